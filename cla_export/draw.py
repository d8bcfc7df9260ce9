"""Drawing a token from scores: a race, which only the likeliest may win.

Each token takes a time, exponential with its probability as rate, and the fastest is drawn. Where a
runtime rounds logits differently from one batch to the next, that changes the token only if two
finish within the rounding of each other. (A number looked up among cumulated probabilities would
have as many such borders as there are tokens.)

The fastest of many is found as in a relay: the time of a block of tokens is exponential with their
sum as rate, and within the fastest block its tokens race. So a vocabulary of 32,000 takes a few
hundred random numbers and not 32,000.

`top_p` is tested on the winner alone. Where those likelier than it reach `top_p` already, it may
not be drawn, nor may any that is at most as likely: these leave, and the others race again, with
numbers of their own. What is left at the end is drawn by its probability among those that `top_p`
keeps (rejection sampling), and nothing was sorted.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cla_export.engines.executor import Logits
from cla_export.kth_largest import kth_largest

if TYPE_CHECKING:
    from cla_export.sampling import SamplingParams

BLOCK = 256  # tokens
_ROUND = 2**32  # numbers that a round of a race may use
_SHORTEST = np.float32(2**-25)  # of a race's times: none is 0
COLDEST = np.float32(1e-20)  # a lower temperature is as good as 0, and may be 0 in float32
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Scratch:
    """Memory for draws by logits of one vocabulary; `row` [V] is where they are put."""

    def __init__(self, vocab: int) -> None:
        whole = -(-vocab // BLOCK) * BLOCK
        self.blocks, self.left = np.zeros((2, whole // BLOCK, BLOCK), np.float32)
        self.row: Logits = self.blocks.reshape(-1)[:vocab]
        self.kept = np.empty(self.blocks.shape, np.bool_)


def draw(scratch: Scratch, params: "SamplingParams", key: int) -> int:
    """A token by the logits in `scratch.row`, of which the largest is 0, and 64 random bits.

    Filters are those of `SamplingParams`, in its order; the temperature is above 0.
    """
    scores = scratch.row
    if params.temperature != 1:
        scores /= max(np.float32(params.temperature), COLDEST)
    lowest = math.log(params.min_p) if params.min_p > 0 else -math.inf
    if 0 < params.top_k < len(scores):
        lowest = max(lowest, kth_largest(scores, params.top_k))
    if lowest > -math.inf:
        stays = scores >= np.float32(lowest)
        np.exp(scores, out=scores)
        scores *= stays  # several times as fast as an assignment to those that do not stay
    else:
        np.exp(scores, out=scores)
    return _race(scratch, params.top_p, key)


def _race(scratch: Scratch, top_p: float, key: int) -> int:
    """A token by the weights in `scratch.row`, of which the largest is 1."""
    weights, left = scratch.blocks, scratch.left
    sums = weights.sum(1)
    total = float(sums.sum(dtype=np.float64))
    rounds = 0
    while True:
        times = _times(len(sums) + BLOCK, key, rounds)
        block = int((sums / times[: len(sums)]).argmax())
        place = int((weights[block] / times[len(sums) :]).argmax())
        weight, token = float(weights[block, place]), block * BLOCK + place
        if top_p == 1 or weight == 1 or weight > (1 - top_p) * total:
            return token  # those likelier than it have less than top_p, whatever they are
        np.greater(weights, np.float32(weight), out=scratch.kept)
        np.multiply(weights, scratch.kept, out=left)
        sums = left.sum(1)
        if sums.sum(dtype=np.float64) < top_p * total:
            return token
        weights, left = left, weights
        rounds += 1


def _times(count: int, key: int, rounds: int) -> NDArray[np.float32]:
    """Exponential numbers of rate 1, above 0: as many as asked for, by a key and a round.

    The mixer is SplitMix64's (Steele, Lea and Flood 2014).
    """
    first = rounds * _ROUND
    mixed = np.arange(first, first + count, dtype=np.uint64) * _GOLDEN + np.uint64(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    uniform = ((mixed >> np.uint64(40)).astype(np.float32) + np.float32(0.5)) * np.float32(2**-24)
    times: NDArray[np.float32] = np.maximum(-np.log(uniform), _SHORTEST)
    return times
