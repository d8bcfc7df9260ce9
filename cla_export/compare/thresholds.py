"""Every tolerance of the gate, in one table, each with its reason.

The reference is PyTorch in float32 on the checkpoint's own values. An element of a case's output
may be off by `floor + factor * noise`, where noise is the largest error that PyTorch itself makes
on that output when it runs in the bundle's dtype: what rounding costs is measured on the model at
hand, not guessed from its depth.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Threshold:
    """Tolerances for bundles of one dtype: `floor` absolute, `factor` times PyTorch's own noise."""

    floor: float
    factor: float
    perplexity: float  # relative difference
    reason: str


THRESHOLDS = {
    "float32": Threshold(
        floor=1e-4,
        factor=0.0,
        perplexity=1e-4,
        reason="same arithmetic, other order of summation: measured errors stay under 3e-5",
    ),
    "float16": Threshold(
        floor=1e-3,
        factor=4.0,
        perplexity=1e-2,
        reason="two half-precision runs round at different places; 4 covers a maximum over 1e6",
    ),
    "bfloat16": Threshold(
        floor=8e-3,
        factor=4.0,
        perplexity=8e-2,
        reason="as float16, with 8 bits instead of 11",
    ),
}
GREEDY_TOKENS = 64  # free-running tokens compared; a disagreement where the reference's two best
# logits lie closer than twice the logit tolerance is a near-tie, which no rounding can decide
