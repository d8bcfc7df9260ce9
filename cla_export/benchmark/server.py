"""A server under load, over plain HTTP: any that has OpenAI's completions."""

import asyncio
import json
import time
from collections.abc import Sequence
from datetime import date
from urllib.parse import urlsplit

from cla_export.benchmark.load import Answer, LoadBench, Work, measure_level
from cla_export.bundle import Progress
from cla_export.errors import BadInput, RunError


def bench_server(
    url: str,
    work: Work,
    *,
    api_key: str | None = None,
    progress: Progress = lambda _what, _done, _of: None,
) -> LoadBench:
    """Load a server, one level after another.

    Args:
        url: such as http://127.0.0.1:8000.
        work: what is asked.
        api_key: sent along.
        progress: called with (what, levels done, of).

    Raises:
        BadInput: the address is wrong.
        RunError: the server does not answer, or with an error other than being full.
    """
    place = urlsplit(url)
    if place.scheme != "http" or place.hostname is None:
        raise BadInput(
            f"url is {url!r}; expected one such as http://127.0.0.1:8000, or a bundle's folder"
        )
    client = _Client(place.hostname, place.port or 80, api_key)
    try:
        model = asyncio.run(client.model())
        levels = []
        for index, streams in enumerate(work.concurrency):
            progress(f"{streams} streams", index, len(work.concurrency))
            bodies = [_body(prompt, work.new_tokens) for prompt in work.prompts(index)]
            began = time.perf_counter()
            answers = asyncio.run(client.run(bodies, streams))
            levels.append(measure_level(work, streams, answers, time.perf_counter() - began))
    except OSError as error:
        raise RunError(f"{url}: the server does not answer ({error})") from error
    return LoadBench(
        target=url,
        model=model,
        date=date.today().isoformat(),
        work=work,
        levels=tuple(levels),
    )


def _body(prompt: Sequence[int], new_tokens: int) -> dict[str, object]:
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

    async def run(self, bodies: Sequence[dict[str, object]], streams: int) -> list[Answer]:
        """Answers, `streams` at a time."""
        waiting, answers = list(bodies), []

        async def one_after_another() -> None:
            while waiting:
                answers.append(await self._stream(waiting.pop()))

        await asyncio.gather(*(one_after_another() for _ in range(streams)))
        return answers

    async def _stream(self, body: dict[str, object]) -> Answer:
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
            return Answer(status, sent, tuple(arrivals), tokens or len(arrivals))
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
