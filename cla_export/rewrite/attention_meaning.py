"""What attention that is spelt out means: decided by running it, never by its code.

How q, k and v are laid out, repeated, transposed, scaled and masked is different in every module,
but at a few lengths attention gives itself away: which keys are seen by where probabilities are
zero, the scale by how two of them differ, and all of it by comparison with the formula.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import cast

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from cla_export.errors import GraphError
from cla_export.rewrite.classify_masks import integers_of, meaning_of
from cla_export.rewrite.report import describe
from cla_export.rewrite.spelt_attention import (
    AXES_ONLY,
    Array,
    Refused,
    Spelt,
    chain,
    inner_values,
)
from cla_export.rewrite.values import constant

_NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_BATCH, _LENGTH = 2, 7  # of the run that shows how the result is laid out
_LARGEST = 128  # tokens to look for a window at; a larger one has a smaller in its place there
_CLOSE = 2e-5  # of the largest value, in float32
_SAME_SCALE = 1e-4  # relative
_BENT = 2e-3  # the same where scores go through a tanh, which is not quite straight at zero


@dataclass(frozen=True, slots=True)
class Meaning:
    """What was found by running it."""

    window: int | None
    scale: float
    softcap: float
    result: ir.Value
    heads_first: bool
    reshape: tuple[int, ...] | None  # what a Reshape of [B, heads, S, D], or tokens first, is told


@dataclass(frozen=True, slots=True)
class _Run:
    """The operators between q, k, v and the result, ready to run at any length."""

    spelt: Spelt
    evaluator: ReferenceEvaluator
    inputs: tuple[ir.Value, ...]
    axes: tuple[object, object]  # symbols of batch and length

    def outputs(self, query: Array, key: Array, value: Array) -> tuple[Array, list[Array]]:
        """Probabilities [B * heads, S, S] and every form of the result, of [B, heads, S, D]."""
        batch, _, length, _ = query.shape
        spelt = self.spelt
        feeds: dict[str, NDArray[np.generic]] = {}
        for source, array in ((spelt.query, query), (spelt.key, key), (spelt.value, value)):
            feeds[str(source.value.name)] = source.shaped(array)
        for given in self.inputs:
            if given.name not in feeds:
                feeds[str(given.name)] = self._fill(given, batch, length)
        found = cast("list[Array]", self.evaluator.run(None, feeds))
        return found[0].reshape(-1, length, length), found[1:]

    def _fill(self, value: ir.Value, batch: int, length: int) -> NDArray[np.generic]:
        """What is not q, k or v: positions count up, of all others only the shape may matter."""
        if value.name == "position_ids":
            return np.tile(np.arange(length), (batch, 1))
        known = dict(zip(self.axes, (batch, length), strict=True))
        dims = _dims(value, known)
        if dims is None:
            raise Refused(f"it reads the shape {value.shape} of {value.name}, which is not known")
        return np.zeros(dims, np.int64 if value.dtype == ir.DataType.INT64 else np.float32)

    def allowed(self, length: int) -> NDArray[np.bool_]:
        """Which keys each query sees: bool [B * heads, S, S]."""
        return self.outputs(*_random(self.spelt, length, 1.0))[0] > 0


def _dims(value: ir.Value, known: Mapping[object, int], depth: int = 64) -> list[int] | None:
    """The shape of a value with numbers for symbols.

    A sum, as of the residual stream, is as long as the first part of it that is known.
    """
    if value.shape is None:
        return None
    dims = [dim if isinstance(dim, int) else known.get(dim) for dim in value.shape]
    if None not in dims:
        return cast("list[int]", dims)
    node = value.producer()
    if node is None or node.op_type not in ("Add", "Sub", "Mul", "Div") or not depth:
        return None
    for part in node.inputs:
        found = None if part is None else _dims(part, known, depth - 1)
        stretched = part is None or part.shape is None or 1 in tuple(part.shape)
        if found is not None and len(found) == len(dims) and not stretched:
            return found
    return None


def understand(model: ir.Model, spelt: Spelt) -> Meaning:
    """Raises Refused where it is not attention, GraphError where its mask is none of a cache's."""
    where = describe(spelt.softmax)
    beside = _beside(spelt)
    mask = {value.name for value in beside}

    def runnable(substitutes: dict[int, int]) -> _Run:
        return _extract(model, spelt, substitutes, mask)

    try:
        window = meaning_of(runnable, sorted(integers_of(beside)), where, _LARGEST)
        run = runnable({})
        scale, softcap = _scale_and_softcap(run, window)
        result, heads_first = _check(run, window, scale, softcap)
    except (Refused, GraphError):
        raise
    except Exception as error:  # the evaluator's, of a graph that does not run by itself
        raise Refused(f"it cannot be run by itself to see what it means: {error}") from error
    return Meaning(window, scale, softcap, result, heads_first, _reshape(spelt, result))


