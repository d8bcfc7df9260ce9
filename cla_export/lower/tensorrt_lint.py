"""What TensorRT would accept and get wrong, or crash on: refused before any builder runs.

Each rule is a function from a graph to complaints; `RULES` lists them all. Checked on every graph
that `cla-export build` takes, our own too. Seen with TensorRT-RTX 1.7 unless said otherwise:

    lengths_ignored       the parser drops Attention's nonpad_kv_seqlen with a warning: all places
                          of the cache are attended to, filled or not
    lengths_missing       over a cache without lengths and without a mask: likewise, and by the
                          graph's own fault
    upper_left            is_causal is read as upper-left: with keys of earlier calls, a query sees
                          the oldest ones only
    scaled_twice          a tensor that is query or key of two Attention nodes crashes the builder
                          unless their scale is 1: the parser scales it for each of them
    outputs               Attention with a present or a qk output is refused
    softcap               refused by the parser; TRT_Attention has none, and ignores the attribute
    not_fused             float32, and head dims over 256, have no fused kernel: refused unless
                          decomposable. What the graph does not say cannot be checked
    mask_and_causal       TRT_Attention takes a mask or a causal kind; given both it is refused
    cache_length          the length of a cache must be a constant
    cache_place           a cache must be a graph input and its present a graph output, each used by
                          one update; anything else is refused, late and without a name
    cache_mode            circular caches and float8 caches are refused
    past_read             whoever reads the past beside the update reads it before or after the
                          write, as the builder likes
    foreign_operators     GroupQueryAttention, MatMulNBits and others of ONNX Runtime's need a
                          library that no TensorRT wheel has
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import onnx_ir as ir

from cla_export.errors import GraphError
from cla_export.rewrite.report import describe

_FUSED_HEAD_DIM = 256
_PER_TOKEN = 2  # dimensions of an input that has one number for each token: ids, positions
_UPDATES = ("TensorScatter", "TRT_KVCacheUpdate")
_FLOAT8 = ("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ")
_MIXING = (  # what comes out of these is no longer what was stored
    *("MatMul", "Gemm", "Conv", "Einsum", "Softmax", "LayerNormalization", "RMSNormalization"),
    *("Attention", "TRT_Attention", "ClaAttention", "ReduceMean", "ReduceSum", "Shape"),
)
_KNOWN_DOMAINS = ("", "ai.onnx", "trt", "cla")
Rule = Callable[[ir.Graph], Iterator[str]]


def check(graph: ir.Graph, *, static_capacity: bool = True) -> None:
    """Refuse a graph that TensorRT would get wrong; GraphError names each node and what to do.

    `static_capacity` false leaves the caches' length open, as in a bundle before its build.
    """
    found = lint(graph, static_capacity=static_capacity)
    if found:
        listed = "\n  ".join(found)
        raise GraphError(f"TensorRT would build this graph wrongly, or not at all:\n  {listed}")


def lint(graph: ir.Graph, *, static_capacity: bool = True) -> list[str]:
    """All complaints, a sentence each."""
    rules = RULES if static_capacity else tuple(r for r in RULES if r is not cache_length)
    return [f"{rule.__name__}: {complaint}" for rule in rules for complaint in rule(graph)]


def _nodes(graph: ir.Graph, *op_types: str) -> Iterator[ir.Node]:
    for node in graph.all_nodes():
        if node.op_type in op_types:
            yield node


def _input(node: ir.Node, slot: int) -> ir.Value | None:
    return node.inputs[slot] if slot < len(node.inputs) else None


def _standard(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node in _nodes(graph, "Attention") if node.domain in ("", "ai.onnx"))


def lengths_ignored(graph: ir.Graph) -> Iterator[str]:
    for node in _standard(graph):
        if _input(node, 6) is not None:
            yield (
                f"{describe(node)} has nonpad_kv_seqlen, which TensorRT's parser drops; use "
                "TRT_Attention with kv_lengths (export with --target tensorrt)"
            )


def lengths_missing(graph: ir.Graph) -> Iterator[str]:
    for node in _nodes(graph, "Attention", "TRT_Attention"):
        given = [_input(node, slot) for slot in (3, 5 if node.op_type == "TRT_Attention" else 6)]
        if any(value is not None for value in given):
            continue
        cache = next((v for v in _stored(_input(node, 1)) if _is_present(v)), None)
        if cache is not None:
            yield (
                f"{describe(node)} reads {cache.name} without kv_lengths or a mask, so places that "
                "hold nothing yet too; give it kv_lengths"
            )


def _stored(value: ir.Value | None) -> Iterator[ir.Value]:
    """What a value is made of without arithmetic that mixes tokens or channels: itself, too."""
    waiting, seen = [value], set()
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        producer = current.producer()
        if producer is not None and producer.op_type not in (*_MIXING, *_UPDATES):
            waiting += producer.inputs


def _is_present(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type in _UPDATES


def upper_left(graph: ir.Graph) -> Iterator[str]:
    for node in _standard(graph):
        if not node.attributes.get_int("is_causal", 0):
            continue
        query, key = _input(node, 0), _input(node, 1)
        if not _same_length(query, key):
            yield (
                f"{describe(node)} has is_causal=1 over keys that are not the queries' own "
                f"({_shape(query)} and {_shape(key)}); TensorRT aligns it to the upper left. Use "
                "TRT_Attention with causal_kind=lower_right, or a mask"
            )


def _same_length(query: ir.Value | None, key: ir.Value | None) -> bool:
    """Whether both have as many tokens: by a constant, or by one name that is no cache's."""
    if query is None or key is None or query.shape is None or key.shape is None:
        return False
    if any(_is_present(value) or _is_old(value) for value in _stored(key)):
        return False
    one, other = query.shape[-2], key.shape[-2]
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    return not isinstance(one, int) and one.value is not None and one == other


