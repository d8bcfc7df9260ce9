"""Time decode on a GPU: a bundle on ONNX Runtime's CUDA provider beside PyTorch, in one run.

    python scripts/bench_cuda.py                         1 B parameters, CLA2, one kv head, float16
    python scripts/bench_cuda.py --dtype bf16 --layers 32 --hidden 3072 --ffn 8192 --heads 24
    python scripts/bench_cuda.py --quantize int4         packed weights; PyTorch's have 16 bits

PyTorch is the best that we could write by hand: one CUDA graph a step, q, k and v in one product,
gate and up in another, norms, RoPE and SwiGLU compiled, cuDNN's attention over full rows. A step of
ours includes choosing the greedy token and feeding it to the next step, on the device. Both start
from the same random weights and caches, and their logits are compared first. The floor is the time
in which the weights, and for every layer the keys and values that it reads, come from memory at the
highest rate that this run saw; `cla-export bench` counts keys and values once a group. Quantised
weights count as they are packed, for PyTorch too, which has in 16 bits what they stand for.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from random_model import add_shape_options, config_of, make_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

import cla_export
from cla_export.bundle import Bundle
from cla_export.engines.onnxruntime_cuda import OnnxRuntimeCudaExecutor
from cla_export.floor import Weights, read_weights
from cla_export.models import cla
from cla_export.quantization import NAMES, PACKED, SCALES
from cla_export.spec import ModelSpec

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
REPEATS = 5  # of a timing
SPARE = 128  # tokens that a slot can hold beyond the context


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp16")
    parser.add_argument("--quantize", choices=NAMES, help="weights of the bundle")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--context", type=int, nargs="+", default=[2048, 16384])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--stock", action="store_true", help="ONNX Runtime's own operators alone")
    parser.add_argument("--profile", action="store_true", help="what the time of a step goes to")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--factor", type=int, default=2, metavar="N", help="layers that share")
    add_shape_options(parser, layers=20, hidden=2048, ffn=5472, heads=16, head_dim=128, vocab=50304)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_cuda.py needs an NVIDIA GPU and a CUDA build of PyTorch", file=sys.stderr)
        return 3
    with tempfile.TemporaryDirectory() as scratch:
        model, bundle = make(Path(scratch), args)
        rows = [
            row
            for batch, context in product(args.batch, args.context)
            for row in cell(model, bundle, batch, context, args)
        ]
        weights = read_weights(bundle.graph)
    rate = max(read_rates())
    show(model.spec, weights, rows, rate, args)
    return 0


def make(folder: Path, args: argparse.Namespace) -> tuple[cla.ClaDecoder, Bundle]:
    """A model with random weights, and its bundle."""
    config = config_of(args, args.factor, max(args.context) + SPARE)
    model = make_model(folder / "model", config, DTYPES[args.dtype], "cuda")
    bundle = cla_export.export(
        folder / "model", folder / "bundle", dtype=args.dtype, quantize=args.quantize
    )
    if args.quantize:
        take_packed(model, bundle)
    return model, bundle


def take_packed(model: cla.ClaDecoder, bundle: Bundle) -> None:
    """Give the model the weights that the bundle's packed ones stand for, and an untied head."""
    initializers = ir.load(bundle.graph).graph.initializers
    modules = dict(model.named_modules())
    for name, value in initializers.items():
        if not name.endswith(PACKED):
            continue
        path, _, part = name.removesuffix(PACKED).rpartition(".")
        scales = initializers[f"{path}.{part}{SCALES}"].const_value
        assert value.const_value is not None and scales is not None
        packed = torch.from_numpy(value.const_value.numpy().copy()).cuda()
        steps = torch.from_numpy(scales.numpy().astype(np.float32)).cuda()
        bits = packed.shape[2] // 4  # a byte each of 32 columns: 8
        if bits == 4:
            packed = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
        weight = ((packed.float() - 2 ** (bits - 1)) * steps[..., None]).flatten(-2)
        columns = modules[path].in_features
        kind = next(modules[path].parameters()).dtype
        setattr(modules[path], part, torch.nn.Parameter(weight[:, :columns].to(kind)))


