"""cla-export: deploy decoders with cross-layer KV sharing.

The functions here are the command line's commands, and load PyTorch, ONNX Runtime and the rest only
when called:

    inspect(path)  export(source, dest)  parity(bundle)  build(bundle)  load(bundle)
    plan(source, ...)  bench(bundle)  doctor()  rewrite_graph(source, dest)
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cla_export.benchmark import Bench
    from cla_export.bundle import Bundle
    from cla_export.compare.report import ParityReport
    from cla_export.engines.tensorrt_build import Built
    from cla_export.environment import Diagnosis
    from cla_export.generation import LoadedModel
    from cla_export.inspection import Inspection
    from cla_export.planning import Plan
    from cla_export.stateless_graph import RewrittenGraph

__version__ = "0.1.0"
__all__ = [
    "bench",
    "build",
    "demo_checkpoint",
    "doctor",
    "export",
    "inspect",
    "load",
    "parity",
    "plan",
    "rewrite_graph",
]

# Each forwards to the module that does the work, and documents the options there.
# ruff: noqa: ANN401


def inspect(path: Path | str, **options: Any) -> "Inspection":
    """Describe a config, a model folder, an .onnx file or a bundle. See `inspection.inspect`."""
    from cla_export import inspection

    return inspection.inspect(path, **options)


def export(source: Path | str, dest: Path | str, **options: Any) -> "Bundle":
    """Export a model folder to a bundle. See `exporter.export`."""
    from cla_export import exporter

    return exporter.export(source, dest, **options)


def rewrite_graph(source: Path | str, dest: Path | str, **options: Any) -> "RewrittenGraph":
    """Give a stateless ONNX graph one cache a group. See `stateless_graph.rewrite_graph`."""
    from cla_export import stateless_graph

    return stateless_graph.rewrite_graph(source, dest, **options)


def parity(
    bundle: "Bundle | Path | str", reference: Path | str | None = None, **options: Any
) -> "ParityReport":
    """Compare a bundle with its PyTorch model. See `compare.gate.compare_bundle`."""
    from cla_export.compare import gate

    return gate.compare_bundle(bundle, reference, **options)


def build(bundle: "Bundle | Path | str", **options: Any) -> "Built":
    """Build a TensorRT engine from a bundle. See `engines.tensorrt_build.build`."""
    from cla_export.engines import tensorrt_build

    return tensorrt_build.build(bundle, **options)


def load(bundle: "Bundle | Path | str", **options: Any) -> "LoadedModel":
    """Open a bundle for running. See `generation.load`."""
    from cla_export import generation

    return generation.load(bundle, **options)


def plan(source: Path | str, **options: Any) -> "Plan":
    """Which layouts fit a memory budget, and how many slots. See `planning.plan`."""
    from cla_export import planning

    return planning.plan(source, **options)


def bench(bundle: "Bundle | Path | str", **options: Any) -> "Bench":
    """How fast a bundle decodes and reads prompts. See `benchmark.bench`."""
    from cla_export import benchmark

    return benchmark.bench(bundle, **options)


def doctor() -> "Diagnosis":
    """What is installed, and what each target would need. See `environment.doctor`."""
    from cla_export import environment

    return environment.doctor()


def demo_checkpoint() -> Path:
    """The model folder that ships with the package: a small trained MQA-CLA2 decoder."""
    return Path(__file__).parent / "data" / "demo"
