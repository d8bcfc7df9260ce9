"""Choosing the next token from rows of logits.

What is drawn for a row depends on its own logits, parameters and seed alone: never on the rows
beside it, the slot it is in, or what the process did before. Numbers are counter-based: the seed,
how many tokens were made, and the token's own id give them.

A draw is a race: each token takes a time, exponential with its probability as rate, and the fastest
is taken. Where a runtime rounds logits differently from one batch to the next, that changes a token
only if two finish within the rounding of each other. (A number looked up among cumulated
probabilities would have as many such borders as there are tokens.)
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cla_export.engines.executor import Logits
from cla_export.errors import BadInput

_SEEDS = 2**64
_SHORTEST = np.float32(2**-25)  # of a race's times: none is 0
_BIAS = 100.0  # largest |logit bias|, as in OpenAI's API


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen; greedy as it stands. BadInput, naming the field, if one is wrong.

    In this order: `logit_bias` is added; `repetition_penalty` divides positive and multiplies
    negative logits of tokens that prompt or output have (Keskar et al. 2019); `presence_penalty`
    and, for each time, `frequency_penalty` are subtracted for tokens that the output has; logits
    are divided by `temperature` (0: the likeliest is taken); then only tokens stay that are among
    the `top_k` likeliest (0: all), at least `min_p` times as likely as the likeliest, and in the
    smallest set of likeliest ones whose probabilities reach `top_p`. Ties at a border stay.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        expected = {
            "temperature": (0 <= self.temperature < math.inf, "0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0, at most 1"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "min_p": (0 <= self.min_p <= 1, "0 to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "more than 0"),
            "presence_penalty": (math.isfinite(self.presence_penalty), "a finite number"),
            "frequency_penalty": (math.isfinite(self.frequency_penalty), "a finite number"),
        }
        for name, (good, wanted) in expected.items():
            if not good:
                raise BadInput(f"{name} is {getattr(self, name)}; expected {wanted}")
        for token, bias in self.logit_bias:
            if token < 0 or not abs(bias) <= _BIAS:
                raise BadInput(
                    f"logit_bias of token {token} is {bias}; expected a token id with a number "
                    f"from {-_BIAS:.0f} to {_BIAS:.0f}"
                )

    @property
    def as_they_are(self) -> bool:
        """Whether the logits are not changed before the temperature."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties == (1.0, 0.0, 0.0) and not self.logit_bias


class Sampler:
    """Chooses the tokens of one sequence.

    Args:
        params: how.
        prompt: what comes before, for `repetition_penalty`.
        choice: number of this sequence among several with the same seed.
        barred: tokens that are not chosen among the first `barred_for`.
        barred_for: tokens.
    """

    def __init__(
        self,
        params: SamplingParams | None = None,
        prompt: Sequence[int] = (),
        *,
        choice: int = 0,
        barred: Sequence[int] = (),
        barred_for: int = 0,
    ) -> None:
        self.params = params = params or SamplingParams()
        self._prompt = np.unique(np.array(prompt, np.int64))
        self._barred = np.array(barred, np.int64)
        self._barred_for = barred_for
        self._made: Counter[int] = Counter()
        self._count = 0
        key = np.random.SeedSequence([params.seed % _SEEDS, choice])
        self._generator = np.random.Generator(np.random.Philox(key))

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token by the model's own logits is taken next."""
        barred = self._count < self._barred_for
        return self.params.temperature == 0 and self.params.as_they_are and not barred

    def pick(self, logits: Logits) -> int:
        """The next token for logits [V], all below infinity and one at least finite."""
        token = int(logits.argmax()) if self.greedy else self._pick(logits)
        self.take(token)
        return token

    def take(self, token: int) -> None:
        """Note a token that was chosen."""
        self._count += 1
        if not self.params.as_they_are:
            self._made[token] += 1

    def _pick(self, logits: Logits) -> int:
        scores = logits.astype(np.float32)
        self._adjust(scores)
        if self.params.temperature == 0:
            return int(scores.argmax())
        scores -= scores.max()
        scores /= self.params.temperature
        ids, weights = _kept(scores, self.params)
        key = self._generator.integers(_SEEDS, dtype=np.uint64, endpoint=False)
        return int(ids[(weights / _times(ids, key)).argmax()])

    def _adjust(self, scores: NDArray[np.float32]) -> None:
        params = self.params
        for token, bias in params.logit_bias:
            scores[token] += bias
        if not params.as_they_are:
            made = np.fromiter(self._made.keys(), np.int64, len(self._made))
            counts = np.fromiter(self._made.values(), np.float32, len(self._made))
            seen = np.union1d(self._prompt, made)
            factor = np.where(
                scores[seen] > 0, 1 / params.repetition_penalty, params.repetition_penalty
            )
            scores[seen] *= factor.astype(np.float32)
            scores[made] -= params.presence_penalty + params.frequency_penalty * counts
        if self._count < self._barred_for:
            scores[self._barred] = -np.inf


