"""Linears that read a weight as the checkpoint has it, so that it is in memory once.

    MatMul(x, Transpose(weight [N, K]))  ->  FusedMatMul(x, weight, transB=1)
    the same, of a tied head             ->  ClaLinear(x, weight)

1. ONNX Runtime would transpose a weight when it opens the file, then pack the result for its
   kernels: a third copy of each, for a moment, and holes in its arena ever after. FusedMatMul packs
   straight from the file.
2. A tied head's weight is the embedding too, which stays in memory as it is: packed, the model's
   largest tensor would be there twice. ClaLinear, of `plugin/cla_attention_cpu.c`, packs nothing.

Source: com.microsoft.FusedMatMul, version 1.
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
        tied = any(user.op_type == "Gather" for user in weight.consumers())
        op_type, domain = ("ClaLinear", DOMAIN) if tied else ("FusedMatMul", "com.microsoft")
        old = node.outputs[0]
        new = ir.node(
            op_type,
            [node.inputs[0], weight],
            {} if tied else {"transB": 1},
            outputs=[ir.Value(name=old.name, type=old.type, shape=old.shape)],
            domain=domain,
            name=str(node.name).replace("/MatMul", f"/{op_type}"),
            metadata_props=dict(node.metadata_props),
        )
        if old.is_graph_output():
            graph.outputs[graph.outputs.index(old)] = new.outputs[0]
        graph.insert_before(node, new)
        old.replace_all_uses_with(new.outputs[0])
        graph.remove(node, safe=True)
        model.opset_imports[domain] = 1
    drop_unused(model)
