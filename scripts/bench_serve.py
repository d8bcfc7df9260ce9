"""What batching brings, and what the scheduler and HTTP cost beside the bare executor's step.

On a GPU a step includes choosing its tokens, and the scheduler works while the next one runs.

For each number of slots: the bare executor's decode step; the engine's tokens per second with twice
as many requests as slots; and as many streams over HTTP, whose client is a process of its own on
the same cores. What the scheduler and HTTP cost is the processor time of their threads for each
decode step, beside the step's own time: other programs on the machine do not change it, and where
no core is idle it is what a step takes longer. With --threads 1, the step's time and the engine's
tokens per second are by the processor's time too; those over HTTP never are.
"""

import argparse
import json
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import heading, provenance
from random_model import SHAPE, add_shape_options, config_of, make_model
from thread_time import thread_seconds

import cla_export
from cla_export.bundle import Bundle, open_bundle
from cla_export.engines.executor import Executor, Logits
from cla_export.engines.opening import open_executor
from cla_export.environment import cpus
from cla_export.sampling import Choice, SamplingParams
from cla_export.serve.engine import Engine
from cla_export.serve.requests import Output, Request
from cla_export.serve.scheduler import Outputs
from cla_export.tokenizer import load_tokenizer

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PROMPT, NEW = 64, 96  # tokens of each request
WARM = 3
_STEPS = 'cla_export_step_seconds_count{phase="decode"}'


@dataclass(frozen=True, slots=True)
class Row:
    """One number of slots."""

    slots: int
    sampled: bool
    step_ms: float  # the bare executor's decode step with all slots busy, its fastest tenth
    engine_ms: float  # processor time of the engine's thread between two steps, median
    http_ms: float | None  # of the event loop's, for each step, mean
    tokens_per_s: float  # of the engine, prompts' reading included
    http_tokens_per_s: float | None

    @property
    def overhead(self) -> float:
        """Both, as a share of the step."""
        return (self.engine_ms + (self.http_ms or 0.0)) / self.step_ms


class Watched:
    """An executor whose decode steps are timed."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.steps: list[tuple[int, float, float, float]] = []  # rows, seconds; CPU before, after

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._executor, name)

    @property
    def chooser(self) -> "Watched | None":
        return None if self._executor.chooser is None else self

    def decode(self, slots: Sequence[int], *rows: Sequence[int]) -> Logits:
        return self._timed(slots, lambda: self._executor.decode(slots, *rows))

    def begin_decode(self, slots: Sequence[int], *rows: Any) -> None:  # noqa: ANN401
        self._begun = slots
        self._executor.begin_decode(slots, *rows)

    def end_decode(self) -> list[int | None]:
        return self._timed(self._begun, self._executor.end_decode)

    def _timed(self, slots: Sequence[int], step: Callable[[], Any]) -> Any:  # noqa: ANN401
        before, began = time.thread_time(), time.perf_counter()
        made = step()
        self.steps.append((len(slots), time.perf_counter() - began, before, time.thread_time()))
        return made

    def between_ms(self, rows: int) -> float:
        """Milliseconds of the calling thread's processor time between two full steps, median."""
        pairs = pairwise(step for step in self.steps)
        gaps = [b[2] - a[3] for a, b in pairs if a[0] == b[0] == rows]
        return float(np.median(gaps)) * 1e3


def requests(bundle: Bundle, count: int, sampled: bool) -> list[Request]:
    random = np.random.default_rng(0)
    heat = 0.8 if sampled else 0.0
    return [
        Request(
            tuple(random.integers(3, bundle.vocab_size, PROMPT).tolist()),
            NEW,
            SamplingParams(temperature=heat, top_p=0.95 if sampled else 1.0, seed=index),
            ignore_eos=True,
            stream=True,
        )
        for index in range(count)
    ]


def measure(bundle: Bundle, slots: int, sampled: bool, threads: int | None, http: bool) -> Row:
    executor = open_executor(bundle, slots=slots, capacity=PROMPT + NEW, threads=threads)
    watched = Watched(executor)
    arrived: queue.SimpleQueue[tuple[int, Output]] = queue.SimpleQueue()

    def deliver(outputs: Outputs) -> None:
        for output in outputs:
            arrived.put(output)

    engine = Engine(watched, deliver, tokenizer=load_tokenizer(bundle.folder))
    engine.start()
    asked = requests(bundle, 2 * slots, sampled)

    def answer(questions: list[Request]) -> None:
        engine.submit(questions)
        left = len(questions)
        while left:
            _, output = arrived.get()
            assert output.failure is None, output.failure
            left -= output.last

    answer([replace(request, max_tokens=4) for request in asked])  # captures steps on a GPU
    watched.steps.clear()
    clock = time.process_time if threads == 1 else time.perf_counter
    began = clock()
    answer(asked)
    seconds = clock() - began
    engine.stop()
    found = serve_http(bundle, slots, sampled, threads) if http else (None, None)
    return Row(
        slots=slots,
        sampled=sampled,
        step_ms=bare_step(executor, slots, time.thread_time if threads == 1 else time.perf_counter),
        engine_ms=watched.between_ms(slots),
        http_ms=found[0],
        tokens_per_s=len(asked) * NEW / seconds,
        http_tokens_per_s=found[1],
    )


