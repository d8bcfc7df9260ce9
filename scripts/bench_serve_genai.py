"""Our engine beside onnxruntime-genai's, on one bundle and the same arrivals and lengths.

    python scripts/bench_serve_genai.py                    12 layers of 768, random weights
    python scripts/bench_serve_genai.py --bundle my-bundle --rate 2 --threads 2

genai's engine on a CPU is the static one: it takes four requests (a constant of its source), and
the next four when all of those have ended. Ours runs with four slots, and with --slots. Each has a
process of its own, as many threads, and requests at the same times: all at the start, or by a
Poisson process of --rate a second. Engines take turns within a round; figures are their medians.

Where all come at the start, time is the processor's, and one thread computes: other programs on the
machine count little. With --wall or a rate it is the clock's, and nothing else should run.
"""

import argparse
import json
import multiprocessing
import queue
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peers.genai import GenaiPeer, genai_folder
from provenance import heading, provenance
from random_model import SHAPE, add_shape_options, config_of, make_model

import cla_export
from cla_export.benchmark.load import Answer, Level, Work, measure_level
from cla_export.bundle import Bundle, open_bundle
from cla_export.engines.opening import open_executor
from cla_export.serve.engine import Engine
from cla_export.serve.requests import Request
from cla_export.serve.scheduler import Outputs

STATIC = 4  # requests of a batch of genai's static engine
PROMPTS, ANSWERS = (8, 96), (32, 128)  # tokens of each request, from and to
Tokens = list[list[int]]  # of each request


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when it comes, in seconds, and what it asks."""

    at: float
    prompt: list[int]
    new: int

    @property
    def total(self) -> int:
        return len(self.prompt) + self.new


def arrivals(count: int, rate: float, vocab: int) -> list[Arrival]:
    random = np.random.default_rng(0)
    gaps = random.exponential(1 / rate, count) if rate else np.zeros(count)
    return [
        Arrival(
            float(at),
            random.integers(3, vocab, random.integers(*PROMPTS)).tolist(),
            int(random.integers(*ANSWERS)),
        )
        for at in np.cumsum(gaps) - gaps[0]
    ]


class Watch:
    """When the tokens of each request came."""

    def __init__(self, asked: Sequence[Arrival], wall: bool) -> None:
        self._asked = asked
        self.clock = time.perf_counter if wall else time.process_time
        self._times: list[list[float]] = [[] for _ in asked]
        self.tokens: Tokens = [[] for _ in asked]
        self.began = self.clock()

    def take(self, index: int, tokens: Sequence[int], now: float) -> None:
        self._times[index].append(now - self.began)
        self.tokens[index] += tokens

    @property
    def due(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.began

    def answers(self) -> list[Answer]:
        """One each; AssertionError if a request did not get what it asked."""
        assert [len(made) for made in self.tokens] == [arrival.new for arrival in self._asked]
        return [
            Answer(200, arrival.at, tuple(times), arrival.new)
            for arrival, times in zip(self._asked, self._times, strict=True)
        ]


def ours(folder: Path, asked: Sequence[Arrival], slots: int, threads: int, wall: bool) -> Watch:
    bundle = open_bundle(folder, verify=False)
    capacity = max(arrival.total for arrival in asked)
    executor = open_executor(bundle, slots=slots, capacity=capacity, threads=threads)
    executor.decode(range(slots), [5] * slots, [0] * slots)  # warms up
    came: queue.SimpleQueue[tuple[float, Outputs]] = queue.SimpleQueue()
    watch, waiting, left = Watch(asked, wall), list(asked), len(asked)
    engine = Engine(executor, lambda outputs: came.put((watch.clock(), outputs)))
    engine.start()
    while left:
        while waiting and waiting[0].at <= watch.due:
            arrival = waiting.pop(0)
            request = Request(tuple(arrival.prompt), arrival.new, ignore_eos=True, stream=True)
            engine.submit([request])  # numbers count up from 0
        try:
            pause = max(0.0, waiting[0].at - watch.due) if waiting else None
            now, outputs = came.get(timeout=pause)
        except queue.Empty:
            continue
        for number, output in outputs:
            assert output.failure is None, output.failure
            watch.take(number, output.tokens, now)
            left -= output.last
    engine.stop()
    return watch


def genai(folder: Path, asked: Sequence[Arrival], slots: int, threads: int, wall: bool) -> Watch:
    assert slots == STATIC
    import onnxruntime_genai as og

    config = og.Config(str(genai_folder(open_bundle(folder, verify=False))))
    session = {"intra_op_num_threads": threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = og.Model(config)
    engine = og.Engine(model)
    capacity = max(arrival.total for arrival in asked)
    buffer = engine.create_event_buffer(4 * STATIC)
    numbers: dict[Any, int] = {}

    def submit(arrival: Arrival, number: int) -> None:
        options = og.RequestOptions()
        options.set_max_session_tokens(capacity)
        request = engine.create_request(options=options)
        turn = og.TurnOptions(request)
        turn.set_do_sample(False)
        turn.set_max_generated_tokens(arrival.new)
        numbers[request] = number
        request.begin_turn(np.array(arrival.prompt, np.int32), turn)

    submit(Arrival(0.0, asked[0].prompt, 2), -1)  # warms up
    while engine.has_pending_requests():
        engine.run(buffer)
    watch, waiting = Watch(asked, wall), list(asked)
    while waiting or engine.has_pending_requests():
        while waiting and waiting[0].at <= watch.due:
            submit(waiting[0], len(asked) - len(waiting))
            waiting.pop(0)
        if not engine.has_pending_requests():
            time.sleep(max(0.0, waiting[0].at - watch.due))
            continue
        events = engine.run(buffer)
        now = watch.clock()
        for event in events:
            assert event.error_code == og.EngineErrorCode.NONE, event.error_code
            watch.take(numbers[event.request], [event.token], now)
    return watch


ENGINES = {"genai": genai, "ours": ours}


def measure_one(
    name: str, folder: Path, asked: Sequence[Arrival], slots: int, threads: int, wall: bool
) -> tuple[Level, Tokens]:
    """One engine's figures, and its tokens; run in a process of its own."""
    watch = ENGINES[name](folder, asked, slots, threads, wall)
    seconds = watch.due
    return measure_level(Work(), slots, watch.answers(), seconds), watch.tokens


