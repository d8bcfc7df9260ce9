"""Quantise caches: in a lowered graph, pasts and presents become int8, with scales as constants.

    GroupQueryAttention    takes k_scale and v_scale; a sharer has present outputs, which nobody
                           reads, since it refuses an int8 cache without
    ClaAppend              becomes cla.int8's, which takes both scales and rounds
    ClaAttention           becomes cla.int8's, which takes them too

Source: com.microsoft.GroupQueryAttention, version 1, as of ONNX Runtime 1.31: with PER_CHANNEL its
first prompt reads what it rounded too, so a cache filled in pieces is the same.
"""

from collections.abc import Sequence

import onnx_ir as ir

from cla_export.errors import BadInput
from cla_export.kv_scales import PARTS, Scales, scale_name
from cla_export.layout import KVLayout
from cla_export.plugin.contract import DOMAIN, INT8_DOMAIN
from cla_export.rewrite.builder import named_constant
from cla_export.rewrite.thread_caches import GROUP

DTYPE = "int8"
_INT8 = ir.TensorType(ir.DataType.INT8)
_FUSED = "GroupQueryAttention"
_SCALES_AT = 12  # among its inputs
_OUTPUTS = 3  # y, present key, present value


def check_heads(layout: KVLayout) -> None:
    """Raise BadInput unless all groups' caches can be int8."""
    for group in layout.groups:
        if group.head_dim % 8:
            raise BadInput(
                f"kv_cache is {DTYPE!r} and the head dim of layer {group.owner} is "
                f"{group.head_dim}; ONNX Runtime's GroupQueryAttention takes int8 caches of head "
                "dims that are multiples of 8"
            )


def quantize_caches(model: ir.Model, layout: KVLayout, scales: Sequence[Scales]) -> None:
    """Make all caches of a lowered graph int8, in place; `scales` are float32 [Hkv, 1, D] each."""
    graph = model.graph
    constants = {
        (group.index, part): named_constant(graph, scale[None], scale_name(group.index, part))
        for group, of_group in zip(layout.groups, scales, strict=True)
        for part, scale in zip(PARTS, of_group, strict=True)
    }
    for value in (*graph.inputs, *graph.outputs):
        if str(value.name).startswith(("past_key_values.", "present.")):
            value.type = _INT8
    for node in graph:
        if GROUP not in node.metadata_props:
            continue
        both = [constants[int(node.metadata_props[GROUP]), part] for part in PARTS]
        if node.op_type == _FUSED:
            _quantize_fused(node, both)
        elif node.domain == DOMAIN:
            at = len(node.inputs)
            node.domain = INT8_DOMAIN
            node.resize_inputs(at + 2)
            for index, scale in enumerate(both, at):
                node.replace_input_with(index, scale)
            model.opset_imports[INT8_DOMAIN] = 1
        else:
            raise AssertionError(f"{node.name}: {node.op_type} has no {DTYPE} cache")


def _quantize_fused(node: ir.Node, scales: list[ir.Value]) -> None:
    node.resize_inputs(_SCALES_AT + 2)
    for index, scale in enumerate(scales, _SCALES_AT):
        node.replace_input_with(index, scale)
    for name in ("k_quant_type", "v_quant_type"):
        node.attributes.add(ir.AttrString(name, "PER_CHANNEL"))
    node.attributes.add(ir.AttrInt64("kv_cache_bit_width", 8))
    if len(node.outputs) < _OUTPUTS:
        node.resize_outputs(_OUTPUTS)
        for part, value in zip(PARTS, node.outputs[1:], strict=True):
            value.name, value.type = f"{node.name}/unread_{part}", _INT8
