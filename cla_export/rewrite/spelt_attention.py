"""Find attention that is spelt out: a softmax between two products of computed values.

q, k and v are taken where they last were [B, heads, S, D] or [B, S, heads, D] before anything was
done to their axes: copies of KV heads fall away, and layers that read the same keys are seen to.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from cla_export.rewrite.values import constant

Array = NDArray[np.float32]

_PRODUCTS = ("MatMul", "Einsum")
_WEIGHED = (*_PRODUCTS, "Gemm")
AXES_ONLY = (
    "Transpose", "Reshape", "Expand", "Unsqueeze", "Squeeze", "Identity", "Cast", "Tile",
)  # fmt: skip


class Refused(Exception):
    """Why two products around a softmax are not attention."""


@dataclass(frozen=True, slots=True)
class Source:
    """q, k or v, with its heads still their own.

    Heads may be on several axes, as of groups and queries, or on none, where there is one.
    """

    value: ir.Value
    axes: tuple[int, ...]  # of heads
    dim: int
    heads_first: bool  # [B, *axes, S, D], else [B, S, *axes, D]

    @property
    def heads(self) -> int:
        return math.prod(self.axes)

    def shaped(self, array: Array) -> Array:
        """[B, heads, S, D] as the graph has it."""
        batch, _, length, dim = array.shape
        if self.heads_first:
            return array.reshape(batch, *self.axes, length, dim)
        return array.transpose(0, 2, 1, 3).reshape(batch, length, *self.axes, dim)


@dataclass(frozen=True, slots=True)
class Spelt:
    """Two products around a softmax."""

    softmax: ir.Node
    query: Source
    key: Source
    value: Source
    results: tuple[ir.Value, ...]  # the second product's, and what its axes become afterwards


def find(softmax: ir.Node) -> Spelt | None:
    scores = _product_above(softmax.inputs[0])
    weighted = None if scores is None else _product_below(softmax.outputs[0])
    if scores is None or weighted is None:
        return None  # 2
    values, probabilities = weighted
    rank = len(softmax.outputs[0].shape or ())
    if softmax.attributes.get_int("axis", -1) not in (-1, rank - 1):
        raise Refused("its axis is not the last")
    if probabilities != 0:
        raise Refused("what it makes is multiplied from the right")
    names = ("query", scores.inputs[0]), ("key", scores.inputs[1]), ("value", values.inputs[1])
    query, key, value = (_source(name, of) for name, of in names)
    if query.dim != key.dim or query.heads % key.heads or key.heads != value.heads:
        raise Refused(
            f"queries have {query.heads} heads of {query.dim}, keys {key.heads} of {key.dim}, "
            f"values {value.heads}; expected whole groups of query heads"
        )
    return Spelt(softmax, query, key, value, tuple(_laid_out(values.outputs[0])))


def _product_above(value: ir.Value | None) -> ir.Node | None:
    """The one product of computed values that a softmax's input comes from."""
    found: set[ir.Node] = set()
    seen: set[ir.Value] = set()
    stack = [value]
    while stack:
        above = stack.pop()
        node = None if above is None or above in seen else above.producer()
        if node is None or above is None or node.op_type in ("Shape", "Size"):
            continue
        seen.add(above)
        if node.op_type in _WEIGHED:
            found.add(node)
        else:
            stack.extend(node.inputs)
    if len(found) != 1:
        return None
    (product,) = found
    two = len(product.inputs) == 2 and product.op_type in _PRODUCTS
    return product if two and all(_computed(value) for value in product.inputs) else None


def _product_below(value: ir.Value) -> tuple[ir.Node, int] | None:
    """The one product that reads a softmax's output, and at which input."""
    found: set[tuple[ir.Node, int]] = set()
    stack = [value]
    while stack:
        below = stack.pop()
        if below.is_graph_output():
            return None
        for node, place in below.uses():
            if node.op_type in _WEIGHED:
                found.add((node, place))
            else:
                stack.extend(node.outputs)
        if len(found) > 1:
            return None
    if not found:
        return None
    product, place = next(iter(found))
    two = len(product.inputs) == 2 and product.op_type in _PRODUCTS
    return (product, place) if two and _computed(product.inputs[1 - place]) else None


def _computed(value: ir.Value | None) -> bool:
    """Whether a value depends on more than weights."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in AXES_ONLY:
            return node.op_type != "Constant"
        value = node.inputs[0]
    return value is not None and not value.is_initializer()


def _source(name: str, value: ir.Value | None) -> Source:
    """Where a product's input last had heads, tokens and D apart, before its axes moved.

    With heads on one axis if there is such a place. A factor for all of it is passed over too: it
    counts as scale.
    """
    found = [source for last in chain(value) if (source := _with_heads(last)) is not None]
    if not found:
        raise Refused(
            f"its {name} {value and value.name} is nowhere [B, heads, S, D], [B, S, heads, D] or "
            "[B, S, D] with constant heads and D"
        )
    return min(reversed(found), key=lambda source: len(source.axes) or math.inf)


def _with_heads(value: ir.Value) -> Source | None:
    """A value [B, heads.., S, D] or [B, S, heads.., D] by its shape."""
    shape = tuple(value.shape or ())
    if len(shape) < 3 or not isinstance(shape[-1], int):
        return None
    for heads_first, axes, length in (
        (True, shape[1:-2], shape[-2]),
        (False, shape[2:-1], shape[1]),
    ):
        constant_axes = tuple(axis for axis in axes if isinstance(axis, int))
        if len(constant_axes) == len(axes) and not isinstance(length, int):
            return Source(value, constant_axes, shape[-1], heads_first)
    return None


def chain(value: ir.Value | None) -> Iterator[ir.Value]:
    """A value, and what it was before each change of its axes or factor for all of it."""
    while value is not None:
        yield value
        node = value.producer()
        if node is None:
            return
        if node.op_type in AXES_ONLY:
            value = node.inputs[0]
        elif node.op_type in ("Mul", "Div") and len(factors := _not_scalar(node)) == 1:
            value = factors[0]
        else:
            return


def _not_scalar(node: ir.Node) -> list[ir.Value]:
    return [
        value
        for value in node.inputs
        if value is not None and ((array := constant(value)) is None or array.size != 1)
    ]


def _laid_out(value: ir.Value) -> Iterator[ir.Value]:
    """A product's result, and what it is after each change of its axes."""
    while True:
        yield value
        users = [node for node, _ in value.uses()]
        if len(users) != 1 or users[0].op_type not in ("Reshape", "Transpose", "Squeeze"):
            return
        value = users[0].outputs[0]


def inner_values(spelt: Spelt) -> set[ir.Value]:
    """q, k and v, at which looking upwards ends."""
    return {spelt.query.value, spelt.key.value, spelt.value.value}
