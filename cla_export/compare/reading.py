"""What reading a bundle's graph shows to be wrong, which running it for a while may not.

1. Its sharing. Executors bind past and present to one buffer, so a layer that reads a cache from
   before this call's write computes the right thing there, and another thing elsewhere.
2. Its norms' epsilon and precision, which a low precision of the rest can drown.
3. Its weights and RoPE tables. No text has every token of a large vocabulary, nor every position.
   What is not quantised is compared exactly; what is, with the most that rounding can be off.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from cla_export.bundle import Bundle
from cla_export.errors import GraphError
from cla_export.graph_names import ALL, KEEP
from cla_export.graph_reading import read_graph
from cla_export.interleaving import INTERLEAVED, interleave, separate
from cla_export.linked_weights import read_in_place
from cla_export.models.decoder import Decoder
from cla_export.quantization import PACKED, SCALES, Quantization

_RESEMBLES = 0.05  # of the mean magnitude
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_SLACK = 1.01  # for ties, and for the arithmetic here
_NORMS = {"RMSNormalization": 1e-5, "SkipSimplifiedLayerNormalization": 1e-12}  # with defaults
_ZERO_POINTS = {"MatMulNBits": (3,), "QMoE": (11, 12)}  # where they would stand


@dataclass(slots=True)
class Reading:
    """What was found: a sentence for each fault, and what quantised weights stand for."""

    faults: list[str] = field(default_factory=list)
    quantized: dict[str, NDArray[np.float32]] = field(default_factory=dict)


def read_bundle(bundle: Bundle, model: Decoder) -> Reading:
    """Read a bundle's graphs beside the float32 model that it was exported from."""
    reading = _read_graph(bundle, bundle.graph, model)
    known = set(reading.faults)
    for graph in (bundle.cpu_graph, bundle.cuda_graph, bundle.cuda_plugin_graph):
        faults = [] if graph is None else _read_graph(bundle, graph, model).faults
        reading.faults += [f"{graph.name}: {f}" for f in faults if graph and f not in known]
    return reading


def _read_graph(bundle: Bundle, path: Path, model: Decoder) -> Reading:
    reading = Reading(_sharing(bundle, path))
    try:
        graph = read_in_place(ir.load(path), bundle.folder).graph
    except Exception as error:  # protobuf's and onnx_ir's own
        reading.faults.append(f"{path.name} cannot be read: {error}")
        return reading
    reading.faults += _norms(graph, model.spec.epsilons or (model.spec.norm_eps,))
    initializers = graph.initializers
    expected = {name: t.detach() for name, t in (*_named(model), *model.named_buffers())}
    keep = initializers.get(KEEP)
    if keep is not None and keep.const_value is not None and keep.const_value.numpy() != ALL:
        reading.faults.append(f"{KEEP} is {keep.const_value.numpy()} by default; expected {ALL}")
    _lookalikes(initializers, expected, reading)
    for name, value in initializers.items():
        if name.endswith(PACKED):
            _read_quantized(name.removesuffix(PACKED), initializers, expected, bundle, reading)
        elif name.endswith(INTERLEAVED) and value.const_value is not None:
            weight = expected.get(name.removesuffix(INTERLEAVED))
            if weight is None:
                reading.faults.append(f"{name} is in the graph, but the model has no such weight")
            else:
                whole = torch.from_numpy(interleave(weight.numpy()))
                _read_exact(name, value.const_value.numpy(), whole, reading)
        elif name in expected and value.const_value is not None:
            _read_exact(name, value.const_value.numpy(), expected[name], reading)
    return reading


def use_quantized(model: Decoder, reading: Reading) -> None:
    """Give a model the weights that the bundle's quantised ones stand for.

    A tied head gets a weight of its own, since the embedding stays as it is.
    """
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, weight in reading.quantized.items():
            path, _, part = name.rpartition(".")
            module = modules[path]
            kind = next(module.parameters()).dtype
            setattr(module, part, nn.Parameter(torch.from_numpy(weight).to(kind)))


def _named(model: Decoder) -> list[tuple[str, torch.Tensor]]:
    return list(model.named_parameters(remove_duplicate=False))  # a tied head by both its names


def _sharing(bundle: Bundle, path: Path) -> list[str]:
    try:
        _, found, _, _ = read_graph(path)
    except GraphError as error:
        return [str(error)]
    if found == bundle.layout:
        return []
    return [f"the graph shares KV as {found.describe()}; expected {bundle.layout.describe()}"]


