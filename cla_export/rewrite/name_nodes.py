"""Name nodes: the same model always yields the same names, and they say where a node belongs.

A node traced from module `model.layers.3.self_attn.q_proj` becomes `layers.3/attn/q_proj/MatMul`,
and what it makes is named after it; a second one of a kind gets `_1`. Graph inputs, outputs and
weights keep their names. The exporter's own metadata (stack traces, paths) is dropped.
"""

import onnx_ir as ir

from cla_export.rewrite.builder import SCOPE
from cla_export.rewrite.group_attention import LAYER
from cla_export.rewrite.report import PassReport
from cla_export.rewrite.thread_caches import GROUP

UNNAMED = ("val_", "_")  # what tracing calls constants; this pass numbers them
_NOWHERE = "_empty_nn_module_stack_from_metadata_hook"  # what tracing calls the place of a shape
_KEPT = (LAYER, GROUP, "cla.window")


def name_nodes(model: ir.Model) -> PassReport:
    report = PassReport("name_nodes")
    graph = model.graph
    fixed = {id(value) for value in (*graph.inputs, *graph.outputs)}
    taken: dict[str, int] = {}
    for position, node in enumerate(graph):  # temporary names, so that no two ever clash
        for index, output in enumerate(node.outputs):
            if id(output) not in fixed:
                output.name = f"__{position}_{index}"
    for node in graph:
        base = f"{_scope(node)}/{node.op_type}"
        count = taken.get(base, 0)
        taken[base] = count + 1
        node.name = base if count == 0 else f"{base}_{count}"
        for index, output in enumerate(node.outputs):
            if id(output) not in fixed:
                output.name = node.name if index == 0 else f"{node.name}:{index}"
        kept = {key: node.metadata_props[key] for key in _KEPT if key in node.metadata_props}
        node.metadata_props.clear()
        node.metadata_props.update(kept)
        node.doc_string = None
        report.fired += 1
    _name_constants(graph)
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.name = "cla_export"
    graph.metadata_props.clear()
    graph.doc_string = None
    model.metadata_props.clear()
    model.producer_name = "cla-export"
    model.producer_version = None
    return report


def _scope(node: ir.Node) -> str:
    if SCOPE in node.metadata_props:
        return node.metadata_props[SCOPE]
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    names = [name for name in scopes.strip("[]").replace("'", "").split(", ") if name]
    module = names[-2] if len(names) > 1 else ""  # the last one is the operator itself
    module = "" if module == _NOWHERE else module
    module = module.removeprefix("model.").replace(".self_attn", ".attn")
    parts = module.split(".")
    if len(parts) > 1 and parts[0] == "layers":
        return "/".join([".".join(parts[:2]), *parts[2:]])
    above = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if module in ("", "model") and above is not None and str(above.name).startswith("layers."):
        return str(above.name).rpartition("/")[0]  # called by hand, outside its module's forward
    return "/".join(part for part in parts if part) or "model"


def _name_constants(graph: ir.Graph) -> None:
    """Constants that tracing named `val_17` are numbered in the order they are first read."""
    order: list[ir.Value] = []
    for node in graph:
        for value in node.inputs:
            if value is not None and value.is_initializer() and value not in order:
                order.append(value)
    unnamed = [value for value in order if str(value.name).startswith(UNNAMED)]
    for index, value in enumerate(unnamed):
        value.name = f"__constant_{index}"
    for index, value in enumerate(unnamed):
        value.name = f"constant_{index}"
