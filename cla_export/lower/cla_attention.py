"""What every lowering to ClaAttention needs: its attributes, its lengths, and moved presents."""

import onnx_ir as ir

from cla_export.layout import Group
from cla_export.rewrite.builder import Builder

_INT32 = ir.DataType.INT32


def attributes(node: ir.Node, group: Group, dim: int) -> dict[str, int | float]:
    """ClaAttention's, of a canonical Attention node."""
    return {
        "scale": node.attributes.get_float("scale", 1.0 / dim**0.5),
        "window": group.window or 0,
        "softcap": node.attributes.get_float("softcap", 0.0),
    }


def frontier(build: Builder, length: ir.Value | None, made: dict[ir.Value, ir.Value]) -> ir.Value:
    """Lengths as int32 [B]; layers that share them share the Cast, which `made` remembers."""
    assert length is not None
    if length not in made:
        made[length] = build.op(
            "Cast",
            [length],
            {"to": int(_INT32)},
            shape=["batch"],
            dtype=_INT32,
            name="lengths/frontier_int32",
        )
    return made[length]


def moved(graph: ir.Graph, present: ir.Value) -> ir.Value:
    """A new value that takes over a present output's name, type, readers and place."""
    value = ir.Value(name=present.name, type=present.type, shape=present.shape)
    present.name = f"{present.name}/scattered"
    graph.outputs[graph.outputs.index(present)] = value
    present.replace_all_uses_with(value)
    return value
