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

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from cla_export.layout import Group, KVLayout
from cla_export.rewrite.report import describe
from cla_export.rewrite.simplify import drop_unused, named_constant
from cla_export.rewrite.thread_caches import GROUP, INT64
from cla_export.rewrite.values import attention_nodes, heads_and_dim, ints, producer

_HEADS_FIRST = (0, 2, 1, 3)


def lower(model: ir.Model, layout: KVLayout) -> list[tuple[str, str]]:
    graph = model.graph
    mask = _lengths_from_mask(graph)
    attentions = attention_nodes(graph)
    choices = [
        _choose(group, [attentions[layer] for layer in group.layers]) for group in layout.groups
    ]
    if any(operator == "GroupQueryAttention" for operator, _ in choices):
        model.opset_imports["com.microsoft"] = 1
        counts = _counts(graph, mask)
        for group, (operator, _) in zip(layout.groups, choices, strict=True):
            if operator == "GroupQueryAttention":
                _lower_group(graph, group, [attentions[layer] for layer in group.layers], counts)
    graph.sort()
    drop_unused(model)
    return choices


def _choose(group: Group, nodes: list[ir.Node]) -> tuple[str, str]:
    if group.head_dim % 8:
        return "Attention", (
            f"GroupQueryAttention takes head dims that are multiples of 8, not {group.head_dim}"
        )
    for node in nodes:
        if node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.DOUBLE:
            return "Attention", "GroupQueryAttention has no float64 kernel"
    return "GroupQueryAttention", "in place, cost follows the valid length"


def _lengths_from_mask(graph: ir.Graph) -> ir.Value:
    """Replace the inputs write_indices and kv_lengths by values computed from attention_mask."""
    inputs = {value.name: value for value in graph.inputs}
    mask = ir.Value(
        name="attention_mask", type=INT64, shape=ir.Shape(["batch", "total_sequence_length"])
    )
    tape = ir.tape.Tape(graph)
    axis_1 = named_constant(graph, np.array([1], np.int64), "axis_1")
    zero = named_constant(graph, np.array(0, np.int64), "zero")
    lengths = tape.op("ReduceSum", [mask, axis_1], {"keepdims": 0}, name="lengths/kv_lengths")
    new = tape.op("Shape", [inputs["input_ids"]], {"start": 1, "end": 2}, name="lengths/new_tokens")
    before = tape.op("Sub", [lengths, new], name="lengths/before")
    starts = tape.op("Max", [before, zero], name="lengths/write_indices")
    for value, name in ((lengths, "kv_lengths"), (starts, "write_indices")):
        value.shape, value.type, value.name = ir.Shape(["batch"]), INT64, f"lengths/{name}"
        inputs[name].replace_all_uses_with(value)
    graph.inputs[:] = [inputs["input_ids"], mask, *graph.inputs[3:]]
    return mask


