"""The onnxruntime target: GroupQueryAttention over caches that are written in place.

    attention_mask [B, T] int64   1 for each token a row holds after this call, 0 for right padding

Row lengths are derived from it in the graph, so onnxruntime-genai opens the file as it is. With T
tokens in the longest row and S in the call, row b holds `sum(attention_mask[b])` tokens afterwards
and `max(that - S, 0)` before. Per group:

    owner    GroupQueryAttention(q, k, v, past, past, ...)    -> y, present, present
    sharer   GroupQueryAttention(q, k[:, 0:0], k[:, 0:0], owner's present, present, ...)    -> y

A zero-length K and V mean "attend to the past as it is"; a sharer has no present outputs. A group
that GroupQueryAttention refuses keeps the standard form: TensorScatter and Attention.
Source: com.microsoft.GroupQueryAttention, version 1, as of ONNX Runtime 1.31.
"""

import onnx_ir as ir

from cla_export.layout import Group, KVLayout
from cla_export.lower.cla_attention import moved
from cla_export.lower.fuse_experts import fuse_experts
from cla_export.lower.fuse_rounded_rotary import fuse_rounded_rotary
from cla_export.lower.pack_heads import packed, replace_unpacked
from cla_export.rewrite.builder import Builder
from cla_export.rewrite.simplify import drop_unused
from cla_export.rewrite.thread_caches import GROUP, INT64, frontier_of
from cla_export.rewrite.values import attention_nodes, heads_and_dim, producer

FUSED = "GroupQueryAttention"
HELD = "lengths/kv_lengths"  # the node that counts each row's tokens


def lower(model: ir.Model, layout: KVLayout) -> list[tuple[str, str]]:
    fuse_rounded_rotary(model)
    fuse_experts(model)
    graph = model.graph
    mask = _lengths_from_mask(graph)
    attentions = attention_nodes(graph)
    choices = [
        _choose(group, [attentions[layer] for layer in group.layers]) for group in layout.groups
    ]
    if any(operator == FUSED for operator, _ in choices):
        lower_groups(model, layout, choices, _counts(graph, mask))
    graph.sort()
    drop_unused(model)
    return choices


def lower_groups(
    model: ir.Model,
    layout: KVLayout,
    choices: list[tuple[str, str]],
    counts: tuple[ir.Value, ir.Value],
) -> None:
    """GroupQueryAttention for every layer of the groups that it was chosen for.

    `counts` are its own two lengths: seqlens_k int32 [B] (each row's length - 1) and the total
    length, an int32 scalar.
    """
    model.opset_imports["com.microsoft"] = 1
    attentions = attention_nodes(model.graph)
    for group, (operator, _) in zip(layout.groups, choices, strict=True):
        if operator == FUSED:
            nodes = [attentions[layer] for layer in group.layers]
            _lower_group(model.graph, group, nodes, counts)


def _choose(group: Group, nodes: list[ir.Node]) -> tuple[str, str]:
    if group.head_dim % 8:
        return "Attention", (
            f"GroupQueryAttention takes head dims that are multiples of 8, not {group.head_dim}"
        )
    for node in nodes:
        if node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.DOUBLE:
            return "Attention", "GroupQueryAttention has no float64 kernel"
    return FUSED, "in place, cost follows the valid length"


def _lengths_from_mask(graph: ir.Graph) -> ir.Value:
    """Replace the inputs write_indices and kv_lengths by values computed from attention_mask."""
    inputs = {value.name: value for value in graph.inputs}
    shape = ir.Shape(["batch", "total_sequence_length"])
    mask = ir.Value(name="attention_mask", type=INT64, shape=shape)
    build, rows = Builder(graph), ["batch"]
    axis, zero = build.int64([1], "axis_1"), build.int64(0, "zero")
    held = build.op("ReduceSum", [mask, axis], {"keepdims": 0}, shape=rows, name=HELD)
    _, new = frontier_of(graph)
    before = build.op("Sub", [held, new], shape=rows, name="lengths/before")
    starts = build.op("Max", [before, zero], shape=rows, name="lengths/write_indices")
    inputs["kv_lengths"].replace_all_uses_with(held)
    inputs["write_indices"].replace_all_uses_with(starts)
    graph.inputs[:] = [inputs["input_ids"], mask, *graph.inputs[3:]]
    return mask


