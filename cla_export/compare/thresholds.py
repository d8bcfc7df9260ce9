"""Every tolerance of the gate, derived by one rule, in one table.

The exact result is PyTorch in float64 on the values that the bundle's weights stand for. The
yardstick is how far PyTorch itself is off when it computes in the bundle's arithmetic: what the
dtype, the lengths of the sums and the depth of the network cost is measured on the model at hand,
for every output, not guessed; three times, with sums in other orders, and the largest counts, since
at an ill-conditioned token a single draw may be small by luck. An output passes if

    its largest error  <=  largest * the yardstick's largest  +  units * u * largest magnitude
    its mean error     <=  mean    * the yardstick's mean     +  u * mean magnitude

with u the unit roundoff of the dtype. The second terms are the rounding of the result itself,
which no computation can beat: they matter only where PyTorch happens to be exact. The mean has a
bound of its own because a maximum over many elements is loose for an error that is small and
everywhere. Attention looked at by itself, and all outputs behind long contexts, have a third term,
4 * 2^-24 * sqrt(keys) * magnitude: PyTorch adds up long rows of keys in blocks, and a runtime that
adds them one by one is right too. Attention by itself has a fourth, 2 * u * its sensitivity to its
scores (probe.py): PyTorch keeps scores in float32, and a runtime that rounds them to the dtype,
once scaled and once not, is right too. Nothing here depends on the size of a model's weights, sums
or logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[np.floating]
_SUM = 4 * 2.0**-24  # of float32, in which all runtimes add up, by the root of how many are added
_ROUNDINGS = 2  # of a score


@dataclass(frozen=True, slots=True)
class Threshold:
    """Tolerances for bundles of one arithmetic."""

    unit: float  # unit roundoff: half the distance from 1 to the next number
    largest: float
    units: float
    mean: float
    perplexity: float  # relative difference
    reason: str

    def of(
        self, exact: _Array, natives: Sequence[_Array], keys: int = 0, scores: float = 0.0
    ) -> float:
        """Allowed absolute error of any element; `natives` are PyTorch in the bundle's arithmetic.

        `keys` is how many each query may attend to, where that can be many, and `scores` how far
        attention moves where each score is off by its own size.
        """
        own = max(float(np.abs(native - exact).max()) for native in natives)
        rounding = self.units * self.unit + _SUM * keys**0.5
        allowed: float = self.largest * own + rounding * float(np.abs(exact).max())
        return allowed + _ROUNDINGS * self.unit * scores

    def mean_of(self, exact: _Array, native: _Array, keys: int = 0) -> float:
        """Allowed mean absolute error, by one native result: a mean has no luck."""
        own = float(np.abs(native - exact).mean())
        rounding = self.unit + _SUM * keys**0.5
        allowed: float = self.mean * own + rounding * float(np.abs(exact).mean())
        return allowed


THRESHOLDS = {
    "float32": Threshold(
        unit=2.0**-24,
        largest=6.0,
        units=8.0,
        mean=2.5,
        perplexity=1e-4,
        reason="same operations, sums in another order: over 200 right bundles no largest error "
        "took more than 66 % of what is allowed, no mean more than 68 %",
    ),
    "float16": Threshold(
        unit=2.0**-11,
        largest=6.0,
        units=4.0,
        mean=2.0,
        perplexity=1e-2,
        reason="as float32, and by its factor: at an ill-conditioned token luck is the same in any "
        "dtype. Over 100 right bundles no largest error took more than 57 % of what is allowed",
    ),
    "bfloat16": Threshold(
        unit=2.0**-8,
        largest=6.0,
        units=4.0,
        mean=2.0,
        perplexity=8e-2,
        reason="as float16, with 8 bits instead of 11",
    ),
    "int8 weights": Threshold(
        unit=2.0**-24,
        largest=4.0,
        units=8.0,
        mean=2.0,
        perplexity=1e-2,
        reason="weights count as what they stand for, so only activations, rounded to int8 block "
        "by block on both sides, can differ; both round at the same places, in other directions",
    ),
    "int4 weights": Threshold(
        unit=2.0**-24,
        largest=4.0,
        units=8.0,
        mean=2.0,
        perplexity=1e-2,
        reason="as int8 weights: activations are rounded alike",
    ),
}
INT8_CACHE = "int8 cache"
THRESHOLDS[INT8_CACHE] = replace(
    THRESHOLDS["float32"],
    largest=2.0,
    mean=1.5,
    perplexity=1e-2,
    reason="the yardstick rounds keys and values to the bundle's own steps, and both round nearly "
    "all of them alike: luck is in the few that they do not. Inside the layers float32's row "
    "applies, since attention is recomputed from what the caches hold",
)
THRESHOLDS |= {
    f"{weights}, {INT8_CACHE}": replace(
        THRESHOLDS[weights], reason=f"as {weights}, whose roundings are the larger ones"
    )
    for weights in ("int8 weights", "int4 weights")
}
GREEDY_TOKENS = 64  # free-running tokens compared; a disagreement where the reference's two best
# logits lie closer than twice the logit tolerance is a near-tie, which no rounding can decide


def thresholds_of(
    dtype: str, weights: str | None = None, cache: str | None = None
) -> tuple[str, Threshold, Threshold]:
    """The table's row for a bundle, by its name, and the row for what its layers make.

    `weights` is the type of quantised ones, if any, and `cache` that of caches, which makes no
    difference inside the layers, where caches are given.
    """
    name = dtype if weights is None or dtype != "float32" else f"{weights} weights"
    inside = THRESHOLDS[name]
    if cache == "int8":
        name = INT8_CACHE if weights is None else f"{name}, {INT8_CACHE}"
    return name, THRESHOLDS[name], inside
