"""Reading the KV sharing of any ONNX graph: canonical, lowered, mixed, or still stateless.

Like the rewriter, it believes the dataflow alone: who writes a cache, who reads what was written.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from cla_export.errors import BadInput, GraphError, LayoutError
from cla_export.layout import KVLayout

if TYPE_CHECKING:
    import onnx_ir as ir

_LARGEST_CONSTANT = 1024  # elements; bigger initialisers are weights, which nothing here reads
_PAST_SLOT = {"Attention": 4, "GroupQueryAttention": 3}  # where past_key stands, past_value next
_ATTENTION = {
    ("Attention", ""),
    ("GroupQueryAttention", "com.microsoft"),
    ("TRT_Attention", "trt"),
    ("ClaAttention", "cla"),
    ("ClaAttention", "cla.int8"),
    ("ClaAttention", "cla.float16"),
    ("ClaAttention", "cla.bfloat16"),
}
_WRITERS = ("TensorScatter", "TRT_KVCacheUpdate")  # past cache, update, where


SPELT = "spelt out"  # in place of an operator's name
_LONG = {"float": "float32", "double": "float64"}  # ONNX's names -> the usual ones


@dataclass(frozen=True, slots=True)
class GraphFacts:
    """What was found in an ONNX graph."""

    file: str
    stage: Literal["stateless", "stateful"]  # stateless: no caches threaded yet
    attention: dict[str, int]  # operator -> how many of them; SPELT: of several operators
    cache_inputs: int
    weight_bytes: dict[str, int]  # dtype -> bytes; shapes and axes (int64) are left out


def read_graph(path: Path) -> tuple[GraphFacts, KVLayout, str, list[str]]:
    """`read_model` of a file; external weights are not touched."""
    import onnx_ir as ir

    try:
        model = ir.load(path)
    except Exception as error:  # protobuf, text parser and deserialiser each have their own
        raise BadInput(f"{path}: not a readable ONNX model ({error}); export it again") from error
    try:
        if _may_be_spelt(model):
            return _read_spelt(model, path)
        return read_model(model, path.name)
    except GraphError as error:
        raise GraphError(f"{path}: {error}") from error


def read_model(model: "ir.Model", name: str) -> tuple[GraphFacts, KVLayout, str, list[str]]:
    """Facts, layout, cache dtype and notes of a graph; layers are numbered in execution order."""
    nodes = [node for node in model.graph if _is_attention(node)]
    if not nodes:
        seen = ", ".join(sorted({node.op_type for node in model.graph}))
        raise GraphError(
            f"no Attention or GroupQueryAttention node, and no softmax (operators seen: {seen}); "
            "it is no decoder's graph, or its softmax is spelt out too, which cannot be read"
        )
    notes: list[str] = []
    counted, weights = dict(Counter(n.op_type for n in nodes)), _weight_bytes(model)
    if not _reads_caches(nodes):
        _drop_weights(model)
        layout, dtype, _ = _stateless_layout(model)
        return GraphFacts(name, "stateless", counted, 0, weights), layout, dtype, notes
    layout, cache_inputs, dtype = _stateful_layout(nodes, notes)
    return GraphFacts(name, "stateful", counted, cache_inputs, weights), layout, dtype, notes


def _drop_weights(model: "ir.Model") -> None:
    import onnx_ir as ir

    for initializer in model.graph.initializers.values():
        tensor = initializer.const_value
        if tensor is None:
            continue
        if isinstance(tensor, ir.ExternalTensor) or tensor.size > _LARGEST_CONSTANT:
            initializer.const_value = None


def _reads_caches(nodes: "list[ir.Node]") -> bool:
    return any(_cache_input(cache) is not None for node in nodes for cache in _caches_of(node))


def _may_be_spelt(model: "ir.Model") -> bool:
    """Whether a stateless graph has a softmax of its own, as attention that is spelt out has."""
    softmax = any(node.op_type == "Softmax" for node in model.graph)
    return softmax and not _reads_caches([node for node in model.graph if _is_attention(node)])


def _read_spelt(model: "ir.Model", path: Path) -> tuple[GraphFacts, KVLayout, str, list[str]]:
    """Read the file again as `rewrite` does, and find its attention as `rewrite` does."""
    from cla_export.stateless_reading import read_stateless

    counted = dict(Counter(n.op_type for n in model.graph if _is_attention(n)))
    layout, dtype, spelt = _stateless_layout(read_stateless(path)[0])
    if spelt:
        counted[SPELT] = spelt
    facts = GraphFacts(path.name, "stateless", counted, 0, _weight_bytes(model))
    return facts, layout, dtype, []


def _weight_bytes(model: "ir.Model") -> dict[str, int]:
    import onnx_ir as ir

    found: Counter[str] = Counter()
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.dtype not in (None, ir.DataType.INT64):
            found[str(value.const_value.dtype).lower()] += value.const_value.nbytes
    return {_LONG.get(name, name): count for name, count in found.most_common()}


def _is_attention(node: "ir.Node") -> bool:
    return (node.op_type, node.domain) in _ATTENTION


def _input(node: "ir.Node", slot: int) -> "ir.Value | None":
    return node.inputs[slot] if slot < len(node.inputs) else None


def _caches_of(node: "ir.Node") -> "list[ir.Value | None]":
    """The key cache and the value cache an attention node reads, as they are after this call.

    1. No past: what it reads as K, which TensorScatter or another node's present output made.
    2. Its past is a graph input: the node is an owner, its own present output.
    3. Its past was made in the graph, by an owner: that, provided it adds nothing to it.
    """
    from cla_export.rewrite.report import describe

    caches: list[ir.Value | None] = []
    for part in (0, 1):
        new, slot = _input(node, 1 + part), _PAST_SLOT.get(node.op_type)
        past = None if slot is None else _input(node, slot + part)
        if past is None:  # 1
            caches.append(new)
        elif past.is_graph_input():  # 2
            if len(node.outputs) <= 1 + part or not node.outputs[1 + part].name:
                raise GraphError(
                    f"{describe(node)}: it reads cache input {past.name} but has no present "
                    "output; expected an owner to write what it reads"
                )
            caches.append(node.outputs[1 + part])
        else:  # 3
            if not _is_empty(new):
                raise GraphError(
                    f"{describe(node)}: it appends its own K or V to {past.name}, a cache that "
                    "another layer wrote in this call; expected a sharer to give zero-length K/V"
                )
            caches.append(past)
    return caches


def _is_empty(value: "ir.Value | None") -> bool:
    """Whether K or V has no tokens: a zero in its shape, or a Slice that ends where it starts."""
    from cla_export.rewrite.values import ints, producer

    if value is not None and value.shape is not None and 0 in value.shape:
        return True
    cut = producer(value, "Slice")
    if cut is None:
        return False
    start = ints(_input(cut, 1))
    return start is not None and start == ints(_input(cut, 2))


def _cache_input(present: "ir.Value | None") -> "ir.Value | None":
    """The cache a present value continues; None if it is not a cache."""
    node = None if present is None else present.producer()
    index = None if present is None else present.index()
    if node is None or index is None:
        return None
    if node.op_type in _WRITERS:
        return node.inputs[0]
    if node.op_type == "ClaAppend":  # both caches at once
        return node.inputs[index]
    if node.op_type == "ClaRotateAppend" and index in (1, 2):  # q, then both caches
        return node.inputs[3 + index]
    if node.op_type in _PAST_SLOT and index in (1, 2):
        return _input(node, _PAST_SLOT[node.op_type] + index - 1)
    return None


def _stateful_layout(nodes: "list[ir.Node]", notes: list[str]) -> tuple[KVLayout, int, str]:
    from cla_export.rewrite.report import describe
    from cla_export.rewrite.values import heads_and_dim

    owner_of: dict[tuple[ir.Value, ir.Value], int] = {}  # (key, value) present -> first reader
    written_by: dict[ir.Value, int] = {}  # cache input -> owner
    owners: list[int] = []
    shapes: list[tuple[int, int]] = []
    windows: list[int | None] = []
    unclear: list[int] = []
    dtype = ""
    for layer, node in enumerate(nodes):
        key, value = _caches_of(node)
        past_key, past_value = _cache_input(key), _cache_input(value)
        if key is None or value is None or past_key is None or past_value is None:
            raise GraphError(
                f"{describe(node)}: layer {layer} reads no cache though others do; expected "
                "every attention node to read one"
            )
        owner = owner_of.setdefault((key, value), layer)
        for past in (past_key, past_value):
            if not past.is_graph_input():
                raise GraphError(f"{describe(node)}: its cache {past.name} is not a graph input")
            if written_by.setdefault(past, owner) != owner:
                raise GraphError(
                    f"{describe(node)}: layers {written_by[past]} and {owner} each write "
                    f"{past.name}; a cache has one owner"
                )
        owners.append(owner)
        shapes.append(heads_and_dim(past_key, node, "key cache"))
        if shapes[-1] != heads_and_dim(past_value, node, "value cache"):
            raise GraphError(
                f"{describe(node)}: its key cache is {past_key.shape}, its value cache "
                f"{past_value.shape}; expected one shape for both"
            )
        windows.append(_window(node, layer, unclear))
        dtype = dtype or _dtype_name(past_key)
    if unclear:
        notes.append(
            f"layers {', '.join(map(str, unclear))}: the mask is not one cla-export writes; shown "
            "as full attention, though it may slide"
        )
    heads, dims = zip(*shapes, strict=True)
    return _legal_layout(owners, heads, dims, windows), len(written_by), dtype


def _legal_layout(
    owners: list[int], heads: tuple[int, ...], dims: tuple[int, ...], windows: list[int | None]
) -> KVLayout:
    try:
        return KVLayout.create(owners, heads, dims, windows)
    except LayoutError as error:
        raise GraphError(f"its layers share KV in a way that is not legal: {error}") from error


def _window(node: "ir.Node", layer: int, unclear: list[int]) -> int | None:
    """Sliding window in tokens: as the rewriter recorded it, else as the node itself says."""
    from cla_export.rewrite.classify_masks import WINDOW, window_of
    from cla_export.rewrite.values import ints, producer

    if WINDOW in node.metadata_props:
        return window_of(node)
    if node.op_type == "GroupQueryAttention":
        size = node.attributes.get_int("local_window_size", -1)
        return size if size > 0 else None
    mask = _input(node, 3)
    if mask is None:
        return None
    newer = producer(mask, "Greater")  # key position > query position - window
    oldest = producer(newer.inputs[1], "Sub") if newer is not None else None
    width = ints(oldest.inputs[1]) if oldest is not None else None
    if width is not None and len(width) == 1:
        return width[0]
    unclear.append(layer)
    return None


def _stateless_layout(model: "ir.Model") -> tuple[KVLayout, str, int]:
    """What `rewrite` would find, by the same passes, on a graph without weight values.

    Also the cache's dtype, and in how many layers attention is spelt out.
    """
    from cla_export.rewrite.classify_masks import classify_masks
    from cla_export.rewrite.fuse_attention import fuse_attention
    from cla_export.rewrite.group_attention import group_attention
    from cla_export.rewrite.hoist_key_scale import hoist_key_scale
    from cla_export.rewrite.simplify import simplify
    from cla_export.rewrite.strip_repeat_kv import strip_repeat_kv
    from cla_export.rewrite.values import attention_nodes

    simplify(model)
    if spelt := fuse_attention(model).fired:
        simplify(model)  # what it left around q, k and v
    for find in (strip_repeat_kv, hoist_key_scale, classify_masks):
        find(model)
    layout, _ = group_attention(model, None)
    key = attention_nodes(model.graph)[0].inputs[1]
    return layout, _dtype_name(cast("ir.Value", key)), spelt


def _dtype_name(value: "ir.Value") -> str:
    if value.dtype is None:
        raise GraphError(f"{value.name} has no dtype; run ONNX shape inference on the file first")
    names = {"FLOAT": "float32", "FLOAT8E4M3FN": "float8_e4m3fn", "FLOAT8E5M2": "float8_e5m2"}
    return names.get(value.dtype.name, value.dtype.name.lower())
