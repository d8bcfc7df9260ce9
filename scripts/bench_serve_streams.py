"""What a streamed token costs beside the model: `serve` over an executor whose step is a sleep.

As on a GPU, a step takes no processor time, and its tokens are chosen elsewhere. What is left is
the engine's thread and the event loop, which share one interpreter; the client is a process of its
own on the same cores. For each number of streams: processor time of both threads for each token,
which other programs hardly change; tokens per second, of those that the step would allow; and
events that the client got in one read, which is more than one where the server is behind.

The script runs itself as the server: `bench_serve_streams.py --serve STEP_MS ARGUMENT...`.
"""

import argparse
import json
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from provenance import heading, provenance
from thread_time import thread_seconds

import cla_export
from cla_export import cli
from cla_export.engines.executor import Array, Cache, Executor, Logits, PooledExecutor
from cla_export.environment import cpus
from cla_export.sampling import Choice
from cla_export.serve import server

PROMPT, NEW = 3, 96  # tokens of each request


class Sleeping(PooledExecutor):
    """Executor and chooser of made-up tokens, each `seconds` after its step was begun."""

    def __init__(self, like: Executor, seconds: float) -> None:
        super().__init__(like.layout, like.capacity, like.slots, like.vocab_size)
        self.backend = like.backend
        self._seconds = seconds
        self._ready = 0.0  # when the step that was begun last is over
        self._rows = self._step_number = 0

    @property
    def chooser(self) -> "Sleeping":
        return self

    def begin_decode(
        self,
        _slots: Sequence[int],
        tokens: Sequence[int],
        _lengths: Sequence[int],
        choices: Iterable[Choice],
    ) -> None:
        list(choices)  # what a device would be sent
        self._ready = max(self._ready, time.perf_counter()) + self._seconds
        self._rows = len(tokens)

    def end_decode(self) -> list[int | None]:
        time.sleep(max(0.0, self._ready - time.perf_counter()))
        self._step_number += 1
        base, size = 7919 * self._step_number, self.vocab_size // 2
        return [self.vocab_size // 4 + (base + 31 * row) % size for row in range(self._rows)]

    def prefill_and_choose(
        self, _first: int, rows: Sequence[Any], _starts: Sequence[int], choices: Iterable[Choice]
    ) -> list[int | None]:
        list(choices)
        time.sleep(self._seconds)
        return [self.vocab_size // 4] * len(rows)

    def logits_of(self, row: int) -> Logits:
        raise NotImplementedError(f"row {row}: no request of this benchmark asks for logprobs")

    def read(self, group: int, slot: int) -> Cache:  # noqa: ARG002
        return np.empty((1, 0, 1)), np.empty((1, 0, 1))

    def write(self, group: int, slot: int, keys: Array, values: Array) -> None:
        pass

    def _run(self, _first: int, input_ids: NDArray[np.int64], *_: Any) -> Logits:  # noqa: ANN401
        time.sleep(self._seconds)
        return np.zeros((len(input_ids), 1, self.vocab_size), np.float32)


def serve(step_ms: float, arguments: Sequence[str]) -> None:
    """`cla-export serve`, whose executor sleeps."""
    opens = server.open_executor

    def open_sleeping(*given: Any, **options: Any) -> Executor:  # noqa: ANN401
        return Sleeping(opens(*given, **options), step_ms * 1e-3)

    server.open_executor = open_sleeping
    sys.argv = ["cla-export", "serve", *arguments]
    cli.main()


@dataclass(frozen=True, slots=True)
class Row:
    """One number of streams. Medians of rounds."""

    streams: int
    loop_us: float  # processor time of the event loop's thread for each token
    engine_us: float  # of the engine's
    tokens_per_s: float
    events_per_read: float


def measure(bundle: Path, streams: int, step_ms: float, rounds: int) -> Row:
    options = ["--port", 0, "--slots", streams, "--max-len", PROMPT + NEW, "--threads", 1]
    command = [sys.executable, __file__, "--serve", step_ms, bundle, *options]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = next(line.split()[-1] for line in process.stderr if line.startswith("serving "))
        host, port = url.removeprefix("http://").split(":")
        found = []
        for _ in range(1 + rounds):
            before, began = thread_seconds(process.pid), time.perf_counter()
            reads = read_streams((host, int(port)), streams)
            seconds, after = time.perf_counter() - began, thread_seconds(process.pid)
            used = {thread: after[thread] - before.get(thread, 0.0) for thread in after}
            loop = used.pop(process.pid)
            count = streams * NEW
            found.append((loop / count, max(used.values()) / count, count / seconds, count / reads))
    finally:
        process.terminate()
        process.wait()
    loop, engine, rate, events = (median(column) for column in zip(*found[1:], strict=True))
    return Row(streams, loop * 1e6, engine * 1e6, rate, events)


def read_streams(address: tuple[str, int], streams: int) -> int:
    """Read as many streams to their ends; how often something was read."""
    tails, reads = {}, 0
    with selectors.DefaultSelector() as ready:
        for index in range(streams):
            client = socket.create_connection(address)
            client.sendall(request(index))
            ready.register(client, selectors.EVENT_READ)
            tails[client] = b""
        while tails:
            for key, _ in ready.select():
                client: Any = key.fileobj
                piece = client.recv(65_536)
                assert piece, tails[client]
                reads += 1
                tail = tails[client] + piece
                tails[client] = tail[-16:]
                if b"[DONE]" in tail:
                    ready.unregister(client)
                    client.close()
                    del tails[client]
    return reads


def request(index: int) -> bytes:
    body = {
        "prompt": [5, 6, 7 + index],
        "max_tokens": NEW,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def table(rows: Sequence[Row], step_ms: float) -> str:
    lines = [
        "| streams | event loop, us a token | engine, us a token | tokens/s | of the step's most "
        "| events in a read |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        most = row.streams / step_ms * 1e3
        lines.append(
            f"| {row.streams} | {row.loop_us:.1f} | {row.engine_us:.1f} | {row.tokens_per_s:,.0f} "
            f"| {row.tokens_per_s / most:.0%} | {row.events_per_read:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve(float(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, help="a bundle, in place of the demo model")
    parser.add_argument("--streams", default="1,16,64")
    parser.add_argument("--step-ms", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="file for the result, as JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        bundle = given.bundle or Path(work) / "bundle"
        if given.bundle is None:
            cla_export.export(cla_export.demo_checkpoint(), bundle)
        rows = [
            measure(bundle, streams, given.step_ms, given.rounds)
            for streams in map(int, given.streams.split(","))
        ]
    head = provenance(cpus())
    print(heading(head))
    print(f"A step of {given.step_ms:g} ms, {NEW} tokens a stream\n")
    print(table(rows, given.step_ms))
    if given.output is not None:
        given.output.write_text(json.dumps({**head, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
