"""Decode and prefill on one CPU: a bundle beside what people would use instead of it.

    python scripts/bench_peers.py                              a model with random weights
    python scripts/bench_peers.py MODEL --batch 1,8 --context 512,8192 --json OUT.json
    python scripts/bench_peers.py --layers 4 --context 512 --peers bundle,stock    a quick look

All peers have the same weights and, but for genai, which reads a prompt instead, the same made-up
keys and values in their caches. Each lives in a process of its own, so that its peak memory is its
own, and only one computes at a time. Before anything is timed, each decodes the same tokens as
the model's PyTorch module: whoever is off by more than 0.001 is WRONG and not timed.

A cell is a batch and a context; its rounds go through all peers in turn, so that noise hits all
alike. A step is greedy, from tokens to next tokens, and a number is the median over rounds of the
median step. The floor is the time that memory takes to deliver the weights and, once for each
group, the valid keys and values; its bandwidth is read between rounds.

    bundle             our export, as its executor runs it
    stock              the same weights with ONNX Runtime's GroupQueryAttention, in place
    torch eager        PyTorch over caches per group, query heads of a kv head folded, in place
    torch compile      the same, compiled for each cell
    torch frozen       the same, with the weights packed by the compiler; not run by default
    per-layer Concat   ONNX, a cache for each layer that grows by Concat: Attention on its present
    per-group Concat   the same with a cache for each group
    genai              onnxruntime-genai on the bundle's folder
"""

import argparse
import contextlib
import gc
import inspect
import json
import os
import platform
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from cla_export.bandwidth import read_bandwidth
from cla_export.bundle import Bundle, open_bundle, write_json
from cla_export.engines.executor import Executor
from cla_export.layout import KVLayout, uniform
from cla_export.spec import ModelSpec

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

    from cla_export.models.cla import ClaDecoder, Layer

Floats = NDArray[np.float32]
Prompts = NDArray[np.int64]  # [B, S]
Answer = dict[str, Any]

PREFILL_PEERS = ("bundle", "stock", "torch eager", "genai")
EXTRA_PEERS = ("torch frozen",)  # run only if named
ALLOWED = 1e-3  # of a logit; rounding moves one by 1e-5
CHECK_BATCH, CHECK_PROMPT = 2, 24
WARM = 2  # steps before those that are timed
PREFILLS = 3  # prompts a round, the first of them untimed
PIECE = 512  # tokens of a long prompt that genai appends at once
LONGEST_BATCHED = 2048  # tokens of a prompt that genai, which takes a batch's whole, has memory for
REST = 0.2  # seconds in which the threads of the last peer go to sleep
TOOLS = ("torch", "onnxruntime", "onnxruntime-genai", "numpy")


class Refused(Exception):
    """A peer cannot run a cell, for a reason known in advance."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What is timed: decode steps behind `context` tokens, or the prefill of that many."""

    phase: str
    batch: int
    context: int

    @property
    def name(self) -> str:
        head = "" if self.phase == "decode" else f"{self.phase} "
        return f"{head}{self.batch} / {self.context}"

    def capacity(self, steps: int) -> int:
        """Tokens that a slot must hold, for so many steps in a row."""
        return self.context + (steps + 1 if self.phase == "decode" else 0)


@dataclass(slots=True)
class Row:
    """One peer in one cell."""

    peer: str
    phase: str
    batch: int
    context: int
    ms_per_step: float | None = None
    tokens_per_s: float | None = None
    floor_share: float | None = None  # the floor's time over the peer's
    peak_rss_bytes: int | None = None  # of its process, so far
    outcome: str = "ok"
    round_ms: list[float] = field(default_factory=list)  # medians


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL_FOLDER")
    parser.add_argument("--peers", type=peer_names, metavar="NAME,...")
    parser.add_argument("--batch", type=numbers, default=[1, 8], metavar="N,...")
    parser.add_argument("--context", type=numbers, default=[512, 8192], metavar="N,...")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of prefill; 0 for none")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    alone = "keep one peer's model in memory, loaded anew for every turn"
    parser.add_argument("--one-at-a-time", action="store_true", help=alone)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--factor", type=int, default=2, metavar="N", help="layers that share")
    add_shape_options(parser)
    options = parser.parse_args()
    if options.worker:
        return work(options.worker, options.model, options)
    options.peers = options.peers or [name for name in PEERS if name not in EXTRA_PEERS]
    cells = [
        Cell("decode", batch, context) for batch in options.batch for context in options.context
    ]
    if options.prompt:
        cells.append(Cell("prefill", 1, options.prompt))
    with tempfile.TemporaryDirectory() as scratch:
        bundle, spec = prepare(options, cells, Path(scratch))
        rows, bandwidths = measure(bundle, cells, options)
    for row in rows:
        conclude(row, spec, statistics.median(bandwidths))
    run = summary(spec, rows, bandwidths, options.threads)
    text = markdown(run, rows)
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    if options.json:
        write_json(options.json, run)
    return int(any(row.outcome.startswith("WRONG") for row in rows))


