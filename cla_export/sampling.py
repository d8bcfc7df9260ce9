"""Choosing the next token from rows of logits.

What is drawn for a row depends on its own logits, parameters and seed alone: never on the rows
beside it, the slot it is in, or what the process did before. Random numbers are counter-based: the
seed and how many tokens were drawn give them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cla_export.draw import Scratch, draw
from cla_export.engines.executor import Executor, Logits
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


Tokens = NDArray[np.int64]
Numbers = NDArray[np.float32]
_NONE = np.empty(0, np.int64), np.empty(0, np.float32)


class Changes(NamedTuple):
    """What is changed of a row's logits before anything is chosen by them, in this order."""

    biased: tuple[Tokens, Numbers]  # tokens, and what is added to their logits
    seen: tuple[Tokens, Numbers]  # tokens to penalise, and how often the output has each
    barred: Tokens  # that are not chosen


class Choice(NamedTuple):
    """What a sequence's next token is chosen by, beside its logits; to be used at once."""

    params: SamplingParams
    key: int = 0  # 64 random bits; 0 where the likeliest is taken
    changes: Changes | None = None


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
        bias = dict.fromkeys((token for token, _ in params.logit_bias), 0.0)
        for token, value in params.logit_bias:
            bias[token] += value
        self._bias = np.array(list(bias), np.int64), np.array(list(bias.values()), np.float32)
        counted = prompt if params.repetition_penalty != 1 else ()
        self._seen = None if params.as_they_are else _Seen(counted)
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

    def next_choice(self) -> Choice:
        """How the next token is to be chosen; the random bits of it are used up."""
        key = self._random.random_raw() if self.params.temperature else 0
        barred = self._barred if self._count < self._barred_for else _NONE[0]
        if self._seen is None and not len(barred):
            return Choice(self.params, key)
        seen = _NONE if self._seen is None else (self._seen.tokens, self._seen.times)
        return Choice(self.params, key, Changes(self._bias, seen, barred))

    def pick(self, logits: Logits, scratch: Scratch | None = None) -> int:
        """The next token for logits [V], all below infinity and one at least finite.

        `scratch` is memory of this vocabulary; None: some is made.
        """
        if self.greedy:
            token = int(logits.argmax())
        else:
            token = pick_by(self.next_choice(), logits, scratch or Scratch(len(logits)))
        self.take(token)
        return token

    def take(self, token: int) -> None:
        """Note a token that was chosen."""
        self._count += 1
        if self._seen is not None:
            self._seen.add(token)


class _Seen:
    """The tokens that prompt and output have, and how often the output has each."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self.tokens = np.fromiter(self._places, np.int64, len(self._places))
        self.times = np.zeros(len(self._places), np.float32)

    def add(self, token: int) -> None:
        """Note one of the output."""
        place = self._places.setdefault(token, len(self.tokens))
        if place == len(self.tokens):
            self.tokens = np.append(self.tokens, np.int64(token))
            self.times = np.append(self.times, np.float32(0))
        self.times[place] += 1


def pick_by(choice: Choice, logits: Logits, scratch: Scratch) -> int:
    """A token by logits [V], as `Sampler.pick`; `scratch` is changed."""
    params = choice.params
    if choice.changes is not None:
        scratch.row[:] = logits
        _adjust(scratch.row, params, choice.changes)
        logits = scratch.row
    likeliest = int(logits.argmax())
    if params.temperature == 0:
        return likeliest
    np.subtract(logits, logits[likeliest], out=scratch.row)
    return draw(scratch, params, choice.key)


def _adjust(scores: Logits, params: SamplingParams, changes: Changes) -> None:
    """Change scores [V]."""
    tokens, bias = changes.biased
    scores[tokens] += bias
    tokens, times = changes.seen
    found = scores[tokens]
    found *= np.where(
        found > 0, np.float32(1 / params.repetition_penalty), np.float32(params.repetition_penalty)
    )
    found -= np.float32(params.frequency_penalty) * times
    found[times > 0] -= np.float32(params.presence_penalty)
    scores[tokens] = found
    scores[changes.barred] = -np.inf


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


def decode_and_choose(
    executor: Executor, slot: int, token: int, length: int, sampler: Sampler
) -> int | None:
    """One step of one slot, and the token after it: chosen where the logits are, if that can be."""
    if executor.chooser is None:
        return choose(executor.decode([slot], [token], [length]), [sampler])[0]
    executor.chooser.begin_decode([slot], [token], [length], [sampler.next_choice()])
    (chosen,) = executor.chooser.end_decode()
    if chosen is not None:
        sampler.take(chosen)
    return chosen
