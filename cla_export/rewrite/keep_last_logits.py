"""Keep last logits: let the caller have the head computed for the last tokens of each row only.

A prompt's logits weigh prompt * vocabulary numbers, and generation reads one row of them. The
gather stands in front of the head, so only what is asked for is multiplied.

    logits_to_keep  int64 scalar, an initialiser a caller may override; by default all are kept,
                    which is what onnxruntime-genai expects
    logits          [B, n, V] with n = min(logits_to_keep, S): each row's last n valid tokens in
                    order; a row with fewer than n has them first, and padding after them

Cases:
1. The logits come from MatMul (and elementwise operators after it): gather before the MatMul.
2. Otherwise gather the logits themselves; right, but no work is saved, and the report says so.
"""

import numpy as np
import onnx_ir as ir

from cla_export.rewrite.report import PassReport
from cla_export.rewrite.simplify import named_constant
from cla_export.rewrite.thread_caches import SCOPE

KEEP = "logits_to_keep"
ALL = 2**31 - 1
_ELEMENTWISE = ("Add", "Mul", "Div", "Tanh", "Cast", "Identity")


def keep_last_logits(model: ir.Model) -> PassReport:
    report = PassReport("keep_last_logits")
    graph = model.graph
    logits = next(value for value in graph.outputs if value.name == "logits")
    tape = ir.tape.Tape(graph)
    rows = _rows(graph, tape)
    head = _head(logits)
    if head is None:  # case 2
        source = logits
        node = logits.producer()
        assert node is not None
        report.skip(node, "the head is not a MatMul; all logits are computed, then gathered")
        kept = tape.op(
            "GatherND", [source, rows], {"batch_dims": 1}, metadata_props={SCOPE: "head"}
        )
        kept.type = logits.type
        graph.outputs[0] = kept
        logits.name, kept.name = "all_logits", "logits"
        logits = kept
    else:  # case 1
        hidden = head.inputs[0]
        assert hidden is not None
        kept = tape.op(
            "GatherND", [hidden, rows], {"batch_dims": 1}, metadata_props={SCOPE: "head"}
        )
        kept.type = hidden.type
        width = hidden.shape[2] if hidden.shape is not None else None
        kept.shape = ir.Shape(["batch", "num_logits", width])
        head.replace_input_with(0, kept)
        report.fired += 1
    vocabulary = logits.shape[-1] if logits.shape is not None else None
    logits.shape = ir.Shape(["batch", "num_logits", vocabulary])
    graph.sort()
    return report


def _head(logits: ir.Value) -> ir.Node | None:
    """The MatMul that makes the logits, through elementwise operators with constants."""
    value: ir.Value | None = logits
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "MatMul":
            return node
        if node.op_type not in _ELEMENTWISE:
            return None
        value = node.inputs[0]
    return None


def _rows(graph: ir.Graph, tape: ir.tape.Tape) -> ir.Value:
    """Indices [B, logits_to_keep, 1] of each row's last valid tokens among this call's S."""
    inputs = {value.name: value for value in graph.inputs}
    keep = named_constant(graph, np.array(ALL, np.int64), KEEP)
    graph.inputs.append(keep)
    zero, one = (
        named_constant(graph, np.array(n, np.int64), name) for n, name in ((0, "zero"), (1, "one"))
    )
    axis_1 = named_constant(graph, np.array([1], np.int64), "axis_1")
    last_axis = named_constant(graph, np.array([-1], np.int64), "axis_last")
    scope = {SCOPE: "head"}

    def op(op_type: str, *values: ir.Value) -> ir.Value:
        return tape.op(op_type, list(values), metadata_props=scope)

    new_tokens = op("Sub", inputs["kv_lengths"], inputs["write_indices"])  # [B]
    length = tape.op("Shape", [inputs["input_ids"]], {"start": 1, "end": 2}, metadata_props=scope)
    count = op("Min", keep, op("Squeeze", length))  # n; also keeps shape inference from fixing it
    first_kept = op("Max", op("Sub", new_tokens, count), zero)
    steps = op("Range", zero, count, one)  # [n]
    index = op("Add", op("Unsqueeze", first_kept, axis_1), steps)  # [B, n]
    return op("Unsqueeze", index, last_axis)
