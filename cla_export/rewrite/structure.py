"""Structural truth of a canonical graph, asserted on every one that is made or loaded."""

import onnx_ir as ir

from cla_export.errors import GraphError
from cla_export.layout import KVLayout
from cla_export.rewrite.report import describe
from cla_export.rewrite.values import attention_nodes


def check_structure(model: ir.Model, layout: KVLayout) -> None:
    """Check that there is exactly one cache per group and that everybody reads it after the write.

    1. two TensorScatter nodes per group, no more;
    2. past and present of each group, key and value, in order, nothing else of the kind;
    3. each layer's Attention reads its own group's present values.
    """
    graph = model.graph
    scatters = [node for node in graph if node.op_type == "TensorScatter"]
    if len(scatters) != 2 * layout.num_groups:
        raise GraphError(
            f"the graph has {len(scatters)} TensorScatter nodes; expected 2 for each of "
            f"{layout.num_groups} groups"
        )
    caches = [f"{group}.{part}" for group in range(layout.num_groups) for part in ("key", "value")]
    pasts = [str(v.name) for v in graph.inputs if str(v.name).startswith("past_key_values.")]
    presents = [str(v.name) for v in graph.outputs if str(v.name).startswith("present.")]
    if pasts != [f"past_key_values.{name}" for name in caches]:
        raise GraphError(f"cache inputs are {pasts}; expected one pair per group: {caches}")
    if presents != [f"present.{name}" for name in caches]:
        raise GraphError(f"cache outputs are {presents}; expected one pair per group: {caches}")
    for layer, node in enumerate(attention_nodes(graph)):
        group = layout.group_of(layer)
        read = [value.name if value is not None else None for value in node.inputs[1:3]]
        if read != [f"present.{group}.key", f"present.{group}.value"]:
            raise GraphError(
                f"{describe(node)}: layer {layer} reads {read}; expected the present values of "
                f"group {group}, after this step's write"
            )
