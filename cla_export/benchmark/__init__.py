"""bench: how fast a bundle decodes and reads prompts, and how near that is to memory's speed.

The time in which memory delivers what a decode step reads is the floor under it (`floor`). A row
says which share of the measured time that is. A model that fits in a processor's cache can beat it.
"""

from cla_export.benchmark.cells import PHASES
from cla_export.benchmark.comparison import NOISE, Comparison, compare
from cla_export.benchmark.measure import bench
from cla_export.benchmark.results import Bench, Row, read_bench

__all__ = ["NOISE", "PHASES", "Bench", "Comparison", "Row", "bench", "compare", "read_bench"]
