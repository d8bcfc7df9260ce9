"""Key/value caches in int8: integers, times a scale for each group, kv head and channel.

    key cache     int8 [slots, Hkv, C, D]    key = q * scale
    scale         float32 [Hkv, 1, D]        q = key / scale, to the nearest integer, half to even

What lies beyond -128 or 127 scales is held as those. Scales are constants of the graph, chosen when
it is exported (calibration.py); ONNX Runtime's GroupQueryAttention (k_quant_type PER_CHANNEL) and
our own ClaAppend round alike.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from cla_export.errors import BundleError
from cla_export.layout import KVLayout

if TYPE_CHECKING:
    import onnx_ir as ir

Part = Literal["key", "value"]
PARTS: tuple[Part, Part] = ("key", "value")
LEAST, MOST = -128, 127
Floats = NDArray[np.float32]
Scales = tuple[Floats, Floats]  # of a group's keys and values


def scale_name(group: int, part: Part) -> str:
    """Of the graph's initialiser, float32 [1, Hkv, 1, D]."""
    return f"cache.{group}.{part}_scale"


def to_int8(values: NDArray[Any], scale: Floats) -> NDArray[np.int8]:
    """What a cache holds of values [..., Hkv, T, D]."""
    held: NDArray[np.int8] = np.clip(np.rint(values / scale), LEAST, MOST).astype(np.int8)
    return held


def from_int8(held: NDArray[np.int8], scale: Floats) -> Floats:
    """The values that a cache stands for."""
    values: Floats = held * scale
    return values


def scales_of(graph: "ir.Graph", layout: KVLayout) -> list[Scales]:
    """Each group's scales, from the graph's initialisers; KeyError, ValueError if one is not so."""
    found = []
    for group in layout.groups:
        values = (graph.initializers[scale_name(group.index, part)].const_value for part in PARTS)
        keys, values_ = (
            value.numpy().copy().reshape(group.kv_heads, 1, group.head_dim)
            for value in values
            if value
        )
        found.append((keys, values_))
    return found


def read_scales(graph: Path, layout: KVLayout) -> list[Scales]:
    """Each group's scales, from a bundle's graph; its weights are not loaded.

    Raises BundleError where the graph lacks one.
    """
    import onnx_ir as ir

    try:
        return scales_of(ir.load(graph).graph, layout)
    except (KeyError, ValueError) as error:
        raise BundleError(
            f"{graph}: bundle.json says that its caches are int8, but the graph has no scale for "
            f"one of them ({error}); export again"
        ) from error
