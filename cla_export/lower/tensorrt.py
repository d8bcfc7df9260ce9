"""The TensorRT targets, both flavours: native KV caches and attention, or the fused plugin.

    write_indices [B] int32   tokens each row holds before the call
    kv_lengths    [B] int32   tokens each row holds after it

Per group, with a scalar q-scale applied in float32 before the query is rounded again:

    owner    TRT_KVCacheUpdate(past, k or v, write_indices) -> present, in place
    all      native: TRT_Attention(q * scale, present, present, kv_lengths, causal_kind=lower_right)
             plugin: ClaAttention(q, present, present, kv_lengths)

1. A sliding window becomes a boolean mask of what each query sees, in place of causal_kind: the
   operator takes only one of the two.
2. float32, and head dims that no fused kernel takes, are marked decomposable: TensorRT then builds
   attention from matrix products.
3. A softcap is taken by the plugin alone.

The capacity stays symbolic here; `engines.tensorrt_build` fixes it, since TensorRT wants the length
of a cache static. Sources: TensorRT's custom ONNX operators TRT_KVCacheUpdate and TRT_Attention, as
of TensorRT 11 and TensorRT-RTX 1.7; the plugin's own contract.
"""

from typing import Literal

import numpy as np
import onnx_ir as ir

from cla_export.errors import BadInput
from cla_export.layout import Group, KVLayout
from cla_export.rewrite.builder import Builder, named_constant
from cla_export.rewrite.simplify import drop_unused
from cla_export.rewrite.thread_caches import GROUP, frontier_of
from cla_export.rewrite.values import attention_nodes, heads_and_dim, producer

Choice = Literal["auto", "native", "plugin"]
DIALECT, PLUGIN = "trt", "cla"  # operator domains
FUSED_HEAD_DIM = 256  # the largest that TensorRT's own kernels take
_INT32 = ir.DataType.INT32
_LOW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def lower(model: ir.Model, layout: KVLayout, attention: Choice = "auto") -> list[tuple[str, str]]:
    graph = model.graph
    nodes = attention_nodes(graph)
    choices = [
        _choose(group, [nodes[layer] for layer in group.layers], attention)
        for group in layout.groups
    ]
    frontier, lengths = _int32_lengths(graph)
    masks: dict[int, ir.Value] = {}
    for group, (operator, _) in zip(layout.groups, choices, strict=True):
        members = [nodes[layer] for layer in group.layers]
        presents = [_update(graph, group, value, lengths) for value in members[0].inputs[1:3]]
        for node in members:
            if operator == "ClaAttention":
                _plugin(graph, group, node, presents, frontier)
            else:
                _native(graph, group, node, presents, frontier, masks)
    model.opset_imports[DIALECT] = 1
    if any(operator == "ClaAttention" for operator, _ in choices):
        model.opset_imports[PLUGIN] = 1
    graph.sort()
    drop_unused(model)
    return choices


def _choose(group: Group, nodes: list[ir.Node], wanted: Choice) -> tuple[str, str]:
    """The operator of a group, and why."""
    query = nodes[0].inputs[0]
    assert query is not None
    dtype, dim = query.dtype, group.head_dim
    capped = any(node.attributes.get_float("softcap", 0.0) for node in nodes)
    if wanted == "plugin" and dtype not in _LOW:
        raise BadInput(
            f"group {group.index}: attention is asked for as the plugin, which computes float16 "
            f"and bfloat16, and the graph is {_name(dtype)}; export with --dtype fp16 or bf16, or "
            "leave --attention to auto"
        )
    if wanted == "plugin":
        return "ClaAttention", "asked for"
    reason = None
    if capped:
        reason = "TensorRT's attention has no softcap"
    elif dim > FUSED_HEAD_DIM or dim % 8:
        reason = (
            f"TensorRT's fused kernels take head dims that are multiples of 8, up to "
            f"{FUSED_HEAD_DIM}, not {dim}"
        )
    if reason is None and dtype in _LOW:
        return "TRT_Attention", "one of TensorRT's own fused kernels"
    if wanted == "auto" and reason is not None and dtype in _LOW:
        return "ClaAttention", reason
    if capped:
        raise BadInput(
            f"group {group.index}: its scores have a softcap, which TensorRT's attention does not; "
            "export with --dtype fp16 or bf16 and --attention auto or plugin"
        )
    return "TRT_Attention, decomposed", reason or f"no fused kernel computes {_name(dtype)}"


def _name(dtype: ir.DataType | None) -> str:
    return "of no known dtype" if dtype is None else dtype.name.lower()