def _counts(graph: ir.Graph, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The operator's own two lengths: seqlens_k int32 [B] (length - 1) and total length, scalar."""
    lengths = next(v for node in graph for v in node.outputs if v.name == "lengths/kv_lengths")
    tape = ir.tape.Tape(graph)
    one = named_constant(graph, np.array(1, np.int64), "one")
    last = tape.op("Sub", [lengths, one], name="lengths/last")
    seqlens = tape.op("Cast", [last], {"to": int(ir.DataType.INT32)}, name="lengths/seqlens_k")
    width = tape.op("Shape", [mask], {"start": 1, "end": 2}, name="lengths/mask_width")
    scalar = tape.op("Squeeze", [width], name="lengths/total")
    total = tape.op("Cast", [scalar], {"to": int(ir.DataType.INT32)}, name="lengths/total_int32")
    return seqlens, total


def _lower_group(
    graph: ir.Graph, group: Group, nodes: list[ir.Node], counts: tuple[ir.Value, ir.Value]
) -> None:
    tape = ir.tape.Tape(graph)
    scatters = [producer(value, "TensorScatter") for value in nodes[0].inputs[1:3]]
    assert scatters[0] is not None and scatters[1] is not None
    pasts = [scatter.inputs[0] for scatter in scatters if scatter is not None]
    presents = [scatter.outputs[0] for scatter in scatters if scatter is not None]
    key, value = (_packed(tape, graph, scatter.inputs[1]) for scatter in scatters if scatter)
    nothing = None
    for layer, node in zip(group.layers, nodes, strict=True):
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
        is_owner = layer == group.owner
        cache: Sequence[ir.Value | None]
        if is_owner:
            new, cache = [key, value], pasts
        else:
            if nothing is None:
                nothing = _zero_length(tape, graph, key, group.index)
            new, cache = [nothing, nothing], presents
        name = str(node.name).rpartition("/")[0] + "/GroupQueryAttention"
        y = ir.Value(name=name, type=query.type, shape=ir.Shape(["batch", "sequence", heads * dim]))
        outputs = [y]
        if is_owner:
            outputs += [_moved(graph, present) for present in presents]
        tape.op_multi_out(
            "GroupQueryAttention",
            [_packed(tape, graph, query), *new, *cache, *counts],
            attributes,
            outputs=outputs,
            domain="com.microsoft",
            name=name,
            metadata_props={**node.metadata_props, GROUP: str(group.index)},
        )
        if is_owner:
            presents = outputs[1:]
        _replace_output(tape, graph, node, y, heads, dim)


def _moved(graph: ir.Graph, present: ir.Value) -> ir.Value:
    """A new value that takes over a present output's name, type, readers and place."""
    value = ir.Value(name=present.name, type=present.type, shape=present.shape)
    present.name = f"{present.name}/scattered"
    graph.outputs[graph.outputs.index(present)] = value
    present.replace_all_uses_with(value)
    return value


def _zero_length(tape: ir.tape.Tape, graph: ir.Graph, key: ir.Value, group: int) -> ir.Value:
    """K or V of no tokens, [B, 0, Hkv * D]: any slice will do, so one of K serves for both."""
    zero = named_constant(graph, np.array([0], np.int64), "slice_0")
    axis = named_constant(graph, np.array([1], np.int64), "axis_1")
    value = tape.op("Slice", [key, zero, zero, axis], name=f"cache.{group}/no_new_tokens")
    value.type = key.type
    value.shape = ir.Shape(["batch", 0, key.shape[2] if key.shape is not None else None])
    return value


def _packed(tape: ir.tape.Tape, graph: ir.Graph, value: ir.Value | None) -> ir.Value:
    """The same numbers as [B, S, H * D], undoing the [B, H, S, D] transposition where it came from.

    1. Transpose of a Reshape of [B, S, H * D]: what was there before.
    2. RotaryEmbedding: rotate in the packed form, which the operator also takes.
    3. Anything else: transposed back and reshaped.
    """
    assert value is not None and value.shape is not None
    heads, dim = value.shape[1], value.shape[3]
    assert isinstance(heads, int) and isinstance(dim, int)
    node = value.producer()
    base = f"{value.name}:packed"
    if node is not None and node.op_type == "Transpose" and _permutes_heads(node):  # case 1
        return _flattened(tape, graph, node.inputs[0], heads * dim, base)
    if node is not None and node.op_type == "RotaryEmbedding" and node.domain == "":  # case 2
        attributes = {**node.attributes, "num_heads": ir.AttrInt64("num_heads", heads)}
        rotated = tape.op(
            "RotaryEmbedding",
            [_packed(tape, graph, node.inputs[0]), *node.inputs[1:]],
            attributes,
            name=base,
        )
        rotated.type, rotated.name = value.type, base
        rotated.shape = ir.Shape(["batch", "sequence", heads * dim])
        return rotated
    tokens_first = tape.op("Transpose", [value], {"perm": _HEADS_FIRST}, name=f"{base}/Transpose")
    tokens_first.type = value.type
    return _flattened(tape, graph, tokens_first, heads * dim, base)  # case 3


def _permutes_heads(node: ir.Node) -> bool:
    return tuple(node.attributes.get_ints("perm", ())) == _HEADS_FIRST


def _flattened(
    tape: ir.tape.Tape, graph: ir.Graph, value: ir.Value | None, width: int, name: str
) -> ir.Value:
    """[B, S, H, D] as [B, S, width], or the value it was split from."""
    assert value is not None
    reshape = producer(value, "Reshape")
    source = reshape.inputs[0] if reshape is not None else None
    if source is not None and source.shape is not None and list(source.shape[2:]) == [width]:
        return source
    shape = named_constant(graph, np.array([0, 0, width], np.int64), f"shape_0_0_{width}")
    flat = tape.op("Reshape", [value, shape], name=name)
    flat.type, flat.shape, flat.name = value.type, ir.Shape(["batch", "sequence", width]), name
    return flat


def _replace_output(
    tape: ir.tape.Tape, graph: ir.Graph, attention: ir.Node, y: ir.Value, heads: int, dim: int
) -> None:
    """Give the readers of a [B, H, S, D] attention output the packed y [B, S, H * D]."""
    old = attention.outputs[0]
    for transpose in list(old.consumers()):
        if transpose.op_type != "Transpose" or not _permutes_heads(transpose):
            continue
        for reshape in list(transpose.outputs[0].consumers()):
            target = ints(reshape.inputs[1]) if reshape.op_type == "Reshape" else None
            if target == [0, 0, heads * dim]:
                reshape.outputs[0].replace_all_uses_with(y)
    if not _still_read(old):
        return
    shape = named_constant(
        graph, np.array([0, 0, heads, dim], np.int64), f"shape_0_0_{heads}_{dim}"
    )
    split = tape.op("Reshape", [y, shape], name=f"{y.name}/Reshape")
    back = tape.op("Transpose", [split], {"perm": _HEADS_FIRST}, name=f"{y.name}/Transpose")
    back.type, back.shape = old.type, old.shape
    old.replace_all_uses_with(back)


def _still_read(value: ir.Value) -> bool:
    """Whether anything that reaches an output reads a value through unread transposes."""
    if value.is_graph_output():
        return True
    return any(
        node.op_type not in ("Transpose", "Reshape")
        or any(_still_read(out) for out in node.outputs)
        for node in value.consumers()
    )


def check(model: ir.Model, layout: KVLayout) -> None:
    """Structural truth of a lowered graph: one writer per group, sharers read what it wrote."""
    owners = [node for node in model.graph if _writes_cache(node)]
    if len(owners) != layout.num_groups:
        names = ", ".join(describe(node) for node in owners)
        raise AssertionError(f"{len(owners)} owners for {layout.num_groups} groups: {names}")


def _writes_cache(node: ir.Node) -> bool:
    return any(str(output.name).endswith(".key") for output in node.outputs)