def _extract(
    model: ir.Model, spelt: Spelt, substitutes: dict[int, int], mask: set[str | None]
) -> _Run:
    """The operators in between as a model of their own, in float32.

    `substitutes` are for integer constants of the mask, given by its values' names.
    """
    graph = model.graph
    ends = [spelt.softmax.outputs[0], *spelt.results]
    bounds = _bounds(spelt, graph, ends)
    names = [str(value.name) for value in bounds]
    small = ir.convenience.extract(graph, names, [str(value.name) for value in ends])
    for initializer in small.initializers.values():
        array = constant(initializer)
        assert array is not None
        number = array.size == 1 and array.dtype == np.int64 and initializer.name in mask
        if number and int(array.item()) in substitutes:
            array = np.full_like(array, substitutes[int(array.item())])
        if initializer.dtype in _NARROW:
            array = array.astype(np.float32)
        initializer.const_value = ir.tensor(array, name=initializer.name)
        initializer.type = ir.TensorType(initializer.const_value.dtype)
    for node in small:
        kind = node.attributes.get_int("to", 0)
        if node.op_type == "Cast" and kind in _NARROW:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
        for output in node.outputs:
            output.type = output.shape = None  # said of a narrower type, perhaps
    for value in [value for value in small.inputs if not value.uses()]:
        small.inputs.remove(value)
    for value in small.inputs:
        if value.dtype in _NARROW:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    alone = ir.Model(small, ir_version=10)
    alone.opset_imports.update(model.opset_imports)
    ids = next((value for value in graph.inputs if value.name == "input_ids"), None)
    axes = tuple(ids.shape) if ids is not None and ids.shape is not None else (None, None)
    used = tuple(value for value in bounds if value.name in {v.name for v in small.inputs})
    evaluator = ReferenceEvaluator(ir.to_proto(alone))
    return _Run(spelt, evaluator, used, cast("tuple[object, object]", axes))


def _bounds(spelt: Spelt, graph: ir.Graph, ends: list[ir.Value]) -> dict[ir.Value, None]:
    """Where the operators in between begin: q, k, v, the inputs, and what only has a shape."""
    inner = inner_values(spelt)
    ids = [value for value in graph.inputs if value.name == "input_ids"]
    measured: dict[ir.Value, None] = {}
    stack: list[ir.Value | None] = [*ends]
    seen: set[ir.Value] = set()
    while stack:
        value = stack.pop()
        if value is None or value in seen or value in inner:
            continue
        seen.add(value)
        node = value.producer()
        if node is None and value.is_initializer() and constant(value) is None:
            raise Refused(f"weight {value.name} takes part in it")
        if value in ids:
            raise Refused(
                "it depends on the tokens of input_ids (padding?); rows are padded on the right, "
                "and their lengths are inputs of the exported graph"
            )
        if node is None:
            continue
        if node.op_type in ("Shape", "Size") and inner.isdisjoint(chain(node.inputs[0])):
            measured |= dict.fromkeys(v for v in node.inputs if v is not None)
        else:
            stack.extend(node.inputs)
    shapes_only = (value for value in measured if value not in seen)
    return dict.fromkeys([*inner, *graph.inputs, *shapes_only])


