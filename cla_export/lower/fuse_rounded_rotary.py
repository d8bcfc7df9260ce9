"""Fuse rounded rotary: RoPE in 16 bits becomes one RotaryEmbedding, for ONNX Runtime alone.

    Cast(Unsqueeze(Gather(table, positions)))  ->  Unsqueeze(Gather(Cast(table), positions))

Tables are float32 in every graph, and a 16-bit model rounds the rows that it reads before it
rotates, so `rewrite.fuse_rotary` meets a Cast where it looks for rows. To round the whole table
first gives the same numbers, and ONNX Runtime does it once, when it opens the file. Then that pass
fires.

A step of this lowering and no pass: the operator may round less often than the products and sums
that a model spells out, so the canonical graph keeps those, and TensorRT fuses them as it likes.
Source: ONNX operator RotaryEmbedding-23.
"""

import onnx_ir as ir

from cla_export.rewrite.builder import Builder
from cla_export.rewrite.fuse_rotary import fuse_rotary
from cla_export.rewrite.simplify import drop_unused
from cla_export.rewrite.values import producer

_LOW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def fuse_rounded_rotary(model: ir.Model) -> int:
    """Fuse every rotation whose cosines and sines are rounded to 16 bits; returns how many."""
    graph = model.graph
    rounded = [cast for cast in list(graph) if _round_table_first(graph, cast)]
    if not rounded:
        return 0
    graph.sort()
    fused = fuse_rotary(model).fired
    for node in graph:
        if node.op_type == "RotaryEmbedding":
            made = node.outputs[0]
            made.name = node.name = str(made.name).replace("/Concat", "/RotaryEmbedding")
    drop_unused(model)
    return fused


def _round_table_first(graph: ir.Graph, cast: ir.Node) -> bool:
    """Move a Cast of rows of a table in front of their Gather; false where there is none."""
    dtype = cast.outputs[0].dtype
    unsqueeze = producer(cast.inputs[0], "Unsqueeze") if cast.op_type == "Cast" else None
    gather = producer(unsqueeze.inputs[0], "Gather") if unsqueeze is not None else None
    if dtype not in _LOW or unsqueeze is None or gather is None:
        return False
    table, rows, column = gather.inputs[0], gather.outputs[0], unsqueeze.outputs[0]
    if table is None or not table.is_initializer() or table.shape is None:
        return False
    if len(rows.consumers()) != 1 or len(column.consumers()) != 1:
        return False  # somebody reads them in float32
    low = Builder(graph).op(
        "Cast",
        [table],
        {"to": int(dtype)},
        shape=list(table.shape),
        dtype=dtype,
        name=f"{table.name}/{dtype.name.lower()}",
    )
    gather.replace_input_with(0, low)
    rows.type = column.type = ir.TensorType(dtype)
    cast.outputs[0].replace_all_uses_with(column)
    return True
