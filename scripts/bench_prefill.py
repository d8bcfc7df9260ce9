"""What reading prompts costs: a call of each kind, and those who decode meanwhile.

    python scripts/bench_prefill.py                  on one thread, by the processor's time
    python scripts/bench_prefill.py --dtype fp16     on an NVIDIA GPU, by the wall clock

First single prompts, then several short ones in one call, beside theirs one by one. On a GPU once
with the last token's logits brought to the host, and once with the next token chosen there; and by
ONNX Runtime's own operators too. Then a queue of requests through a scheduler, by what
`--prefill-budget` lets prompts take of a round: tokens per second, and how far a sequence's tokens
are apart. Processor time is changed little by other programs.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import heading, provenance
from random_model import add_shape_options, config_of, make_model

import cla_export
from cla_export.bundle import Bundle
from cla_export.engines.cuda_memory import CudaMemory
from cla_export.engines.executor import Executor
from cla_export.engines.opening import open_executor
from cla_export.errors import MissingEnvironment
from cla_export.sampling import Choice, SamplingParams
from cla_export.serve.requests import Request
from cla_export.serve.scheduler import Scheduler
from cla_export.serve.sequence import Sequence

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PROMPT, ANSWERS = 192, (16, 112)  # tokens; of answers, from and to
SIZES = [(1, 8), (1, 64), (2, 8), (4, 8), (8, 8), (2, 16), (4, 16), (2, 32)]  # prompts, of tokens
GPU_SIZES = [(1, 8), (1, 64), (1, 512), (1, 2048), (1, 16384), (2, 8), (8, 8), (2, 64), (8, 64)]
GPU_CAPACITY = 16500
GREEDY = Choice(SamplingParams())

Clock = Callable[[], float]
Rows = list[list[int]]


def fastest(read: Callable[[], object], clock: Clock, times: int) -> float:
    """Milliseconds."""
    taken = []
    for _ in range(times):
        began = clock()
        read()
        taken.append(clock() - began)
    return min(taken) * 1e3


def ways(executor: Executor, rows: Rows) -> Iterator[tuple[str, Callable[[], object]]]:
    """How these prompts can be read."""
    slots = range(len(rows))
    yield "one by one", lambda: [executor.prefill(slot, rows[slot], 0) for slot in slots]
    if len(rows) > 1:
        yield "in one call", lambda: executor.prefill_rows(0, rows)
    if (chooser := executor.chooser) is not None:
        starts, choices = [0] * len(rows), [GREEDY] * len(rows)
        yield "chosen there", lambda: chooser.prefill_and_choose(0, rows, starts, choices)


def calls(
    executors: dict[str, Executor], sizes: list[tuple[int, int]], clock: Clock, times: int
) -> Iterator[dict[str, Any]]:
    """A row for each executor, prompts, tokens of each and way."""
    for graph, executor in executors.items():
        for count, length in sizes:
            random = np.random.default_rng(0)
            rows = random.integers(3, executor.vocab_size, (count, length)).tolist()
            for way, read in ways(executor, rows):
                made = {"graph": graph, "prompts": count, "tokens": length, "way": way}
                yield made | {"ms": fastest(read, clock, times)}


def load(
    executor: Executor, requests: int, budget: float | None, clock: Clock
) -> dict[str, float | None]:
    """A queue until it is done, with a budget in milliseconds: tokens/s, and those between two."""
    random = np.random.default_rng(0)
    seconds_a_round = None if budget is None else budget / 1e3
    scheduler = Scheduler(executor, clock, prefill_seconds=seconds_a_round)
    for number in range(requests):
        prompt = tuple(random.integers(3, executor.vocab_size, PROMPT).tolist())
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
    return {
        "budget": budget,
        "tokens_per_s": sum(map(len, came.values())) / seconds,
        "mean_ms": float(gaps.mean()),
        "p50_ms": float(p50),
        "p99_ms": float(p99),
    }


def on_gpu(bundle: Bundle, slots: int) -> dict[str, Executor]:
    """Its graphs for GPUs, by name."""
    from cla_export.engines.onnxruntime_cuda import OnnxRuntimeCudaExecutor

    opened = partial(OnnxRuntimeCudaExecutor, bundle, slots=slots, capacity=GPU_CAPACITY)
    executors = [opened(), opened(stock=True)]
    return {executor.graph.name: executor for executor in executors}


def table(rows: list[dict[str, Any]]) -> str:
    """A line for prompts of a kind, a column for each way to read them."""
    cells: dict[tuple[int, int], dict[str, str]] = {}
    for row in rows:
        name = f"{row['graph']} {row['way']}".strip()
        cells.setdefault((row["prompts"], row["tokens"]), {})[name] = f"{row['ms']:.2f}"
    names = list(dict.fromkeys(name for made in cells.values() for name in made))
    lines = [
        f"| prompts | tokens of each | {', ms | '.join(names)}, ms |",
        "|---" * (2 + len(names)) + "|",
    ]
    for (prompts, tokens), made in cells.items():
        times = " | ".join(made.get(name, "") for name in names)
        lines.append(f"| {prompts} | {tokens} | {times} |")
    return "\n".join(lines)


def measure(bundle: Bundle, given: argparse.Namespace, gpu: str | None) -> dict[str, Any]:
    """Print everything, and give it back; `gpu` is the name of the one that runs it."""
    if gpu is None:
        positions = PROMPT + ANSWERS[1]
        opened = open_executor(bundle, slots=given.slots, capacity=positions, threads=1)
        executors, sizes, clock = {"": opened}, SIZES, time.process_time
    else:
        executors, sizes, clock = on_gpu(bundle, given.slots), GPU_SIZES, time.perf_counter
    executor = next(iter(executors.values()))
    head = provenance(1, gpu)
    print(heading(head, bundle.dtype))
    sizes = [(count, length) for count, length in sizes if count <= given.slots]
    made = list(calls(executors, sizes, clock, given.times))
    print(table(made))
    print(f"\n{given.requests} prompts of {PROMPT} tokens in {given.slots} slots, "
          f"{ANSWERS[0]} to {ANSWERS[1]} new ones.\n")  # fmt: skip
    print("| budget | tokens/s | between tokens, ms: mean | p50 | p99 |")
    print("|---" * 5 + "|")
    if gpu is not None:
        load(executor, given.requests, None, clock)  # steps of each size are captured
    rounds = []
    for budget in (None, *(float(ms) for ms in given.budgets.split(","))):
        found = load(executor, given.requests, budget, clock)
        name = "a chunk a round" if budget is None else f"{budget:g} ms"
        times = " | ".join(f"{found[key]:.2f}" for key in ("mean_ms", "p50_ms", "p99_ms"))
        print(f"| {name} | {found['tokens_per_s']:.0f} | {times} |", flush=True)
        rounds.append(found)
    return {**head, "calls": made, "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="16 bits for a GPU")
    parser.add_argument("--budgets", default="10,25,100,400", help="milliseconds")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--times", type=int, default=5, help="a call; the fastest counts")
    parser.add_argument("--json", type=Path, metavar="FILE")
    add_shape_options(parser)
    given = parser.parse_args()
    gpu, device = None, "cpu"
    if given.dtype != "fp32":
        try:
            gpu, device = CudaMemory().name, "cuda" if torch.cuda.is_available() else "cpu"
        except MissingEnvironment as error:
            parser.exit(3, f"bench_prefill.py --dtype {given.dtype}: {error}\n")
    with tempfile.TemporaryDirectory() as work:
        config = config_of(given, 2, GPU_CAPACITY)
        make_model(Path(work) / "model", config, DTYPES[given.dtype], device)
        bundle = cla_export.export(Path(work) / "model", Path(work) / "bundle", dtype=given.dtype)
        found = measure(bundle, given, gpu)
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
