"""Simplify: what an exporter leaves behind, folded; nothing here knows about attention.

Cases, beside constant folding and onnxscript's own rules:
1. Reshape whose target copies the leading axes of its input becomes a constant [0, 0, ...].
2. GatherND of whole rows by one index becomes Gather.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import basic_constant_propagation, fold_constants
from onnxscript.rewriter import rewrite as apply_rules
from onnxscript.rewriter.rules import common as library

from cla_export.rewrite.builder import named_constant
from cla_export.rewrite.report import PassReport
from cla_export.rewrite.values import ints, producer

# Those of the library's default rules that a decoder's graph has work for. The one that makes a
# Split of two Slices looks through the whole graph at each node; `split_rotation` needs none.
RULES = (
    library.add_0_rule,
    library.sub_0_rule,
    library.mul_by_1_rule,
    library.div_by_1_rule,
    library.dropout_zero_rule,
    library.dropout_inference_rule,
    library.two_reshapes_matmul_reshape_rule,
    library.one_reshape_matmul_reshape_rule,
    library.collapse_slice_rule,
    library.collapse_slice2_rule,
    library.materialize_reshape_shape_rule,
    library.cast_cast_rule,
    library.no_op_cast_rule,
    library.no_op_expand_rule,
    library.flatten_to_reshape_rule,
    library.reshape_reshape_rule,
    library.no_op_transpose_rule,
    library.transpose_transpose_rule,
    library.unsqueeze_unsqueeze_rule,
    library.squeeze_reshape_1d_rule,
    library.no_op_dynamic_scatter_nd_rule,
    library.no_op_static_scatter_nd_rule,
)


def simplify(model: ir.Model) -> PassReport:
    report = PassReport("simplify")
    for _ in range(2):  # what one folds, the other's rules can match
        fold_constants(model, onnx_shape_inference=True)
        apply_rules(model, RULES)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for node in list(model.graph):
        if node.op_type == "Reshape":
            _static_reshape(model.graph, node, report)
        elif node.op_type == "GatherND":
            _gather_rows(model.graph, node, report)
    basic_constant_propagation(model.graph)
    common.CommonSubexpressionEliminationPass()(model)
    drop_unused(model)
    return report


def drop_unused(model: ir.Model) -> None:
    """Remove nodes, initialisers and opset imports nobody reads; sort the rest."""
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    common.RemoveUnusedOpsetsPass()(model)
    model.graph.sort()


def _static_reshape(graph: ir.Graph, node: ir.Node, report: PassReport) -> None:  # case 1
    source, target = node.inputs
    before, after = source.shape if source else None, node.outputs[0].shape
    if target is None or ints(target) is not None:
        return
    if before is None or after is None:
        report.skip(node, "shapes unknown", f"{before} -> {after}")
        return
    dims: list[int] = []
    for axis, dim in enumerate(after):
        if isinstance(dim, int):
            dims.append(dim)
        elif axis < len(before) and before[axis] == dim and all(d == 0 for d in dims):
            dims.append(0)
        else:
            dims.append(-1)
    if dims.count(-1) > 1:
        report.skip(node, "more than one axis is computed", f"{before} -> {after}")
        return
    shape = named_constant(
        graph, np.array(dims, np.int64), "const/shape_" + "_".join(map(str, dims))
    )
    node.replace_input_with(1, shape)
    node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
    report.fired += 1


def _gather_rows(graph: ir.Graph, node: ir.Node, report: PassReport) -> None:  # case 2
    index = producer(node.inputs[1], "Unsqueeze")
    batch_dims = node.attributes.get_int("batch_dims", 0)
    if index is None or ints(index.inputs[1]) != [-1] or batch_dims != 0:
        report.skip(node, "not an index of whole rows", f"batch_dims {batch_dims}")
        return
    gather = ir.node("Gather", [node.inputs[0], index.inputs[0]], {"axis": 0}, name=node.name)
    gather.metadata_props.update(node.metadata_props)
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], [gather], node.outputs, gather.outputs
    )
    report.fired += 1
