"""What a decode step has to read from memory, which no implementation can be faster than.

Every weight once and, for each group of layers, the keys and values that its rows see, once: on a
CPU and a GPU alike. All layers of a group read them, but those after the first might find them in a
cache.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cla_export.layout import DTYPE_BITS, KVLayout

if TYPE_CHECKING:
    import onnx_ir as ir

_ROTATIONS = ("ClaRotate", "ClaRotateAppend")  # of decode_ops.cu
_TABLES = (1, 2)  # cosines and sines, by position


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of a graph's weights that a step reads."""

    whole: int  # by every step
    row: int  # by every row of a batch: of each table that is only looked up, one entry


def read_weights(graph: Path) -> Weights:
    """Bytes of weights that a step of an ONNX graph reads; their values are not loaded.

    1. An initialiser counts once, whoever reads it: a tied embedding is the head's weight too.
    2. Of one that is only looked up, such as an untied embedding or a table of cosines, each row of
       the batch reads an entry: by Gather, through a Cast too, or by our rotations.
    3. int64 constants are shapes and axes, and do not count.
    """
    import onnx_ir as ir

    whole = row = 0
    for value in ir.load(graph).graph.initializers.values():
        tensor, uses = value.const_value, value.uses()
        if tensor is None or not uses or tensor.dtype == ir.DataType.INT64:  # 3
            continue
        if all(_looks_up(node, place) for node, place in uses):  # 2
            row += tensor.nbytes // tensor.shape.numpy()[0]
        else:  # 1
            whole += tensor.nbytes
    return Weights(whole, row)


def kv_bytes(layout: KVLayout, dtype: str, batch: int, context: int) -> int:
    """Bytes of keys and values that a step behind `context` tokens sees, once for each group.

    A group with a sliding window sees at most that many tokens.
    """
    numbers = sum(
        2 * group.kv_heads * group.head_dim * min(context, group.window or context)
        for group in layout.groups
    )
    return batch * numbers * DTYPE_BITS[dtype] // 8


def _looks_up(node: "ir.Node", place: int) -> bool:
    """Whether a node reads only some entries of its input at this place."""
    if node.op_type == "Cast":
        return all(_looks_up(reader, at) for reader, at in node.outputs[0].uses())
    if node.op_type == "Gather":
        return place == 0 and node.attributes.get_int("axis", 0) == 0
    return node.op_type in _ROTATIONS and place in _TABLES
