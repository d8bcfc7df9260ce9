"""Thread caches: one key and one value cache per group, as graph inputs and outputs.

Before: Attention reads K and V of this call's tokens, positions come from `position_ids`.
After, for group g and cache capacity C (every dimension but heads and head_dim is dynamic):

    past_key_values.{g}.key    [B, Hkv, C, D]  --TensorScatter at write_indices-->  present.{g}.key
    Attention(q, present.{g}.key, present.{g}.value, mask?, "", "", frontier, is_causal=1)

    write_indices [B] int64   tokens each row holds already: where its new ones go
    kv_lengths    [B] int64   tokens each row holds afterwards; less than write_indices + S where a
                              row of the batch is padded on the right
    frontier = write_indices + S, positions = write_indices + 0..S-1

Padded queries see padded keys only beyond every valid query's frontier, and what they write is
overwritten before anyone reads it. A sliding window adds a mask, since opset 24 has no attribute
for it. Sources: ONNX operators Attention-24 and TensorScatter-24.
"""

import numpy as np
import onnx_ir as ir

from cla_export.errors import GraphError
from cla_export.layout import KVLayout
from cla_export.rewrite.builder import SCOPE, Builder, Dim
from cla_export.rewrite.group_attention import LAYER
from cla_export.rewrite.report import PassReport
from cla_export.rewrite.values import attention_nodes, producer

OPSET = 24
IR_VERSION = 11  # newer ONNX packages default to more than ONNX Runtime reads
GROUP = "cla.group"  # metadata key of an Attention or TensorScatter node
INT64 = ir.TensorType(ir.DataType.INT64)


def thread_caches(model: ir.Model, layout: KVLayout) -> PassReport:
    report = PassReport("thread_caches")
    graph = model.graph
    inputs = check_inputs(graph)
    model.opset_imports[""] = OPSET
    model.ir_version = IR_VERSION
    input_ids, position_ids = inputs["input_ids"], inputs["position_ids"]
    _rename_axes(graph, input_ids)
    write_indices = ir.Value(name="write_indices", type=INT64, shape=ir.Shape(["batch"]))
    kv_lengths = ir.Value(name="kv_lengths", type=INT64, shape=ir.Shape(["batch"]))

    lengths = _Lengths(graph, input_ids, write_indices)
    position_ids.replace_all_uses_with(lengths.positions)
    graph.inputs[:] = [input_ids, write_indices, kv_lengths]
    attentions = attention_nodes(graph)
    for group in layout.groups:
        owner = attentions[group.owner]
        presents = [
            _cache(graph, owner.inputs[slot], f"{group.index}.{part}", group.index, write_indices)
            for slot, part in ((1, "key"), (2, "value"))
        ]
        for layer in group.layers:
            node = attentions[layer]
            assert node.metadata_props[LAYER] == str(layer)
            node.metadata_props[GROUP] = str(group.index)
            mask = None
            if group.window is not None:
                mask = lengths.window_mask(group.window, presents[0], group.index)
            node.resize_inputs(7)
            for slot, value in (
                (1, presents[0]),
                (2, presents[1]),
                (3, mask),
                (6, lengths.frontier),
            ):
                node.replace_input_with(slot, value)
            if "scale" not in node.attributes:
                scale = 1.0 / float(np.sqrt(group.head_dim))
                node.attributes["scale"] = ir.AttrFloat32("scale", scale)
            report.fired += 1
    graph.sort()
    return report


def check_inputs(graph: ir.Graph) -> dict[str | None, ir.Value]:
    """A stateless graph's inputs by name; GraphError if it lacks one."""
    inputs = {value.name: value for value in graph.inputs}
    for name in ("input_ids", "position_ids"):
        if name not in inputs:
            raise GraphError(
                f"the graph has no input {name!r} (it has {', '.join(map(str, inputs))}); expected "
                "input_ids [B, S] and position_ids [B, S]"
            )
    return inputs


