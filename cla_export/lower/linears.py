"""Linears that read a weight as the checkpoint has it, so that it is in memory once.

    MatMul(x, Transpose(weight [N, K]))  ->  ClaLinear(x, weight)

ONNX Runtime would transpose a weight when it opens the file, then pack the result for its kernels:
two more copies of each. ClaLinear, of `plugin/cla_attention_cpu.c`, packs nothing: it reads the
pages of the file itself, for a tied head those that the embedding is looked up in.
"""

import onnx_ir as ir

from cla_export.plugin.contract import DOMAIN
from cla_export.rewrite.simplify import drop_unused


def linear_weight(node: ir.Node) -> ir.Value | None:
    """The 2-D weight [N, K] of a MatMul with its transpose, or None."""
    if node.op_type != "MatMul" or node.inputs[1] is None:
        return None
    transpose = node.inputs[1].producer()
    if transpose is None or transpose.op_type != "Transpose":
        return None
    weight = transpose.inputs[0]
    if weight is None or not weight.is_initializer():
        return None
    return weight if weight.shape is not None and len(weight.shape) == 2 else None


def read_weights_in_place(model: ir.Model) -> None:
    """Rewrite every float32 Linear. Quantised ones are something else by now."""
    graph = model.graph
    for node in list(graph):
        weight = linear_weight(node)
        if weight is None or weight.dtype != ir.DataType.FLOAT:
            continue
        old = node.outputs[0]
        new = ir.node(
            "ClaLinear",
            [node.inputs[0], weight],
            outputs=[ir.Value(name=old.name, type=old.type, shape=old.shape)],
            domain=DOMAIN,
            name=str(node.name).replace("/MatMul", "/ClaLinear"),
            metadata_props=dict(node.metadata_props),
        )
        if old.is_graph_output():
            graph.outputs[graph.outputs.index(old)] = new.outputs[0]
        graph.insert_before(node, new)
        old.replace_all_uses_with(new.outputs[0])
        graph.remove(node, safe=True)
        model.opset_imports[DOMAIN] = 1
    drop_unused(model)