def _is_old(value: ir.Value) -> bool:
    """Whether a value may hold tokens of earlier calls: an input with places, or glued to some."""
    if value.is_graph_input():
        return value.shape is None or len(value.shape) > _PER_TOKEN
    producer = value.producer()
    if producer is None or producer.op_type != "Concat" or value.shape is None:
        return producer is not None and producer.op_type == "Concat"
    axis = producer.attributes.get_int("axis", 0)
    return axis not in (-1, len(value.shape) - 1)


def _shape(value: ir.Value | None) -> str:
    return "no shape" if value is None or value.shape is None else str(list(value.shape))


def scaled_twice(graph: ir.Graph) -> Iterator[str]:
    scaled: dict[int, list[ir.Node]] = {}
    for node in _standard(graph):
        if node.attributes.get_float("scale", 0.0) == 1.0:
            continue
        for slot in (0, 1):
            if (value := _input(node, slot)) is not None:
                scaled.setdefault(id(_renamed(value)), []).append(node)
    named: set[int] = set()
    for nodes in scaled.values():
        if len(nodes) > 1 and id(nodes[0]) not in named:
            named.update(id(node) for node in nodes)
            other = "uses it twice" if nodes[0] is nodes[1] else f"shares it with {nodes[1].name!r}"
            yield (
                f"{describe(nodes[0])} scales a query or key and {other}, which crashes TensorRT's "
                "builder; scale the query before it instead, and set scale=1"
            )


def _renamed(value: ir.Value) -> ir.Value:
    """The value that the parser takes for this one: in front of nodes that change nothing."""
    producer = value.producer()
    while producer is not None and producer.op_type in ("Identity", "Cast"):
        before = producer.inputs[0]
        if before is None or (producer.op_type == "Cast" and before.dtype != value.dtype):
            break
        value, producer = before, before.producer()
    return value


def outputs(graph: ir.Graph) -> Iterator[str]:
    for node in _standard(graph):
        used = [out for out in node.outputs[1:] if out.name]
        if used or _input(node, 4) is not None or _input(node, 5) is not None:
            yield (
                f"{describe(node)} keeps its own cache (past or present); TensorRT takes Attention "
                "with one output only. Write the cache with TRT_KVCacheUpdate"
            )


def softcap(graph: ir.Graph) -> Iterator[str]:
    for node in _nodes(graph, "Attention", "TRT_Attention"):
        if node.attributes.get_float("softcap", 0.0):
            yield f"{describe(node)} has a softcap, which TensorRT lacks; use the plugin"


