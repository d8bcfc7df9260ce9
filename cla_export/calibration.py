"""Scales for int8 caches: how large a model's keys and values get, channel by channel, on a text.

The model runs in PyTorch, in float32, over windows of the text and one of ids from all over the
vocabulary. Windows stand at positions all over the context: RoPE turns a channel into its partner
as positions grow, the slow ones only once in a context, so that a channel's range at the beginning
says little about its range at the end.

A scale leaves room for a quarter more than the largest value seen, which costs a third of a bit.
What is larger still is held as the largest number that there is.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cla_export.errors import BadInput
from cla_export.kv_scales import MOST, Floats, Scales

if TYPE_CHECKING:
    import torch

    from cla_export.models.decoder import Decoder

MARGIN = 1.25
WINDOWS = 8
LENGTH = 256  # tokens of a window
_LEAST = 2.0**-12  # of the group's largest: a channel that is always zero has a scale all the same


def calibrate(model: "Decoder", stream: Sequence[int]) -> list[Scales]:
    """Each group's scales for keys and values, float32 [Hkv, 1, D], from token ids of a text.

    Raises BadInput if a key or a value is not a number.
    """
    import torch

    spec = model.spec
    length = min(LENGTH, spec.max_positions)
    text = np.resize(np.asarray(stream, np.int64), max(length, len(stream)))
    begins = np.linspace(0, len(text) - length, WINDOWS).astype(int)
    rows = [text[begin : begin + length] for begin in begins]
    rows.append(np.linspace(0, spec.vocab_size - 1, length).astype(np.int64))
    starts = [*np.linspace(0, spec.max_positions - length, WINDOWS).astype(int), 0]
    largest: list[Scales] = []
    with torch.inference_mode():
        for row, start in zip(rows, starts, strict=True):
            positions = torch.arange(length)[None] + int(start)
            _, groups = model.forward_with_kv(torch.from_numpy(row)[None], positions)
            seen = [(_largest(key), _largest(value)) for key, value in groups]
            largest = [
                (np.maximum(a, c), np.maximum(b, d))
                for (a, b), (c, d) in zip(largest or seen, seen, strict=True)
            ]
    for group, pair in enumerate(largest):
        if not all(np.isfinite(part).all() for part in pair):
            raise BadInput(
                f"group {group}: keys or values of the text are infinite or no numbers, so there "
                "is no scale for them; the checkpoint is broken, or needs more than float32"
            )
    return [(_scale(keys), _scale(values)) for keys, values in largest]


def _largest(part: "torch.Tensor") -> Floats:
    """Of each head and channel of [1, Hkv, T, D], in size."""
    found: Floats = part[0].abs().amax(1, keepdim=True).float().numpy()
    return found


def _scale(largest: Floats) -> Floats:
    floor = max(float(largest.max()) * _LEAST, float(np.finfo(np.float32).tiny) * 2**24)
    scale: Floats = (np.maximum(largest, floor) * (MARGIN / MOST)).astype(np.float32)
    return scale
