"""Fuse products: products of one input inside one module become one product, cut apart again.

    MatMul(x, Transpose(w_1)), MatMul(x, Transpose(w_2)), ...
    ->  Split(MatMul(x, Transpose(Concat(w_1, w_2, ...))))

A decode step multiplies a few rows, so each product takes as long as its weights take to read, and
small ones do not fill a GPU: query, key and value of an owner are one product, and so are gate and
up. Weights stay what they are on disk, [N, K] each; ONNX Runtime concatenates and transposes them
once, when it opens the file. Each number is the dot product that it was; biases are added after
the Split, as before.

Parts are of one width, or three: others stay apart, since ONNX Runtime's CUDA kernel of Split then
copies widths from the host, and a captured CUDA graph would copy them again from memory that is
gone. Source: ONNX operator Split-18.
"""

import onnx_ir as ir

from cla_export.lower.linears import linear_weight
from cla_export.rewrite.builder import Builder
from cla_export.rewrite.simplify import drop_unused

_INNER_PARTS = 3  # that Split has a kernel of its own for, along the last axis


def fuse_products(model: ir.Model) -> int:
    """Fuse all there are; returns how many products became part of another."""
    graph = model.graph
    found: dict[tuple[ir.Value, str], list[ir.Node]] = {}
    for node in graph:
        weight, source = linear_weight(node), node.inputs[0] if node.inputs else None
        module = str(node.name).rsplit("/", 2)[0]  # of layers.0/attn/q_proj/MatMul: layers.0/attn
        if weight is not None and source is not None:
            found.setdefault((source, module), []).append(node)
    groups = [(module, nodes) for (_, module), nodes in found.items() if _fusable(nodes)]
    for module, nodes in groups:
        _fuse(graph, module, nodes)
    graph.sort()
    drop_unused(model)
    return sum(len(nodes) for _, nodes in groups)


def _fusable(nodes: list[ir.Node]) -> bool:
    widths = {_width(weight) for node in nodes if (weight := linear_weight(node)) is not None}
    return len(nodes) == _INNER_PARTS or (len(nodes) > 1 and len(widths) == 1)


def _fuse(graph: ir.Graph, module: str, nodes: list[ir.Node]) -> None:
    """One product in place of several of one input; its parts keep the names they had."""
    build = Builder(graph)
    weights = [weight for node in nodes if (weight := linear_weight(node)) is not None]
    parts = [node.outputs[0] for node in nodes]
    widths = [_width(weight) for weight in weights]
    dtype, source, old = weights[0].dtype, nodes[0].inputs[0], parts[0].shape
    assert old is not None and source is not None and weights[0].shape is not None
    depth = weights[0].shape[1]
    # of layers.0/attn/q_proj/MatMul and its like: layers.0/attn/q_proj+k_proj+v_proj
    scope = f"{module}/{'+'.join(str(node.name).rsplit('/', 2)[-2] for node in nodes)}"
    packed = build.op(
        "Concat",
        weights,
        {"axis": 0},
        shape=[sum(widths), depth],
        dtype=dtype,
        name=f"{scope}/Concat",
    )
    transposed = build.op(
        "Transpose",
        [packed],
        {"perm": [1, 0]},
        shape=[depth, sum(widths)],
        dtype=dtype,
        name=f"{scope}/Transpose",
    )
    product = build.op(
        "MatMul",
        [source, transposed],
        shape=[*old[:-1], sum(widths)],
        dtype=parts[0].dtype,
        name=f"{scope}/MatMul",
    )
    sizes = build.int64(widths, f"split_{'_'.join(map(str, widths))}")
    made = [ir.Value(name=part.name, type=part.type, shape=part.shape) for part in parts]
    graph.append(
        ir.node("Split", [product, sizes], {"axis": -1}, outputs=made, name=f"{scope}/Split")
    )
    for node, part, new in zip(nodes, parts, made, strict=True):
        if part.is_graph_output():
            graph.outputs[graph.outputs.index(part)] = new
        part.replace_all_uses_with(new)
        graph.remove(node, safe=True)


def _width(weight: ir.Value) -> int:
    """N of a weight [N, K]."""
    assert weight.shape is not None
    width = weight.shape[0]
    assert isinstance(width, int)
    return width