def not_fused(graph: ir.Graph) -> Iterator[str]:
    for node in _nodes(graph, "Attention", "TRT_Attention"):
        query = _input(node, 0)
        if node.attributes.get_int("TRT_decomposable", 0) or query is None:
            continue
        if query.dtype is None or query.shape is None:
            yield (
                f"{describe(node)}: the graph does not say the dtype and shape of its query, so it "
                "cannot be checked; run onnx.shape_inference on it"
            )
        if query.dtype == ir.DataType.FLOAT:
            yield (
                f"{describe(node)} is float32, which no fused kernel computes; set "
                "TRT_decomposable=1, or export with --dtype fp16 or bf16"
            )
        dim = query.shape[-1] if query.shape is not None else None
        if isinstance(dim, int) and dim > _FUSED_HEAD_DIM:
            yield (
                f"{describe(node)} has head dim {dim}; fused kernels end at {_FUSED_HEAD_DIM}. Set "
                "TRT_decomposable=1 or use the plugin"
            )


def mask_and_causal(graph: ir.Graph) -> Iterator[str]:
    for node in _nodes(graph, "TRT_Attention"):
        kind = node.attributes.get_string("causal_kind", "none")
        if _input(node, 3) is not None and kind != "none":
            yield f"{describe(node)} has a mask and causal_kind={kind}; give it one of the two"


def _updates(graph: ir.Graph) -> Iterator[ir.Node]:
    return _nodes(graph, *_UPDATES)


def cache_length(graph: ir.Graph) -> Iterator[str]:
    for node in _updates(graph):
        cache = _input(node, 0)
        length = cache.shape[2] if cache is not None and cache.shape is not None else None
        if not isinstance(length, int):
            yield (
                f"{describe(node)}: the length of its cache is {length}; TensorRT wants a constant "
                "(--capacity)"
            )


def cache_place(graph: ir.Graph) -> Iterator[str]:
    pasts: Counter[int] = Counter()
    for node in _updates(graph):
        past, present = _input(node, 0), node.outputs[0]
        if past is None or not past.is_graph_input():
            yield f"{describe(node)}: its cache is computed in the graph; it must be a graph input"
        elif pasts[id(past)]:
            yield f"{describe(node)}: {past.name} is updated twice; a cache has one update"
        if not present.is_graph_output():
            yield f"{describe(node)}: its present is not a graph output; it must be"
        pasts[id(past)] += 1


def cache_mode(graph: ir.Graph) -> Iterator[str]:
    for node in _updates(graph):
        mode = node.attributes.get_string("mode", "linear")
        if mode != "linear":
            yield f"{describe(node)}: mode {mode}; TensorRT's caches are linear"
        axis = node.attributes.get_int("axis", -2)
        if axis not in (2, -2):
            yield f"{describe(node)}: writes along axis {axis}; TensorRT's caches run along axis 2"
        cache = _input(node, 0)
        if cache is not None and cache.dtype is not None and cache.dtype.name in _FLOAT8:
            yield f"{describe(node)}: a {cache.dtype.name} cache; use float16 or bfloat16"


def past_read(graph: ir.Graph) -> Iterator[str]:
    for node in _updates(graph):
        past = _input(node, 0)
        if past is None:
            continue
        for user, slot in past.uses():
            written = user.op_type in _UPDATES and slot == 0  # cache_place has a word on a second
            if not written and user.op_type != "Shape":
                yield (
                    f"{describe(user)} reads {past.name} beside the update that overwrites it; "
                    f"read {node.outputs[0].name}"
                )


def foreign_operators(graph: ir.Graph) -> Iterator[str]:
    seen: dict[str, ir.Node] = {}
    for node in graph.all_nodes():
        if node.domain not in _KNOWN_DOMAINS:
            seen.setdefault(f"{node.domain}.{node.op_type}", node)
    for name, node in seen.items():
        yield f"{describe(node)}: TensorRT has no {name}; export with --target tensorrt"


RULES: Sequence[Rule] = (
    lengths_ignored,
    lengths_missing,
    upper_left,
    scaled_twice,
    outputs,
    softcap,
    not_fused,
    mask_and_causal,
    cache_length,
    cache_place,
    cache_mode,
    past_read,
    foreign_operators,
)
