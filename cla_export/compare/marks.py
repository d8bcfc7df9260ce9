"""The graph's side of every layer: a copy of a bundle's graph with those values as outputs.

They are found by what the rewriter leaves: attention nodes carry `cla.layer` (where that is lost,
they are numbered in execution order), nodes of layer i are called `layers.{i}/...`, and the last of
these makes the layer's output; the last one in `layers.{i}/attn` and in `layers.{i}/mlp` makes that
branch.
"""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from cla_export.bundle import Bundle
from cla_export.compare.probe import CACHES, Key
from cla_export.compare.report import ROLES
from cla_export.compare.routing import ROUTER, routes_of
from cla_export.compare.runners import cache_rows
from cla_export.engines.executor import Logits
from cla_export.engines.onnxruntime import OnnxRuntimeExecutor
from cla_export.rewrite.group_attention import LAYER

ATTENTION = ("Attention", "GroupQueryAttention", "ClaAttention")
_NEW_TOKENS = {"TensorScatter": 1, "ClaAppend": 2}  # where what enters the first cache stands
_BRANCHES = {"attn": "attention_branch", "mlp": "mlp"}
Arrays = dict[str, NDArray[np.generic]]
Row = dict[Key, NDArray[Any]]  # [tokens of the row, width]; of a router, the experts it chose


@dataclass(frozen=True, slots=True)
class Call:
    """One run of the graph: which slots, what they held, what was added, what each layer made."""

    first_slot: int
    starts: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]  # per row of the call
    rows: tuple[Row, ...]
    caches: tuple[list[NDArray[np.float32]], ...]  # per row: each group's K and V, from place 0


@dataclass(frozen=True, slots=True)
class Recorded:
    """Everything that went into one call of the graph and came out of it, as the graph has it."""

    keep: int
    inputs: Arrays
    logits: Logits
    outputs: dict[Key, NDArray[np.generic]]
    presents: Arrays


class MarkedExecutor(OnnxRuntimeExecutor):
    """An executor over the marked graph, which keeps what every layer made in every call."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        capacity: int,
        slots: int,
        record: int | None = None,
        stock: bool = False,
    ) -> None:
        self.marks: dict[Key, str] = {}
        self.calls: list[Call] = []
        self.recorded: Recorded | None = None  # of call number `record`
        self.record = -1 if record is None else record
        super().__init__(bundle, capacity=capacity, slots=slots, stock=stock, change=self._mark)

    def _mark(self, model: ir.Model) -> None:
        self.marks = mark(model)

    def _run(
        self,
        first: int,
        input_ids: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        keep: int,
    ) -> Logits:
        wanted = len(self.calls) == self.record
        inputs = self._inputs(first, input_ids, starts, counts) if wanted else {}
        logits, marked = self._run_with(first, input_ids, starts, counts, keep, self.marks.values())
        if wanted:
            outputs = {key: value.copy() for key, value in zip(self.marks, marked, strict=True)}
            presents = self._pools_of(first, len(counts), "present")
            self.recorded = Recorded(keep, inputs, logits.copy(), outputs, presents)
        rows: tuple[Row, ...] = tuple(
            {
                key: tokens_first(value[row])[: counts[row]]
                for key, value in zip(self.marks, marked, strict=True)
            }
            for row in range(len(counts))
        )
        ends = (starts + counts).tolist()
        caches = tuple(cache_rows(self, first + row, 0, end) for row, end in enumerate(ends))
        if self.scales is not None:  # attention reads what they hold, which is not what went in
            for row, start, held in zip(rows, starts, caches, strict=True):
                row.update(self._held_of(held, int(start)))
        for i, values in enumerate(rows):
            chosen = routes_of(self, first + i, int(starts[i]), ends[i])
            values |= {(layer, ROUTER): experts for layer, experts in chosen.items()}
        call = Call(
            first,
            tuple(starts.tolist()),
            tuple(
                tuple(ids[:count].tolist()) for ids, count in zip(input_ids, counts, strict=True)
            ),
            rows,
            caches,
        )
        self.calls.append(call)
        return logits

    def _held_of(self, caches: list[NDArray[np.float32]], start: int) -> Row:
        """The caches' roles, from place `start` on."""
        roles = CACHES.values()
        return {
            (group.owner, role): held[start:].reshape(len(held) - start, -1)
            for group in self.layout.groups
            for role, held in zip(roles, caches[2 * group.index : 2 * group.index + 2], strict=True)
        }

    def _inputs(
        self,
        first: int,
        input_ids: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
    ) -> Arrays:
        lengths = self._lengths(starts, counts, input_ids.shape[1])
        pasts = self._pools_of(first, len(counts), "past_key_values")
        return {"input_ids": input_ids, **lengths, **pasts}

    def _pools_of(self, first: int, rows: int, kind: str) -> Arrays:
        return {
            f"{kind}.{group}.{part}": pool[first : first + rows].copy()
            for group in range(self.layout.num_groups)
            for part, pool in zip(("key", "value"), self.cache(group), strict=True)
        }


