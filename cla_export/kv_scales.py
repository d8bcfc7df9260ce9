"""Key/value caches in int8: integers, times a scale for each group, kv head and channel.

    key cache     int8 [slots, Hkv, C, D]    key = q * scale
    scale         float32 [Hkv, 1, D]        q = key / scale, to the nearest integer, half to even

What lies beyond -128 or 127 scales is held as those. Scales are constants of the graph, chosen when
it is exported (calibration.py); ONNX Runtime's GroupQueryAttention (k_quant_type PER_CHANNEL) and
our own ClaAppend round alike.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cla_export.errors import BundleError
from cla_export.layout import Group, KVLayout

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


def read_scales(graph: Path, layout: KVLayout) -> list[Scales]:
    """Each group's scales, from a bundle's graph; its weights are not loaded.

    Raises BundleError where the graph lacks one, or it has another shape.
    """
    import onnx

    model = onnx.load(graph, load_external_data=False)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}

    def scale(group: Group, part: Part) -> Floats:
        name = scale_name(group.index, part)
        tensor = initializers.get(name)
        shape = (1, group.kv_heads, 1, group.head_dim)
        if tensor is None or tuple(tensor.dims) != shape:
            raise BundleError(
                f"{graph}: bundle.json says that its caches are int8, but the graph has no {name} "
                f"of shape {list(shape)}; export again"
            )
        values: Floats = onnx.numpy_helper.to_array(tensor)[0].copy()
        return values

    return [(scale(group, "key"), scale(group, "value")) for group in layout.groups]
