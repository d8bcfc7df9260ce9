"""Every tolerance of the gate, in one table, each with its reason.

The reference is PyTorch in float32 on the checkpoint's own values. An element of a case's output
may be off by `scale * rms(reference) + factor * noise`, where noise is the largest error that
PyTorch itself makes on that output when it runs in the bundle's dtype: what half precision costs is
measured on the model at hand, not guessed from its depth. Both terms grow and shrink with the
values, so a model with small logits is held to as many digits as one with large logits.

A maximum over many elements is loose for an error that is small and everywhere, so the mean error
has a bound of its own, of the same form: right float16 bundles were measured at 0.64 to 1.05 of
PyTorch's own mean error.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Threshold:
    """Tolerances for bundles of one dtype."""

    scale: float  # of the reference's root mean square
    factor: float  # of PyTorch's own error in that dtype
    mean_scale: float  # both again, for the mean error
    mean_factor: float
    perplexity: float  # relative difference
    reason: str

    def of(
        self, reference: NDArray[np.float32], rounded: NDArray[np.float32] | None = None
    ) -> float:
        """Allowed absolute error; `rounded` is the reference computed in the bundle's dtype."""
        allowed = self.scale * float(np.sqrt(np.mean(np.square(reference, dtype=np.float64))))
        if rounded is not None:
            allowed += self.factor * float(np.abs(rounded - reference).max())
        return allowed

    def mean_of(
        self, reference: NDArray[np.float32], rounded: NDArray[np.float32] | None = None
    ) -> float:
        """Allowed mean absolute error, likewise."""
        allowed = self.mean_scale * float(np.sqrt(np.mean(np.square(reference, dtype=np.float64))))
        if rounded is not None:
            allowed += self.mean_factor * float(np.abs(rounded - reference).mean(dtype=np.float64))
        return allowed


THRESHOLDS = {
    "float32": Threshold(
        scale=5e-5,
        factor=0.0,
        mean_scale=5e-6,
        mean_factor=0.0,
        perplexity=1e-4,
        reason="same arithmetic, other order of summation: measured errors stay under 1e-5 rms",
    ),
    "float16": Threshold(
        scale=1e-3,
        factor=4.0,
        mean_scale=1e-5,
        mean_factor=1.5,
        perplexity=1e-2,
        reason="two half-precision runs round at different places; 4 covers a maximum over 1e6",
    ),
    "bfloat16": Threshold(
        scale=8e-3,
        factor=4.0,
        mean_scale=8e-5,
        mean_factor=1.5,
        perplexity=8e-2,
        reason="as float16, with 8 bits instead of 11",
    ),
}
GREEDY_TOKENS = 64  # free-running tokens compared; a disagreement where the reference's two best
# logits lie closer than twice the logit tolerance is a near-tie, which no rounding can decide
