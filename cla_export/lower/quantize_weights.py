"""Quantise weights: MatMul with a Linear's transposed weight becomes MatMulNBits.

    x, Transpose(weight [N, K])           ->  MatMulNBits(x, weight.packed, weight.scales)
    ClaLinear(x, weight, norm, residual)  ->  ClaLinear(x, packed, norm, residual, scales)

Our own product for GPUs takes several weights as one: the Concat of their rows then becomes one of
packed rows and one of scales. Weights have no values yet at this point; `weights.attach` packs each
when it is written out. A weight that is also read elsewhere, such as a tied embedding, is kept
beside its packed form.
"""

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from cla_export.lower.linears import linear_weight
from cla_export.quantization import PACKED, SCALES, WEIGHT, Quantization
from cla_export.rewrite.builder import Builder
from cla_export.rewrite.simplify import drop_unused

_INT8_PRODUCTS = 4  # accuracy_level
_PRODUCTS = ("Transpose", "ClaLinear", "Concat")  # what a weight goes into on its way to one


def quantize_weights(
    model: ir.Model, quantization: Quantization, tied: Mapping[str, str] | None = None
) -> int:
    """Quantise every Linear's weight; returns how many there were.

    `tied` gives further names of weights: one that is looked up in too is packed under such a name.
    """
    others = {weight: name for name, weight in (tied or {}).items()}
    graph = model.graph
    found = 0
    for node in list(graph):
        if node.op_type == "ClaLinear":
            found += _quantize_ours(graph, node, quantization, others)
            continue
        weight = linear_weight(node)
        if weight is None or weight.const_value is not None:
            continue
        how, parts = _parts(graph, node, weight, quantization, others)
        assert weight.shape is not None
        rows, columns = weight.shape.numpy()
        old = node.outputs[0]
        quantized = ir.node(
            "MatMulNBits",
            [node.inputs[0], *parts],
            {
                "K": columns,
                "N": rows,
                "bits": how.bits,
                "block_size": how.block,
                "accuracy_level": _INT8_PRODUCTS,
            },
            domain="com.microsoft",
            outputs=[ir.Value(name=old.name, type=old.type, shape=old.shape)],
            name=str(node.name).replace("/MatMul", "/MatMulNBits"),
            metadata_props=dict(node.metadata_props),
        )
        new = quantized.outputs[0]
        if old.is_graph_output():
            graph.outputs[graph.outputs.index(old)] = new
        graph.insert_before(node, quantized)
        old.replace_all_uses_with(new)
        graph.remove(node, safe=True)
        found += 1
    if any(node.op_type == "MatMulNBits" for node in graph):
        model.opset_imports["com.microsoft"] = 1
    graph.sort()
    drop_unused(model)
    return found


def _quantize_ours(
    graph: ir.Graph, node: ir.Node, quantization: Quantization, others: Mapping[str, str]
) -> int:
    """Quantise the weights of one ClaLinear; returns how many there were."""
    whole = node.inputs[1]
    assert whole is not None
    concat = whole.producer()
    inputs = [whole] if concat is None else concat.inputs
    weights = [weight for weight in inputs if weight is not None]
    if any(weight.const_value is not None for weight in weights):
        return 0
    found = [_parts(graph, node, weight, quantization, others)[1] for weight in weights]
    packed, scales = (
        parts[0] if concat is None else _one_after_another(graph, f"{concat.name}{suffix}", parts)
        for suffix, parts in zip((PACKED, SCALES), zip(*found, strict=True), strict=True)
    )
    node.replace_input_with(1, packed)
    node.resize_inputs(5)
    node.replace_input_with(4, scales)
    return len(found)


def _one_after_another(graph: ir.Graph, name: str, parts: Sequence[ir.Value]) -> ir.Value:
    """Rows of several initialisers as those of one."""
    shapes = [part.shape.numpy() for part in parts if part.shape is not None]
    rows = sum(shape[0] for shape in shapes)
    return Builder(graph).op(
        "Concat",
        parts,
        {"axis": 0},
        shape=[rows, *shapes[0][1:]],
        dtype=parts[0].dtype,
        name=name,
    )


def _parts(
    graph: ir.Graph,
    node: ir.Node,
    weight: ir.Value,
    quantization: Quantization,
    others: Mapping[str, str],
) -> tuple[Quantization, list[ir.Value]]:
    """Packed and scales of a node's weight, and how it is quantised."""
    name = str(weight.name)
    if str(node.name).startswith("lm_head/"):
        name = "lm_head.weight"
    elif any(reader.op_type not in _PRODUCTS for reader, _ in weight.uses()):
        name = others.get(name, name)
    how = quantization.of_weight(name)
    assert weight.shape is not None and weight.shape.is_static()
    packed_shape, scales_shape = how.shapes(*weight.shape.numpy())
    return how, [
        _initializer(graph, name + PACKED, weight, ir.DataType.UINT8, packed_shape),
        _initializer(graph, name + SCALES, weight, weight.dtype, scales_shape),
    ]


def _initializer(
    graph: ir.Graph, name: str, weight: ir.Value, dtype: ir.DataType | None, shape: tuple[int, ...]
) -> ir.Value:
    assert dtype is not None
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    value.metadata_props[WEIGHT] = str(weight.name)
    graph.initializers[name] = value
    return value
