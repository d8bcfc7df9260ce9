"""What reading prompts costs those who decode: chunks, `--prefill-budget`, and calls for several.

    python scripts/bench_prefill.py

A queue of requests through a scheduler on one thread, by the processor's time, which other programs
change little: tokens per second, and how far a sequence's tokens are apart. Then the time of a call
that reads several short prompts, beside theirs one by one.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from provenance import heading, provenance
from random_model import add_shape_options, config_of, make_model

import cla_export
from cla_export.bundle import Bundle
from cla_export.engines.executor import Executor
from cla_export.engines.opening import open_executor
from cla_export.serve.requests import Request
from cla_export.serve.scheduler import Scheduler
from cla_export.serve.sequence import Sequence

PROMPT, ANSWERS = 192, (16, 112)  # tokens; of answers, from and to
PACKS = ((2, 8), (4, 8), (8, 8), (2, 16), (4, 16), (2, 32))  # prompts, tokens of each


def load(executor: Executor, bundle: Bundle, requests: int, budget: float | None) -> str:
    """One row of the table: a queue until it is done."""
    random = np.random.default_rng(0)
    clock = time.process_time
    scheduler = Scheduler(executor, clock, prefill_seconds=budget)
    for number in range(requests):
        prompt = tuple(random.integers(3, bundle.vocab_size, PROMPT).tolist())
        new = int(random.integers(*ANSWERS))
        asked = Request(prompt, new, ignore_eos=True, stream=True, tenant=str(number))
        scheduler.waiting.append(Sequence(number, asked, frozenset(), None))
    came: dict[int, list[float]] = {number: [] for number in range(requests)}
    began = clock()
    while scheduler.busy:
        for outputs in scheduler.tick():
            for number, _ in outputs:
                came[number].append(clock())
    seconds = clock() - began
    gaps = np.concatenate([np.diff(times) for times in came.values()]) * 1e3
    p50, p99 = np.percentile(gaps, [50, 99])
    tokens = sum(map(len, came.values()))
    name = "a chunk a round" if budget is None else f"{1e3 * budget:g} ms"
    return f"| {name} | {tokens / seconds:.0f} | {gaps.mean():.1f} | {p50:.1f} | {p99:.1f} |"


def packs(executor: Executor, bundle: Bundle) -> str:
    """A call for several prompts, beside calls for each: milliseconds, the fastest of five."""

    def one_by_one(rows: list[list[int]]) -> None:
        for slot, row in enumerate(rows):
            executor.prefill(slot, row, 0)

    def in_one_call(rows: list[list[int]]) -> None:
        executor.prefill_rows(0, rows)

    def fastest(read: Callable[[list[list[int]]], None], rows: list[list[int]]) -> float:
        times = []
        for _ in range(5):
            began = time.process_time()
            read(rows)
            times.append(time.process_time() - began)
        return min(times) * 1e3

    lines = ["| prompts | tokens of each | one by one, ms | in one call, ms |", "|---" * 4 + "|"]
    for count, length in PACKS:
        rows = np.random.default_rng(0).integers(3, bundle.vocab_size, (count, length)).tolist()
        times = (f"{fastest(read, rows):.1f}" for read in (one_by_one, in_one_call))
        lines.append(f"| {count} | {length} | {' | '.join(times)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budgets", default="10,25,100,400", help="milliseconds")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--slots", type=int, default=8)
    add_shape_options(parser)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        make_model(Path(work) / "model", config_of(given, 2, 1024))
        bundle = cla_export.export(Path(work) / "model", Path(work) / "bundle")
        capacity = PROMPT + ANSWERS[1]
        executor = open_executor(bundle, slots=given.slots, capacity=capacity, threads=1)
        print(heading(provenance(1)))
        print(packs(executor, bundle), flush=True)
        print(f"\n{given.requests} prompts of {PROMPT} tokens in {given.slots} slots, "
              f"{ANSWERS[0]} to {ANSWERS[1]} new ones.\n")  # fmt: skip
        print("| budget | tokens/s | between tokens, ms: mean | p50 | p99 |")
        print("|---" * 5 + "|")
        for budget in (None, *(float(ms) / 1e3 for ms in given.budgets.split(","))):
            print(load(executor, bundle, given.requests, budget), flush=True)


if __name__ == "__main__":
    main()
