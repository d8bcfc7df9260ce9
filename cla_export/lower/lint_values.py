"""Where a value of a graph comes from, as the TensorRT lint asks it."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

UPDATES = ("TensorScatter", "TRT_KVCacheUpdate")
_RESULTS = ("Attention", "TRT_Attention", "ClaAttention")
_WEIGHTED = ("MatMul", "Gemm", "Einsum", "LayerNormalization", "RMSNormalization")
_NUMBERS_ALONE = ("Softmax", "Shape", "Size", "ReduceMean", "ReduceSum", "ReduceMax")
_MOVES = (  # what the builder looks through: nothing is computed
    *("Identity", "Cast", "CastLike", "Dropout", "Transpose", "Reshape", "Squeeze", "Unsqueeze"),
    "Flatten",
)
_ELEMENTWISE = ("Mul", "Add", "Sub", "Div", "Where")
_PER_TOKEN = 2  # dimensions of an input that has one number for each token: ids, positions
_END = 2**30  # an end of a slice that is beyond any
_SMALL = 16  # elements of a constant that is compared by its value


def is_present(value: ir.Value) -> bool:
    """Whether a value is a cache after its update."""
    producer = value.producer()
    return producer is not None and producer.op_type in UPDATES


def made_of(value: ir.Value | None) -> Iterator[ir.Value]:
    """Everything that a value is computed from, itself first: up to caches and attention."""
    return _walk(value, _computed_from)


def stored_in(value: ir.Value | None) -> Iterator[ir.Value]:
    """What a value holds, itself first, without arithmetic that mixes tokens or channels."""
    return _walk(value, _stored_before)


def _walk(
    value: ir.Value | None, before: Callable[[ir.Node, ir.Value], Iterable[ir.Value | None]]
) -> Iterator[ir.Value]:
    """A value and all that `before` leads back to, through the nodes that make them."""
    waiting, seen = [value], set()
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        if (producer := current.producer()) is not None:
            waiting += before(producer, current)


def _computed_from(node: ir.Node, _: ir.Value) -> Iterable[ir.Value | None]:
    if node.op_type in (*UPDATES, *_RESULTS, *_NUMBERS_ALONE):
        return ()
    graphs = [a.value for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    inner = [output for graph in graphs for output in graph.outputs]  # of If and Loop
    return [*(node.inputs[:1] if node.op_type in _WEIGHTED else node.inputs), *inner]


def _stored_before(node: ir.Node, result: ir.Value) -> Iterable[ir.Value | None]:
    if node.op_type in (*UPDATES, *_RESULTS, *_WEIGHTED, *_NUMBERS_ALONE):
        return ()
    if node.op_type == "RotaryEmbedding":
        return node.inputs[:1]
    if node.op_type in _ELEMENTWISE:
        return [other for other in node.inputs if _has_its_heads(other, result)]
    return node.inputs


def _has_its_heads(value: ir.Value | None, result: ir.Value) -> bool:
    """False for what is stretched over heads: angles of RoPE, masks, numbers."""
    if value is None or value.shape is None or result.shape is None:
        return value is not None
    heads = -3
    if len(value.shape) < len(result.shape):
        return False
    return len(value.shape) < -heads or value.shape[heads] == result.shape[heads]


def is_old(value: ir.Value) -> bool:
    """Whether a value may hold tokens of earlier calls: an input with places, or glued to some."""
    if value.is_graph_input():
        return value.shape is None or len(value.shape) > _PER_TOKEN
    producer = value.producer()
    if producer is None or producer.op_type != "Concat":
        return False
    attribute = producer.attributes.get("axis")
    axis = 0 if attribute is None else int(attribute.value)
    return value.shape is None or axis not in (-1, len(value.shape) - 1)


def multiplied(value: ir.Value) -> tuple[ir.Value, bool]:
    """What a query or key is before products with one number, and whether there is one.

    Products in another dtype are left alone, and so does the builder: they are rounded in between.
    """
    found, current, dtype = False, value, value.dtype
    while (producer := current.producer()) is not None:
        first = producer.inputs[0] if producer.inputs else None
        if first is not None and _moves(producer):
            current = first
        elif producer.op_type in ("Mul", "Div") and current.dtype in (dtype, None):
            second = producer.inputs[1]
            if first is not None and _is_number(second):
                current, found = first, True
            elif producer.op_type == "Mul" and second is not None and _is_number(first):
                current, found = second, True
            else:
                break
        else:
            break
    return current, found


def _moves(node: ir.Node) -> bool:
    """Whether a node computes nothing: of several parts, or a part of one, only the whole."""
    if node.op_type == "Concat":
        return len(node.inputs) == 1
    if node.op_type != "Slice":
        return node.op_type in _MOVES
    starts, ends = (_constant(node.inputs[slot]) for slot in (1, 2))
    return (
        starts is not None and ends is not None and not starts.any() and bool((ends > _END).all())
    )


def _constant(value: ir.Value | None) -> NDArray[np.int64] | None:
    """The numbers of a constant; None where they are not known."""
    if value is None:
        return None
    producer = value.producer()
    if value.const_value is None and producer is not None and producer.op_type == "Constant":
        tensor = producer.attributes.get("value")
        return None if tensor is None else np.asarray(tensor.value.numpy())
    return None if value.const_value is None else value.const_value.numpy()


def _is_number(value: ir.Value | None) -> bool:
    """Whether a value is one constant, or computed from constants and shapes alone."""
    waiting, seen = [value], 0
    while waiting:
        current = waiting.pop()
        seen += 1
        if current is None or seen > _SMALL:
            return False
        if current.const_value is not None:
            if current.const_value.size != 1:
                return False
            continue
        producer = current.producer()
        if producer is None:
            return False
        if producer.op_type in ("Shape", "Size"):  # one number or not: taken for one
            continue
        if producer.op_type == "Constant":
            tensor = producer.attributes.get("value")
            if tensor is not None and tensor.value.size != 1:
                return False
            continue
        if not producer.inputs:
            return False
        waiting += [other for other in producer.inputs if other is not None]
    return True


class Numbers:
    """A number for each value of a graph, equal for values that the builder may merge into one."""

    def __init__(self, graph: ir.Graph) -> None:
        self._found: dict[object, int] = {}
        self._of: dict[int, int] = {}
        for node in graph.all_nodes():
            for index, output in enumerate(node.outputs):
                self._of[id(output)] = self._number(node, index, output)

    def __getitem__(self, value: ir.Value) -> int:
        if id(value) not in self._of:
            constant = value.const_value
            small = constant is not None and constant.size <= _SMALL
            key = ("constant", constant.numpy().tobytes()) if small else ("value", id(value))  # type: ignore[union-attr]
            self._of[id(value)] = self._intern(key)
        return self._of[id(value)]

    def _number(self, node: ir.Node, index: int, output: ir.Value) -> int:
        first = node.inputs[0] if node.inputs else None
        if first is not None and _moves(node):
            return self[first]
        tensor = node.attributes.get("value") if node.op_type == "Constant" else None
        if tensor is not None and tensor.value.size <= _SMALL:
            return self._intern(("constant", tensor.value.numpy().tobytes()))
        if node.op_type in (*UPDATES, *_RESULTS) or not node.inputs:
            return self._intern(("value", id(output)))
        attributes = tuple(sorted((name, str(a.value)) for name, a in node.attributes.items()))
        inputs = tuple(None if value is None else self[value] for value in node.inputs)
        return self._intern((node.op_type, index, attributes, inputs))

    def _intern(self, key: object) -> int:
        return self._found.setdefault(key, len(self._found))
