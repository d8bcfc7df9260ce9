"""A second graph for ONNX Runtime on NVIDIA GPUs, over the same weights: one CUDA graph a step.

    write_indices [B] int64   tokens each row holds before the call
    kv_lengths    [B] int64   tokens each row holds after it: write_indices + S, no padding
    tokens        [B, num_logits] int64, an output: the likeliest token after each that has logits

Attention is the `onnxruntime` target's, GroupQueryAttention over caches in place, with lengths that
are read on the device, so that a captured step can be replayed whatever they are:

    seqlens_k              int32(kv_lengths - 1)
    total_sequence_length  int32 of the caches' capacity, from the shape of one

Anything less than the capacity makes replays silently wrong, so it is no input. In return the
operator takes several rows with one new token each, or one row with several, and refuses several
rows with several: prompts are prefilled row by row. A group that it has no kernel for keeps the
standard form, TensorScatter and Attention.

ONNX Runtime captures a session whose nodes copy nothing between host and device. Shapes are the
host's, so what is computed from them may enter a kernel only as an argument:

1. the frontier of the standard form is kv_lengths, in place of write_indices + S;
2. the last hidden states are a Slice. GatherND's CUDA kernel copies its strides from the host's
   stack, which is something else when the graph is replayed.

`fuse_rounded_rotary` and `fuse_norms` leave one kernel where there were several, and so does
`fuse_products`, which comes after quantisation. Sources: com.microsoft.GroupQueryAttention, version
1, as of ONNX Runtime 1.31; ONNX operators Slice-13 and ArgMax-13.
"""

import onnx_ir as ir

from cla_export.layout import Group, KVLayout
from cla_export.lower.fuse_norms import fuse_norms
from cla_export.lower.fuse_rounded_rotary import fuse_rounded_rotary
from cla_export.lower.onnxruntime import FUSED, lower_groups
from cla_export.rewrite.builder import Builder
from cla_export.rewrite.simplify import drop_unused
from cla_export.rewrite.values import attention_nodes

TOKENS = "tokens"
MAX_HEAD_DIM = 256  # wider ones have no kernel that reads keys once for all heads of a group
_LOW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_INT32, _FLOAT = ir.DataType.INT32, ir.DataType.FLOAT


def lower(model: ir.Model, layout: KVLayout) -> list[tuple[str, str]]:
    fuse_rounded_rotary(model)
    graph = model.graph
    attentions = attention_nodes(graph)
    choices = [_choose(group, attentions[group.owner]) for group in layout.groups]
    if any(operator == FUSED for operator, _ in choices):
        lower_groups(model, layout, choices, _counts(graph))
    lower_the_rest(model)
    return choices


def lower_the_rest(model: ir.Model) -> None:
    """Everything but attention."""
    graph = model.graph
    _lengths_from_inputs(graph)
    _slice_last_tokens(graph)
    _add_tokens(graph)
    graph.sort()
    drop_unused(model)
    fuse_norms(model)


def _choose(group: Group, node: ir.Node) -> tuple[str, str]:
    query = node.inputs[0]
    assert query is not None
    if query.dtype not in _LOW:
        return "Attention", f"{FUSED} computes float16 and bfloat16 on a GPU"
    if group.head_dim % 8 or group.head_dim > MAX_HEAD_DIM:
        return "Attention", (
            f"{FUSED} takes head dims that are multiples of 8, up to {MAX_HEAD_DIM} on a GPU, not "
            f"{group.head_dim}"
        )
    return FUSED, "in place, cost follows the valid length"


def _counts(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    """The operator's lengths: kv_lengths - 1 of each row, and the capacity of the caches."""
    inputs = {value.name: value for value in graph.inputs}
    build = Builder(graph)
    last = build.op(
        "Sub",
        [inputs["kv_lengths"], build.int64(1, "one")],
        shape=["batch"],
        name="lengths/last",
    )
    to = {"to": int(_INT32)}
    seqlens = build.op("Cast", [last], to, shape=["batch"], dtype=_INT32, name="lengths/seqlens_k")
    past = inputs["past_key_values.0.key"]
    places = build.op("Shape", [past], {"start": 2, "end": 3}, shape=[1], name="lengths/places")
    capacity = build.op("Squeeze", [places], shape=[], name="lengths/capacity")
    total = build.op("Cast", [capacity], to, shape=[], dtype=_INT32, name="lengths/capacity_int32")
    return seqlens, total


def _lengths_from_inputs(graph: ir.Graph) -> None:  # case 1
    """Let whoever reads write_indices + S read kv_lengths."""
    inputs = {value.name: value for value in graph.inputs}
    length = _length(graph)
    for user in list(length.consumers()):
        if user.op_type == "Add" and inputs["write_indices"] in user.inputs:
            user.outputs[0].replace_all_uses_with(inputs["kv_lengths"])


def _length(graph: ir.Graph) -> ir.Value:
    """How many tokens a row of the call has, S [1]: the second axis of input_ids.

    Its name says who was the first to read it, which may be a layer.
    """
    (ids,) = (value for value in graph.inputs if value.name == "input_ids")
    return next(
        node.outputs[0]
        for node, _ in ids.uses()
        if node.op_type == "Shape"
        and node.attributes.get_int("start", 0) == 1
        and node.attributes.get_int("end", 0) == 2
    )


def _slice_last_tokens(graph: ir.Graph) -> None:  # case 2
    """GatherND of each row's last tokens, all of them valid, becomes Slice."""
    nodes = {node.name: node for node in graph}
    gather, count = nodes["head/GatherND"], nodes["head/Min"].outputs[0]
    length = _length(graph)
    source, old = gather.inputs[0], gather.outputs[0]
    assert old.shape is not None
    build = Builder(graph)
    start = build.op("Sub", [length, count], shape=[1], name="head/start")
    last = build.op(
        "Slice",
        [source, start, length, build.int64([1], "axis_1")],
        shape=list(old.shape),
        dtype=old.dtype,
        name="head/Slice",
    )
    if old.is_graph_output():
        graph.outputs[graph.outputs.index(old)] = last
        last.name, old.name = old.name, last.name
    old.replace_all_uses_with(last)


def _add_tokens(graph: ir.Graph) -> None:
    """The output `tokens`: greedy sampling, on the device."""
    logits = next(value for value in graph.outputs if value.name == "logits")
    build, shape = Builder(graph), ["batch", "num_logits"]
    assert logits.shape is not None
    wide = logits
    if logits.dtype != _FLOAT:  # the operator has no kernel for bfloat16
        wide = build.op(
            "Cast",
            [logits],
            {"to": int(_FLOAT)},
            shape=list(logits.shape),
            dtype=_FLOAT,
            name="head/logits_float",
        )
    tokens = build.op(
        "ArgMax", [wide], {"axis": -1, "keepdims": 0}, shape=shape, name="head/ArgMax"
    )
    tokens.name = TOKENS
    graph.outputs.append(tokens)
