"""Hoist key scale: a scale that each layer puts on the same K moves onto that layer's Q.

Some models (Hunyuan-Large) let every layer of a group apply its own key norm to a shared K after
RoPE. Its statistics are the same for all of them; only the per-channel weight differs, and
`q . (k * w) == (q * w) . k`. So the group caches the norm without weight, once, and each layer
multiplies its query instead. Exact in real arithmetic; one rounding moves from K to Q.

Cases:
1. Two or more Attention nodes whose K are RMSNormalizations, over the last axis and with one
   epsilon, of the same value: K becomes one RMSNormalization with weight one, Q is multiplied.
2. A K that is the only one of its kind is left alone: nothing would be saved.
"""

import numpy as np
import onnx_ir as ir

from cla_export.rewrite.builder import named_constant
from cla_export.rewrite.report import PassReport
from cla_export.rewrite.values import attention_nodes, producer


def hoist_key_scale(model: ir.Model) -> PassReport:
    report = PassReport("hoist_key_scale")
    readers: dict[tuple[ir.Value, float], list[tuple[ir.Node, ir.Node]]] = {}
    for node in attention_nodes(model.graph):
        norm = producer(node.inputs[1], "RMSNormalization")
        if norm is None:
            report.skip(node, "its key is not an RMSNormalization")
            continue
        source, weight = norm.inputs[0], norm.inputs[1]
        axis = norm.attributes.get_int("axis", -1)
        if source is None or weight is None or axis not in (-1, 3) or len(weight.shape or ()) != 1:
            report.skip(node, "its key norm is not over the last axis alone", f"axis {axis}")
            continue
        epsilon = norm.attributes.get_float("epsilon", 1e-5)
        readers.setdefault((source, epsilon), []).append((node, norm))
    for (source, _), pairs in readers.items():
        if len({norm for _, norm in pairs}) < 2:
            report.skip(pairs[0][0], "no other layer norms the same key; nothing to save")
            continue
        _hoist(model.graph, source, pairs)
        report.fired += len(pairs)
    model.graph.sort()
    return report


def _hoist(graph: ir.Graph, source: ir.Value, pairs: list[tuple[ir.Node, ir.Node]]) -> None:
    first_norm = pairs[0][1]
    weight = first_norm.inputs[1]
    assert weight is not None and weight.shape is not None and weight.dtype is not None
    width = weight.shape[0]
    assert isinstance(width, int)
    dtype = weight.dtype.numpy()
    ones = named_constant(
        graph, np.ones(width, dtype), f"const/ones_{width}_{weight.dtype.name.lower()}"
    )
    tape = ir.tape.Tape(graph)
    bare = tape.op(
        "RMSNormalization", [source, ones], first_norm.attributes, metadata_props=_scope(first_norm)
    )
    bare.shape, bare.type = first_norm.outputs[0].shape, first_norm.outputs[0].type
    for attention, norm in pairs:
        query = attention.inputs[0]
        assert query is not None
        scaled = tape.op("Mul", [query, norm.inputs[1]], metadata_props=_scope(attention))
        scaled.shape, scaled.type = query.shape, query.type
        attention.replace_input_with(0, scaled)
        attention.replace_input_with(1, bare)


def _scope(node: ir.Node) -> dict[str, str]:
    return dict(node.metadata_props)
