"""What choosing tokens costs, a step: on a CPU, or on an NVIDIA GPU.

    python scripts/bench_sampling.py          milliseconds of processor time
    python scripts/bench_sampling.py --gpu    microseconds of the kernel, and of the host beside it

Medians. Logits are normal numbers: of deviation 4, about as peaked as a trained model's, and of
0.5, where nearly all tokens are likely. Penalties are of 500 tokens of prompt and 200 made. On a
GPU logits are float16, and the kernel is replayed as a CUDA graph; the host says before it what
rows are chosen by, and sends that, and takes the tokens back after it.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from provenance import heading, provenance

from cla_export.engines.executor import Logits
from cla_export.errors import MissingEnvironment
from cla_export.sampling import Sampler, SamplingParams, choose
from cla_export.serve.logprobs import logprob_of

if TYPE_CHECKING:
    from cla_export.engines.cuda_memory import CudaMemory

KINDS = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(temperature=0.8),
    "top_p 0.95": SamplingParams(temperature=0.8, top_p=0.95),
    "top_p 0.5": SamplingParams(temperature=0.8, top_p=0.5),
    "top_k 50": SamplingParams(temperature=0.8, top_k=50),
    "min_p 0.05": SamplingParams(temperature=0.8, min_p=0.05),
    "all three": SamplingParams(temperature=0.8, top_k=50, min_p=0.02, top_p=0.95),
    "top_p, penalties": SamplingParams(
        temperature=0.8, top_p=0.95, repetition_penalty=1.1, presence_penalty=0.1
    ),
}
SHAPES = {"peaked": 4.0, "flat": 0.5}  # deviations of logits
LOGPROBS = "top 5 logprobs"  # beside whatever is chosen
REPLAYED = 200  # kernels of a CUDA graph


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of choosing, for some rows."""

    vocab: int
    logits: str
    rows: int
    what: str
    kind: str
    cost: float  # milliseconds on a CPU, microseconds on a GPU


def median(step: Callable[[], object], times: int, clock: Callable[[], float]) -> float:
    """Seconds."""
    taken = []
    for _ in range(times + 2):
        began = clock()
        step()
        taken.append(clock() - began)
    return float(np.median(taken[2:]))


def samplers_of(params: SamplingParams, rows: int, vocab: int) -> list[Sampler]:
    random = np.random.default_rng(1)
    made = [
        Sampler(params, prompt=random.integers(0, vocab, 500).tolist(), choice=row)
        for row in range(rows)
    ]
    for sampler in made:
        for token in random.integers(0, vocab, 200).tolist():
            sampler.take(token)
    return made


def on_cpu(logits: Logits, times: int) -> Iterator[tuple[str, str, float]]:
    """What, by which kind, and its milliseconds, for logits [rows, V]."""
    took = partial(median, times=times, clock=time.thread_time)
    for kind, params in KINDS.items():
        samplers = samplers_of(params, *logits.shape)
        yield "processor", kind, took(partial(choose, logits, samplers)) * 1e3
    yield "processor", LOGPROBS, took(lambda: [logprob_of(row, 5, 5) for row in logits]) * 1e3


def on_gpu(memory: "CudaMemory", logits: Logits, times: int) -> Iterator[tuple[str, str, float]]:
    """The same in microseconds: of the kernel alone, and of what the host does."""
    from cla_export.engines.device_chooser import DeviceChooser

    took = partial(median, times=times, clock=time.perf_counter)
    rows, vocab = logits.shape
    narrow = logits.astype(np.float16)
    at = memory.allocate(narrow.nbytes)
    memory.upload(at, narrow)
    chooser = DeviceChooser(memory, "float16", vocab, rows)
    for kind, params in KINDS.items():
        samplers = samplers_of(params, rows, vocab)

        def say(samplers: list[Sampler] = samplers) -> None:
            chooser.prepare([sampler.next_choice() for sampler in samplers])

        def kernels() -> None:
            for _ in range(REPLAYED):
                chooser.choose(at, rows)

        yield "host before", kind, took(say) * 1e6
        chooser.choose(at, rows)
        yield "host after", kind, took(chooser.tokens) * 1e6
        replay = memory.capture(kernels)

        def replayed(replay: Callable[[], None] = replay) -> None:
            replay()
            chooser.tokens()  # waits

        yield "kernel", kind, took(replayed) * 1e6 / REPLAYED
    memory.free(at)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--rows", default="1,8,16,64")
    parser.add_argument("--vocab", default="32000,152000")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    measure, gpu = on_cpu, None
    if given.gpu:
        from cla_export.engines.cuda_memory import CudaMemory

        try:
            memory = CudaMemory()
        except MissingEnvironment as error:
            parser.exit(3, f"bench_sampling.py --gpu: {error}\n")
        measure, gpu = partial(on_gpu, memory), memory.name
    head = provenance(1, gpu)
    print(heading(head, "float16 logits" if gpu else "float32"))
    kinds = [*KINDS] if gpu else [*KINDS, LOGPROBS]
    print(f"| vocabulary | logits | rows | what | {' | '.join(kinds)} |")
    print("|---" * (4 + len(kinds)) + "|")
    cells = []
    for vocab in map(int, given.vocab.split(",")):
        for shape, deviation in SHAPES.items():
            for rows in map(int, given.rows.split(",")):
                normal = np.random.default_rng(0).standard_normal((rows, vocab), np.float32)
                found = [
                    Cell(vocab, shape, rows, *cell)
                    for cell in measure(normal * np.float32(deviation), given.times)
                ]
                for what in dict.fromkeys(cell.what for cell in found):
                    costs = (f"{c.cost:.{1 if gpu else 2}f}" for c in found if c.what == what)
                    line = f"{vocab:,} | {shape} | {rows} | {what} | {' | '.join(costs)}"
                    print(f"| {line} |", flush=True)
                cells += found
    if given.json is not None:
        content = {**head, "cells": [asdict(cell) for cell in cells]}
        given.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