def same(one: Tokens, other: Tokens) -> int:
    """Requests that have the same tokens."""
    return sum(a == b for a, b in zip(one, other, strict=True))


def table(found: dict[tuple[str, int], list[Level]]) -> str:
    def median(levels: Sequence[Level], name: str, part: str = "") -> float:
        values = [getattr(level, name) for level in levels]
        return statistics.median(getattr(it, part) if part else it for it in values)

    lines = [
        "| engine | requests at a time | tokens/s | first token, ms: p50 / p95 "
        "| between tokens, ms: p50 / p95 | whole answer, ms: p50 / p95 |",
        "|---" * 6 + "|",
    ]
    for (name, slots), levels in found.items():
        cells = [
            f"{median(levels, time_, 'p50'):,.0f} / {median(levels, time_, 'p95'):,.0f}"
            for time_ in ("time_to_first_token", "inter_token_latency", "request_latency")
        ]
        rate = median(levels, "output_token_throughput")
        lines.append(f"| {name} | {slots} | {rate:,.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(bundle: Bundle, given: argparse.Namespace) -> str:
    wall = given.wall or given.rate > 0
    asked = arrivals(given.requests, given.rate, bundle.vocab_size)
    which = [("genai", STATIC), ("ours", STATIC), ("ours", given.slots)]
    found: dict[tuple[str, int], list[Level]] = {key: [] for key in which}
    context, tokens = multiprocessing.get_context("spawn"), {}
    for index in range(given.rounds):
        for name, slots in which:
            with context.Pool(1) as pool:
                job = (name, bundle.folder, asked, slots, given.threads, wall)
                level, tokens[name, slots] = pool.apply(measure_one, job)
            found[name, slots].append(level)
            print(f"round {index}: {name}, {slots}: {level.output_token_throughput:.1f} tokens/s",
                  file=sys.stderr, flush=True)  # fmt: skip
    equal = same(tokens["genai", STATIC], tokens["ours", STATIC])
    load = "all at the start" if not given.rate else f"{given.rate:g} a second, Poisson"
    return (
        f"{len(asked)} requests, {load}; prompts of {PROMPTS[0]} to {PROMPTS[1]} tokens, "
        f"{ANSWERS[0]} to {ANSWERS[1]} new ones. {equal} have the same tokens from both engines; "
        f"seconds are {'the clock' if wall else 'the processor'}'s."
        f"\n\n{table(found)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, help="a bundle, in place of a random model")
    parser.add_argument("--factor", type=int, default=2, help="layers that share a cache")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rate", type=float, default=0.0, help="a second; 0: all at the start")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--wall", action="store_true", help="the clock's seconds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    add_shape_options(parser)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "bundle"
        if given.bundle is not None:
            shutil.copytree(given.bundle, folder)
        else:
            make_model(Path(work) / "model", config_of(given, given.factor, 1024))
            cla_export.export(Path(work) / "model", folder)
        bundle = open_bundle(folder)
        GenaiPeer.prepare(bundle)
        text = measure(bundle, given)
    shape = given.bundle or {name: getattr(given, name) for name in SHAPE}
    text = f"{heading(provenance(given.threads))}\n{shape}; {text}\n"
    print(text)
    if given.markdown:
        given.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
