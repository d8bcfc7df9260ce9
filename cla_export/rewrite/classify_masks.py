"""Classify masks: decide what each Attention's mask means by evaluating it, never by its code.

A mask is a matter of lengths and positions: one that reads the tokens themselves is refused. The
subgraph that computes it is run at several lengths, among them one past each integer
constant it contains (a window shows only at lengths beyond it), and compared with what it may mean.

Cases:
1. causal: the query at position i sees keys 0..i.
2. sliding window w: the query at i sees the last w keys up to and including its own.
3. anything else, including no mask at all, is an error: such attention cannot be cached.

The meaning is recorded on the node (`cla.window` in its metadata) and the mask input is dropped.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from cla_export.errors import GraphError
from cla_export.rewrite.report import PassReport, describe
from cla_export.rewrite.values import attention_nodes, constant

WINDOW = "cla.window"  # metadata key; the value is "none" or a number of tokens
_LENGTHS = (1, 6, 37)
_LARGEST = 2048  # a window constant above this is evaluated with _STAND_IN in its place
_STAND_IN = 101
_BLOCKED = -1e4  # an additive mask at or below this blocks; exporters write -inf or the dtype's min


@dataclass(frozen=True, slots=True)
class _Mask:
    """A mask's subgraph, ready to run for any length."""

    evaluator: ReferenceEvaluator
    inputs: tuple[str, ...]
    causal: bool  # beside what the mask says

    def allowed(self, length: int) -> NDArray[np.bool_]:
        """Which keys each query sees: bool [..., S, S]."""
        ids = np.zeros((2, length), np.int64)
        positions = np.tile(np.arange(length), (2, 1))
        feeds = {name: ids if name == "input_ids" else positions for name in self.inputs}
        outputs = cast("list[NDArray[np.float32]]", self.evaluator.run(None, feeds))
        mask = outputs[0]
        visible: NDArray[np.bool_]
        if mask.dtype == np.bool_:
            visible = mask.astype(np.bool_)
        elif not np.all((mask == 0) | (mask <= _BLOCKED)):
            raise ValueError("it adds values other than 0 and minus infinity (a position bias?)")
        else:
            visible = mask == 0
        return visible & np.tri(length, dtype=np.bool_) if self.causal else visible


@dataclass(frozen=True, slots=True)
class _Masks:
    """A mask's subgraph with some of its integer constants replaced."""

    model: ir.Model
    node: ir.Node
    mask: ir.Value
    causal: bool

    def __call__(self, substitutes: dict[int, int]) -> _Mask:
        evaluator, inputs = _extract(self.model, self.node, self.mask, substitutes)
        return _Mask(evaluator, inputs, self.causal)


def classify_masks(model: ir.Model) -> PassReport:
    report = PassReport("classify_masks")
    known: dict[tuple[ir.Value | None, bool], int | None] = {}
    for node in attention_nodes(model.graph):
        if WINDOW in node.metadata_props:
            continue  # `fuse_attention` knows
        if any(node.inputs[4:]):
            raise GraphError(
                f"{describe(node)}: it has a cache already (past or nonpad inputs); expected a "
                "stateless graph, traced without a cache"
            )
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        causal = bool(node.attributes.get_int("is_causal", 0))
        if (mask, causal) not in known:
            known[mask, causal] = _meaning(model, node, mask, causal=causal)
        window = known[mask, causal]
        node.metadata_props[WINDOW] = "none" if window is None else str(window)
        node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
        node.resize_inputs(3)
        report.fired += 1
    return report


def window_of(node: ir.Node) -> int | None:
    """The sliding window that `classify_masks` found, None for plain causal."""
    text = node.metadata_props[WINDOW]
    return None if text == "none" else int(text)


def _meaning(model: ir.Model, node: ir.Node, mask: ir.Value | None, *, causal: bool) -> int | None:
    if mask is None:
        if causal:
            return None
        raise GraphError(
            f"{describe(node)}: attention without a mask and with is_causal=0 sees the future, so "
            "its keys cannot be cached; a decoder's attention must be causal"
        )
    above = _above(mask)
    if "input_ids" in {value.name for value in above}:
        raise GraphError(
            f"{describe(node)}: its mask depends on the tokens of input_ids (padding?); expected a "
            "mask computed from lengths and positions alone: rows are padded on the right, and "
            "their lengths are inputs of the exported graph"
        )
    runnable = _Masks(model, node, mask, causal)
    return meaning_of(runnable, sorted(integers_of(above)), describe(node))


