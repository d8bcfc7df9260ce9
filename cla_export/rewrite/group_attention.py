"""Group attention: discover which layers share KV, from the dataflow alone.

Attention nodes that read the very same K and V values form a group; the first of them in
execution order is the owner. What the config promised is checked against what was found.
"""

import onnx_ir as ir

from cla_export.errors import GraphError, LayoutError
from cla_export.layout import KVLayout
from cla_export.rewrite.classify_masks import window_of
from cla_export.rewrite.report import PassReport, describe
from cla_export.rewrite.values import attention_nodes, heads_and_dim

LAYER = "cla.layer"  # metadata key of an Attention node


def group_attention(model: ir.Model, expected: KVLayout | None) -> tuple[KVLayout, PassReport]:
    """Number the layers, find the groups; `expected` None takes what is found."""
    report = PassReport("group_attention")
    owners: list[int] = []
    kv_heads: list[int] = []
    head_dims: list[int] = []
    windows: list[int | None] = []
    owner_of_key: dict[ir.Value, int] = {}
    owner_of_value: dict[ir.Value, int] = {}
    nodes = attention_nodes(model.graph)
    for layer, node in enumerate(nodes):
        key, value = _key_and_value(node)
        heads, dim = heads_and_dim(key, node, "key")
        value_heads, value_dim = heads_and_dim(value, node, "value")
        if (heads, dim) != (value_heads, value_dim):
            raise GraphError(
                f"{describe(node)}: keys have {heads} heads of {dim}, values {value_heads} of "
                f"{value_dim}; expected one shape for both"
            )
        owner = owner_of_key.setdefault(key, layer)
        if owner_of_value.setdefault(value, layer) != owner:
            raise GraphError(
                f"{describe(node)}: layer {layer} reads the keys of layer {owner} but the values "
                f"of layer {owner_of_value[value]}; a group shares both"
            )
        owners.append(owner)
        kv_heads.append(heads)
        head_dims.append(dim)
        windows.append(window_of(node))
        node.metadata_props[LAYER] = str(layer)
        report.fired += owner != layer
    try:
        found = KVLayout.create(owners, kv_heads, head_dims, windows)
    except LayoutError as error:
        raise GraphError(
            f"the graph's layers share KV in a way that is not legal: {error}"
        ) from error
    if expected is not None:
        _compare(found, expected, nodes)
    return found, report


def _key_and_value(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    key, value = node.inputs[1], node.inputs[2]
    if key is None or value is None:
        raise GraphError(f"{describe(node)}: its key or value input is missing")
    return key, value


def _compare(found: KVLayout, expected: KVLayout, nodes: list[ir.Node]) -> None:
    if found.num_layers != expected.num_layers:
        raise GraphError(
            f"the config promises {expected.num_layers} layers, the graph has {found.num_layers} "
            "attention nodes"
        )
    rows = (
        ("owner", found.kv_owner, expected.kv_owner),
        ("KV heads", found.kv_heads, expected.kv_heads),
        ("head dim", found.head_dim, expected.head_dim),
        ("window", found.window, expected.window),
    )
    for layer, node in enumerate(nodes):
        for what, seen, promised in rows:
            if seen[layer] != promised[layer]:
                raise GraphError(
                    f"layer {layer}, {describe(node)}: the graph says {what} {seen[layer]}, the "
                    f"config promises {promised[layer]}; the model's code and its config disagree"
                )