def bare_step(executor: Executor, slots: int, clock: Callable[[], float]) -> float:
    """Milliseconds of decode with `slots` rows in the middle of their answers."""
    times, rows, params = [], range(slots), SamplingParams()
    for step in range(WARM + NEW // 2):
        began = clock()
        lengths = [PROMPT + NEW // 4 + step] * slots
        if executor.chooser is None:
            executor.decode(rows, [5] * slots, lengths)
        else:
            executor.chooser.begin_decode(rows, [5] * slots, lengths, [Choice(params)] * slots)
            executor.chooser.end_decode()
        times.append(clock() - began)
    return float(np.percentile(times[WARM:], 10)) * 1e3


CLIENT = """
import asyncio, json, sys, time
host, port, bodies = sys.argv[1], int(sys.argv[2]), json.load(sys.stdin)
async def one(body):
    reader, writer = await asyncio.open_connection(host, port)
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\\r\\nhost: x\\r\\ncontent-type: application/json\\r\\n"
    writer.write(head.encode() + f"content-length: {len(content)}\\r\\n\\r\\n".encode() + content)
    tail = b""
    while b"[DONE]" not in tail:
        piece = await reader.read(65536)
        assert piece, tail
        tail = tail[-64:] + piece
    writer.close()
async def main():
    await asyncio.gather(*(one(body) for body in bodies))
began = time.perf_counter()
asyncio.run(main())
print(time.perf_counter() - began)
"""


def serve_http(
    bundle: Bundle, slots: int, sampled: bool, threads: int | None
) -> tuple[float, float]:
    """Milliseconds of the event loop's processor time a decode step, and tokens per second."""
    import httpx

    options = ["--port", "0", "--slots", slots, "--max-len", PROMPT + NEW]
    options += [] if threads is None else ["--threads", threads]
    command = [sys.executable, "-m", "cla_export.cli", "serve", bundle.folder, *options]
    server = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        said = []
        for line in server.stderr:
            said.append(line)
            if line.startswith("serving "):
                break
        else:
            raise SystemExit(f"{' '.join(map(str, command))} does not start:\n{''.join(said)}")
        url = said[-1].split()[-1]
        bodies = [
            {
                "prompt": list(request.prompt),
                "max_tokens": NEW,
                "temperature": request.sampling.temperature,
                "top_p": request.sampling.top_p,
                "seed": index,
                "ignore_eos": True,
                "stream": True,
            }
            for index, request in enumerate(requests(bundle, slots, sampled))
        ]
        client = [sys.executable, "-c", CLIENT, *url.removeprefix("http://").split(":")]
        rounds = []
        for _ in range(4):  # the first warms up
            before = _metrics(httpx.get(f"{url}/metrics").text), _loop_seconds(server.pid)
            done = subprocess.run(
                client, input=json.dumps(bodies), text=True, check=True, stdout=subprocess.PIPE
            )
            seconds = float(done.stdout)  # without its start
            after = _metrics(httpx.get(f"{url}/metrics").text), _loop_seconds(server.pid)
            steps = after[0][_STEPS] - before[0].get(_STEPS, 0)
            rounds.append(((after[1] - before[1]) / steps * 1e3, slots * NEW / seconds))
    finally:
        server.terminate()
        server.wait()
    return float(np.mean([ms for ms, _ in rounds[1:]])), max(rate for _, rate in rounds[1:])


def _loop_seconds(pid: int) -> float:
    """Processor time of the event loop, which is a server's first thread."""
    return thread_seconds(pid)[pid]


def _metrics(text: str) -> dict[str, float]:
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| slots | tokens | step, ms | engine, ms | HTTP, ms | both | tokens/s | x 1 slot "
        "| tokens/s over HTTP |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        one = next(r for r in rows if r.sampled == row.sampled)
        http = ("", "")
        if row.http_ms is not None:
            http = (f"{row.http_ms:.2f}", f"{row.http_tokens_per_s:.0f}")
        lines.append(
            f"| {row.slots} | {'sampled' if row.sampled else 'greedy'} | {row.step_ms:.2f} "
            f"| {row.engine_ms:.2f} | {http[0]} | {row.overhead:.0%} | {row.tokens_per_s:.0f} "
            f"| {row.tokens_per_s / one.tokens_per_s:.2f} | {http[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, help="a bundle, in place of a random model")
    parser.add_argument("--slots", default="1,8,16")
    parser.add_argument("--factor", type=int, default=2, help="layers that share a cache")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="16 bits for a GPU")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--greedy-only", action="store_true")
    parser.add_argument("--no-http", action="store_true")
    parser.add_argument("--output", type=Path, help="file for the result, as JSON")
    add_shape_options(parser)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = given.bundle
        if folder is None:
            folder = Path(work) / "bundle"
            config = config_of(given, given.factor, 1024)
            make_model(Path(work) / "model", config, DTYPES[given.dtype])
            cla_export.export(Path(work) / "model", folder, dtype=given.dtype)
        bundle = open_bundle(folder)
        rows = [
            measure(bundle, slots, sampled, given.threads, not given.no_http)
            for sampled in ((False,) if given.greedy_only else (False, True))
            for slots in map(int, given.slots.split(","))
        ]
    head = provenance(given.threads or cpus())
    print(heading(head, bundle.dtype))
    shape = given.bundle or {name: getattr(given, name) for name in SHAPE}
    print(f"Prompts of {PROMPT} tokens, {NEW} new ones; {shape}\n")
    print(table(rows))
    if given.output is not None:
        given.output.write_text(json.dumps({**head, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