def _random(spelt: Spelt, length: int, size: float) -> tuple[Array, Array, Array]:
    """q, k, v [B, heads, S, D] whose scores are of order `size` whatever the head dim."""
    made = np.random.default_rng(length)
    sources = spelt.query, spelt.key, spelt.value
    shapes = [(_BATCH, source.heads, length, source.dim) for source in sources]
    query, key, value = (made.standard_normal(shape, np.float32) for shape in shapes)
    return query * np.float32(size / spelt.query.dim**0.25), key, value


def _scale_and_softcap(run: _Run, window: int | None) -> tuple[float, float]:
    """From what a query makes of two keys; rounded to what the module must have meant."""
    capped = "Tanh" in _operators_above(run.spelt.softmax.inputs[0], inner_values(run.spelt))
    scale = _slope(run, 0.01 if capped else 0.05)  # a tanh is straight near zero only
    numbers = _numbers(run.spelt)
    meant = {1.0, run.spelt.query.dim**-0.5, 1.0 / run.spelt.query.dim}
    meant |= {a * b for a, b in combinations_with_replacement({1.0, *numbers}, 2)}
    meant |= {a / b for a in {1.0, *numbers} for b in numbers}
    near = min(meant, key=lambda candidate: abs(candidate - scale))
    if abs(near - scale) <= (_BENT if capped else _SAME_SCALE) * abs(scale):
        scale = near
    if not capped:
        return scale, 0.0
    for cap in sorted(number for number in numbers if number > 1):  # Gemma's: cap * tanh(s / cap)
        try:
            _check(run, window, scale, cap)
        except Exception:
            continue
        return scale, cap
    raise Refused("its scores go through a tanh that is not a softcap: cap * tanh(score / cap)")


def _slope(run: _Run, size: float) -> float:
    """How the logarithm of two probabilities' ratio follows from two scores' difference."""
    query, key, value = _random(run.spelt, 2, 1.0)
    query *= np.float32(size * run.spelt.query.dim**0.25)
    probabilities = run.outputs(query, key, value)[0].astype(np.float64)
    repeats = run.spelt.query.heads // run.spelt.key.heads
    scores = query.astype(np.float64) @ key.repeat(repeats, 1).astype(np.float64).swapaxes(2, 3)
    last = scores.reshape(-1, 2, 2)[:, 1]  # the second query sees both keys
    seen = probabilities.reshape(len(last), 2, 2)[:, 1]
    differences, ratios = last[:, 1] - last[:, 0], np.log(seen[:, 1] / seen[:, 0])
    return float((differences * ratios).sum() / (differences**2).sum())


def _check(run: _Run, window: int | None, scale: float, softcap: float) -> tuple[ir.Value, bool]:
    """Compare with attention at two lengths; which result it is, and whether its heads come first.

    Lengths differ from the number of heads, so that axes cannot be confused.
    """
    heads = run.spelt.query.heads
    first = _LENGTH + (heads == _LENGTH)
    place, heads_first = -1, True
    for length in (first, 2 * first + 1 + (heads == 2 * first + 1)):
        query, key, value = _random(run.spelt, length, 3.0)
        wanted = _attention(query, key, value, window, scale, softcap)
        forms = run.outputs(query, key, value)[1]
        if place < 0:
            place, heads_first = _place(forms, wanted)
        expected = _laid_out_as(forms[place], wanted, heads_first)
        off = float(np.abs(forms[place] - expected).max())
        if not off <= _CLOSE * float(np.abs(wanted).max()):
            raise Refused(
                f"it is not softmax(scale * q k^T + mask) v: at {length} tokens it is off by "
                f"{off:.1e} with scale {scale:.6g}" + (f", softcap {softcap:g}" if softcap else "")
            )
    return run.spelt.results[place], heads_first


