"""Adding nodes to a graph that is being rewritten: typed, shaped, and named or scoped."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from cla_export.errors import GraphError

SCOPE = "cla.scope"  # metadata key: where a node that a pass made belongs, for `name_nodes`
Dim = int | str | None | ir.SymbolicDim


class Builder:
    """Appends to a graph; sort it when done.

    `scope` places nodes that `name_nodes` will name; after that pass, give each a `name`.
    """

    def __init__(self, graph: ir.Graph, scope: str = "") -> None:
        self._graph = graph
        self._tape = ir.tape.Tape(graph)
        self._scope = scope

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, int | str | Sequence[int] | ir.Attr] | None = None,
        *,
        shape: Sequence[Dim] | None = None,
        dtype: ir.DataType | None = ir.DataType.INT64,
        name: str | None = None,
    ) -> ir.Value:
        """Append one node with one output and return that."""
        scope = {SCOPE: self._scope} if self._scope else {}
        value = self._tape.op(op_type, inputs, attributes, name=name, metadata_props=scope)
        value.shape = None if shape is None else ir.Shape(shape)
        value.type = None if dtype is None else ir.TensorType(dtype)
        if name is not None:
            value.name = name
        return value

    def int64(self, number: int | Sequence[int], name: str) -> ir.Value:
        """The graph's int64 constant of that name, made on first use."""
        return named_constant(self._graph, np.array(number, np.int64), f"const/{name}")


def named_constant(graph: ir.Graph, array: NDArray[np.generic], name: str) -> ir.Value:
    """The graph's initialiser of that name, made on first use."""
    if name not in graph.initializers:
        graph.register_initializer(
            ir.Value(
                name=name,
                type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
                shape=ir.Shape(array.shape),
                const_value=ir.tensor(array, name=name),
            )
        )
    found = graph.initializers[name]
    if found.const_value is None or not np.array_equal(found.const_value.numpy(), array):
        raise GraphError(f"the graph has another initialiser called {name!r}; rename that one")
    return found
