"""Quantise experts: MoE with weights of every expert becomes QMoE.

    MoE(x, scores, gate_up [E, 2 * I, H], down [E, H, I])
    ->  QMoE(x, scores, gate_up.packed, gate_up.scales, down.packed, down.scales)

Each expert's weight is packed as a Linear's is (`quantization`), with a row's blocks end to end:
packed is uint8 [E, N, K * bits / 8], scales [E, N, K / block].

1. Rows of H and I numbers must be whole blocks, which is what the kernel takes.
2. Weights have no values yet; `weights.attach` packs them, rows interleaved first where MoE reads
   them so.

The kernel rounds activations to int8 for weights of 8 bits, and computes in float32 for 4 bits.
Source: com.microsoft.QMoE, version 1, as of ONNX Runtime 1.32.
"""

import onnx_ir as ir

from cla_export.interleaving import INTERLEAVED
from cla_export.quantization import PACKED, SCALES, WEIGHT, Quantization
from cla_export.rewrite.simplify import drop_unused


def quantize_experts(model: ir.Model, quantization: Quantization) -> int:
    """Quantise the weights of every MoE; returns how many of these there were."""
    graph, found = model.graph, 0
    for node in list(graph):
        weights = [node.inputs[2], node.inputs[4]] if node.op_type == "MoE" else []
        if not weights or any(not _fits(weight, quantization) for weight in weights):
            continue
        parts = [part for weight in weights for part in _parts(graph, weight, quantization)]
        old = node.outputs[0]
        made = ir.node(
            "QMoE",
            [*node.inputs[:2], *parts[:2], None, *parts[2:]],
            {
                **{name: node.attributes[name] for name in node.attributes},
                "expert_weight_bits": quantization.bits,
                "block_size": quantization.block,
            },
            outputs=[ir.Value(name=old.name, type=old.type, shape=old.shape)],
            domain="com.microsoft",
            name=str(node.name).replace("/MoE", "/QMoE"),
            metadata_props=dict(node.metadata_props),
        )
        graph.insert_before(node, made)
        old.replace_all_uses_with(made.outputs[0])
        graph.remove(node, safe=True)
        found += 1
    drop_unused(model)
    return found


def _fits(weight: ir.Value | None, quantization: Quantization) -> bool:  # case 1
    if weight is None or weight.const_value is not None or weight.shape is None:
        return False
    return weight.shape.numpy()[-1] % quantization.block == 0


def _parts(
    graph: ir.Graph, weight: ir.Value | None, quantization: Quantization
) -> tuple[ir.Value, ir.Value]:
    """What a weight is packed as: initialisers that say what of (case 2)."""
    assert weight is not None and weight.shape is not None and weight.dtype is not None
    shapes = quantization.shapes_of_experts(*weight.shape.numpy())
    made = []
    for suffix, dtype, shape in zip(
        (PACKED, SCALES), (ir.DataType.UINT8, weight.dtype), shapes, strict=True
    ):
        name = f"{weight.name}{suffix}"
        if name not in graph.initializers:
            value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
            value.metadata_props[WEIGHT] = str(weight.name).removesuffix(INTERLEAVED)
            graph.initializers[name] = value
        made.append(graph.initializers[name])
    return made[0], made[1]