def _norms(graph: ir.Graph, epsilons: tuple[float, ...]) -> list[str]:
    faults = []
    for node in graph:
        with_norm = node.op_type == "ClaLinear" and any(node.inputs[2:3])
        if node.op_type in _NORMS or with_norm:
            got = node.attributes.get_float("epsilon", _NORMS.get(node.op_type, 0.0))
            if not np.isclose(got, epsilons, rtol=1e-6, atol=0).any():
                expected = " or ".join(f"{epsilon:g}" for epsilon in epsilons)
                faults.append(f"{node.name}: epsilon is {got:g}; expected {expected}")
            if node.attributes.get_int("stash_type", 1) != 1:
                faults.append(f"{node.name}: its statistics are not in float32")
    return faults


def _read_exact(name: str, got: NDArray[np.generic], tensor: torch.Tensor, into: Reading) -> None:
    want = tensor.numpy().astype(got.dtype)
    if got.shape != want.shape:
        into.faults.append(f"{name} is {list(got.shape)}; expected {list(want.shape)}")
    elif not np.array_equal(got, want, equal_nan=True):
        into.faults.append(
            f"{name}: {int((got != want).sum())} of {got.size} values are not the model's"
        )


def _lookalikes(
    initializers: Mapping[str, ir.Value], expected: Mapping[str, torch.Tensor], into: Reading
) -> None:
    """Weights that the graph holds under another name, or transposed, and nearly as they were.

    What resembles no weight is left to the cases: an optimiser may have folded something into it.
    """
    missing = {
        name: tensor.numpy()
        for name, tensor in expected.items()
        if name not in initializers and name + PACKED not in initializers and tensor.ndim == 2
    }
    if not missing:
        return
    for name, value in initializers.items():
        if name in expected or value.const_value is None or len(value.const_value.shape) != 2:
            continue
        if name.endswith((PACKED, SCALES)) or value.dtype not in _FLOATS:
            continue
        got = value.const_value.numpy()
        for weight, whole in missing.items():
            for want in (whole, whole.T):
                if got.shape != want.shape:
                    continue
                rounded = want.astype(got.dtype)
                off = np.abs(got.astype(np.float32) - want).mean()
                if off < _RESEMBLES * np.abs(want).mean() and not np.array_equal(got, rounded):
                    count = int((got != rounded).sum())
                    into.faults.append(
                        f"{name} is nearly {weight}: {count} of {got.size} values are not the "
                        "model's"
                    )
                    break


def _read_quantized(
    name: str,
    initializers: Mapping[str, ir.Value],
    expected: Mapping[str, torch.Tensor],
    bundle: Bundle,
    into: Reading,
) -> None:
    parts = [initializers.get(name + suffix) for suffix in (PACKED, SCALES)]
    how = bundle.quantization
    held, name = name, name.removesuffix(INTERLEAVED)
    if how is None or name not in expected or None in [p and p.const_value for p in parts]:
        into.faults.append(f"{name} is quantised in the graph, but {_why(how, name in expected)}")
        return
    packed, scales = (part.const_value.numpy() for part in parts)  # type: ignore[union-attr]
    want = expected[name].numpy()
    of_experts = want.ndim == 3
    shapes = (how.shapes_of_experts if of_experts else how.of_weight(name).shapes)(*want.shape)
    if (packed.shape, scales.shape) != shapes:
        into.faults.append(
            f"{name} is quantised as {list(packed.shape)} with scales {list(scales.shape)}; "
            f"expected {list(shapes[0])} and {list(shapes[1])}"
        )
        return
    products = {node for node, _ in initializers[held + PACKED].uses()}
    if any(_has_zero_points(node) for node in products):
        into.faults.append(f"{name} is read with zero points, but it is quantised without")
        return
    if of_experts:
        got = how.unpack_experts(packed, scales)
        got = separate(got) if held != name else got
        allowed = how.largest_error(want.reshape(-1, want.shape[-1])).reshape(want.shape)
    else:
        got = how.of_weight(name).unpack(packed, scales, want.shape[1])
        allowed = how.of_weight(name).largest_error(want)
    allowed *= _SLACK
    kind = getattr(torch, scales.dtype.name)  # NumPy knows no limits of bfloat16
    allowed += np.abs(want) * torch.finfo(kind).eps  # scales are rounded too
    wrong = ~(np.abs(got - want) <= allowed)
    if wrong.any():
        into.faults.append(
            f"{name}: {int(wrong.sum())} of {want.size} values are further from the model's than "
            f"rounding to {how.of_weight(name).name} can bring them"
        )
    else:
        into.quantized[name] = got


def _has_zero_points(node: ir.Node) -> bool:
    places = _ZERO_POINTS.get(node.op_type, ())
    return any(place < len(node.inputs) and node.inputs[place] for place in places)


def _why(how: Quantization | None, known: bool) -> str:
    if how is None:
        return "bundle.json does not say so"
    return "a part of it is missing" if known else "the model has no such weight"
