"""Quantise weights: MatMul with a Linear's transposed weight becomes MatMulNBits.

    x, Transpose(weight [N, K])  ->  MatMulNBits(x, weight.packed, weight.scales)

Weights have no values yet at this point; `weights.attach` packs each when it is written out. A
weight that is also read elsewhere, such as a tied embedding, is kept beside its packed form.
"""

from collections.abc import Mapping

import onnx_ir as ir

from cla_export.lower.linears import linear_weight
from cla_export.quantization import PACKED, SCALES, WEIGHT, Quantization
from cla_export.rewrite.simplify import drop_unused

_INT8_PRODUCTS = 4  # accuracy_level


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
        weight = linear_weight(node)
        if weight is None or weight.const_value is not None:
            continue
        name = str(weight.name)
        if str(node.name).startswith("lm_head/"):
            name = "lm_head.weight"
        elif any(reader.op_type != "Transpose" for reader, _ in weight.uses()):
            name = others.get(name, name)
        how = quantization.of_weight(name)
        assert weight.shape is not None and weight.shape.is_static()
        rows, columns = weight.shape.numpy()
        packed_shape, scales_shape = how.shapes(rows, columns)
        parts = [
            _initializer(graph, name + PACKED, weight, ir.DataType.UINT8, packed_shape),
            _initializer(graph, name + SCALES, weight, weight.dtype, scales_shape),
        ]
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
    if found:
        model.opset_imports["com.microsoft"] = 1
    drop_unused(model)
    return found


def _initializer(
    graph: ir.Graph, name: str, weight: ir.Value, dtype: ir.DataType | None, shape: tuple[int, ...]
) -> ir.Value:
    assert dtype is not None
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    value.metadata_props[WEIGHT] = str(weight.name)
    graph.initializers[name] = value
    return value
