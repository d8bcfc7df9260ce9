"""Time a prompt's attention node: ClaAttention beside PyTorch's own attention, on this GPU.

    python scripts/bench_prompt_attention.py
    python scripts/bench_prompt_attention.py --heads 32/8 --head-dim 64 --chunks 512x512 2048x8192

A cell is a chunk of query positions at the end of so many keys; every contender's answer is
compared with the float32 reference first. Median over replays of a CUDA graph of several nodes, and
TFLOP/s of the scores that are not masked. FlashAttention gets the chunk's place as PyTorch's
`causal_lower_right`; cuDNN, which PyTorch gives no such thing, only takes chunks with nothing
before them.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from bench_attention import TOLERANCE, time_graph
from provenance import heading, provenance
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa

from cla_export.plugin.contract import Problem
from cla_export.plugin.launch import Launcher, torch_attention
from cla_export.plugin.reference import torch_reference

NODES = 8  # of a graph
Call = Callable[[], Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--heads", default="16/1", metavar="QUERY/KV")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument(
        "--chunks",
        nargs="+",
        default=["2048x2048", "2048x8192", "2048x16384", "512x512", "512x8192", "512x16384"],
        metavar="QUERIESxKEYS",
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"{Path(__file__).name} needs an NVIDIA GPU and PyTorch for CUDA", file=sys.stderr)
        return 3
    query_heads, kv_heads = map(int, args.heads.split("/"))
    launcher, rows = Launcher(), []
    for chunk in args.chunks:
        queries, keys = map(int, chunk.split("x"))
        scale = args.head_dim**-0.5
        problem = Problem(
            1, query_heads, kv_heads, args.head_dim, keys, queries, scale, dtype=args.dtype
        )
        seen = queries * (keys - queries) + queries * (queries + 1) // 2
        flops = 4 * query_heads * args.head_dim * seen
        times = dict(measure(launcher, problem))
        rows.append({"chunk": chunk, "flops": flops, "us": times})
    run = {**provenance(1, torch.cuda.get_device_name()), "rows": rows}
    print(f"{heading(run, args.dtype)}\n{args.heads} heads of {args.head_dim}.\n")
    names = list(dict.fromkeys(name for row in rows for name in row["us"]))
    print(f"| queries x keys | {' | '.join(names)} |\n{'|---' * (len(names) + 1)}|")
    for row in rows:
        shown = [
            f"{us:.0f} us, {row['flops'] / us / 1e6:.0f} TFLOP/s"
            if (us := row["us"].get(n))
            else "-"
            for n in names
        ]
        print(f"| {row['chunk']} | {' | '.join(shown)} |")
    if args.json:
        args.json.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(launcher: Launcher, problem: Problem) -> Iterator[tuple[str, float]]:
    """Median microseconds a node of everyone whose answer is right."""
    torch.manual_seed(0)
    dtype = getattr(torch, problem.dtype)
    q = torch.randn(problem.query_shape, dtype=dtype, device="cuda")
    k, v = (torch.randn(problem.cache_shape, dtype=dtype, device="cuda") for _ in range(2))
    lengths = torch.tensor([problem.capacity], dtype=torch.int32, device="cuda")
    expected = torch_reference(q, k, v, lengths, scale=problem.scale)
    for name, call in contenders(launcher, problem, q, k, v, lengths):
        try:
            error = ((call().float() - expected).norm() / expected.norm()).item()
            us = time_graph([call] * NODES)
        except RuntimeError as reason:
            print(f"{problem.queries}x{problem.capacity}: {name}: {reason}", file=sys.stderr)
            continue
        if error < TOLERANCE[problem.dtype]:
            yield name, us
        else:
            print(f"{problem}: {name} is wrong, relative error {error:.1e}", file=sys.stderr)


def contenders(
    launcher: Launcher, problem: Problem, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor
) -> Iterator[tuple[str, Call]]:
    scale = problem.scale
    yield "ClaAttention", lambda: torch_attention(launcher, q, k, v, lengths, scale=scale)
    first = problem.queries == problem.capacity
    place = None if first else causal_lower_right(problem.queries, problem.capacity)

    def on(backend: SDPBackend) -> Call:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(q, k, v, attn_mask=place, is_causal=first, scale=scale, enable_gqa=True)

        return call

    yield "FlashAttention", on(SDPBackend.FLASH_ATTENTION)
    if first:
        yield "cuDNN", on(SDPBackend.CUDNN_ATTENTION)


if __name__ == "__main__":
    sys.exit(main())
