"""Choosing the next token from rows of logits.

What is drawn for a row depends on its own logits, parameters and seed alone: never on the rows
beside it, the slot it is in, or what the process did before. Random numbers are counter-based: the
seed and how many tokens were drawn give them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cla_export.draw import Scratch, draw
from cla_export.engines.executor import Logits
from cla_export.errors import BadInput

_SEEDS = 2**64
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
        self._bias = dict.fromkeys((token for token, _ in params.logit_bias), 0.0)
        for token, bias in params.logit_bias:
            self._bias[token] += bias
        self._seen = None if params.as_they_are else _Seen(prompt)
        self._barred = np.array(barred, np.int64)
        self._barred_for = barred_for
        self._count = 0
        key = np.random.SeedSequence([params.seed % _SEEDS, choice])
        self._random = np.random.Philox(key)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token by the model's own logits is taken next."""
        barred = self._count < self._barred_for
        return self.params.temperature == 0 and self.params.as_they_are and not barred

    def pick(self, logits: Logits, scratch: Scratch | None = None) -> int:
        """The next token for logits [V], all below infinity and one at least finite.

        `scratch` is memory of this vocabulary; None: some is made.
        """
        if self.greedy:
            token = int(logits.argmax())
        else:
            token = self._pick(logits, scratch or Scratch(len(logits)))
        self.take(token)
        return token

    def take(self, token: int) -> None:
        """Note a token that was chosen."""
        self._count += 1
        if self._seen is not None:
            self._seen.add(token)

    def _pick(self, logits: Logits, scratch: Scratch) -> int:
        if not self.params.as_they_are or self._count < self._barred_for:
            scratch.row[:] = logits
            self._adjust(scratch.row)
            logits = scratch.row
        likeliest = int(logits.argmax())
        if self.params.temperature == 0:
            return likeliest
        np.subtract(logits, logits[likeliest], out=scratch.row)
        return draw(scratch, self.params, self._random.random_raw())

    def _adjust(self, scores: Logits) -> None:
        for token, bias in self._bias.items():
            scores[token] += bias
        if self._seen is not None:
            self._seen.penalize(scores, self.params)
        if self._count < self._barred_for:
            scores[self._barred] = -np.inf


class _Seen:
    """The tokens that prompt and output have, and how often the output has each."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._tokens = np.fromiter(self._places, np.int64, len(self._places))
        self._times = np.zeros(len(self._places), np.float32)

    def add(self, token: int) -> None:
        """Note one of the output."""
        place = self._places.setdefault(token, len(self._tokens))
        if place == len(self._tokens):
            self._tokens = np.append(self._tokens, np.int64(token))
            self._times = np.append(self._times, np.float32(0))
        self._times[place] += 1

    def penalize(self, scores: Logits, params: SamplingParams) -> None:
        """Change scores [V] by the penalties."""
        found = scores[self._tokens]
        found *= np.where(
            found > 0,
            np.float32(1 / params.repetition_penalty),
            np.float32(params.repetition_penalty),
        )
        found -= np.float32(params.frequency_penalty) * self._times
        found[self._times > 0] -= np.float32(params.presence_penalty)
        scores[self._tokens] = found


def choose(logits: Logits, samplers: Sequence[Sampler]) -> list[int | None]:
    """The next token of each row of logits [B, V]; None for a row that is not numbers.

    A row with NaN or infinity is noticed by its largest value: argmax takes NaN for the largest.
    """
    likeliest = logits.argmax(1)
    largest = logits[np.arange(len(samplers)), likeliest]
    tokens: list[int | None] = []
    scratch = None
    for row, sampler in enumerate(samplers):
        if not math.isfinite(largest[row]):
            tokens.append(None)
        elif sampler.greedy:
            tokens.append(int(likeliest[row]))
            sampler.take(int(likeliest[row]))
        else:
            scratch = scratch or Scratch(logits.shape[1])
            tokens.append(sampler.pick(logits[row], scratch))
    return tokens
