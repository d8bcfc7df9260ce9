"""What the gate does for int8 caches alone: judge their scales, and make up what they hold.

The reference rounds nothing. The yardstick rounds keys and values to the bundle's scales
(reference.py), and inside the layers attention is recomputed from what the caches hold (probe.py),
which may be half a step from what they were given (replay.py). What is left is whether the scales
are any good, since with bad ones all of that would agree.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from cla_export.bundle import Bundle
from cla_export.calibration import calibrate
from cla_export.compare.reference import GroupKV
from cla_export.compare.runners import LOUD
from cla_export.kv_scales import MOST, PARTS, Scales, from_int8, read_scales, to_int8
from cla_export.models.decoder import Decoder

_SATURATES, _COARSE = 0.5, 8.0  # scales over those that the text which is compared on asks for


def find_scales(
    bundle: Bundle, model: Decoder, stream: Sequence[int]
) -> tuple[list[Scales] | None, list[str]]:
    """The scales of a bundle's caches, None if they are not int8, and a sentence for each fault."""
    if bundle.cache_dtype != "int8":
        return None, []
    scales = read_scales(bundle.graph, bundle.layout)
    faults = list(_misfits(scales, calibrate(model, stream)))
    if bundle.cpu_graph is not None:
        others = read_scales(bundle.cpu_graph, bundle.layout)
        pairs = zip(scales, others, strict=True)
        if not all(np.array_equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True)):
            faults.append(f"{bundle.cpu_graph.name}: its scales are not {bundle.graph.name}'s")
    return scales, faults


def _misfits(scales: Sequence[Scales], wanted: Sequence[Scales]) -> Iterator[str]:
    """Caches whose scales are far from what the model's keys and values ask for."""
    for group, (mine, others) in enumerate(zip(scales, wanted, strict=True)):
        for part, scale, other in zip(PARTS, mine, others, strict=True):
            least, most = float((scale / other).min()), float((scale / other).max())
            if not (least >= _SATURATES and most <= _COARSE):
                yield (
                    f"cache.{group}.{part}: scales are {least:.2g} to {most:.2g} times what this "
                    f"text asks for; expected {_SATURATES:g} to {_COARSE:g} times: calibrate on a "
                    "text like it (export --calibration FILE)"
                )


def made_up(groups: GroupKV, scales: Sequence[Scales]) -> GroupKV:
    """Keys and values [T, Hkv, D] as int8 caches hold them, in float32.

    Values are so small that those which a case makes loud are held as they are too.
    """
    made: GroupKV = []
    most = MOST // LOUD
    for (keys, values), (of_keys, of_values) in zip(groups, scales, strict=True):
        key_scale, value_scale = of_keys[:, 0], of_values[:, 0]
        quiet = to_int8(values / LOUD, value_scale).clip(-most, most).astype(np.int8)
        made.append((from_int8(to_int8(keys, key_scale), key_scale), from_int8(quiet, value_scale)))
    return made
