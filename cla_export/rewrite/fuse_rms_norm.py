"""Fuse RMS norm: a norm that a module spells out becomes one RMSNormalization.

    weight * cast(x * 1 / sqrt(mean(x * x) + epsilon))  ->  RMSNormalization(x, weight)

Cases:
1. x as it is, no cast: all in one type.
2. x cast to float32, and what is normed cast back before it meets its weight, as models do for
   16-bit weights: that is what the operator does by itself (its `stash_type`).

Source: ONNX operator RMSNormalization-23.
"""

import onnx_ir as ir

from cla_export.rewrite.report import PassReport
from cla_export.rewrite.simplify import drop_unused
from cla_export.rewrite.values import constant, ints, producer


def fuse_rms_norm(model: ir.Model) -> PassReport:
    report = PassReport("fuse_rms_norm")
    for node in list(model.graph):
        if node.op_type == "ReduceMean":
            _fuse(model.graph, node, report)
    if report.fired:
        drop_unused(model)
    return report


def _fuse(graph: ir.Graph, mean: ir.Node, report: PassReport) -> None:
    x = _squared(mean.inputs[0])
    if x is None or ints(mean.inputs[1] if len(mean.inputs) > 1 else None) != [-1]:
        return  # the mean of something else
    if not mean.attributes.get_int("keepdims", 1):
        report.skip(mean, "its axis is dropped, so what it divides is another")
        return
    add = _reader(mean, "Add")
    epsilon = _number(add, mean.outputs[0])
    inverse = _reader(_reader(add, "Sqrt"), "Reciprocal")
    normed = _reader(inverse, "Mul")
    if epsilon is None or inverse is None or normed is None:
        report.skip(mean, "not followed by + epsilon, Sqrt, Reciprocal and a product")
        return
    if _other(normed, inverse.outputs[0]) is not x:
        report.skip(mean, "what is multiplied by it is not what was squared")
        return
    source, last = x, normed
    widened, narrowed = producer(x, "Cast"), _reader(normed, "Cast")
    if widened is not None and narrowed is not None:  # case 2
        source, last = widened.inputs[0] or x, narrowed
    scaled = _reader(last, "Mul")
    weight = None if scaled is None else _other(scaled, last.outputs[0])
    width = x.shape[-1:] if x.shape is not None else None
    if scaled is None or weight is None or width is None or weight.shape != width:
        report.skip(mean, "what is normed is not multiplied by a weight [D]")
        return
    if source.dtype != scaled.outputs[0].dtype:
        report.skip(mean, "it is cast after it met its weight", source.dtype)
        return
    fused = ir.node(
        "RMSNormalization",
        [source, weight],
        {"axis": -1, "epsilon": epsilon, "stash_type": 1},
        metadata_props=scaled.metadata_props,
    )
    ir.convenience.replace_nodes_and_values(
        graph, scaled, [scaled], [fused], scaled.outputs, fused.outputs
    )
    report.fired += 1


def _squared(value: ir.Value | None) -> ir.Value | None:
    """The x of x * x or x ** 2."""
    node = producer(value, "Mul", "Pow")
    if node is None:
        return None
    x, other = node.inputs
    if node.op_type == "Mul":
        return x if other is x else None
    exponent = constant(other)
    return (
        x if exponent is not None and exponent.size == 1 and float(exponent.item()) == 2 else None
    )


def _reader(node: ir.Node | None, op_type: str) -> ir.Node | None:
    """The one node that reads a node's output, if it is of that type."""
    if node is None:
        return None
    users = [user for user, _ in node.outputs[0].uses()]
    return users[0] if len(users) == 1 and users[0].op_type == op_type else None


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """A product's other factor."""
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _number(node: ir.Node | None, beside: ir.Value) -> float | None:
    """The constant that is added to a value."""
    array = None if node is None else constant(_other(node, beside))
    return float(array.item()) if array is not None and array.size == 1 else None
