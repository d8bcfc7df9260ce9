"""A bundle's engine under load, in this process: what a server does, without HTTP."""

import queue
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from cla_export.benchmark.load import Answer, LoadBench, Work, measure_level
from cla_export.bundle import Bundle, Progress, open_bundle
from cla_export.engines.opening import open_executor
from cla_export.errors import RunError
from cla_export.serve.engine import Engine
from cla_export.serve.requests import Request
from cla_export.serve.scheduler import Outputs
from cla_export.tokenizer import load_tokenizer


def bench_engine(
    bundle: Bundle | Path | str,
    work: Work,
    *,
    slots: int | None = None,
    chunk: int | None = None,
    prefill_seconds: float | None = None,
    threads: int | None = None,
    progress: Progress = lambda _what, _done, _of: None,
) -> LoadBench:
    """Load a bundle's engine, one level after another.

    Args:
        bundle: an opened bundle, or its folder (verified before use).
        work: what is asked.
        slots: sequences that run side by side; None: as many as the largest level has streams.
        chunk: as of `Scheduler`.
        prefill_seconds: as of `Scheduler`.
        threads: intra-operator threads (onnxruntime only); None: its own choice.
        progress: called with (what, levels done, of).

    Raises:
        BadInput: an option is wrong, or prompt and answer are longer than the model's positions.
        BundleError, MissingEnvironment: as `open_executor`.
        RunError: a request failed.
    """
    if not isinstance(bundle, Bundle):
        bundle = open_bundle(bundle)
    executor = open_executor(
        bundle,
        slots=slots or max(work.concurrency),
        capacity=work.prompt_tokens + work.new_tokens,
        threads=threads,
    )
    load = _Load()
    tokenizer = load_tokenizer(bundle.folder)
    engine = Engine(
        executor, load.deliver, tokenizer=tokenizer, chunk=chunk, prefill_seconds=prefill_seconds
    )
    engine.start()
    levels = []
    try:
        for index, streams in enumerate(work.concurrency):
            progress(f"{streams} streams", index, len(work.concurrency))
            requests = [
                Request(tuple(prompt), work.new_tokens, ignore_eos=True, stream=True)
                for prompt in work.prompts(index)
            ]
            began = time.perf_counter()
            answers = load.run(engine, requests, streams)
            levels.append(measure_level(work, streams, answers, time.perf_counter() - began))
    finally:
        engine.stop()
    return LoadBench(
        target=str(bundle.folder),
        model=bundle.folder.name,
        date=date.today().isoformat(),
        work=work,
        levels=tuple(levels),
    )


class _Load:
    """Requests at an engine, and when their outputs came."""

    def __init__(self) -> None:
        self._sent: dict[int, float] = {}
        self._arrivals: dict[int, list[float]] = {}
        self._tokens: dict[int, int] = {}
        self._came: queue.SimpleQueue[tuple[float, Outputs]] = queue.SimpleQueue()

    def deliver(self, outputs: Outputs) -> None:
        """As the engine's: called in its thread."""
        self._came.put((time.perf_counter(), outputs))

    def run(self, engine: Engine, requests: Sequence[Request], streams: int) -> list[Answer]:
        """Answers, `streams` at a time."""
        answers: list[Answer] = []
        waiting = list(requests)
        self._submit(engine, waiting, streams)
        while len(answers) < len(requests):
            now, outputs = self._came.get()
            for number, output in outputs:
                if output.failure is not None:
                    raise RunError(f"a request failed: {output.failure.message}")
                if output.tokens:
                    self._arrivals[number].append(now)
                    self._tokens[number] += len(output.tokens)
                if output.last:
                    answers.append(self._answer(number))
                    self._submit(engine, waiting, 1)
        return answers

    def _submit(self, engine: Engine, waiting: list[Request], count: int) -> None:
        for _ in range(min(count, len(waiting))):
            sent = time.perf_counter()
            (number,) = engine.submit([waiting.pop()])
            self._sent[number], self._arrivals[number], self._tokens[number] = sent, [], 0

    def _answer(self, number: int) -> Answer:
        arrivals = tuple(self._arrivals.pop(number))
        return Answer(200, self._sent.pop(number), arrivals, self._tokens.pop(number))