def choose(logits: Logits, samplers: Sequence[Sampler]) -> list[int | None]:
    """The next token of each row of logits [B, V]; None for a row that is not numbers.

    A row with NaN or infinity is noticed by its largest value: argmax takes NaN for the largest.
    """
    likeliest = logits.argmax(1)
    largest = logits[np.arange(len(samplers)), likeliest]
    tokens: list[int | None] = []
    for row, sampler in enumerate(samplers):
        if not math.isfinite(largest[row]):
            tokens.append(None)
        elif sampler.greedy:
            tokens.append(int(likeliest[row]))
            sampler.take(int(likeliest[row]))
        else:
            tokens.append(sampler.pick(logits[row]))
    return tokens


def _kept(
    scores: NDArray[np.float32], params: SamplingParams
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Tokens that may be drawn, and their weights, by scores [V] of which the largest is 0."""
    lowest = -math.inf
    if 0 < params.top_k < len(scores):
        lowest = float(np.partition(scores, -params.top_k)[-params.top_k])
    if params.min_p > 0:
        lowest = max(lowest, math.log(params.min_p))
    weights = np.exp(scores)
    if lowest > -math.inf:
        weights[scores < lowest] = 0
    if params.top_p < 1:
        total = float(weights.sum())
        # Those at most this likely have 1 - top_p together at most: the others reach top_p.
        few = total * (1 - params.top_p) / len(weights)
        ids = np.flatnonzero(weights > few)
        weights = weights[ids]
        inside = np.flatnonzero(weights >= _border(weights, params.top_p * total))
        return ids[inside], weights[inside]
    ids = np.flatnonzero(weights)
    return ids, weights[ids]


def _border(weights: NDArray[np.float32], mass: float) -> np.float32:
    """The least of the largest weights that have this mass together; weights are positive.

    Only weights whose upper bits are the border's are sorted: bits of positive floats rise with
    them.
    """
    bins = weights.view(np.int32) >> 20  # eight to an octave
    falling_mass = np.cumsum(np.bincount(bins, weights)[::-1])
    reached = int(np.searchsorted(falling_mass, mass))
    if reached == len(falling_mass):  # by rounding alone
        return np.float32(weights.min())
    left = mass - (falling_mass[reached - 1] if reached else 0.0)
    falling = -np.sort(-weights[bins == len(falling_mass) - 1 - reached])
    last = int(np.searchsorted(np.cumsum(falling, dtype=np.float64), left))
    return np.float32(falling[min(last, len(falling) - 1)])


def _times(ids: NDArray[np.int64], key: np.uint64) -> NDArray[np.float32]:
    """Exponential numbers of rate 1, above 0, one for each token id and key.

    The mixer is SplitMix64's (Steele, Lea and Flood 2014).
    """
    mixed = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    uniform = ((mixed >> np.uint64(40)).astype(np.float32) + np.float32(0.5)) * np.float32(2**-24)
    times: NDArray[np.float32] = np.maximum(-np.log(uniform), _SHORTEST)
    return times