def numbers(text: str) -> list[int]:
    return [int(item) for item in text.split(",")]


def peer_names(text: str) -> list[str]:
    known = {plain(name): name for name in PEERS}
    try:
        return [known[plain(name)] for name in text.split(",")]
    except KeyError as error:
        raise argparse.ArgumentTypeError(
            f"no peer is called {error}; expected some of {', '.join(PEERS)}"
        ) from error


def plain(name: str) -> str:
    return name.strip().lower().replace("-", " ")


# The model.


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """The shape of a model with random weights, but for who shares."""
    shape = parser.add_argument_group("shape of a model with random weights")
    for name, default in (
        ("layers", 12), ("hidden", 768), ("ffn", 2048), ("heads", 12), ("kv-heads", 1),
        ("head-dim", 64), ("vocab", 32000),
    ):  # fmt: skip
        shape.add_argument(f"--{name}", type=int, default=default, metavar="N")


def make_model(folder: Path, shape: argparse.Namespace, factor: int, positions: int) -> Path:
    """Write a checkpoint with random weights, normal, scaled by the width of their input."""
    import torch

    from cla_export.models import cla
    from cla_export.models.checkpoint import save_checkpoint

    config = {
        "model_type": "cla",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "kv_owner": list(uniform(shape.layers, factor, "first")),
        "max_position_embeddings": positions,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    model = cla.build(cla.read_spec(config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    save_checkpoint(model, folder, config)
    return folder


def made_up(
    layout: KVLayout, batch: int, tokens: int, only: int | None = None
) -> Iterator[tuple[int, int, Floats, Floats]]:
    """Group, slot, keys and values, each [Hkv, T, D], of normal numbers: the same for everyone."""
    groups = layout.groups if only is None else layout.groups[only : only + 1]
    for group in groups:
        for slot in range(batch):
            random = np.random.default_rng([group.index, slot])
            shape = (2, group.kv_heads, tokens, group.head_dim)
            keys, values = random.standard_normal(shape, np.float32)
            yield group.index, slot, keys, values


def prepare(
    options: argparse.Namespace, cells: Sequence[Cell], scratch: Path
) -> tuple[Bundle, ModelSpec]:
    """Export the model to a bundle in `scratch`, and write what other peers need beside it."""
    from cla_export.exporter import export
    from cla_export.models.checkpoint import open_checkpoint

    steps = options.rounds * (WARM + options.steps)
    positions = max(2 * CHECK_PROMPT, *(cell.capacity(steps) for cell in cells))
    source = options.model
    if source is None:
        source = make_model(scratch / "model", options, options.factor, positions)
    bundle = export(source, scratch / "bundle")
    if bundle.max_positions < positions:
        raise SystemExit(f"{source}: {bundle.max_positions} positions; the cells take {positions}")
    for name in options.peers:
        if name.endswith("Concat"):
            write_concat(bundle, concat_path(bundle, name), per_layer=name == "per-layer Concat")
    if "genai" in options.peers:
        write_endless(bundle)
    return bundle, open_checkpoint(source).spec


def genai_path(bundle: Bundle) -> Path:
    return bundle.folder.parent / "genai"


def write_endless(bundle: Bundle) -> None:
    """The bundle's files once more, linked, for genai, of a model that no token of text ends."""
    shutil.copytree(bundle.folder, genai_path(bundle), copy_function=os.link)
    path = genai_path(bundle) / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"].pop("eos_token_id", None)
    path.unlink()  # not the bundle's
    write_json(path, config)


def concat_path(bundle: Bundle, name: str) -> Path:
    return bundle.folder.parent / f"{name}.onnx"


def write_concat(bundle: Bundle, path: Path, *, per_layer: bool) -> None:
    """Write a graph whose caches grow by Concat, over the bundle's weights.

    past, new -> Concat -> present, which the Attention of each layer that the cache is for reads.
    Cosines and sines come from the model's tables.
    """
    import onnx_ir as ir
    import torch

    from cla_export.models import family_of
    from cla_export.models.checkpoint import open_checkpoint
    from cla_export.rewrite import rewrite
    from cla_export.rewrite.simplify import drop_unused
    from cla_export.trace import trace

    checkpoint = open_checkpoint(bundle.source)
    layout = checkpoint.spec.layout
    stateless = trace(family_of(checkpoint.config), checkpoint.spec, torch.float32)
    model = rewrite(stateless, layout).model
    grow_by_concat(model.graph, layout, per_layer=per_layer)
    drop_unused(model)
    stored = ir.load(bundle.graph).graph.initializers
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            value.const_value = stored[name].const_value
    path.write_bytes(ir.to_proto(model).SerializeToString())


def grow_by_concat(graph: "ir.Graph", layout: KVLayout, *, per_layer: bool) -> None:
    """Replace the caches of a canonical graph, written by TensorScatter, by growing ones."""
    import onnx_ir as ir

    from cla_export.rewrite.builder import Builder
    from cla_export.rewrite.values import attention_nodes, producer

    build, attentions = Builder(graph), attention_nodes(graph)
    scatters = {
        (group.owner, place): producer(attentions[group.owner].inputs[place], "TensorScatter")
        for group in layout.groups
        for place in (1, 2)
    }
    graph.inputs[:] = [value for value in graph.inputs if not is_past(value)]
    graph.outputs[:] = graph.outputs[:1]
    for index, layer in enumerate(cache_layers(layout, per_layer=per_layer)):
        for place, part in ((1, "key"), (2, "value")):
            scatter = scatters[layout.kv_owner[layer], place]
            assert scatter is not None and scatter.inputs[1] is not None
            new = scatter.inputs[1]
            assert new.shape is not None and new.dtype is not None
            heads, dim = new.shape[1], new.shape[3]
            past = ir.Value(
                name=f"past_key_values.{index}.{part}",
                type=ir.TensorType(new.dtype),
                shape=ir.Shape(["batch", heads, "past", dim]),
            )
            present = build.op(
                "Concat",
                [past, new],
                {"axis": 2},
                shape=["batch", heads, "total", dim],
                dtype=new.dtype,
                name=f"present.{index}.{part}",
            )
            if layout.is_owner(layer):
                scatter.outputs[0].replace_all_uses_with(present)
            attentions[layer].replace_input_with(place, present)
            graph.inputs.append(past)
            graph.outputs.append(present)
    graph.sort()


def is_past(value: "ir.Value") -> bool:
    return str(value.name).startswith("past_key_values.")


def cache_layers(layout: KVLayout, *, per_layer: bool) -> list[int]:
    """The layer that each cache is named after: every layer, or every owner."""
    return [layer for layer in range(layout.num_layers) if per_layer or layout.is_owner(layer)]


# The peers, each in a worker.


class Peer(ABC):
    """Decodes rows of equal length over caches of its own."""

    fills = True  # whether its caches can be filled with made-up keys and values
    goes_on = False  # whether a round starts where the last one ended

    @abstractmethod
    def start(self, batch: int, capacity: int) -> None:
        """Have empty caches, and no others, for `batch` rows of up to `capacity` tokens."""

    @abstractmethod
    def fill(self, context: int) -> None:
        """Hold `context` made-up tokens in each row."""

    @abstractmethod
    def prefill(self, rows: Prompts) -> Floats:
        """Hold first prompts [B, S]; logits [B, V] of their last tokens."""

    @abstractmethod
    def decode(self, tokens: Sequence[int], length: int) -> Floats:
        """Append a token to rows that hold `length`; logits [B, V]."""

    @abstractmethod
    def free(self) -> None:
        """Let the caches go."""

    def rewind(self, context: int) -> None:  # noqa: B027  most have nothing to do
        """Hold `context` tokens again; what is behind them may stay."""

    def step(self, tokens: Sequence[int], length: int) -> Sequence[int]:
        """From tokens to the next, greedily."""
        best: list[int] = self.decode(tokens, length).argmax(-1).tolist()
        return best


class ExecutorPeer(Peer):
    """An executor of this package."""

    def __init__(self, layout: KVLayout, open_: Callable[..., Executor]) -> None:
        self._layout, self._open = layout, open_
        self._executor: Executor | None = None

    def start(self, batch: int, capacity: int) -> None:
        self.free()
        self._executor = self._open(capacity=capacity, slots=batch)

    def fill(self, context: int) -> None:
        executor = self._opened()
        for made in made_up(self._layout, executor.slots, context):
            executor.write(*made)

    def prefill(self, rows: Prompts) -> Floats:
        return self._opened().prefill_rows(0, rows.tolist())

    def decode(self, tokens: Sequence[int], length: int) -> Floats:
        return self._opened().decode(range(len(tokens)), tokens, [length] * len(tokens))

    def free(self) -> None:
        self._executor = None

    def _opened(self) -> Executor:
        assert self._executor is not None, "start comes first"
        return self._executor


def bundle_peer(bundle: Bundle, threads: int) -> Peer:
    from cla_export.engines.opening import open_executor

    return ExecutorPeer(bundle.layout, partial(open_executor, bundle, threads=threads))


def stock_peer(bundle: Bundle, threads: int) -> Peer:
    """The executor on model.onnx, which it must be told to run where it has a choice."""
    from cla_export.engines.onnxruntime import OnnxRuntimeExecutor

    open_: Callable[..., Executor] = partial(OnnxRuntimeExecutor, bundle, threads=threads)
    if "stock" in inspect.signature(OnnxRuntimeExecutor).parameters:
        open_ = partial(open_, stock=True)
    return ExecutorPeer(bundle.layout, open_)


class TorchPeer(Peer):
    """PyTorch over preallocated caches per group, query heads folded onto their kv head.

    Eagerly, a step reads the valid part of the caches. Compiled, its shapes stand still: it reads
    all of them, which in a cell is a few tokens more, behind a mask.
    """

    def __init__(
        self, bundle: Bundle, threads: int, *, compiled: bool = False, frozen: bool = False
    ) -> None:
        import torch

        from cla_export.models.checkpoint import load_model, open_checkpoint

        torch.set_num_threads(threads)
        self._model = load_model(open_checkpoint(bundle.source))
        self._model.requires_grad_(requires_grad=False)
        self._caches: list[tuple[Tensor, Tensor]] = []
        self._compiled, self._compiled_for = compiled, (0, 0)
        self._run: Callable[..., Tensor] = torch_step
        if frozen:
            from torch._inductor import config

            config.freezing = True  # the tracer reads it too, so it is no option of `compile`

    def start(self, batch: int, capacity: int) -> None:
        import torch

        self.free()
        for group in self._model.spec.layout.groups:
            shape = (batch, group.kv_heads, capacity, group.head_dim)
            self._caches.append((torch.zeros(shape), torch.zeros(shape)))
        if self._compiled and self._compiled_for != (batch, capacity):
            self._compiled_for = batch, capacity
            torch.compiler.reset()
            self._run = torch.compile(torch_step, dynamic=False, fullgraph=True)

    def fill(self, context: int) -> None:
        import torch

        batch = self._caches[0][0].shape[0]
        for group, slot, *made in made_up(self._model.spec.layout, batch, context):
            for cache, new in zip(self._caches[group], made, strict=True):
                cache[slot, :, :context] = torch.from_numpy(new)

    def prefill(self, rows: Prompts) -> Floats:
        import torch

        with torch.inference_mode():
            ids = torch.from_numpy(rows)
            positions = torch.arange(rows.shape[1]).expand_as(ids)
            hidden, shared = self._model.model(ids, positions, None)
            for caches, parts in zip(self._caches, shared, strict=True):
                for cache, new in zip(caches, parts, strict=True):
                    cache[:, :, : rows.shape[1]] = new
            logits: Floats = self._model.lm_head(hidden[:, -1]).numpy()
        return logits

    def decode(self, tokens: Sequence[int], length: int) -> Floats:
        import torch

        end = None if self._compiled else length + 1
        with torch.inference_mode():
            ids, position = torch.tensor(tokens), torch.tensor([length])
            logits: Floats = self._run(self._model, self._caches, ids, position, end).numpy()
        return logits

    def free(self) -> None:
        self._caches = []


def torch_step(
    model: "ClaDecoder",
    caches: "Sequence[tuple[Tensor, Tensor]]",
    ids: "Tensor",
    position: "Tensor",
    end: int | None,
) -> "Tensor":
    """Logits [B, V] of ids [B], all at one position [1].

    `end` is the position after it, where it may be a number; None masks the caches' rest instead.
    """
    from torch.nn import functional as F  # noqa: N812

    from cla_export.models.cla import rotate

    body = model.model
    x = body.embed_tokens(ids)  # [B, H]
    rope = body.rope_cos[position], body.rope_sin[position]  # [1, D/2]
    for layer in cast("Iterable[Layer]", body.layers):
        attention, (keys, values) = layer.self_attn, caches[layer.group]
        normed = layer.input_layernorm(x)
        if attention.is_owner:
            source = layer.kv_layernorm(x) if hasattr(layer, "kv_layernorm") else normed
            key, value = attention.project_kv(source[:, None], rope)  # [B, Hkv, 1, D]
            keys.index_copy_(2, position, key)
            values.index_copy_(2, position, value)
        query = attention.q_proj(normed).view(len(ids), attention.kv_heads, -1, attention.head_dim)
        if attention.q_norm is not None:
            query = attention.q_norm(query)
        seen = visible(keys, values, position, end, layer.window)
        y = F.scaled_dot_product_attention(rotate(query, *rope), *seen)  # [B, Hkv, Hq/Hkv, D]
        x = x + attention.o_proj(y.reshape(len(ids), -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    logits: Tensor = model.lm_head(body.norm(x))
    return logits


def visible(
    keys: "Tensor", values: "Tensor", position: "Tensor", end: int | None, window: int | None
) -> "tuple[Tensor, Tensor, Tensor | None]":
    """Keys and values, and a mask where they are more than a query at `position` sees."""
    import torch

    if end is not None:
        seen = slice(0 if window is None else max(0, end - window), end)
        return keys[:, :, seen], values[:, :, seen], None
    places = torch.arange(keys.shape[2])
    mask = places <= position
    if window is not None:
        mask &= places > position - window
    return keys, values, mask[None, None, None]


class ConcatPeer(Peer):
    """A graph that returns caches one token longer; they are bound as the next step's past."""

    def __init__(self, bundle: Bundle, threads: int, *, name: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only, as the executor
        options.intra_op_num_threads = threads
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(bundle.folder)
        )
        self._ort, self._layout, self._batch = onnxruntime, bundle.layout, 0
        self._session = onnxruntime.InferenceSession(
            concat_path(bundle, name).read_bytes(), options, providers=["CPUExecutionProvider"]
        )
        layers = cache_layers(bundle.layout, per_layer=name == "per-layer Concat")
        self._groups = [bundle.layout.group_of(layer) for layer in layers]  # of each cache
        self._pasts: dict[str, Any] = {}  # `0.key` -> OrtValue

    def start(self, batch: int, capacity: int) -> None:  # noqa: ARG002
        self._batch = batch
        self.fill(0)

    def fill(self, context: int) -> None:
        self.free()
        for index, group in enumerate(self._groups):
            made = [row[2:] for row in made_up(self._layout, self._batch, context, group)]
            for part, rows in zip(("key", "value"), zip(*made, strict=True), strict=True):
                value = self._ort.OrtValue.ortvalue_from_shape_and_type(
                    [self._batch, *rows[0].shape], np.float32
                )
                value.update_inplace(np.stack(rows))
                self._pasts[f"{index}.{part}"] = value

    def rewind(self, context: int) -> None:
        self.fill(context)

    def prefill(self, rows: Prompts) -> Floats:
        return self._append(rows, 0)

    def decode(self, tokens: Sequence[int], length: int) -> Floats:
        return self._append(np.array(tokens, np.int64)[:, None], length)

    def free(self) -> None:
        self._pasts = {}

    def _append(self, rows: Prompts, held: int) -> Floats:
        binding = self._session.io_binding()
        starts = np.full(len(rows), held, np.int64)
        feeds = {
            "input_ids": rows,
            "write_indices": starts,
            "kv_lengths": starts + rows.shape[1],
            "logits_to_keep": np.array(1, np.int64),
        }
        values = {name: self._ort.OrtValue.ortvalue_from_numpy(feeds[name]) for name in feeds}
        values |= {f"past_key_values.{name}": value for name, value in self._pasts.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in ("logits", *(f"present.{name}" for name in self._pasts)):
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        logits, *presents = binding.get_outputs()
        self._pasts = dict(zip(self._pasts, presents, strict=True))
        last: Floats = logits.numpy()[:, -1]
        return last


class GenaiPeer(Peer):
    """onnxruntime-genai. It cannot go back in a batch, so it goes on from round to round."""

    fills = False
    goes_on = True

    def __init__(self, bundle: Bundle, threads: int) -> None:
        try:
            import onnxruntime_genai
        except ImportError as error:
            raise Refused(
                "onnxruntime-genai is not installed; pip install onnxruntime-genai"
            ) from error
        self._og, self._vocab = onnxruntime_genai, bundle.vocab_size
        config = onnxruntime_genai.Config(str(genai_path(bundle)))
        session = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = onnxruntime_genai.Model(config)
        self._shape = 0, 0
        self._generator: Any = None

    def start(self, batch: int, capacity: int) -> None:
        self.free()
        self._shape = batch, capacity
        parameters = self._og.GeneratorParams(self._model)
        parameters.set_search_options(batch_size=batch, max_length=capacity, do_sample=False)
        self._generator = self._og.Generator(self._model, parameters)

    def fill(self, context: int) -> None:
        batch = self._shape[0]
        if batch > 1 and context > LONGEST_BATCHED:
            raise Refused(
                f"a batch's prompts are taken whole, and {batch} x {context} tokens need too much "
                "memory for their scores"
            )
        rows = prompts(batch, context, self._vocab)
        pieces = [rows] if batch > 1 else np.split(rows, range(PIECE, context, PIECE), axis=1)
        for piece in pieces:
            self._generator.append_tokens(piece.astype(np.int32))

    def rewind(self, context: int) -> None:
        if context == 0:
            self.start(*self._shape)

    def prefill(self, rows: Prompts) -> Floats:
        self._generator.append_tokens(rows.astype(np.int32))
        logits: Floats = self._generator.get_logits()[:, -1]
        return logits

    def decode(self, tokens: Sequence[int], length: int) -> Floats:  # noqa: ARG002
        """It appends the token that it chose itself, which should be the same."""
        self._generator.generate_next_token()
        logits: Floats = self._generator.get_logits()[:, -1]
        return logits

    def step(self, tokens: Sequence[int], length: int) -> Sequence[int]:  # noqa: ARG002
        self._generator.generate_next_token()
        return tokens

    def free(self) -> None:
        self._generator = None


PEERS: Mapping[str, Callable[[Bundle, int], Peer]] = {
    "bundle": bundle_peer,
    "stock": stock_peer,
    "torch eager": TorchPeer,
    "torch compile": partial(TorchPeer, compiled=True),
    "torch frozen": partial(TorchPeer, compiled=True, frozen=True),
    "per-layer Concat": partial(ConcatPeer, name="per-layer Concat"),
    "per-group Concat": partial(ConcatPeer, name="per-group Concat"),
    "genai": GenaiPeer,
}


# A worker: one peer, asked by lines of JSON.


def work(name: str, folder: Path, options: argparse.Namespace) -> int:
    """Answer requests on stdin until it ends; whatever else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    desk = Desk(name, open_bundle(folder, verify=False), options)
    for line in sys.stdin:
        try:
            answer = desk.answer(json.loads(line))
        except Refused as error:
            answer = {"outcome": f"refused: {error}"}
        except Exception as error:  # compilers and runtimes each have their own
            traceback.print_exc()
            answer = {"outcome": f"failed: {type(error).__name__}: {str(error).split(chr(10))[0]}"}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


class Desk:
    """Takes requests for one peer."""

    def __init__(self, name: str, bundle: Bundle, options: argparse.Namespace) -> None:
        self._name, self._bundle, self._options = name, bundle, options
        self._peer: Peer | None = None
        self._cell = Cell("decode", 0, 0)

    def answer(self, request: Answer) -> Answer:
        peer = self._peer = self._peer or PEERS[self._name](self._bundle, self._options.threads)
        if request["do"] == "check":
            np.save(request["file"], check_logits(peer, self._bundle))
        elif request["do"] == "open":
            self._cell = Cell(**request["cell"])
            self._open(peer)
        elif request["do"] == "round":
            return {"ms": self._round(peer), "peak_rss_bytes": peak_rss()}
        elif request["do"] == "close":
            peer.free()
            gc.collect()
        return {}

    def _open(self, peer: Peer) -> None:
        cell, options = self._cell, self._options
        rounds = options.rounds if peer.goes_on else 1
        peer.start(cell.batch, cell.capacity(rounds * (WARM + options.steps)))
        if cell.phase == "decode":
            peer.fill(cell.context)

    def _round(self, peer: Peer) -> list[float]:
        cell = self._cell
        if cell.phase == "prefill":
            return prefill_ms(peer, prompts(cell.batch, cell.context, self._bundle.vocab_size))
        return decode_ms(peer, cell, self._options.steps)


def decode_ms(peer: Peer, cell: Cell, steps: int) -> list[float]:
    """Milliseconds of each step behind the cell's context."""
    peer.rewind(cell.context)
    tokens: Sequence[int] = [1] * cell.batch
    found = []
    for length in range(cell.context, cell.context + WARM + steps):
        began = time.perf_counter()
        tokens = peer.step(tokens, length)
        found.append((time.perf_counter() - began) * 1e3)
    return found[WARM:]


def prefill_ms(peer: Peer, rows: Prompts) -> list[float]:
    """Milliseconds of each prefill into empty caches."""
    found = []
    for _ in range(PREFILLS):
        peer.rewind(0)
        began = time.perf_counter()
        peer.prefill(rows)
        found.append((time.perf_counter() - began) * 1e3)
    return found[1:]


def check_logits(peer: Peer, bundle: Bundle) -> Floats:
    """Logits [N, B, V] after prompts, after the tokens they suggest, and behind made-up caches."""
    capacity = 2 * CHECK_PROMPT
    peer.start(CHECK_BATCH, capacity)
    found = [peer.prefill(prompts(CHECK_BATCH, CHECK_PROMPT, bundle.vocab_size)).copy()]
    found.append(peer.decode(found[0].argmax(-1).tolist(), CHECK_PROMPT).copy())
    if peer.fills:
        peer.start(CHECK_BATCH, capacity)
        peer.fill(CHECK_PROMPT)
        found.append(peer.decode([1] * CHECK_BATCH, CHECK_PROMPT).copy())
    peer.free()
    return np.stack(found)


def prompts(batch: int, length: int, vocab: int) -> Prompts:
    """Random tokens [B, S], the same for everyone; the first three are left out, as special."""
    return np.random.default_rng(length).integers(3, vocab, (batch, length))


def peak_rss() -> int:
    """Bytes of memory at this process's highest, loading included.

    Where Linux tells; `ru_maxrss` starts from what the process that forked this one had.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# The parent: asks workers in turn.


class Worker:
    """A peer's process, from the first request on."""

    def __init__(self, name: str, bundle: Bundle, options: argparse.Namespace) -> None:
        numbers_ = {name: getattr(options, name) for name in ("threads", "steps", "rounds")}
        self._command = [sys.executable, __file__, str(bundle.folder), "--worker", name]
        self._command += [f"--{key}={number}" for key, number in numbers_.items()]
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        self._process: subprocess.Popen[str] | None = None
        self.cell: Cell | None = None  # that its caches are for

    def ask(self, **request: object) -> Answer:
        """Send a request and wait for the answer; a worker that died gives an outcome too."""
        process = self._process = self._process or subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._environment,
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None
        time.sleep(REST)
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=process.stdin, flush=True)
        line = process.stdout.readline()
        if line:
            return cast("Answer", json.loads(line))
        code = process.wait()
        self._process = self.cell = None
        return {"outcome": f"failed: its process ended with {code}"}

    def turn(self, cell: Cell) -> Answer:
        """One round of a cell, whose caches it makes first if it has not yet."""
        if self.cell != cell:
            self.cell = cell
            answer = self.ask(do="open", cell=asdict(cell))
            if answer:
                return answer
        return self.ask(do="round")

    def close(self) -> None:
        """Free the caches."""
        if self.cell is not None and self._process is not None:
            self.ask(do="close")
        self.cell = None

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()
        self._process = self.cell = None


def measure(
    bundle: Bundle, cells: Sequence[Cell], options: argparse.Namespace
) -> tuple[list[Row], list[float]]:
    """Every peer in every cell, and the bandwidths seen on the way, in bytes per second."""
    workers = {name: Worker(name, bundle, options) for name in options.peers}
    rows: list[Row] = []
    bandwidths: list[float] = []
    try:
        outcomes = check(workers, bundle, alone=options.one_at_a_time)
        for cell in cells:
            names = [name for name in workers if cell.phase == "decode" or name in PREFILL_PEERS]
            found = {name: Row(name, **asdict(cell), outcome=outcomes[name]) for name in names}
            for number in range(options.rounds):
                bandwidths.append(read_bandwidth(options.threads))
                turn_about(workers, cell, found, number, alone=options.one_at_a_time)
            for name in names:
                workers[name].close()
            rows += found.values()
    finally:
        for worker in workers.values():
            worker.stop()
    return rows, bandwidths


def turn_about(
    workers: Mapping[str, Worker], cell: Cell, rows: Mapping[str, Row], number: int, *, alone: bool
) -> None:
    """One round of a cell: a turn of every peer that can run it, none of them always first."""
    names = [name for name, row in rows.items() if row.outcome == "ok"]
    first = number % max(len(names), 1)
    for name in names[first:] + names[:first]:
        row, answer = rows[name], workers[name].turn(cell)
        row.outcome = answer.get("outcome", "ok")
        if row.outcome == "ok":
            row.round_ms.append(statistics.median(answer["ms"]))
            row.peak_rss_bytes = max(answer["peak_rss_bytes"], row.peak_rss_bytes or 0)
            shown = f"{row.round_ms[-1]:.2f} ms"
        else:
            workers[name].close()
            shown = row.outcome
        if alone:
            workers[name].stop()
        print(f"{cell.name}, round {number + 1}, {name}: {shown}", file=sys.stderr)


def check(workers: Mapping[str, Worker], bundle: Bundle, *, alone: bool) -> dict[str, str]:
    """Outcome by peer: `ok`, or what is wrong with its logits."""
    from cla_export.engines.torch import TorchExecutor
    from cla_export.models.checkpoint import load_model, open_checkpoint

    model = load_model(open_checkpoint(bundle.source))
    reference = ExecutorPeer(bundle.layout, partial(TorchExecutor, model))
    expected = check_logits(reference, bundle)
    outcomes = {}
    for name, worker in workers.items():
        file = bundle.folder.parent / f"{name}.npy"
        outcome = worker.ask(do="check", file=str(file)).get("outcome", "ok")
        if outcome == "ok":
            got = np.load(file)
            difference = float(np.abs(got - expected[: len(got)]).max())
            if not difference <= ALLOWED:
                outcome = f"WRONG: max difference {difference:.1e}"
            print(f"check {name}: max difference {difference:.1e}", file=sys.stderr)
        if alone or outcome != "ok":
            worker.stop()
        outcomes[name] = outcome
    return outcomes


# The report.


def weight_bytes(spec: ModelSpec) -> int:
    """Bytes of float32 weights that a step reads: all, but of an untied embedding a few rows."""
    looked_up = 0 if spec.tie_embeddings else spec.vocab_size * spec.hidden_size
    return 4 * (spec.parameters() - looked_up)


def kv_bytes(layout: KVLayout, batch: int, context: int) -> int:
    """Bytes of float32 keys and values that a step has to read, once for each group."""
    per_row = 0
    for group in layout.groups:
        valid = context if group.window is None else min(context, group.window)
        per_row += 2 * group.kv_heads * group.head_dim * valid
    return 4 * batch * per_row


def conclude(row: Row, spec: ModelSpec, bandwidth: float) -> None:
    """Turn a row's rounds into its numbers."""
    if row.outcome != "ok":
        return
    row.ms_per_step = statistics.median(row.round_ms)
    tokens = row.batch * (row.context if row.phase == "prefill" else 1)
    row.tokens_per_s = tokens / row.ms_per_step * 1e3
    if row.phase == "decode":
        size = weight_bytes(spec) + kv_bytes(spec.layout, row.batch, row.context)
        row.floor_share = size / bandwidth * 1e3 / row.ms_per_step


def summary(
    spec: ModelSpec, rows: Sequence[Row], bandwidths: Sequence[float], threads: int
) -> dict[str, Any]:
    """All of a run, as --json writes it."""
    return {
        "date": str(date.today()),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(threads),
        "versions": versions(),
        "model": {
            "layout": spec.layout.describe(),
            "kv_layout": spec.layout.to_json(),
            "parameters": spec.parameters(),
            "weight_bytes_per_step": weight_bytes(spec),
            "kv_bytes_per_token": spec.layout.bytes_per_token("float32"),
        },
        "bandwidth_bytes_per_s": {
            "median": statistics.median(bandwidths),
            "samples": bandwidths,
        },
        "rows": [asdict(row) for row in rows],
    }


def machine(threads: int) -> dict[str, object]:
    from cla_export.environment import processor

    return {
        "processor": processor(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Of what takes part and is installed."""
    found = {}
    for name in TOOLS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def heading(run: Mapping[str, Any]) -> str:
    """Date, machine, versions and command of a run, in Markdown."""
    place = run["machine"]
    tools = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    return (
        f"{run['date']}, {place['processor']}, {place['threads']} of {place['cpus']} CPUs; "
        f"{tools}; float32. `{run['command']}`\n"
    )


def markdown(run: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """A row for each cell, a column for each peer."""
    model, bandwidth = run["model"], run["bandwidth_bytes_per_s"]["median"]
    peers = list(dict.fromkeys(row.peer for row in rows))
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(Cell(row.phase, row.batch, row.context).name, {})[row.peer] = row
    lines = [
        heading(run),
        f"{model['parameters'] / 1e6:,.0f} M parameters, {model['layout']}; a step reads "
        f"{model['weight_bytes_per_step'] / 2**20:,.0f} MiB of weights and "
        f"{model['kv_bytes_per_token']:,} B a token of context; memory read at "
        f"{bandwidth / 1e9:.1f} GB/s. ms a step (tokens/s), share of the floor.\n",
        f"| batch / context | {' | '.join(peers)} |",
        "|---" * (len(peers) + 1) + "|",
    ]
    for name, by_peer in found.items():
        shown = [cell_text(by_peer[peer]) if peer in by_peer else "-" for peer in peers]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    peaks = {peer: [row.peak_rss_bytes or 0 for row in rows if row.peer == peer] for peer in peers}
    sizes = [f"{max(peaks[peer]) / 2**20:,.0f}" if any(peaks[peer]) else "-" for peer in peers]
    lines.append(f"| peak memory, MiB | {' | '.join(sizes)} |")
    lines += ["", *(f"- {row.peer}, {name}: {row.outcome}" for name, by_peer in found.items()
                    for row in by_peer.values() if row.outcome != "ok")]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def cell_text(row: Row) -> str:
    if row.ms_per_step is None:
        return row.outcome.partition(":")[0]
    share = "" if row.floor_share is None else f" {row.floor_share:.0%}"
    return f"{row.ms_per_step:,.1f} ({row.tokens_per_s:,.0f}){share}"


if __name__ == "__main__":
    sys.exit(main())
