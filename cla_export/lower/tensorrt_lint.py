"""What TensorRT would accept and get wrong, or crash on: refused before any builder runs.

Each rule is a function from a graph to complaints; `RULES` lists them all. Checked on every graph
that `cla-export build` takes, our own too. TensorRT's parser looks at a node's operator and not at
its domain, so the rules do too. Seen with TensorRT-RTX 1.7 unless said otherwise:

    attributes_dropped    attributes that the parser does not know are left out without a warning: a
                          window of Attention, a scale of TRT_Attention
    lengths_ignored       the parser drops Attention's nonpad_kv_seqlen with a warning: all places
                          of the cache are attended to, filled or not
    lengths_missing       over a cache without lengths and without a mask: likewise, and by the
                          graph's own fault
    upper_left            is_causal is read as upper-left: with keys of earlier calls, a query sees
                          the oldest ones only (by the operator's text that is right without
                          lengths, but nobody means it)
    mask_stretched        Attention's mask with one column is stretched over all keys; the operator
                          pads it with False
    scaled_twice          a tensor that is multiplied by one number for two uses as a query or a key
                          crashes the builder: by two nodes' scale, or by a node in front of them
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
from cla_export.lower.lint_values import (
    UPDATES,
    Numbers,
    is_old,
    is_present,
    made_of,
    multiplied,
    stored_in,
)
from cla_export.rewrite.report import describe

_FUSED_HEAD_DIM = 256
_FLOAT8 = ("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ")
_KNOWN_DOMAINS = ("", "ai.onnx", "trt", "cla")
_ATTENTION = ("Attention", "TRT_Attention")
_INT, _FLOAT, _STRING = ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING
_ATTRIBUTES = {  # that the parser reads, and softcap, which it refuses
    "Attention": {
        "is_causal": _INT,
        "kv_num_heads": _INT,
        "q_num_heads": _INT,
        "qk_matmul_output_mode": _INT,
        "scale": _FLOAT,
        "softcap": _FLOAT,
        "softmax_precision": _INT,
        "TRT_decomposable": _INT,
    },
    "TRT_Attention": {
        "causal_kind": _STRING,
        "kv_form": _STRING,
        "nb_rank": _INT,
        "query_form": _STRING,
        "softcap": _FLOAT,
        "TRT_decomposable": _INT,
        "TRT_normalization_op": _STRING,
    },
}
_NO_WINDOW = -1
_PACKED = 3  # dimensions of a query with its heads side by side
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


def _number(node: ir.Node, name: str, default: float) -> float:
    """An attribute's number; the default if it is of another type, which has a rule of its own."""
    attribute = node.attributes.get(name)
    good = attribute is not None and attribute.type in (_INT, _FLOAT)
    return float(attribute.value) if good else default  # type: ignore[union-attr]


def _text(node: ir.Node, name: str, default: str) -> str:
    attribute = node.attributes.get(name)
    return str(attribute.value) if attribute is not None else default


def _dim(value: ir.Value | None, axis: int) -> object:
    """A dimension; None if the graph does not say it."""
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    return value.shape[axis]


def attributes_dropped(graph: ir.Graph) -> Iterator[str]:
    for node in _nodes(graph, *_ATTENTION):
        known = _ATTRIBUTES[node.op_type]
        for name, attribute in node.attributes.items():
            if name.endswith("_window_size") and _number(node, name, 0.0) == _NO_WINDOW:
                continue
            if name not in known:
                yield (
                    f"{describe(node)} has {name}={attribute.value}, which TensorRT's parser drops "
                    f"without a word; it knows {', '.join(sorted(known))}"
                )
            elif attribute.type != known[name]:
                yield (
                    f"{describe(node)}: {name} is of type {attribute.type.name}; expected "
                    f"{known[name].name}"
                )


def lengths_ignored(graph: ir.Graph) -> Iterator[str]:
    for node in _nodes(graph, "Attention"):
        if _input(node, 6) is not None:
            yield (
                f"{describe(node)} has nonpad_kv_seqlen, which TensorRT's parser drops; use "
                "TRT_Attention with kv_lengths (export with --target tensorrt)"
            )


def lengths_missing(graph: ir.Graph) -> Iterator[str]:
    for node in _nodes(graph, *_ATTENTION):
        given = [_input(node, slot) for slot in (3, 5 if node.op_type == "TRT_Attention" else 6)]
        if any(value is not None for value in given):
            continue
        read = (v for slot in (1, 2) for v in made_of(_input(node, slot)))
        cache = next((value for value in read if is_present(value)), None)
        if cache is not None:
            yield (
                f"{describe(node)} reads {cache.name} without kv_lengths or a mask, so places that "
                "hold nothing yet too; give it kv_lengths"
            )


def upper_left(graph: ir.Graph) -> Iterator[str]:
    for node in _nodes(graph, *_ATTENTION):
        query, key = _input(node, 0), _input(node, 1)
        if node.op_type == "TRT_Attention":
            causal, what = _text(node, "causal_kind", "none") == "upper_left", "upper_left"
            wrong = any(is_present(value) for value in made_of(key))
        else:
            causal, what = bool(_number(node, "is_causal", 0)), "is_causal=1"
            wrong = not _same_length(query, key)
        if causal and wrong:
            yield (
                f"{describe(node)} has {what} over keys that are not the queries' own "
                f"({_shape(query)} and {_shape(key)}); TensorRT aligns it to the upper left. Use "
                "TRT_Attention with causal_kind=lower_right, or a mask"
            )


