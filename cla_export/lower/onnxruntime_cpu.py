"""A second graph for ONNX Runtime on a CPU, over the same weights: attention as our own operator.

    write_indices [B] int64   tokens each row holds before the call
    kv_lengths    [B] int64   tokens each row holds after it

Per group:

    owner    ClaAppend(past, past, k, v, write_indices)    -> present, present, in place
    all      ClaAttention(q, present, present, frontier)   -> y

GroupQueryAttention reads a cached key once for each of its query heads; ClaAttention reads it once
for all of them, and takes any mix of prompts, chunks and steps in one call. Both operators are of
`plugin/cla_attention_cpu.c`, in float32. A group that it has no code for keeps the standard form.
"""

import onnx_ir as ir

from cla_export.layout import Group, KVLayout
from cla_export.lower import cla_attention
from cla_export.lower.fuse_experts import fuse_experts
from cla_export.lower.pack_heads import packed, replace_unpacked
from cla_export.plugin.contract import DOMAIN, MAX_HEAD_DIM
from cla_export.rewrite.builder import Builder
from cla_export.rewrite.simplify import drop_unused
from cla_export.rewrite.thread_caches import GROUP
from cla_export.rewrite.values import attention_nodes, heads_and_dim, producer

MIN_HEAD_DIM = 16  # floats of the widest vector that the operator may be compiled for


def lower(model: ir.Model, layout: KVLayout) -> list[tuple[str, str]]:
    fuse_experts(model)
    graph = model.graph
    attentions = attention_nodes(graph)
    choices = [_choose(group, attentions[group.owner]) for group in layout.groups]
    if any(operator == "ClaAttention" for operator, _ in choices):
        model.opset_imports[DOMAIN] = 1
        build = Builder(graph)
        frontiers: dict[ir.Value, ir.Value] = {}
        for group, (operator, _) in zip(layout.groups, choices, strict=True):
            if operator == "ClaAttention":
                nodes = [attentions[layer] for layer in group.layers]
                _lower_group(graph, build, group, nodes, frontiers)
    graph.sort()
    drop_unused(model)
    return choices


def _choose(group: Group, node: ir.Node) -> tuple[str, str]:
    query = node.inputs[0]
    assert query is not None
    if query.dtype != ir.DataType.FLOAT:
        return "Attention", "ClaAttention computes float32 on a CPU"
    if not MIN_HEAD_DIM <= group.head_dim <= MAX_HEAD_DIM:
        return "Attention", (
            f"ClaAttention takes head dims from {MIN_HEAD_DIM} to {MAX_HEAD_DIM} on a CPU, not "
            f"{group.head_dim}"
        )
    return "ClaAttention", "reads each cached key once for all its query heads"


def _lower_group(
    graph: ir.Graph,
    build: Builder,
    group: Group,
    nodes: list[ir.Node],
    frontiers: dict[ir.Value, ir.Value],
) -> None:
    presents = _append(graph, build, group, nodes[0])
    for node in nodes:
        query = node.inputs[0]
        assert query is not None
        lengths = cla_attention.frontier(build, node.inputs[6], frontiers)
        heads, dim = heads_and_dim(query, node, "query")
        name = str(node.name).replace("/Attention", "/ClaAttention")
        y = ir.Value(name=name, type=query.type, shape=ir.Shape(["batch", "sequence", heads * dim]))
        graph.append(
            ir.node(
                "ClaAttention",
                [packed(build, query), *presents, lengths],
                cla_attention.attributes(node, group, dim),
                outputs=[y],
                domain=DOMAIN,
                name=name,
                metadata_props={**node.metadata_props, GROUP: str(group.index)},
            )
        )
        replace_unpacked(build, node.outputs[0], y, heads, dim)


def _append(graph: ir.Graph, build: Builder, group: Group, owner: ir.Node) -> list[ir.Value]:
    """ClaAppend in place of the group's two TensorScatter nodes; returns the presents."""
    pasts, new, presents, starts = [], [], [], None
    for value in owner.inputs[1:3]:
        scatter = producer(value, "TensorScatter")
        assert scatter is not None and value is not None
        past, update, starts = scatter.inputs[:3]
        assert past is not None and update is not None
        pasts.append(past)
        new.append(packed(build, update))
        presents.append(cla_attention.moved(graph, value))
    graph.append(
        ir.node(
            "ClaAppend",
            [*pasts, *new, starts],
            outputs=presents,
            domain=DOMAIN,
            name=f"cache.{group.index}/ClaAppend",
            metadata_props={GROUP: str(group.index)},
        )
    )
    return presents