def _counts(graph: ir.Graph, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The operator's lengths, from the mask: its sums and its width."""
    held = next(node.outputs[0] for node in graph if node.name == HELD)
    build, int32 = Builder(graph), ir.DataType.INT32
    last = build.op("Sub", [held, build.int64(1, "one")], shape=["batch"], name="lengths/last")
    seqlens = build.op(
        "Cast", [last], {"to": int(int32)}, shape=["batch"], dtype=int32, name="lengths/seqlens_k"
    )
    width = build.op("Shape", [mask], {"start": 1, "end": 2}, shape=[1], name="lengths/mask_width")
    scalar = build.op("Squeeze", [width], shape=[], name="lengths/total")
    total = build.op(
        "Cast", [scalar], {"to": int(int32)}, shape=[], dtype=int32, name="lengths/total_int32"
    )
    return seqlens, total


def _lower_group(
    graph: ir.Graph, group: Group, nodes: list[ir.Node], counts: tuple[ir.Value, ir.Value]
) -> None:
    build = Builder(graph)
    scatters = [producer(value, "TensorScatter") for value in nodes[0].inputs[1:3]]
    new, pasts, presents = [], [], []
    for scatter in scatters:
        assert scatter is not None and scatter.inputs[0] is not None
        assert scatter.inputs[1] is not None
        pasts.append(scatter.inputs[0])
        new.append(packed(build, scatter.inputs[1]))
        presents.append(moved(graph, scatter.outputs[0]))
    owner, *sharers = nodes
    _replace(graph, build, group, owner, [*new, *pasts, *counts], presents)
    if sharers:
        nothing = _zero_length(build, new[0], group.index)
        for node in sharers:
            _replace(graph, build, group, node, [nothing, nothing, *presents, *counts], [])


def _replace(
    graph: ir.Graph,
    build: Builder,
    group: Group,
    node: ir.Node,
    inputs: list[ir.Value],
    presents: list[ir.Value],
) -> None:
    """Put a GroupQueryAttention where an Attention stands. `presents` are outputs of an owner."""
    query = node.inputs[0]
    assert query is not None
    heads, dim = heads_and_dim(query, node, "query")
    attributes: dict[str, int | float] = {
        "num_heads": heads,
        "kv_num_heads": group.kv_heads,
        "scale": node.attributes.get_float("scale", 1.0 / dim**0.5),
    }
    if group.window is not None:
        attributes["local_window_size"] = group.window
    if softcap := node.attributes.get_float("softcap", 0.0):
        attributes["softcap"] = softcap
    name = str(node.name).replace("/Attention", "/GroupQueryAttention")
    y = ir.Value(name=name, type=query.type, shape=ir.Shape(["batch", "sequence", heads * dim]))
    fused = ir.node(
        "GroupQueryAttention",
        [packed(build, query), *inputs],
        attributes,
        outputs=[y, *presents],
        domain="com.microsoft",
        name=name,
        metadata_props={**node.metadata_props, GROUP: str(group.index)},
    )
    graph.append(fused)
    replace_unpacked(build, node.outputs[0], y, heads, dim)


def _zero_length(build: Builder, key: ir.Value, group: int) -> ir.Value:
    """K or V of no tokens, [B, 0, Hkv * D]: any slice will do, so one of K serves for both."""
    zero, axis = build.int64([0], "slice_0"), build.int64([1], "axis_1")
    width = key.shape[2] if key.shape is not None else None
    return build.op(
        "Slice",
        [key, zero, zero, axis],
        shape=["batch", 0, width],
        dtype=key.dtype,
        name=f"cache.{group}/no_new_tokens",
    )