def _same_length(query: ir.Value | None, key: ir.Value | None) -> bool:
    """Whether both have as many tokens: by a constant, or by one name that is no cache's."""
    if any(is_present(value) or is_old(value) for value in stored_in(key)):
        return False
    one, other = _dim(query, -2), _dim(key, -2)
    if isinstance(one, int) or isinstance(other, int):
        return one == other
    known = isinstance(one, ir.SymbolicDim) and one.value is not None
    return known and one == other


def _shape(value: ir.Value | None) -> str:
    return "no shape" if value is None or value.shape is None else str(list(value.shape))


def mask_stretched(graph: ir.Graph) -> Iterator[str]:
    for node in _nodes(graph, "Attention"):
        if _dim(_input(node, 3), -1) == 1 and _dim(_input(node, 1), -2) != 1:
            yield (
                f"{describe(node)}: its mask has one column, which TensorRT stretches over all "
                "keys, and the operator does not; give the mask a column for each key"
            )


def scaled_twice(graph: ir.Graph) -> Iterator[str]:
    numbers = Numbers(graph)
    scaled: dict[int, list[ir.Node]] = {}
    for node in _nodes(graph, *_ATTENTION):
        scales = node.op_type == "Attention" and _number(node, "scale", 0.0) != 1.0
        for slot in (0, 1):
            value = _input(node, slot)
            if value is None:
                continue
            base, times_number = multiplied(value)
            if scales or times_number:
                scaled.setdefault(numbers[base], []).append(node)
    named: set[int] = set()
    for nodes in scaled.values():
        if len(nodes) > 1 and id(nodes[0]) not in named:
            named.update(id(node) for node in nodes)
            other = "uses it twice" if nodes[0] is nodes[1] else f"shares it with {nodes[1].name!r}"
            yield (
                f"{describe(nodes[0])} has a query or key that is multiplied by a number, and "
                f"{other}, which crashes TensorRT's builder; multiply it in float32 and round "
                "afterwards, once for each node, and set scale=1"
            )


def outputs(graph: ir.Graph) -> Iterator[str]:
    for node in _nodes(graph, "Attention"):
        used = [out for out in node.outputs[1:] if out.name]
        if used or _input(node, 4) is not None or _input(node, 5) is not None:
            yield (
                f"{describe(node)} keeps its own cache (past or present); TensorRT takes Attention "
                "with one output only. Write the cache with TRT_KVCacheUpdate"
            )


def softcap(graph: ir.Graph) -> Iterator[str]:
    for node in _nodes(graph, *_ATTENTION):
        if _number(node, "softcap", 0.0):
            yield f"{describe(node)} has a softcap, which TensorRT lacks; use the plugin"


def not_fused(graph: ir.Graph) -> Iterator[str]:
    for node in _nodes(graph, *_ATTENTION):
        query = _input(node, 0)
        if _number(node, "TRT_decomposable", 0) or query is None:
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
        dim = _dim(query, -1)
        heads = int(_number(node, "q_num_heads", 0))
        if isinstance(dim, int) and heads and len(query.shape or ()) == _PACKED:
            dim //= heads
        if isinstance(dim, int) and dim > _FUSED_HEAD_DIM:
            yield (
                f"{describe(node)} has head dim {dim}; fused kernels end at {_FUSED_HEAD_DIM}. Set "
                "TRT_decomposable=1 or use the plugin"
            )


def mask_and_causal(graph: ir.Graph) -> Iterator[str]:
    for node in _nodes(graph, "TRT_Attention"):
        kind = _text(node, "causal_kind", "none")
        if _input(node, 3) is not None and kind != "none":
            yield f"{describe(node)} has a mask and causal_kind={kind}; give it one of the two"


def _updates(graph: ir.Graph) -> Iterator[ir.Node]:
    return _nodes(graph, *UPDATES)


def cache_length(graph: ir.Graph) -> Iterator[str]:
    for node in _updates(graph):
        length = _dim(_input(node, 0), 2)
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
        mode = _text(node, "mode", "linear")
        if mode != "linear":
            yield f"{describe(node)}: mode {mode}; TensorRT's caches are linear"
        axis = _number(node, "axis", -2)
        if axis not in (2, -2):
            yield f"{describe(node)}: writes along axis {axis:g}; TensorRT's caches have axis 2"
        cache = _input(node, 0)
        if cache is not None and cache.dtype is not None and cache.dtype.name in _FLOAT8:
            yield f"{describe(node)}: a {cache.dtype.name} cache; use float16 or bfloat16"


def past_read(graph: ir.Graph) -> Iterator[str]:
    for node in _updates(graph):
        past = _input(node, 0)
        if past is None:
            continue
        for user, slot in past.uses():
            written = user.op_type in UPDATES and slot == 0  # cache_place has a word on a second
            if not written and user.op_type not in ("Shape", "Size"):
                yield (
                    f"{describe(user)} reads {past.name} beside the update that overwrites it; "
                    f"read {node.outputs[0].name}"
                )


def foreign_operators(graph: ir.Graph) -> Iterator[str]:
    seen: dict[str, ir.Node] = {}
    for node in graph.all_nodes():
        dialect = node.op_type.startswith("TRT_") or node.op_type == "ClaAttention"
        if node.domain not in _KNOWN_DOMAINS and not dialect:
            seen.setdefault(f"{node.domain}.{node.op_type}", node)
    for name, node in seen.items():
        yield f"{describe(node)}: TensorRT has no {name}; export with --target tensorrt"


RULES: Sequence[Rule] = (
    attributes_dropped,
    lengths_ignored,
    lengths_missing,
    upper_left,
    mask_stretched,
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