def _place(forms: list[Array], wanted: Array) -> tuple[int, bool]:
    """Which form of the result to take, and whether its heads come before its tokens.

    The first with four axes; where there is none, the first that has the numbers in one of the two
    orders, heads split into groups or put into one axis with D.
    """
    shapes = {wanted.shape: True, wanted.transpose(0, 2, 1, 3).shape: False}
    for place, form in enumerate(forms):
        if form.shape in shapes:
            return place, shapes[form.shape]
    for place, form in enumerate(forms):
        for heads_first in (True, False):
            if form.ndim != wanted.ndim and form.size == wanted.size:
                same = _laid_out_as(form, wanted, heads_first)
                if np.abs(form - same).max() <= _CLOSE * np.abs(wanted).max():
                    return place, heads_first
    raise Refused(
        "what it makes is nowhere attention's result [B, heads, S, D], in whatever order of axes"
    )


def _laid_out_as(form: Array, wanted: Array, heads_first: bool) -> Array:
    """Attention's result [B, heads, S, D] with its axes as a form has them."""
    ordered = wanted if heads_first else wanted.transpose(0, 2, 1, 3)
    return ordered.reshape(form.shape)


def _reshape(spelt: Spelt, result: ir.Value) -> tuple[int, ...] | None:
    """How a Reshape names the axes of a result that has not four: batch first, one length."""
    shape, batch = result.shape, spelt.query.value.shape
    if shape is None or batch is None or len(shape) == 4:
        return None
    dims = [dim if isinstance(dim, int) else -1 for dim in shape]
    dims[0] = 0 if shape[0] == batch[0] else dims[0]
    if dims.count(-1) > 1:
        raise Refused(f"what it makes has shape {shape}; expected one axis of tokens")
    return tuple(dims)


def _attention(
    query: Array, key: Array, value: Array, window: int | None, scale: float, softcap: float
) -> Array:
    """Attention of [B, heads, S, D], in float64."""
    repeats, length = query.shape[1] // key.shape[1], query.shape[2]
    keys, values = (part.repeat(repeats, 1).astype(np.float64) for part in (key, value))
    scores = scale * query.astype(np.float64) @ keys.swapaxes(2, 3)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    seen = (distance >= 0) & (distance < (window or length))
    scores = np.where(seen, scores, -np.inf)
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    result: Array = (powers / powers.sum(-1, keepdims=True) @ values).astype(np.float32)
    return result


def _numbers(spelt: Spelt) -> set[float]:
    """Scalar constants on the way from q and k to the softmax."""
    found = set()
    for value in _above(spelt.softmax.inputs[0], inner_values(spelt)):
        array = constant(value)
        if array is not None and array.size == 1 and array.dtype.kind not in "biu":
            found.add(abs(float(array.item())))
    return {number for number in found if 0 < number < 1e6}


def _beside(spelt: Spelt) -> set[ir.Value]:
    """What scores meet that does not come from q and k: a mask, and what that is computed from."""
    inner = inner_values(spelt)
    known: dict[ir.Value, bool] = {}

    def scored(value: ir.Value) -> bool:
        if value not in known:
            node = value.producer()
            above = () if node is None or node.op_type in ("Shape", "Size") else node.inputs
            known[value] = value in inner or any(scored(v) for v in above if v is not None)
        return known[value]

    found: set[ir.Value] = set()
    for value in _above(spelt.softmax.inputs[0], inner):
        node = value.producer()
        if node is None or node.op_type in AXES_ONLY or not scored(value):
            continue
        for beside in node.inputs:
            if beside is not None and not scored(beside):
                found |= _above(beside, inner)
    return found


def _operators_above(value: ir.Value | None, inner: set[ir.Value]) -> set[str]:
    nodes = (each.producer() for each in _above(value, inner))
    return {node.op_type for node in nodes if node is not None}


def _above(value: ir.Value | None, inner: set[ir.Value]) -> set[ir.Value]:
    """Every value whose elements a value is computed from, looking no further than `inner`."""
    seen: set[ir.Value] = set()
    stack = [value]
    while stack:
        each = stack.pop()
        if each is None or each in seen or each in inner:
            continue
        seen.add(each)
        node = each.producer()
        if node is not None and node.op_type not in ("Shape", "Size"):
            stack.extend(node.inputs)
    return seen
