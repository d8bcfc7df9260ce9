"""A server under load: as many streams at a time as asked for, and how long their tokens take.

Works with any server of OpenAI's completions over plain HTTP. Prompts are random token ids.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

import numpy as np

from cla_export.bundle import Progress
from cla_export.errors import BadInput, RunError

_IDS = (3, 250)  # token ids of prompts: every vocabulary has them


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Milliseconds."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Level:
    """One number of streams at a time. A request is good if it kept both limits."""

    concurrency: int
    answered: int
    refused: int  # 429 and 503
    seconds: float
    tokens_per_s: float
    first_token: Percentiles  # from sending the request
    between_tokens: Percentiles
    whole: Percentiles
    good_per_s: float


@dataclass(frozen=True, slots=True)
class ServerBench:
    """What was measured, by what limits."""

    url: str
    model: str
    prompt_tokens: int
    new_tokens: int
    first_token_limit_ms: float
    between_tokens_limit_ms: float
    levels: tuple[Level, ...]

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self) | {"levels": [asdict(level) for level in self.levels]}


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    sent: float
    arrivals: tuple[float, ...]  # of events with text
    tokens: int  # by the usage that the server told; without one, its events


def bench_server(
    url: str,
    *,
    concurrency: Sequence[int] = (1, 4, 16),
    requests: int = 32,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    first_token_limit_ms: float = 1000.0,
    between_tokens_limit_ms: float = 100.0,
    api_key: str | None = None,
    progress: Progress = lambda _what, _done, _of: None,
) -> ServerBench:
    """Load a server, one level after another.

    Args:
        url: such as http://127.0.0.1:8000.
        concurrency: streams at a time, of each level.
        requests: of each level; at least two for each stream run.
        prompt_tokens: of each prompt; no two have a first token in common on purpose.
        new_tokens: of each answer; end tokens are ignored.
        first_token_limit_ms: what a good request may take to its first token.
        between_tokens_limit_ms: what a good request's tokens may be apart, on average.
        api_key: sent along.
        progress: called with (what, levels done, of).

    Raises:
        BadInput: an option is wrong.
        RunError: the server does not answer, or with an error other than being full.
    """
    place = urlsplit(url)
    if place.scheme != "http" or place.hostname is None:
        raise BadInput(f"url is {url!r}; expected one such as http://127.0.0.1:8000")
    numbers = [*concurrency, requests, prompt_tokens, new_tokens]
    if min(numbers) < 1:
        raise BadInput(f"{min(numbers)} streams, requests or tokens; expected at least 1 of each")
    client = _Client(place.hostname, place.port or 80, api_key)
    try:
        model = asyncio.run(client.model())
        levels = []
        for index, streams in enumerate(concurrency):
            progress(f"{streams} streams", index, len(concurrency))
            count = max(requests, 2 * streams)
            bodies = [_body(index * 10_000 + i, prompt_tokens, new_tokens) for i in range(count)]
            began = time.perf_counter()
            answers = asyncio.run(client.run(bodies, streams))
            seconds = time.perf_counter() - began
            limits = (first_token_limit_ms, between_tokens_limit_ms)
            levels.append(_level(streams, answers, seconds, limits))
    except OSError as error:
        raise RunError(f"{url}: the server does not answer ({error})") from error
    return ServerBench(
        url=url,
        model=model,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        first_token_limit_ms=first_token_limit_ms,
        between_tokens_limit_ms=between_tokens_limit_ms,
        levels=tuple(levels),
    )


def _body(seed: int, prompt_tokens: int, new_tokens: int) -> dict[str, object]:
    prompt = np.random.default_rng(seed).integers(*_IDS, prompt_tokens).tolist()
    return {
        "prompt": prompt,
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


class _Client:
    """Just enough of HTTP, to be light beside what it measures."""

    def __init__(self, host: str, port: int, api_key: str | None) -> None:
        self._host, self._port = host, port
        self._key = "" if api_key is None else f"authorization: Bearer {api_key}\r\n"

    async def model(self) -> str:
        status, content = await self._whole("GET", "/v1/models")
        if status != 200:
            raise RunError(f"/v1/models: status {status}: {content.decode(errors='replace')}")
        return str(json.loads(content)["data"][0]["id"])

    async def run(self, bodies: Sequence[dict[str, object]], streams: int) -> list[_Answer]:
        """Answers, `streams` at a time."""
        waiting, answers = list(bodies), []

        async def one_after_another() -> None:
            while waiting:
                answers.append(await self._stream(waiting.pop()))

        await asyncio.gather(*(one_after_another() for _ in range(streams)))
        return answers

    async def _stream(self, body: dict[str, object]) -> _Answer:
        sent = time.perf_counter()
        reader, writer = await self._send("POST", "/v1/completions", json.dumps(body).encode())
        try:
            status = int((await reader.readline()).split()[1])
            arrivals, line, tokens = [], b" ", 0
            while line and b"[DONE]" not in line:
                line = await reader.readline()
                if line.startswith(b'data: {"error"'):
                    raise RunError(f"/v1/completions: {line.decode(errors='replace').strip()}")
                if line.startswith(b"data: {"):
                    now, told = time.perf_counter(), json.loads(line.removeprefix(b"data: "))
                    arrivals += [now] if told["choices"] else []
                    tokens = (told.get("usage") or {}).get("completion_tokens", tokens)
                if status != 200 and line.startswith(b"{"):
                    break
            if status not in (200, 429, 503):
                raise RunError(f"/v1/completions: status {status}: {line.decode(errors='replace')}")
            return _Answer(status, sent, tuple(arrivals), tokens or len(arrivals))
        finally:
            writer.close()

    async def _whole(self, method: str, path: str) -> tuple[int, bytes]:
        reader, writer = await self._send(method, path, b"", close=True)
        try:
            head, _, content = (await reader.read()).partition(b"\r\n\r\n")
            return int(head.split()[1]), content
        finally:
            writer.close()

    async def _send(
        self, method: str, path: str, content: bytes, *, close: bool = False
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        end = "connection: close\r\n" if close else ""
        head = (
            f"{method} {path} HTTP/1.1\r\nhost: {self._host}\r\n{self._key}{end}"
            f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        )
        writer.write(head.encode() + content)
        await writer.drain()
        return reader, writer


def _level(
    streams: int, answers: Sequence[_Answer], seconds: float, limits: tuple[float, float]
) -> Level:
    done = [answer for answer in answers if answer.status == 200 and answer.arrivals]
    if not done:
        raise RunError(f"{streams} streams: none of {len(answers)} requests was answered")
    first = [1e3 * (answer.arrivals[0] - answer.sent) for answer in done]
    gaps = [1e3 * np.diff(answer.arrivals) for answer in done]
    good = [
        early <= limits[0] and (not len(gap) or gap.mean() <= limits[1])
        for early, gap in zip(first, gaps, strict=True)
    ]
    return Level(
        concurrency=streams,
        answered=len(done),
        refused=len(answers) - len(done),
        seconds=seconds,
        tokens_per_s=sum(answer.tokens for answer in done) / seconds,
        first_token=_percentiles(first),
        between_tokens=_percentiles(np.concatenate(gaps).tolist()),
        whole=_percentiles([1e3 * (answer.arrivals[-1] - answer.sent) for answer in done]),
        good_per_s=sum(good) / seconds,
    )


def _percentiles(values: Sequence[float]) -> Percentiles:
    if not len(values):
        return Percentiles(0.0, 0.0, 0.0)
    return Percentiles(*(float(value) for value in np.percentile(values, [50, 95, 99])))
