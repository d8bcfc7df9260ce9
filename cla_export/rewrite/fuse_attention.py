"""Fuse attention: what a module, or an older exporter, spells out becomes one Attention.

    softmax(scale * q k^T + mask) v    in whatever operators    ->    Attention(q, k, v)

Two products with a softmax between them are found by the dataflow (spelt_attention.py); what they
compute is decided by running them (attention_meaning.py).

Cases:
1. causal attention, or a sliding window, with any scale and any softcap: one Attention.
2. a softmax that is not between two products of computed values (a router's): left alone.
3. two products that compute something else: an error that says what, such as a position bias,
   where a probability is for each token; left alone, with the reason, where it is not.
"""

import numpy as np
import onnx_ir as ir

from cla_export.errors import GraphError
from cla_export.rewrite.attention_meaning import Meaning, understand
from cla_export.rewrite.builder import named_constant
from cla_export.rewrite.classify_masks import WINDOW
from cla_export.rewrite.report import PassReport, describe
from cla_export.rewrite.simplify import drop_unused
from cla_export.rewrite.spelt_attention import Refused, Source, Spelt, find


def fuse_attention(model: ir.Model) -> PassReport:
    report = PassReport("fuse_attention")
    for node in list(model.graph):
        if node.op_type != "Softmax":
            continue
        try:
            spelt = find(node)
            if spelt is not None:
                _replace(model.graph, spelt, understand(model, spelt))
                report.fired += 1
        except Refused as refusal:
            if _over_tokens(node):
                raise GraphError(
                    f"{describe(node)}: its scores and what they weigh are computed, as in "
                    f"attention, but {refusal}; such a layer cannot be cached"
                ) from refusal
            report.skip(node, str(refusal))
    if report.fired:
        model.graph.sort()
        drop_unused(model)
    return report


def _over_tokens(softmax: ir.Node) -> bool:
    """Whether as many probabilities as there are tokens come out, and not a constant number."""
    shape = softmax.outputs[0].shape
    return shape is None or not isinstance(shape[-1], int)


def _replace(graph: ir.Graph, spelt: Spelt, meaning: Meaning) -> None:
    old, dtype = meaning.result, meaning.result.dtype
    inputs = []
    for source in (spelt.query, spelt.key, spelt.value):
        given = source.value
        if len(source.axes) != 1:
            given = _with_one_axis(graph, source)
        if not source.heads_first:
            given = _transposed(graph, given)
        if given.dtype != dtype and dtype is not None:  # it was widened for the softmax
            cast_node = ir.node("Cast", [given], {"to": int(dtype)})
            narrowed = cast_node.outputs[0]
            narrowed.shape, narrowed.type = given.shape, ir.TensorType(dtype)
            graph.append(cast_node)
            given = narrowed
        inputs.append(given)
    attributes: dict[str, int | float] = {"is_causal": 1, "scale": meaning.scale}
    if meaning.softcap:
        attributes["softcap"] = meaning.softcap
    node = ir.node("Attention", inputs, attributes, metadata_props=spelt.softmax.metadata_props)
    window = "none" if meaning.window is None else str(meaning.window)
    node.metadata_props[WINDOW] = window
    made = node.outputs[0]
    query = inputs[0].shape
    assert query is not None
    made.shape = ir.Shape([query[0], spelt.query.heads, query[2], spelt.value.dim])
    made.type = old.type
    graph.append(node)
    new = made if meaning.heads_first else _transposed(graph, made)
    if meaning.reshape is not None:
        dims = named_constant(graph, np.array(meaning.reshape, np.int64), f"{old.name}/axes")
        reshape = ir.node("Reshape", [new, dims])
        graph.append(reshape)
        new = reshape.outputs[0]
        new.shape, new.type = old.shape, old.type
    new.name, old.name = old.name, f"{old.name}/spelt out"
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _with_one_axis(graph: ir.Graph, source: Source) -> ir.Value:
    """A source's value with all heads on one axis, which need not be there at all."""
    dims = (
        [0, source.heads, -1, source.dim]
        if source.heads_first
        else [0, -1, source.heads, source.dim]
    )
    name = f"heads {'x'.join(map(str, dims))}"
    node = ir.node("Reshape", [source.value, named_constant(graph, np.array(dims), name)])
    old, made = source.value.shape, node.outputs[0]
    assert old is not None
    length = old[-2] if source.heads_first else old[1]
    made.shape = ir.Shape([length if dim == -1 else dim or old[0] for dim in dims])
    made.type = source.value.type
    graph.append(node)
    return made


def _transposed(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """Heads and tokens change places."""
    node = ir.node("Transpose", [value], {"perm": [0, 2, 1, 3]})
    shape = value.shape
    assert shape is not None
    node.outputs[0].shape = ir.Shape([shape[0], shape[2], shape[1], shape[3]])
    node.outputs[0].type = value.type
    graph.append(node)
    return node.outputs[0]
