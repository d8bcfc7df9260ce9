"""Reading an onnx_ir graph: constants, attributes, shapes, and the chain above a value."""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from cla_export.errors import GraphError
from cla_export.rewrite.report import describe


def constant(value: ir.Value | None) -> NDArray[np.generic] | None:
    """The array a value always has, or None if it is computed or has no value yet."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def ints(value: ir.Value | None) -> list[int] | None:
    """A constant of integers, flattened."""
    array = constant(value)
    if array is None or not np.issubdtype(array.dtype, np.integer):
        return None
    return [int(item) for item in array.reshape(-1)]


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes a value, if it is of one of these types."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in op_types else None


def attention_nodes(graph: ir.Graph) -> list[ir.Node]:
    """Standard Attention nodes in execution order; refuses a graph without any."""
    nodes = [node for node in graph if node.op_type == "Attention" and node.domain == ""]
    if not nodes:
        seen = sorted({node.op_type for node in graph})
        raise GraphError(
            "the graph has no attention: no Attention node, and no softmax between two products of "
            f"computed values (operators seen: {', '.join(seen)})"
        )
    return nodes


def heads_and_dim(value: ir.Value, node: ir.Node, role: str) -> tuple[int, int]:
    """Heads and head dim of a [B, H, S, D] input of an Attention node."""
    shape = value.shape
    if shape is None or len(shape) != 4:
        raise GraphError(
            f"{describe(node)}: its {role} is {shape}; expected [B, heads, S, head_dim]"
        )
    heads, dim = shape[1], shape[3]
    if not isinstance(heads, int) or not isinstance(dim, int):
        raise GraphError(
            f"{describe(node)}: its {role} has shape {shape}; heads and head_dim must be constants"
        )
    return heads, dim