def frontier_of(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    """A canonical graph's frontier [B], and the S [1] that it adds to write_indices."""
    frontier = attention_nodes(graph)[0].inputs[6]
    add = producer(frontier, "Add")
    assert frontier is not None and add is not None and add.inputs[1] is not None
    return frontier, add.inputs[1]


def _rename_axes(graph: ir.Graph, input_ids: ir.Value) -> None:
    """The tracer's symbols for the axes of input_ids [B, S] become `batch` and `sequence`.

    Where a module puts the two together, their product becomes `tokens`.
    """
    shape = input_ids.shape
    if shape is None or len(shape) != 2 or any(isinstance(dim, int) for dim in shape):
        raise GraphError(f"input_ids has shape {shape}; expected [B, S] with both axes dynamic")
    first, second = shape
    names: dict[object, str] = {first: "batch", second: "sequence"}
    for one, other in ((first, second), (second, first)):
        names[ir.SymbolicDim(f"{one}*{other}")] = "tokens"
    values = [output for node in graph for output in node.outputs]
    for value in (*graph.inputs, *values):
        if value.shape is not None:
            value.shape = ir.Shape([names.get(dim, dim) for dim in value.shape])


def _cache(
    graph: ir.Graph, new: ir.Value | None, name: str, group: int, write_indices: ir.Value
) -> ir.Value:
    """Add one cache input, its TensorScatter and its output; return the present value."""
    assert new is not None and new.shape is not None and new.dtype is not None
    shape = ir.Shape(["batch", new.shape[1], "capacity", new.shape[3]])
    kind = ir.TensorType(new.dtype)
    past = ir.Value(name=f"past_key_values.{name}", type=kind, shape=shape)
    present = ir.Value(name=f"present.{name}", type=kind, shape=shape)
    tape = ir.tape.Tape(graph)
    tape.op(
        "TensorScatter",
        [past, new, write_indices],
        {"axis": 2, "mode": "linear"},
        output=present,
        metadata_props={SCOPE: f"cache.{name.replace('.', '/')}", GROUP: str(group)},
    )
    graph.inputs.append(past)
    graph.outputs.append(present)
    return present


class _Lengths:
    """Values derived from the row lengths, each made once per graph."""

    def __init__(self, graph: ir.Graph, input_ids: ir.Value, write_indices: ir.Value) -> None:
        self._build = build = Builder(graph, "lengths")
        self._masks: dict[tuple[int, int], ir.Value] = {}
        axis = build.int64([1], "axis_1")
        length = build.op("Shape", [input_ids], {"start": 1, "end": 2}, shape=[1])  # [S]
        self.frontier = build.op("Add", [write_indices, length], shape=["batch"])
        steps = self._range(length, "sequence")
        starts = build.op("Unsqueeze", [write_indices, axis], shape=["batch", 1])
        self.positions = build.op("Add", [starts, steps], shape=["batch", "sequence"])

    def window_mask(self, window: int, cache: ir.Value, group: int) -> ir.Value:
        """Bool [B, 1, S, C]: true where a key is less than `window` behind the query."""
        if (window, group) not in self._masks:
            build = self._build
            column: list[Dim] = ["batch", 1, "sequence", 1]
            length = build.op("Shape", [cache], {"start": 2, "end": 3}, shape=[1])
            keys = self._range(length, "capacity")
            axes = build.int64([1, 3], "axes_1_3")
            queries = build.op("Unsqueeze", [self.positions, axes], shape=column)
            width = build.int64(window, f"window_{window}")
            oldest = build.op("Sub", [queries, width], shape=column)
            self._masks[window, group] = build.op(
                "Greater",
                [keys, oldest],
                shape=["batch", 1, "sequence", "capacity"],
                dtype=ir.DataType.BOOL,
            )
        return self._masks[window, group]

    def _range(self, length: ir.Value, axis: str) -> ir.Value:
        """0 .. length - 1, for a length of shape [1]."""
        build = self._build
        count = build.op("Squeeze", [length], shape=[])
        zero, one = build.int64(0, "zero"), build.int64(1, "one")
        return build.op("Range", [zero, count, one], shape=[axis])