def marked(engine: type[OnnxRuntimeExecutor]) -> type[MarkedExecutor]:
    """That executor, over the marked graph."""
    if engine is OnnxRuntimeExecutor:
        return MarkedExecutor
    return cast(
        "type[MarkedExecutor]", type(f"Marked{engine.__name__}", (MarkedExecutor, engine), {})
    )


def mark(model: ir.Model) -> dict[Key, str]:
    """Add outputs to the graph; returns (layer, role) -> the graph's name, in execution order."""
    values: dict[Key, ir.Value] = {}
    scattered: set[ir.Value] = set()
    attentions = 0
    for node in model.graph:
        if node.op_type in ATTENTION:
            layer = int(node.metadata_props.get(LAYER, attentions))
            attentions += 1
            for role, value in _around(node, scattered).items():
                values[layer, role] = value
        parts = str(node.name).split("/")
        if parts[0].startswith("layers.") and parts[0][7:].isdigit():
            layer = int(parts[0][7:])
            if len(node.outputs[0].shape or ()) != 3:
                continue  # no step that PyTorch's side has
            values[layer, "output"] = node.outputs[0]
            branch = _BRANCHES.get(parts[1]) if len(parts) > 1 else None
            if branch is not None and node.op_type not in ("Transpose", *ATTENTION):
                values[layer, branch] = node.outputs[0]
    roles = list(ROLES)
    order = sorted(values, key=lambda key: (key[0], roles.index(key[1])))
    for key in order:
        if not values[key].is_graph_output():
            model.graph.outputs.append(values[key])
    return {key: str(values[key].name) for key in order}


def _around(node: ir.Node, scattered: set[ir.Value]) -> dict[str, ir.Value]:
    """q, new k and new v (not of a sharer), and output of an attention node.

    `scattered` collects the caches met: whoever reads one first owns it.
    """
    q, key, value = node.inputs[:3]
    new: list[ir.Value | None] = []
    if node.op_type == "GroupQueryAttention":
        new = [key, value] if any(made.is_graph_output() for made in node.outputs[1:]) else []
    else:
        for present in (key, value):
            scatter = present.producer() if present is not None else None
            if scatter is not None and present is not None and scatter.op_type in _NEW_TOKENS:
                slot = _NEW_TOKENS[scatter.op_type] + (present.index() or 0)
                new += [scatter.inputs[slot]] if present not in scattered else []
                scattered.add(present)
    found = {"q": q, **dict(zip(("k", "v"), new, strict=False)), "attention": node.outputs[0]}
    return {role: value for role, value in found.items() if value is not None}


def tokens_first(value: NDArray[np.generic]) -> NDArray[np.float32]:
    """[H, S, D] or [S, width] as [S, width]."""
    array = value.astype(np.float32)
    if array.ndim == 3:
        array = array.transpose(1, 0, 2)
    return array.reshape(array.shape[0], -1)