def cell(
    model: cla.ClaDecoder, bundle: Bundle, batch: int, context: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Both contenders at one batch and context."""
    capacity = context + SPARE
    torch.manual_seed(1)
    peer = TorchStep(model, batch, context, capacity)
    executor = OnnxRuntimeCudaExecutor(bundle, capacity=capacity, slots=batch, stock=args.stock)
    for name, tensor in executor_pools(executor).items():
        group, part = name.split(".")
        tensor.copy_(peer.caches[int(group)][part == "value"].view(tensor.dtype))
    tokens = torch.randint(0, args.vocab, (batch,)).tolist()
    slots, lengths = range(batch), [context - 1] * batch
    ours = torch.from_numpy(executor.decode(slots, tokens, lengths))
    theirs = peer.run(tokens).float().cpu()
    off = float((ours - theirs).abs().max() / theirs.abs().max())
    agree = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    executor.decode_greedy(slots, tokens, lengths, 3)
    if args.profile:
        profile(lambda: executor.decode_greedy(slots, tokens, lengths, 5))
    times = {
        "ONNX Runtime": [
            timed(lambda: executor.decode_greedy(slots, tokens, lengths, args.steps)) / args.steps
            for _ in range(REPEATS)
        ],
        "PyTorch": [timed(lambda: peer.replay(args.steps)) / args.steps for _ in range(REPEATS)],
    }
    found = []
    for name, seconds in times.items():
        row = {"contender": name, "batch": batch, "context": context, "off": off, "agree": agree}
        found.append({**row, "us": median(seconds) * 1e6, "best_us": min(seconds) * 1e6})
        print(found[-1], file=sys.stderr, flush=True)
    return found


class TorchStep:
    """A decode step in PyTorch as one CUDA graph, every row at the same length."""

    def __init__(self, model: cla.ClaDecoder, batch: int, context: int, capacity: int) -> None:
        spec = model.spec
        self._layout, self._context, self._heads = spec.layout, context, spec.q_heads
        self._dim = spec.layout.head_dim[0]
        weights = dict(model.named_parameters())
        self._embed = weights["model.embed_tokens.weight"]
        dtype = self._embed.dtype
        self._layers = [self._pack(weights, i) for i in range(spec.num_layers)]
        self._head = weights.get("lm_head.weight", self._embed)
        self._norm, self._eps = weights["model.norm.weight"], spec.norm_eps
        cos, sin = cla.rope_tables(spec.max_positions, self._dim, spec.rope_theta)
        self._cos, self._sin = (t[context - 1].to("cuda", dtype) for t in (cos, sin))
        shape = (batch, spec.layout.kv_heads[0], capacity, self._dim)
        self.caches = [
            (
                torch.randn(shape, device="cuda", dtype=dtype),
                torch.randn(shape, device="cuda", dtype=dtype),
            )
            for _ in spec.layout.groups
        ]
        self._ids = torch.zeros(batch, dtype=torch.int64, device="cuda")
        stream = torch.cuda.Stream()
        with torch.inference_mode():
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self._step()
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits = self._step()

    def _pack(self, weights: dict[str, Tensor], i: int) -> dict[str, Tensor]:
        layer = f"model.layers.{i}."
        names = ("q_proj", "k_proj", "v_proj") if self._layout.is_owner(i) else ("q_proj",)
        return {
            "qkv": torch.cat([weights[f"{layer}self_attn.{n}.weight"] for n in names]).t(),
            "o": weights[f"{layer}self_attn.o_proj.weight"].t(),
            "gate_up": torch.cat(
                [weights[f"{layer}mlp.{n}_proj.weight"] for n in ("gate", "up")]
            ).t(),
            "down": weights[f"{layer}mlp.down_proj.weight"].t(),
            "norm": weights[f"{layer}input_layernorm.weight"],
            "post": weights[f"{layer}post_attention_layernorm.weight"],
        }

    def _step(self) -> Tensor:
        stream = torch.nn.functional.embedding(self._ids, self._embed)
        branch = torch.zeros_like(stream)
        width = self._heads * self._dim
        for i, layer in enumerate(self._layers):
            x, stream = add_norm(stream, branch, layer["norm"], self._eps)
            qkv = x @ layer["qkv"]
            keys, values = self.caches[self._layout.group_of(i)]
            if self._layout.is_owner(i):
                q = rotate_and_write(
                    qkv, self._cos, self._sin, keys, values, self._context - 1, width, self._dim
                )
            else:
                q = rotate_heads(qkv, self._cos, self._sin, self._dim)
            seen = (part[:, :, : self._context] for part in (keys, values))
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                y = sdpa(q[:, :, None], *seen, enable_gqa=True)
            x, stream = add_norm(
                stream, y.reshape(-1, width) @ layer["o"], layer["post"], self._eps
            )
            branch = swiglu(x @ layer["gate_up"]) @ layer["down"]
        x, _ = add_norm(stream, branch, self._norm, self._eps)
        return x @ self._head.t()

    def run(self, tokens: list[int]) -> Tensor:
        self._ids.copy_(torch.tensor(tokens))
        self._graph.replay()
        torch.cuda.synchronize()
        return self._logits

    def replay(self, steps: int) -> None:
        for _ in range(steps):
            self._graph.replay()
        torch.cuda.synchronize()


@torch.compile
def add_norm(stream: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    stream = stream + branch
    wide = stream.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(stream.dtype), stream


@torch.compile
def swiglu(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


@torch.compile
def rotate_heads(q: Tensor, cos: Tensor, sin: Tensor, dim: int) -> Tensor:
    a, b = q.view(q.shape[0], -1, dim).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@torch.compile
def rotate_and_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    place: int,
    width: int,
    dim: int,
) -> Tensor:
    kv_heads = keys.shape[1]
    q, k, v = qkv.split([width, kv_heads * dim, kv_heads * dim], -1)
    heads = torch.cat((q, k), -1).view(qkv.shape[0], -1, dim)
    a, b = heads.chunk(2, -1)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    keys[:, :, place] = turned[:, -kv_heads:]
    values[:, :, place] = v.view(qkv.shape[0], kv_heads, dim)
    return turned[:, :-kv_heads].contiguous()


class _Array:
    """Device memory as PyTorch takes it."""

    def __init__(self, address: int, shape: tuple[int, ...]) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": "<i2", "data": (address, False), "version": 3,
        }  # fmt: skip


def executor_pools(executor: OnnxRuntimeCudaExecutor) -> dict[str, Tensor]:
    """The executor's own pools, as 16-bit integers."""
    return {
        name: torch.as_tensor(_Array(pool.start, (executor.slots, *pool.shape)), device="cuda")
        for name, pool in executor.pools.by_name.items()
    }


def timed(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def profile(work: Callable[[], object]) -> None:
    """Print what each kernel of five steps takes; one that starts early counts its waiting too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    events = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
    for event in events[:20]:
        total, count = event.self_device_time_total, event.count
        each = f"{count / 5:5.1f} x {total / count:6.2f}"
        print(f"{total / 5:8.1f} us a step, {each}  {event.key[:90]}", file=sys.stderr)


def read_rates() -> list[float]:
    """Bytes per second at which two readers go through gigabytes: a sum, and cuDNN's attention."""
    numbers = torch.ones(1 << 30, dtype=torch.int32, device="cuda")
    kv = torch.randn(2, 64, 4, 65536, 128, dtype=torch.float16, device="cuda")
    q = torch.randn(64, 16, 1, 128, dtype=torch.float16, device="cuda")

    def attend() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            sdpa(q, kv[0], kv[1], enable_gqa=True)

    rates = []
    for size, work in ((numbers.nbytes, numbers.sum), (kv.nbytes, attend)):
        work()
        rates.append(size / min(timed(work) for _ in range(10)))
    return rates


def show(
    spec: ModelSpec,
    weights: Weights,
    rows: list[dict[str, Any]],
    rate: float,
    args: argparse.Namespace,
) -> None:
    for row in rows:
        per_token = 4 * sum(
            h * d for h, d in zip(spec.layout.kv_heads, spec.layout.head_dim, strict=True)
        )
        read = weights.whole + row["batch"] * (weights.row + row["context"] * per_token)
        row["floor_us"] = read / rate * 1e6
        row["share"] = row["floor_us"] / row["us"]
    place = {"gpu": torch.cuda.get_device_name(), "date": str(date.today()), "rate": rate}
    place |= {"torch": torch.__version__, "command": f"python {' '.join(sys.argv)}"}
    print(f"{place['date']}, {place['gpu']}, torch {place['torch']}; `{place['command']}`")
    kind = f"{args.dtype}, {args.quantize} weights" if args.quantize else args.dtype
    size = f"{spec.parameters() / 1e9:.2f} B parameters, {kind}"
    print(f"\n{size}; memory read at {rate / 1e9:.0f} GB/s\n")
    titles = ("batch / context", "floor us", "ONNX Runtime us", "share", "PyTorch us", "share")
    print(f"| {' | '.join((*titles, 'logits off', 'same token'))} |")
    print("|---|---|---|---|---|---|---|---|")
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        cells = [f"{ours['batch']} / {ours['context']}", f"{ours['floor_us']:.0f}"]
        for row in (ours, theirs):
            cells += [f"{row['us']:.0f}", f"{row['share']:.0%}"]
        cells += [f"{ours['off']:.1e}", f"{ours['agree']:.0%}"]
        print(f"| {' | '.join(cells)} |")
    if args.json:
        args.json.write_text(json.dumps({**place, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
