"""Fuse norms: a residual sum and the norm that reads it become one node, which returns both.

    sum = Add(a, b);  normed = RMSNormalization(sum, weight)
    ->  normed, "", "", sum = SkipSimplifiedLayerNormalization(a, b, weight)

1. Of several norms that read one sum, the first is fused; others read the sum that it returns.
2. A norm over other axes than the last, with statistics not in float32, or of a sum that stretches
   one of its sides, stays as it is.

Statistics are in float32 as RMSNormalization's are: on a CPU always, on a GPU where the session
has `enable_skip_layer_norm_strict_mode` = 1; without it ONNX Runtime's CUDA provider adds up the
squares in the graph's own dtype. Source: com.microsoft.SkipSimplifiedLayerNormalization, version 1.
"""

import onnx_ir as ir

from cla_export.rewrite.simplify import drop_unused
from cla_export.rewrite.values import producer


def fuse_norms(model: ir.Model) -> int:
    """Fuse all there are; returns how many."""
    graph = model.graph
    fused = 0
    for norm in list(graph):
        add = producer(norm.inputs[0], "Add") if norm.op_type == "RMSNormalization" else None
        if add is not None and _fusable(add, norm):
            _fuse(graph, add, norm)
            fused += 1
    if fused:
        model.opset_imports["com.microsoft"] = 1
    graph.sort()
    drop_unused(model)
    return fused


def _fusable(add: ir.Node, norm: ir.Node) -> bool:  # case 2
    weight, total = norm.inputs[1], add.outputs[0]
    if weight is None or weight.shape is None or total.shape is None:
        return False
    axis, rank = norm.attributes.get_int("axis", -1), len(total.shape)
    same = all(side is not None and side.shape == total.shape for side in add.inputs)
    return (
        same
        and rank == 3
        and axis in (-1, rank - 1)
        and len(weight.shape) == 1
        and norm.attributes.get_int("stash_type", 1) == 1
    )


def _fuse(graph: ir.Graph, add: ir.Node, norm: ir.Node) -> None:
    """Put one node in place of both; what they made keeps its names."""
    total, normed = (
        ir.Value(name=old.name, type=old.type, shape=old.shape)
        for old in (add.outputs[0], norm.outputs[0])
    )
    fused = ir.node(
        "SkipSimplifiedLayerNormalization",
        [*add.inputs, norm.inputs[1]],
        {"epsilon": norm.attributes.get_float("epsilon", 1e-5)},
        outputs=[normed, ir.Value(name=""), ir.Value(name=""), total],
        domain="com.microsoft",
        name=str(norm.name).replace("/RMSNormalization", "/SkipSimplifiedLayerNormalization"),
    )
    graph.insert_before(add, fused)
    for old, new in ((add.outputs[0], total), (norm.outputs[0], normed)):
        if old.is_graph_output():
            graph.outputs[graph.outputs.index(old)] = new
        old.replace_all_uses_with(new)
    graph.remove([norm, add], safe=True)