def meaning_of(
    runnable: Callable[[dict[int, int]], "Visible"],
    candidates: list[int],
    where: str,
    largest: int = _LARGEST,
) -> int | None:
    """None if what is seen at several lengths is plain causal, the window if it is one.

    `runnable` makes what is looked at, given what to put in place of some integer constants: of
    those above `largest`, since so many tokens would take long.
    """
    meanings: dict[int | None, list[int]] = {}
    for window in [None, *candidates]:
        stand_in = _STAND_IN if window is not None and window > largest else window
        changed = {} if window is None or stand_in in (None, window) else {window: stand_in}
        run = runnable(changed)
        for length in (*_LENGTHS, *([stand_in + 3] if stand_in else [])):
            try:
                allowed = run.allowed(length)
            except ValueError as error:
                raise GraphError(f"{where}: its mask cannot be used: {error}") from error
            seen = _window_shown(allowed, length)
            if seen == -1:
                raise GraphError(
                    f"{where}: its mask at length {length} is neither causal nor a sliding "
                    f"window; the last rows see\n{_picture(allowed)}"
                )
            if seen is not None:
                if window is not None and stand_in is not None and abs(seen - stand_in) <= 1:
                    seen += window - stand_in  # `<= w - 1` says the same as `< w`
                meanings.setdefault(seen, []).append(length)
    if len(meanings) > 1:
        found = ", ".join(f"{window} at lengths {at}" for window, at in meanings.items())
        raise GraphError(f"{where}: its mask means different windows by length: {found}")
    return next(iter(meanings), None)


class Visible(Protocol):
    """What tells which keys are seen."""

    def allowed(self, length: int) -> NDArray[np.bool_]:
        """Which keys each query sees: bool [..., S, S]."""


def _window_shown(allowed: NDArray[np.bool_], length: int) -> int | None:
    """None if plain causal at this length, the window if narrower, -1 if neither."""
    square = np.broadcast_to(allowed, (*allowed.shape[:-2], length, length)).reshape(
        -1, length, length
    )
    if not (square == square[0]).all():
        return -1
    window = int(square[0][-1].sum())
    distance = np.arange(length)[:, None] - np.arange(length)[None, :]
    if window == 0 or not np.array_equal(square[0], (distance >= 0) & (distance < window)):
        return -1
    return None if window == length else window


def _extract(
    model: ir.Model, node: ir.Node, mask: ir.Value, substitutes: dict[int, int]
) -> tuple[ReferenceEvaluator, tuple[str, ...]]:
    upstream = [value.name for value in model.graph.inputs if value.name]
    graph = ir.convenience.extract(model.graph, upstream, [str(mask.name)])
    for initializer in graph.initializers.values():
        array = constant(initializer)
        if array is None:
            raise GraphError(
                f"{describe(node)}: its mask depends on weight {initializer.name}; expected a mask "
                "computed from lengths and positions alone"
            )
        if array.size == 1 and array.dtype == np.int64 and int(array.item()) in substitutes:
            replacement = np.full_like(array, substitutes[int(array.item())])
            initializer.const_value = ir.tensor(replacement, name=initializer.name)
    small = ir.Model(graph, ir_version=10)
    small.opset_imports.update(model.opset_imports)
    used = tuple(str(value.name) for value in graph.inputs if value.uses())
    for value in [value for value in graph.inputs if not value.uses()]:
        graph.inputs.remove(value)
    return ReferenceEvaluator(ir.to_proto(small)), used


def _above(mask: ir.Value) -> set[ir.Value]:
    """Every value whose elements a mask is computed from; a Shape reads no elements."""
    visited: set[ir.Value] = set()
    stack: list[ir.Value | None] = [mask]
    while stack:
        value = stack.pop()
        if value is None or value in visited:
            continue
        visited.add(value)
        node = value.producer()
        if node is not None and node.op_type not in ("Shape", "Size"):
            stack.extend(node.inputs)
    return visited


def integers_of(values: set[ir.Value]) -> set[int]:
    """Integer constants among the values a mask is computed from: its possible windows."""
    found: set[int] = set()
    for value in values:
        array = constant(value)
        if array is not None and array.size == 1 and np.issubdtype(array.dtype, np.integer):
            found.add(abs(int(array.item())))
    return {number for number in found if number > 1}


def _picture(allowed: NDArray[np.bool_]) -> str:
    rows = allowed.reshape(-1, *allowed.shape[-2:])[0][-6:, -12:]
    return "\n".join("  " + "".join("x" if seen else "." for seen in row) for row in rows)
