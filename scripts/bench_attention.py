"""Time one decode-attention node: ClaAttention beside PyTorch's own attention, on this GPU.

    python scripts/bench_attention.py                  a Markdown table, every contender checked
    python scripts/bench_attention.py --dtype bfloat16 --only '16/4*'
    python scripts/bench_attention.py --sweep          the kernel's layouts instead of its peers
    python scripts/bench_attention.py --rows 34x16384 1x16384+63x1024      cells of your own

A CUDA graph holds many nodes, each with a cache of its own, so that the L2 cache is cold; a cell
is the median over replays, per node. "Share" is the rate at which keys and values are read, over
the highest rate that anything in this run reached. Cells start from random data; every contender's
answer is compared with the float32 reference first. Lengths are data to ClaAttention, which is
planned for the capacity alone; of its peers, SDPA gets them as a mask where rows differ, and
flex_attention as a block mask. Where onnxruntime-gpu is installed, its GroupQueryAttention takes
part, as a group's owner (which also writes a key and a value) and as a sharer.
"""

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

from cla_export.plugin.cases import Case, speed_case, speed_cases
from cla_export.plugin.launch import Launcher, torch_attention
from cla_export.plugin.plan import Plan, make_plan
from cla_export.plugin.reference import torch_reference

COLD_BYTES = 400e6  # that the nodes of a graph read in all, at least
MAX_NODES = 400
REPLAY_MS = 15.0  # of replays a cell
ORT_GRAPH_US = 2000  # of nodes in a graph of ONNX Runtime's, at least: each replay may wait
OURS = "ClaAttention"
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.5e-2}

Call = Callable[[], Tensor]
Attention = Callable[..., Tensor]  # (q, keys, values, lengths) -> y
Timed = tuple[Tensor, Callable[[], float]]  # the first node's y, and what times one node
Start = Callable[["Case", "Buffers"], Timed]


