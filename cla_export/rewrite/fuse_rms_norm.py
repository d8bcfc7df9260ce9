"""Fuse RMS norm: a norm that a module spells out becomes one RMSNormalization.

    weight * cast(x * 1 / sqrt(mean(x * x) + epsilon))  ->  RMSNormalization(x, weight)

The inverse of the root may be a Reciprocal, a Div or a Pow, and x may be divided by the root.

Cases:
1. x as it is, no cast: all in one type. Where x was cast to float32, and what met its weight is
   cast back (Gemma), both casts stay.
2. x cast to float32, and what is normed cast back before it meets its weight (Llama), as models do
   for 16-bit weights: that is what the operator does by itself (its `stash_type`).
3. What is normed meets several weights, one by one: as many operators.
4. It meets no weight [D]: the weight is ones.

Source: ONNX operator RMSNormalization-23.
"""

import numpy as np
import onnx_ir as ir

from cla_export.rewrite.builder import named_constant
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
    normed = _normed(add, x)
    if epsilon is None or normed is None:
        report.skip(mean, "not followed by + epsilon, and x times the inverse of its root")
        return
    width = None if x.shape is None else x.shape[-1]
    if not isinstance(width, int) or x.dtype is None:
        report.skip(mean, "x is not [.., D] with constant D", x.shape)
        return
    source, last = x, normed
    widened, narrowed = producer(x, "Cast"), _reader(normed, "Cast")
    before = None if widened is None else widened.inputs[0]
    if before is not None and narrowed is not None and before.dtype == narrowed.outputs[0].dtype:
        source, last = before, narrowed  # 2
    attributes = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
    for end, weight in _weighed(graph, last, source, width):
        inputs = [source, weight]
        fused = ir.node("RMSNormalization", inputs, attributes, metadata_props=end.metadata_props)
        ir.convenience.replace_nodes_and_values(
            graph, end, [end], [fused], end.outputs, fused.outputs
        )
        report.fired += 1


def _normed(add: ir.Node | None, x: ir.Value) -> ir.Node | None:
    """The node that makes x / sqrt(what `add` makes)."""
    root = _reader(add, "Sqrt")
    divided = _reader(root, "Div")
    if divided is not None and divided.inputs[0] is x:
        return divided
    inverse = _reader(root, "Reciprocal")
    if divided is not None and _is(divided.inputs[0], 1.0):
        inverse = divided
    power = _reader(add, "Pow")
    if power is not None and add is not None and power.inputs[0] is add.outputs[0]:
        inverse = power if _is(power.inputs[1], -0.5) else None
    product = _reader(inverse, "Mul")
    if inverse is None or product is None or _other(product, inverse.outputs[0]) is not x:
        return None
    return product


def _weighed(
    graph: ir.Graph, last: ir.Node, source: ir.Value, width: int
) -> list[tuple[ir.Node, ir.Value]]:
    """The products of what is normed and a weight [D], and those weights; see cases 3 and 4."""
    found = []
    value = last.outputs[0]
    for user in {user: None for user, _ in value.uses()}:
        weight = _other(user, value) if user.op_type == "Mul" else None
        alike = weight is not None and weight is not value and weight.dtype == source.dtype
        if weight is not None and alike and list(weight.shape or ()) == [width]:
            found.append((user, weight))
    if found and len(found) == len(value.uses()) and not value.is_graph_output():
        return found
    assert source.dtype is not None
    ones = np.ones(width, source.dtype.numpy())
    return [(last, named_constant(graph, ones, f"const/ones_{width}_{source.dtype.name.lower()}"))]


def _squared(value: ir.Value | None) -> ir.Value | None:
    """The x of x * x or x ** 2."""
    node = producer(value, "Mul", "Pow")
    if node is None:
        return None
    x, other = node.inputs
    if node.op_type == "Mul":
        return x if other is x else None
    return x if _is(other, 2.0) else None


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


def _is(value: ir.Value | None, number: float) -> bool:
    """Whether a value is the constant scalar of that size."""
    array = constant(value)
    return array is not None and array.size == 1 and float(array.item()) == number
