"""Graphs whose caches grow by Concat, made from the canonical graph, which writes by TensorScatter.

past, new -> Concat -> present, which the Attention of each layer that the cache is for reads.
"""

from pathlib import Path

import onnx_ir as ir
import torch

from cla_export.bundle import Bundle
from cla_export.layout import KVLayout
from cla_export.models import family_of
from cla_export.models.checkpoint import open_checkpoint
from cla_export.rewrite import rewrite
from cla_export.rewrite.builder import Builder
from cla_export.rewrite.simplify import drop_unused
from cla_export.rewrite.values import attention_nodes, producer
from cla_export.trace import trace


def write_concat(bundle: Bundle, path: Path, *, per_layer: bool) -> None:
    """Write the graph of a bundle's model, over the bundle's weights.

    Cosines and sines come from the model's tables.
    """
    checkpoint = open_checkpoint(bundle.source)
    layout = checkpoint.spec.layout
    stateless = trace(family_of(checkpoint.config), checkpoint.spec, torch.float32)
    model = rewrite(stateless, layout).model
    grow_by_concat(model.graph, layout, per_layer=per_layer)
    drop_unused(model)
    stored = ir.load(bundle.graph).graph.initializers
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            value.const_value = stored[name].const_value
    path.write_bytes(ir.to_proto(model).SerializeToString())


def grow_by_concat(graph: ir.Graph, layout: KVLayout, *, per_layer: bool) -> None:
    """Replace the caches of a canonical graph, written by TensorScatter, by growing ones."""
    build, attentions = Builder(graph), attention_nodes(graph)
    scatters = {
        (group.owner, place): producer(attentions[group.owner].inputs[place], "TensorScatter")
        for group in layout.groups
        for place in (1, 2)
    }
    graph.inputs[:] = [value for value in graph.inputs if not is_past(value)]
    graph.outputs[:] = graph.outputs[:1]
    layers = range(layout.num_layers) if per_layer else [group.owner for group in layout.groups]
    for index, layer in enumerate(layers):
        for place, part in ((1, "key"), (2, "value")):
            scatter = scatters[layout.kv_owner[layer], place]
            assert scatter is not None and scatter.inputs[1] is not None
            new = scatter.inputs[1]
            assert new.shape is not None and new.dtype is not None
            heads, dim = new.shape[1], new.shape[3]
            past = ir.Value(
                name=f"past_key_values.{index}.{part}",
                type=ir.TensorType(new.dtype),
                shape=ir.Shape(["batch", heads, "past", dim]),
            )
            present = build.op(
                "Concat",
                [past, new],
                {"axis": 2},
                shape=["batch", heads, "total", dim],
                dtype=new.dtype,
                name=f"present.{index}.{part}",
            )
            if layout.is_owner(layer):
                scatter.outputs[0].replace_all_uses_with(present)
            attentions[layer].replace_input_with(place, present)
            graph.inputs.append(past)
            graph.outputs.append(present)
    graph.sort()


def is_past(value: ir.Value) -> bool:
    return str(value.name).startswith("past_key_values.")
