"""Read an ONNX file that somebody else traced, as the rewriter wants it: its weights apart.

1. Weights stay in their files, so that no pass copies or folds one.
2. A graph of an opset before 18 is converted to that, where operators are what they are today.
3. Shapes are inferred as far as they go: an exporter that leaves them out computes the target of a
   Reshape in the graph, and heads show only once that has been followed.
"""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import shape_inference, version_converter
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants

from cla_export.errors import BadInput, GraphError
from cla_export.rewrite.builder import named_constant
from cla_export.rewrite.name_nodes import UNNAMED
from cla_export.rewrite.thread_caches import check_inputs
from cla_export.rewrite.values import ints, producer

Weights = dict[str, ir.TensorProtocol]

_SMALL = 16  # numbers: what is larger is a weight, which no pass looks into
_OPSET = 18  # from which on nothing that a decoder uses has changed
_INLINE = 1 << 20  # bytes; constants larger than that are kept out of the library's hands too


def read_stateless(source: Path) -> tuple[ir.Model, Weights]:
    """A graph without the values of its weights, and those by name.

    Raises BadInput for a file that cannot be read or that keeps weights outside of its folder, and
    GraphError for one that is no decoder's.
    """
    if not source.is_file():
        raise BadInput(f"{source}: {'is a folder' if source.is_dir() else 'does not exist'}")
    try:
        model = ir.load(source)
    except Exception as error:  # protobuf's and onnx_ir's own
        raise BadInput(f"{source}: not an ONNX file that can be read: {error}") from error
    outputs = [value.name for value in model.graph.outputs]
    if outputs != ["logits"]:
        raise GraphError(
            f"{source}: its outputs are {outputs}; expected one, logits [B, S, V] "
            "(output_names=['logits'] where it is exported)"
        )
    check_inputs(model.graph)
    weights: Weights = {}
    large: Weights = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            _check_place(source, name, str(tensor.location))
        if tensor is None:
            continue
        named = not name.startswith(UNNAMED) and not _is_mask(value)
        if named and tensor.size > _SMALL and tensor.dtype.is_floating_point():
            weights[name] = tensor
            continue
        if isinstance(tensor, ir.ExternalTensor) and (tensor.nbytes <= _INLINE or not named):
            value.const_value = tensor = _loaded(source, tensor)
        if tensor.nbytes > _INLINE:
            large[name] = tensor
    model = _prepared(source, model, {*weights, *large})
    for name, tensor in large.items():
        model.graph.initializers[name].const_value = tensor
    return model, weights


def _is_mask(value: ir.Value) -> bool:
    """Whether an initialiser is a square that is only cut: a mask that a module keeps."""
    shape = value.shape
    if shape is None or len(shape) < 2 or shape[-1] != shape[-2]:
        return False
    users = [node for node, _ in value.uses()]
    for node in users:
        if node.op_type == "Identity":  # the exporter's, for a layer with the same mask
            users += [user for user, _ in node.outputs[0].uses()]
    return bool(users) and all(node.op_type in ("Slice", "Identity") for node in users)


def _loaded(source: Path, tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    try:
        return ir.tensor(tensor.numpy().copy(), tensor.dtype, name=tensor.name)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{source}: {tensor.name} is kept in {tensor.location!r}, which cannot be read: {error}"
        ) from error


def _prepared(source: Path, model: ir.Model, apart: set[str]) -> ir.Model:
    """The same graph at a present opset, with all shapes that can be inferred."""
    if model.functions:
        common.InlinePass()(model)
    for name in apart:  # an input has no value
        model.graph.inputs.append(model.graph.initializers.pop(name))
        model.graph.inputs[-1].const_value = None
    proto = ir.to_proto(model)
    opset = model.opset_imports.get("", 0)
    try:
        if opset < _OPSET:
            proto = version_converter.convert_version(proto, _OPSET)
        proto = shape_inference.infer_shapes(proto, data_prop=True)
        folded = ir.from_proto(proto)
        if _known_axes(folded):  # heads may be computed from them
            fold_constants(folded)
            proto = shape_inference.infer_shapes(ir.to_proto(folded), data_prop=True)
    except (RuntimeError, onnx.shape_inference.InferenceError) as error:
        raise BadInput(
            f"{source}: opset {opset} could not be converted to {_OPSET}: {error}; export it again "
            "with opset_version=23"
        ) from error
    model = ir.from_proto(proto)
    for value in [value for value in model.graph.inputs if value.name in apart]:
        model.graph.inputs.remove(value)
        model.graph.initializers[str(value.name)] = value
    return model


def _known_axes(model: ir.Model) -> int:
    """Make constants of axes that are read off a Shape and known; how many there were."""
    graph, found = model.graph, 0
    for node in list(graph):
        shape = producer(node.inputs[0], "Shape") if node.op_type == "Gather" else None
        measured = None if shape is None else shape.inputs[0]
        axes = ints(node.inputs[1]) if measured is not None else None
        if measured is None or axes is None or measured.shape is None or shape is None:
            continue
        start = shape.attributes.get_int("start", 0)
        dims = [measured.shape[start:][axis] for axis in axes]
        if all(isinstance(dim, int) for dim in dims):
            index = node.inputs[1]
            assert index is not None
            array = np.array(dims, np.int64).reshape(
                [] if index.shape is None else index.shape.numpy()
            )
            made = named_constant(graph, array, f"axis/{node.outputs[0].name}")
            node.outputs[0].replace_all_uses_with(made)
            found += 1
    return found


def _check_place(source: Path, name: str, location: str) -> None:
    folder = source.parent.resolve()
    if not (folder / location).resolve().is_relative_to(folder):
        raise BadInput(
            f"{source}: weight {name} is kept in {location!r}, outside of the graph's own folder; "
            "such files are not opened: save the graph again with its weights beside it"
        )