@dataclass(frozen=True, slots=True)
class Buffers:
    """A case's inputs, and several caches of the same shape."""

    q: Tensor
    lengths: Tensor
    caches: list[tuple[Tensor, Tensor]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--only", default="*", metavar="GLOB", help="cells, by name")
    parser.add_argument(
        "--rows",
        nargs="+",
        metavar="NxTOKENS[+...]",
        help="rows of 16 heads on one, in their place",
    )
    parser.add_argument("--sweep", action="store_true", help="time the kernel's layouts")
    parser.add_argument("--no-flex", action="store_true", help="skip flex_attention (it compiles)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="all numbers, for plot_attention.py"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_attention.py needs an NVIDIA GPU and a CUDA build of PyTorch", file=sys.stderr)
        return 3
    cells = [case_of(text, args.dtype) for text in args.rows or ()]
    cells = cells or [c for c in speed_cases(dtype=args.dtype) if fnmatchcase(c.name, args.only)]
    if not cells:
        parser.error(f"--only {args.only!r} matches no cell")
    launcher = Launcher()
    results: dict[str, dict[str, float]] = {}
    for case in cells:
        buffers = make_buffers(case)
        entrants = (
            layouts(launcher, case) if args.sweep else contenders(launcher, case, args.no_flex)
        )
        results[case.name] = {n: t for n, f in entrants if (t := measure(case, buffers, f, n))}
        best = min(results[case.name].items(), key=lambda item: item[1])
        print(f"{case.name}: {len(buffers.caches)} caches, best {best}", file=sys.stderr)
        if args.sweep:
            ranked = sorted(results[case.name].items(), key=lambda item: item[1])
            print(f"  {'  '.join(f'{n}={t:.1f}' for n, t in ranked[:12])}", flush=True)
    if args.sweep and not args.json:
        return 0
    run = summary(cells, results, args.dtype)
    if not args.sweep:
        report(run)
    if args.json:
        args.json.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    return 0


def case_of(rows: str, dtype: str) -> Case:
    """Rows such as 1x16384+63x1024, 16 query heads on one."""
    parts = [part.split("x") for part in rows.split("+")]
    lengths = [int(tokens) for count, tokens in parts for _ in range(int(count))]
    return speed_case(16, 1, tuple(lengths), dtype, rows)


def make_buffers(case: Case) -> Buffers:
    """Random inputs; as many caches as it takes to make each of them cold."""
    problem, dtype = case.problem, getattr(torch, case.problem.dtype)
    torch.cuda.empty_cache()
    count = int(np.clip(COLD_BYTES // case.cache_bytes + 1, 2, MAX_NODES))
    torch.manual_seed(0)

    def new(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, dtype=dtype, device="cuda")

    caches = [(new(problem.cache_shape), new(problem.cache_shape)) for _ in range(count)]
    return Buffers(new(problem.query_shape), torch.tensor(case.lengths).int().cuda(), caches)


def contenders(launcher: Launcher, case: Case, no_flex: bool) -> Iterator[tuple[str, Start]]:
    """Name and start of everyone in a cell."""
    scale, capacity = case.problem.scale, case.problem.capacity
    ragged = any(length != capacity for length in case.lengths)

    def ours(q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> Tensor:
        return torch_attention(launcher, q, k, v, n, scale=scale)

    mask = None
    if ragged:
        keys = torch.arange(capacity, device="cuda")
        mask = (keys < torch.tensor(case.lengths, device="cuda")[:, None])[:, None, None]

    def stock(q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> Tensor:  # noqa: ARG001
        return sdpa(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)

    def cudnn(q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> Tensor:  # noqa: ARG001
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)

    yield OURS, partial(in_torch, function=ours)
    yield "SDPA", partial(in_torch, function=stock)
    yield "SDPA cuDNN", partial(in_torch, function=cudnn)
    if onnxruntime_runs():
        yield "GQA owner", partial(in_onnxruntime, sharer=False)
        yield "GQA owner, no XQA", partial(in_onnxruntime, sharer=False, xqa=False)
        yield "GQA sharer", partial(in_onnxruntime, sharer=True)
    if not no_flex:
        lengths = torch.tensor(case.lengths, device="cuda")
        blocks = create_block_mask(
            lambda b, _h, _i, j: j < lengths[b], case.problem.batch, None, 1, capacity, "cuda"
        )
        torch.compiler.reset()
        compiled = torch.compile(flex_attention, dynamic=False)

        def flex(q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> Tensor:  # noqa: ARG001
            return compiled(q, k, v, block_mask=blocks, scale=scale, enable_gqa=True)

        yield "flex", partial(in_torch, function=flex)


def layouts(launcher: Launcher, case: Case) -> Iterator[tuple[str, Start]]:
    """The kernel under every layout worth trying."""
    for warps, cluster, waves in product((4, 8), (1, 2, 4, 8), (0.0, 0.25, 0.5, 1.0, 4.0)):
        plan = make_plan(case.problem, launcher.gpu, warps=warps, cluster=cluster, waves=waves)

        def call(q: Tensor, k: Tensor, v: Tensor, n: Tensor, plan: Plan = plan) -> Tensor:
            return torch_attention(launcher, q, k, v, n, scale=case.problem.scale, plan=plan)

        yield f"w{warps}c{cluster}x{waves:g}", partial(in_torch, function=call)

    def auto(q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> Tensor:
        return torch_attention(launcher, q, k, v, n, scale=case.problem.scale)

    yield "auto", partial(in_torch, function=auto)


def onnxruntime_runs() -> bool:
    try:
        from onnxruntime_nodes import available
    except ImportError:
        return False
    return available()


def in_torch(_case: Case, buffers: Buffers, function: Attention) -> Timed:
    """A node for each cache, in a CUDA graph of PyTorch's."""
    q, lengths = buffers.q, buffers.lengths
    calls = [lambda k=k, v=v: function(q, k, v, lengths) for k, v in buffers.caches]
    return calls[0](), lambda: time_graph(calls)


def in_onnxruntime(case: Case, buffers: Buffers, *, sharer: bool, xqa: bool = True) -> Timed:
    """GroupQueryAttention on every cache, in a CUDA graph of ONNX Runtime's."""
    from onnxruntime_nodes import GroupQueryAttentionNodes

    least_us = len(buffers.caches) * (case.cache_bytes / 4e6 + 5)
    nodes = GroupQueryAttentionNodes(
        buffers.q,
        buffers.caches,
        buffers.lengths,
        scale=case.problem.scale,
        sharer=sharer,
        xqa=xqa,
        repeat=int(np.ceil(ORT_GRAPH_US / least_us)),
    )

    def time() -> float:
        first = nodes.replay_ms(2)[1]
        times = nodes.replay_ms(int(np.clip(REPLAY_MS / first, 5, 300)))
        return float(np.median(times)) * 1e3 / nodes.count

    y = nodes.y.unflatten(2, case.problem.query_shape[1::2]).transpose(1, 2)
    return y, time


def measure(case: Case, buffers: Buffers, start: Start, name: str) -> float | None:
    """Median microseconds a node; None, with the reason on stderr, where it cannot run."""
    try:
        y, time = start(case, buffers)
        caches = buffers.caches[0]
        expected = torch_reference(buffers.q, *caches, buffers.lengths, scale=case.problem.scale)
        error = ((y.float() - expected).norm() / expected.norm()).item()
        if not error < TOLERANCE[case.problem.dtype]:
            print(f"{case.name}: {name} is wrong, relative error {error:.1e}", file=sys.stderr)
            return None
        return time()
    except Exception as error:  # compilers, PyTorch and ONNX Runtime each have their own
        print(f"{case.name}: {name} cannot run: {str(error)[:120]!r}", file=sys.stderr)
        return None


def time_graph(calls: list[Call]) -> float:
    """Median microseconds a call, from replays of one graph that holds them all."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        graph.replay()
        first = replay_ms(graph, 1)[0]
        times = replay_ms(graph, int(np.clip(REPLAY_MS / first, 5, 300)))
    return float(np.median(times)) * 1e3 / len(calls)


def replay_ms(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def read_rate() -> float:
    """GB/s at which a plain reduction reads 4 GB; attention itself may read faster."""
    data = torch.randint(0, 100, (1 << 29,), dtype=torch.int64, device="cuda")
    us = time_graph([data.sum])
    return data.nbytes / us / 1e3


def summary(cells: list[Case], results: dict[str, dict[str, float]], dtype: str) -> dict[str, Any]:
    """All numbers of a run, as --json writes them."""
    rates = [c.cache_bytes / us / 1e3 for c in cells for us in results[c.name].values()]
    return {
        "date": str(datetime.date.today()),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "dtype": dtype,
        "ceiling": max(read_rate(), *rates),  # GB/s
        "cells": {c.name: {"bytes": c.cache_bytes, "us": results[c.name]} for c in cells},
    }


def report(run: dict[str, Any]) -> None:
    """The Markdown table: microseconds (share of the ceiling)."""
    cells = run["cells"]
    names = list(dict.fromkeys(n for cell in cells.values() for n in cell["us"]))
    print(f"{run['date']}, {run['gpu']}, torch {run['torch']}, {run['dtype']}, head dim 128.")
    print(f"`python {' '.join(sys.argv)}`; ceiling {run['ceiling']:.0f} GB/s.\n")
    print(f"| q/kv heads, rows x context | KV MB | {' | '.join(names)} | of the best peer's time |")
    print("|---" * (len(names) + 3) + "|")
    for name, cell in cells.items():
        size, row = cell["bytes"], cell["us"]
        share = {n: size / us / 1e3 / run["ceiling"] for n, us in row.items()}
        shown = [f"{row[n]:.1f} ({share[n]:.0%})" if n in row else "-" for n in names]
        peers = [us for n, us in row.items() if n != OURS]
        ratio = f"{row[OURS] / min(peers):.2f}" if peers and OURS in row else "-"
        print(f"| {name} | {size / 1e6:.1f} | {' | '.join(shown)} | {ratio} |")


if __name__ == "__main__":
    sys.exit(main())
