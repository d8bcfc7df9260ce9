"""Fuse experts: where every expert was computed and weighed, one operator computes the chosen ones.

    inner = silu(gate) * up,  where gate, up = Split(MatMul(x, Transpose(gate_up)))    [E, T, I]
    y = ReduceSum(MatMul(inner, Transpose(down)) * Unsqueeze(Transpose(share)))        [T, H]
    ->  y = MoE(x, Log(share), gate_up interleaved, down) * ReduceSum(share)

`share` [T, E] is the weight of each expert, zero for those that were not chosen. MoE takes the k
greatest of its router's scores and makes weights of them that sum to one: softmax over logarithms
gives a chosen expert its part of all shares, whose sum is multiplied in again. One rounding each.

1. k is the number of shares that are put into a row of `share`.
2. Experts that are not SwiGLU, or not float32, which is what the kernel takes, stay as they are.

Source: com.microsoft.MoE, version 1, as of ONNX Runtime 1.31, whose CPU kernel wants gate and up
interleaved.
"""

from dataclasses import dataclass

import onnx_ir as ir

from cla_export.interleaving import INTERLEAVED, interleave
from cla_export.rewrite.builder import Builder
from cla_export.rewrite.simplify import drop_unused
from cla_export.rewrite.values import ints, producer


@dataclass(frozen=True, slots=True)
class _Found:
    """A mixture in the graph."""

    x: ir.Value
    share: ir.Value
    gate_up: ir.Value
    down: ir.Value
    chosen: int


def fuse_experts(model: ir.Model) -> int:
    """Fuse all there are; returns how many."""
    graph = model.graph
    fused = 0
    for node in list(graph):
        found = _find(node) if node.op_type == "ReduceSum" else None
        if found is not None:
            _fuse(graph, node, found)
            fused += 1
    if fused:
        model.opset_imports["com.microsoft"] = 1
        graph.sort()
        drop_unused(model)
    return fused


def _find(total: ir.Node) -> _Found | None:
    weighed = producer(total.inputs[0], "Mul")
    if weighed is None or ints(total.inputs[1]) != [0]:
        return None
    for made, factor in (weighed.inputs, reversed(weighed.inputs)):
        down, turned = _product(made), producer(_input(producer(factor, "Unsqueeze")), "Transpose")
        share = _input(turned)
        chosen = _chosen(share)
        if down is None or share is None or chosen is None:
            continue
        up = _product(_swiglu(down[0]))
        if up is not None:
            return _Found(up[0], share, up[1], down[1], chosen)
    return None


def _product(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """What is multiplied by the transposed weight [E, N, K] of all experts, and that weight."""
    node = producer(value, "MatMul")
    transpose = None if node is None else producer(node.inputs[1], "Transpose")
    weight = _input(transpose)
    if node is None or transpose is None or weight is None or not weight.is_initializer():
        return None
    swapped = list(transpose.attributes.get_ints("perm", ())) == [0, 2, 1]
    x = node.inputs[0]
    return (x, weight) if swapped and x is not None and weight.dtype == ir.DataType.FLOAT else None


def _swiglu(value: ir.Value | None) -> ir.Value | None:
    """What is split into gate and up, of silu(gate) * up."""
    product = producer(value, "Mul")
    if product is None:
        return None
    for activated, up in (product.inputs, reversed(product.inputs)):
        silu, split = producer(activated, "Mul"), producer(up, "Split")
        if silu is None or split is None or up is not split.outputs[1]:
            continue
        gate = split.outputs[0]
        for one, other in (silu.inputs, reversed(silu.inputs)):
            if one is gate and _input(producer(other, "Sigmoid")) is gate:
                return split.inputs[0]
    return None


def _chosen(share: ir.Value | None) -> int | None:  # case 1
    total = producer(share, "ReduceSum")
    placed = producer(_input(total), "Where")
    if total is None or placed is None or ints(total.inputs[1]) != [1]:
        return None
    shape = placed.outputs[0].shape
    return shape[1] if shape is not None and isinstance(shape[1], int) else None


def _input(node: ir.Node | None) -> ir.Value | None:
    return None if node is None else node.inputs[0]


def _fuse(graph: ir.Graph, total: ir.Node, found: _Found) -> None:
    old, scope, build = total.outputs[0], str(total.name).rpartition("/")[0], Builder(graph)
    share, float32 = found.share, ir.DataType.FLOAT
    shape, made = list(share.shape or ()), list(old.shape or ())
    logs = build.op("Log", [share], shape=shape, dtype=float32, name=f"{scope}/Log")
    mixed = ir.node(
        "MoE",
        [found.x, logs, _interleaved(graph, found.gate_up), None, found.down],
        {
            "k": found.chosen,
            "activation_type": "swiglu",
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
            "swiglu_fusion": 1,
            "normalize_routing_weights": 1,
        },
        outputs=[ir.Value(name=f"{scope}/MoE", type=old.type, shape=old.shape)],
        domain="com.microsoft",
        name=f"{scope}/MoE",
        metadata_props=dict(total.metadata_props),
    )
    graph.append(mixed)
    whole = build.op(
        "ReduceSum",
        [share, build.int64([1], "axis_1")],
        shape=[*shape[:1], 1],
        dtype=float32,
        name=f"{scope}/share",
    )
    y = build.op("Mul", [mixed.outputs[0], whole], shape=made, dtype=float32, name=f"{scope}/Mul")
    old.replace_all_uses_with(y)
    graph.remove(total, safe=True)


def _interleaved(graph: ir.Graph, weight: ir.Value) -> ir.Value:
    """That weight as MoE wants it; `weights.attach` gives it its values, if the graph has none."""
    name, values = f"{weight.name}{INTERLEAVED}", weight.const_value
    if name not in graph.initializers:
        made = ir.Value(name=name, type=weight.type, shape=weight.shape)
        made.metadata_props[INTERLEAVED] = str(weight.name)
        if values is not None:
            made.const_value = ir.tensor(interleave(values.numpy()), name=name)
        graph.initializers[name] = made
    return graph.initializers[name]
