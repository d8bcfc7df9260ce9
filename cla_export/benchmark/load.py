"""A load of streams on whatever generates, level by level, and what it is measured by.

Metrics have the names and meanings that aiperf gives them, so that tables can be laid side by side.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cla_export.errors import BadInput, RunError

_IDS = (3, 250)  # token ids of prompts: every vocabulary has them


@dataclass(frozen=True, slots=True)
class Work:
    """What is asked, and what is expected. BadInput if it cannot be.

    Args:
        concurrency: streams at a time, of each level.
        requests: of each level; at least two for each stream run.
        prompt_tokens: of each prompt; no two have a first token in common on purpose.
        new_tokens: of each answer; end tokens are ignored.
        first_token_limit_ms: what a good request may take to its first token.
        between_tokens_limit_ms: what a good request's tokens may be apart, on average.
    """

    concurrency: tuple[int, ...] = (1, 4, 16)
    requests: int = 32
    prompt_tokens: int = 64
    new_tokens: int = 64
    first_token_limit_ms: float = 1000.0
    between_tokens_limit_ms: float = 100.0

    def __post_init__(self) -> None:
        numbers = [*self.concurrency, self.requests, self.prompt_tokens, self.new_tokens]
        if not self.concurrency or min(numbers) < 1:
            raise BadInput(
                f"{list(self.concurrency)} streams, {self.requests} requests, {self.prompt_tokens} "
                f"and {self.new_tokens} tokens; expected at least 1 of each"
            )

    def prompts(self, level: int) -> Iterator[list[int]]:
        """The prompts of one level."""
        for index in range(max(self.requests, 2 * self.concurrency[level])):
            random = np.random.default_rng(level * 10_000 + index)
            yield random.integers(*_IDS, self.prompt_tokens).tolist()


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's, in seconds of a clock; `arrivals` are of events with text."""

    status: int
    sent: float
    arrivals: tuple[float, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class Spread:
    """Milliseconds."""

    avg: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Level:
    """One number of streams at a time. `goodput` counts requests that kept both limits."""

    concurrency: int
    request_count: int  # answered
    refused: int  # 429 and 503
    benchmark_duration: float  # s
    output_token_throughput: float  # tokens/s
    request_throughput: float  # requests/s
    goodput: float  # requests/s
    time_to_first_token: Spread  # from sending the request
    inter_token_latency: Spread  # a request's mean from its first token to its last
    inter_chunk_latency: Spread  # from one event with text to the next
    request_latency: Spread


@dataclass(frozen=True, slots=True)
class LoadBench:
    """What was measured, of what, on which day."""

    target: str  # an address, or a bundle's folder
    model: str
    date: str
    work: Work
    levels: tuple[Level, ...]

    def to_json(self) -> dict[str, object]:
        """Plain data; `from_json` reads it back."""
        return {
            **asdict(self),
            "work": {**asdict(self.work), "concurrency": list(self.work.concurrency)},
            "levels": [asdict(level) for level in self.levels],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "LoadBench":
        """Read what `to_json` wrote; TypeError or KeyError for anything else."""
        work = content["work"]
        return cls(
            **{
                **content,
                "work": Work(**{**work, "concurrency": tuple(work["concurrency"])}),
                "levels": tuple(_level(level) for level in content["levels"]),
            }
        )


def _level(content: Mapping[str, Any]) -> Level:
    spreads = {name: Spread(**of) for name, of in content.items() if isinstance(of, dict)}
    return Level(**{**content, **spreads})


def flat(level: Level) -> dict[str, float]:
    """A level as one row of a table: each spread is a column for each of its figures."""
    row: dict[str, float] = {}
    for name, of in asdict(level).items():
        parts = of if isinstance(of, dict) else {"": of}
        row |= {f"{name}_{part}".rstrip("_"): value for part, value in parts.items()}
    return row


def measure_level(work: Work, streams: int, answers: Sequence[Answer], seconds: float) -> Level:
    """A level's figures; RunError if nothing was answered."""
    done = [answer for answer in answers if answer.status == 200 and answer.arrivals]
    if not done:
        raise RunError(f"{streams} streams: none of {len(answers)} requests was answered")
    first = [1e3 * (answer.arrivals[0] - answer.sent) for answer in done]
    gaps = [1e3 * np.diff(answer.arrivals) for answer in done]
    between = [
        1e3 * (answer.arrivals[-1] - answer.arrivals[0]) / max(answer.tokens - 1, 1)
        for answer in done
    ]
    good = [
        early <= work.first_token_limit_ms and apart <= work.between_tokens_limit_ms
        for early, apart in zip(first, between, strict=True)
    ]
    return Level(
        concurrency=streams,
        request_count=len(done),
        refused=len(answers) - len(done),
        benchmark_duration=seconds,
        output_token_throughput=sum(answer.tokens for answer in done) / seconds,
        request_throughput=len(done) / seconds,
        goodput=sum(good) / seconds,
        time_to_first_token=_spread(first),
        inter_token_latency=_spread(between),
        inter_chunk_latency=_spread(np.concatenate(gaps).tolist()),
        request_latency=_spread([1e3 * (answer.arrivals[-1] - answer.sent) for answer in done]),
    )


def _spread(values: Sequence[float]) -> Spread:
    if not len(values):
        return Spread(0.0, 0.0, 0.0, 0.0)
    return Spread(float(np.mean(values)), *map(float, np.percentile(values, [50, 95, 99])))


def read_load(path: Path) -> LoadBench:
    """A stored result; BadInput for anything else."""
    try:
        return LoadBench.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise BadInput(
            f"{path}: no such file; expected the JSON of an earlier run, as `cla-export "
            "bench-server TARGET --output FILE` writes it"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: not a stored load ({error!r})") from error
