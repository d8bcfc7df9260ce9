"""Keep last logits: let the caller have the head computed for the last tokens of each row only.

A prompt's logits weigh prompt * vocabulary numbers, and generation reads one row of them. The
gather stands in front of the head, so only what is asked for is multiplied.

    logits_to_keep  int64 scalar, an initialiser a caller may override; by default all are kept,
                    which is what onnxruntime-genai expects
    logits          [B, n, V] with n = min(logits_to_keep, S): each row's last n valid tokens in
                    order; a row with fewer than n has them first, and padding after them

Cases:
1. The logits come from a MatMul with a constant, and elementwise operators with constants after
   it: gather before the MatMul.
2. Otherwise gather the logits themselves; right, but no work is saved, and the report says so.
"""

import numpy as np
import onnx_ir as ir

from cla_export.graph_names import ALL, KEEP
from cla_export.rewrite.builder import Builder, named_constant
from cla_export.rewrite.report import PassReport

_ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Identity")


def keep_last_logits(model: ir.Model) -> PassReport:
    report = PassReport("keep_last_logits")
    graph = model.graph
    logits = next(value for value in graph.outputs if value.name == "logits")
    build = Builder(graph, "head")
    rows = _rows(graph, build)
    chain = _head(logits)
    if chain is None:  # case 2
        node = logits.producer()
        assert node is not None
        report.skip(node, "the head is not a MatMul; all logits are computed, then gathered")
        kept = _gather(build, logits, rows)
        graph.outputs[graph.outputs.index(logits)] = kept
        logits.name, kept.name = "all_logits", "logits"
    else:  # case 1
        hidden = chain[0].inputs[0]
        assert hidden is not None
        chain[0].replace_input_with(0, _gather(build, hidden, rows))
        for node in chain:
            made = node.outputs[0]
            made.shape = _kept_shape(made)
        report.fired += 1
    graph.sort()
    return report


def _gather(build: Builder, source: ir.Value, rows: ir.Value) -> ir.Value:
    shape = _kept_shape(source)
    return build.op(
        "GatherND", [source, rows], {"batch_dims": 1}, shape=list(shape), dtype=source.dtype
    )


def _kept_shape(value: ir.Value) -> ir.Shape:
    width = value.shape[-1] if value.shape is not None else None
    return ir.Shape(["batch", "num_logits", width])


def _head(logits: ir.Value) -> list[ir.Node] | None:
    """The MatMul that makes the logits and the operators after it, in that order."""
    chain: list[ir.Node] = []
    value: ir.Value | None = logits
    while value is not None and (node := value.producer()) is not None:
        computed = [v for v in node.inputs if v is not None and not _is_weight(v)]
        if len(computed) != 1 or node.op_type not in ("MatMul", *_ELEMENTWISE):
            return None
        chain.insert(0, node)
        if node.op_type == "MatMul":
            return chain if computed[0] is node.inputs[0] else None
        value = computed[0]
    return None


def _is_weight(value: ir.Value) -> bool:
    """Whether a value is an initialiser, possibly transposed or cast."""
    node = value.producer()
    if node is None:
        return value.is_initializer()
    only = node.inputs[0]
    return node.op_type in ("Transpose", "Cast") and only is not None and only.is_initializer()


def _rows(graph: ir.Graph, build: Builder) -> ir.Value:
    """Indices [B, n, 1] of each row's last valid tokens among this call's S."""
    inputs = {value.name: value for value in graph.inputs}
    keep = named_constant(graph, np.array(ALL, np.int64), KEEP)
    graph.inputs.append(keep)
    zero, one = build.int64(0, "zero"), build.int64(1, "one")
    length = build.op("Shape", [inputs["input_ids"]], {"start": 1, "end": 2}, shape=[1])
    # n; the minimum also keeps shape inference from taking the default for a fixed size
    count = build.op("Min", [keep, build.op("Squeeze", [length], shape=[])], shape=[])
    new = build.op("Sub", [inputs["kv_lengths"], inputs["write_indices"]], shape=["batch"])
    surplus = build.op("Sub", [new, count], shape=["batch"])
    first = build.op("Max", [surplus, zero], shape=["batch"])
    column = build.op("Unsqueeze", [first, build.int64([1], "axis_1")], shape=["batch", 1])
    steps = build.op("Range", [zero, count, one], shape=["num_logits"])
    index = build.op("Add", [column, steps], shape=["batch", "num_logits"])
    last_axis = build.int64([-1], "axis_last")
    return build.op("Unsqueeze", [index, last_axis], shape=["batch", "num_logits", 1])