def _int32_lengths(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    """Make both length inputs int32; returns the frontier and write_indices in int32.

    The frontier (write_indices + S) is what attention's lengths are: past it, padding included, a
    query sees nothing.
    """
    build, int64 = Builder(graph), ir.DataType.INT64
    inputs = {value.name: value for value in graph.inputs}
    wide = {}
    for name in ("write_indices", "kv_lengths"):
        value = inputs[name]
        narrow = ir.Value(name=name, type=ir.TensorType(_INT32), shape=value.shape)
        wide[name] = build.op(
            "Cast", [narrow], {"to": int(int64)}, shape=["batch"], name=f"lengths/{name}_int64"
        )
        value.replace_all_uses_with(wide[name])
        graph.inputs[graph.inputs.index(value)] = narrow
        inputs[name] = narrow
    frontier, _ = frontier_of(graph)
    cast = build.op(
        "Cast",
        [frontier],
        {"to": int(_INT32)},
        shape=["batch"],
        dtype=_INT32,
        name="lengths/frontier_int32",
    )
    return cast, inputs["write_indices"]


def _update(
    graph: ir.Graph, group: Group, present: ir.Value | None, write_indices: ir.Value
) -> ir.Value:
    """TRT_KVCacheUpdate in place of a TensorScatter; returns its present output."""
    scatter = producer(present, "TensorScatter")
    assert scatter is not None and present is not None
    value = ir.Value(name=present.name, type=present.type, shape=present.shape)
    part = str(present.name).rpartition(".")[2]
    node = ir.node(
        "TRT_KVCacheUpdate",
        [scatter.inputs[0], scatter.inputs[1], write_indices],
        {"mode": "linear", "axis": -2},
        outputs=[value],
        domain=DIALECT,
        name=f"cache.{group.index}/{part}/TRT_KVCacheUpdate",
        metadata_props={GROUP: str(group.index)},
    )
    graph.append(node)
    present.name = f"{present.name}/scattered"
    graph.outputs[graph.outputs.index(present)] = value
    present.replace_all_uses_with(value)
    return value


def _native(
    graph: ir.Graph,
    group: Group,
    node: ir.Node,
    presents: list[ir.Value],
    frontier: ir.Value,
    masks: dict[int, ir.Value],
) -> None:
    query = node.inputs[0]
    assert query is not None and query.dtype is not None
    decomposed = query.dtype not in _LOW or group.head_dim > FUSED_HEAD_DIM or group.head_dim % 8
    scaled = _scaled(graph, node, query)
    attributes: dict[str, int | str] = {"TRT_decomposable": int(bool(decomposed))}
    inputs: list[ir.Value | None] = [scaled, *presents]
    if group.window is None:
        attributes["causal_kind"] = "lower_right"
        inputs += [None, None, frontier]
    else:  # case 1
        inputs += [_window_mask(graph, node, masks)]
    _replace(graph, node, "TRT_Attention", DIALECT, inputs, attributes)


def _plugin(
    graph: ir.Graph, group: Group, node: ir.Node, presents: list[ir.Value], frontier: ir.Value
) -> None:
    query = node.inputs[0]
    assert query is not None
    attributes: dict[str, int | float | str] = {
        "scale": node.attributes.get_float("scale", 1.0),
        "window": group.window or 0,
        "softcap": node.attributes.get_float("softcap", 0.0),
        "plugin_namespace": PLUGIN,
        "plugin_version": "1",
    }
    inputs: list[ir.Value | None] = [query, *presents, frontier]
    _replace(graph, node, "ClaAttention", PLUGIN, inputs, attributes)


def _scaled(graph: ir.Graph, node: ir.Node, query: ir.Value) -> ir.Value:
    """The query times the scale, multiplied in float32 and rounded once."""
    build, float32 = Builder(graph), ir.DataType.FLOAT
    scale = node.attributes.get_float("scale", 1.0)
    factor = named_constant(graph, np.array(scale, np.float32), f"const/scale_{scale:.9g}")
    shape = None if query.shape is None else list(query.shape)
    name = f"{node.name}/query"
    wide = query
    if query.dtype != float32:
        to = {"to": int(float32)}
        wide = build.op("Cast", [query], to, shape=shape, dtype=float32, name=f"{name}/float32")
    scaled = build.op("Mul", [wide, factor], shape=shape, dtype=float32, name=f"{name}/scaled")
    if query.dtype == float32 or query.dtype is None:
        return scaled
    to = {"to": int(query.dtype)}
    return build.op("Cast", [scaled], to, shape=shape, dtype=query.dtype, name=f"{name}/rounded")


def _window_mask(graph: ir.Graph, node: ir.Node, masks: dict[int, ir.Value]) -> ir.Value:
    """Bool [B, 1, S, C]: the canonical lower end of the window, and the causal upper end."""
    newer = node.inputs[3]
    greater = producer(newer, "Greater")
    assert newer is not None and greater is not None
    if id(newer) not in masks:
        keys = greater.inputs[0]
        oldest = producer(greater.inputs[1], "Sub")
        assert oldest is not None and keys is not None
        build, dtype = Builder(graph), ir.DataType.BOOL
        shape = None if newer.shape is None else list(newer.shape)
        name = f"lengths/window_{len(masks)}"
        older = build.op(
            "LessOrEqual", [keys, oldest.inputs[0]], shape=shape, dtype=dtype, name=f"{name}/causal"
        )
        masks[id(newer)] = build.op("And", [newer, older], shape=shape, dtype=dtype, name=name)
    return masks[id(newer)]


def _replace(
    graph: ir.Graph,
    node: ir.Node,
    op_type: str,
    domain: str,
    inputs: list[ir.Value | None],
    attributes: dict[str, int | float | str] | dict[str, int | str],
) -> None:
    """Put an operator of the dialect where a standard Attention stands."""
    query, old = node.inputs[0], node.outputs[0]
    assert query is not None
    heads_and_dim(query, node, "query")
    name = str(node.name).replace("/Attention", f"/{op_type}")
    y = ir.Value(name=name, type=query.type, shape=query.shape)
    new = ir.node(
        op_type,
        inputs,
        attributes,
        outputs=[y],
        domain=domain,
        name=name,
        metadata_props=dict(node.metadata_props),
    )
    graph.append(new)
    old.replace_all_uses_with(y)
