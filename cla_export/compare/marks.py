"""The graph's side of every layer: a copy of a bundle's graph with those values as outputs.

They are found by what the rewriter leaves: attention nodes carry `cla.layer`, nodes of layer i are
called `layers.{i}/...`, and the last of these makes the layer's output.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from cla_export.bundle import Bundle
from cla_export.compare.probe import ROLES, Tensors
from cla_export.engines.executor import Logits
from cla_export.engines.onnxruntime import OnnxRuntimeExecutor
from cla_export.rewrite.group_attention import LAYER


@dataclass(frozen=True, slots=True)
class Call:
    """One run of the graph: which slots, what they held, what was added, what each layer made."""

    first_slot: int
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    rows: tuple[Tensors, ...]  # per row of the call, tokens of the row only


class MarkedExecutor(OnnxRuntimeExecutor):
    """An executor over the marked graph, which keeps what every layer made in every call."""

    def __init__(self, bundle: Bundle, *, capacity: int, slots: int) -> None:
        model = ir.load(bundle.graph)
        self._marks = mark(model)
        self.calls: list[Call] = []
        super().__init__(bundle, capacity=capacity, slots=slots, graph=ir.to_proto(model))

    def _run(
        self,
        first: int,
        input_ids: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        keep: int,
    ) -> Logits:
        logits, marked = self._run_with(
            first, input_ids, starts, counts, keep, self._marks.values()
        )
        rows = tuple(
            {
                key: _tokens_first(value[row])[: counts[row]]
                for key, value in zip(self._marks, marked, strict=True)
            }
            for row in range(len(counts))
        )
        call = Call(first, tuple(starts.tolist()), tuple(counts.tolist()), rows)
        self.calls.append(call)
        return logits


def marked(engine: type[OnnxRuntimeExecutor]) -> type[MarkedExecutor]:
    """That executor, over the marked graph."""
    if engine is OnnxRuntimeExecutor:
        return MarkedExecutor
    return cast(
        "type[MarkedExecutor]", type(f"Marked{engine.__name__}", (MarkedExecutor, engine), {})
    )


def mark(model: ir.Model) -> dict[tuple[int, str], str]:
    """Add outputs to the graph; returns (layer, role) -> the graph's name, in execution order."""
    values: dict[tuple[int, str], ir.Value] = {}
    scattered: set[ir.Node] = set()
    for node in model.graph:
        if LAYER in node.metadata_props:
            layer = int(node.metadata_props[LAYER])
            for role, value in zip(ROLES, _around(node, scattered), strict=False):
                if value is not None:
                    values[layer, role] = value
        elif (name := str(node.name)).startswith("layers."):
            values[int(name.split("/", maxsplit=1)[0].split(".")[1]), "output"] = node.outputs[0]
    order = sorted(values, key=lambda key: (key[0], ROLES.index(key[1])))
    for key in order:
        if not values[key].is_graph_output():
            model.graph.outputs.append(values[key])
    return {key: str(values[key].name) for key in order}


def _around(node: ir.Node, scattered: set[ir.Node]) -> list[ir.Value | None]:
    """q, new k, new v (None for a sharer) and output of an attention node.

    `scattered` collects the TensorScatter nodes met: whoever reads one first owns it.
    """
    q, key, value = node.inputs[:3]
    if node.op_type == "GroupQueryAttention":
        owner = len(node.outputs) > 1
        return [q, key if owner else None, value if owner else None, node.outputs[0]]
    new: list[ir.Value | None] = []
    for present in (key, value):
        scatter = present.producer() if present is not None else None
        if scatter is None or scatter.op_type != "TensorScatter" or scatter in scattered:
            new.append(None)
        else:
            scattered.add(scatter)
            new.append(scatter.inputs[1])
    return [q, *new, node.outputs[0]]


def _tokens_first(value: NDArray[np.generic]) -> NDArray[np.float32]:
    """[H, S, D] or [S, width] as [S, width]."""
    array = value.astype(np.float32)
    if array.ndim == 3:
        array = array.transpose(1, 0, 2)
    return array.reshape(array.shape[0], -1)
