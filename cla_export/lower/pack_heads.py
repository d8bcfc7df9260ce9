"""Packed heads: the same numbers as [B, S, H * D] instead of [B, H, S, D].

Traced attention transposes heads in front of it and back after it; an operator that takes packed
heads needs neither.
"""

import onnx_ir as ir

from cla_export.rewrite.builder import Builder, Dim
from cla_export.rewrite.values import ints, producer

_HEADS_FIRST = (0, 2, 1, 3)


def packed(build: Builder, value: ir.Value) -> ir.Value:
    """A [B, H, S, D] value as [B, S, H * D], undoing the transposition where it came from.

    1. Transpose of a Reshape of [B, S, H * D]: what was there before.
    2. RotaryEmbedding: rotate in the packed form, which the operator also takes.
    3. Anything else: transposed back and reshaped.
    """
    assert value.shape is not None
    heads, dim = value.shape[1], value.shape[3]
    assert isinstance(heads, int) and isinstance(dim, int)
    node, name = value.producer(), f"{value.name}:packed"
    source = node.inputs[0] if node is not None and node.inputs else None
    if node is not None and source is not None:
        if _transposes_heads(node):  # case 1
            return _flattened(build, source, heads * dim, name)
        if node.op_type == "RotaryEmbedding" and node.domain == "":  # case 2
            return build.op(
                "RotaryEmbedding",
                [packed(build, source), *node.inputs[1:]],
                {**node.attributes, "num_heads": heads},
                shape=["batch", "sequence", heads * dim],
                dtype=value.dtype,
                name=name,
            )
    tokens_first = build.op(  # case 3
        "Transpose",
        [value],
        {"perm": _HEADS_FIRST},
        shape=["batch", "sequence", heads, dim],
        dtype=value.dtype,
        name=f"{name}/Transpose",
    )
    return _flattened(build, tokens_first, heads * dim, name)


def replace_unpacked(build: Builder, old: ir.Value, new: ir.Value, heads: int, dim: int) -> None:
    """Give the readers of `old` [B, H, S, D] the packed `new` [B, S, H * D].

    Readers that transpose and merge the heads themselves get `new` as it is; any others get it
    split and transposed again.
    """
    for transpose in list(old.consumers()):
        if not _transposes_heads(transpose):
            continue
        for reshape in list(transpose.outputs[0].consumers()):
            target = ints(reshape.inputs[1]) if reshape.op_type == "Reshape" else None
            if target == [0, 0, heads * dim]:
                reshape.outputs[0].replace_all_uses_with(new)
    if not _still_read(old):
        return
    shape = build.int64([0, 0, heads, dim], f"shape_0_0_{heads}_{dim}")
    split = build.op(
        "Reshape",
        [new, shape],
        shape=["batch", "sequence", heads, dim],
        dtype=new.dtype,
        name=f"{new.name}/Reshape",
    )
    back = build.op(
        "Transpose",
        [split],
        {"perm": _HEADS_FIRST},
        shape=["batch", heads, "sequence", dim],
        dtype=new.dtype,
        name=f"{new.name}/Transpose",
    )
    old.replace_all_uses_with(back)


def _transposes_heads(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and (
        tuple(node.attributes.get_ints("perm", ())) == _HEADS_FIRST
    )


def _flattened(build: Builder, value: ir.Value, width: int, name: str) -> ir.Value:
    """[B, S, H, D] as [B, S, width], or the value it was split from."""
    reshape = producer(value, "Reshape")
    source = reshape.inputs[0] if reshape is not None else None
    if source is not None and source.shape is not None and list(source.shape[2:]) == [width]:
        return source
    shape = build.int64([0, 0, width], f"shape_0_0_{width}")
    dims: list[Dim] = ["batch", "sequence", width]
    return build.op("Reshape", [value, shape], shape=dims, dtype=value.dtype, name=name)


def _still_read(value: ir.Value) -> bool:
    """Whether anything but dead transposes and reshapes reads a value."""
    if value.is_graph_output():
        return True
    return any(
        node.op_type not in ("Transpose", "Reshape")
        or any(_still_read(output) for output in node.outputs)
        for node in value.consumers()
    )
