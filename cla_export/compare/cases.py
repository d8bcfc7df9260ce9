"""What the gate runs: one case per way a server may drive the caches.

A case is a polygraphy feed dict, the same for every runner:

    tokens       int64 [B, T]  each row's tokens, padded on the right
    prompts      int64 [B]     how many of them arrive before decoding starts
    steps        int64 []      tokens decoded after that, one at a time, all rows together
    chunk        int64 []      tokens per prefill call; 0: all rows' prompts in one padded call
    first_slot   int64 []      rows take this slot and the ones after it
    logits_from  int64 [B]     first position whose logits are compared
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cla_export.layout import KVLayout

Feed = dict[str, NDArray[np.int64]]
SLOTS = 4
DECODE_STEPS = 36
_LENGTH = 160  # tokens; longer where a sliding window asks for it
_LONGEST = 640
INPUTS = ("tokens", "prompts", "steps", "chunk", "first_slot", "logits_from")


@dataclass(frozen=True, slots=True)
class Case:
    """A named feed, with what it would catch."""

    name: str
    about: str
    feed: Feed


def case_length(layout: KVLayout, max_positions: int) -> int:
    """Tokens per row: past every sliding window that is not longer than 600 tokens."""
    windows = [window for window in layout.window if window is not None]
    wanted = max([_LENGTH, *(window + 40 for window in windows)])
    return min(wanted, _LONGEST, max_positions)


def make_cases(length: int, stream: Sequence[int]) -> list[Case]:
    """Cases of rows up to `length` tokens, cut from a stream of token ids (repeated as needed)."""
    source = np.resize(np.asarray(stream, np.int64), length * (SLOTS + 3))
    rows = [source[i * length : (i + 1) * length] for i in range(SLOTS + 3)]
    steps = min(DECODE_STEPS, length // 2)
    most = length - steps  # the longest prompt that leaves room for the steps
    uneven = [max(1, most // 9), most, max(1, most // 3), max(1, most // 2)]
    return [
        Case("prefill", "one prompt in one call", _feed([rows[0]], [length])),
        Case("decode", "a prompt, then single tokens", _feed([rows[1]], [most], steps)),
        Case("decode-from-one", "a one-token prompt, then tokens", _feed([rows[2]], [1], steps)),
        Case(
            "chunked-prefill",
            "one prompt in uneven pieces",
            _feed([rows[3]], [most], min(2, steps), chunk=max(1, most // 5)),
        ),
        Case(
            "ragged-decode",
            "rows of different lengths decoded together",
            _feed(rows[:SLOTS], uneven, steps),
        ),
        Case(
            "batched-prefill",
            "prompts of different lengths in one padded call",
            _feed(rows[1:SLOTS], uneven[1:], min(8, steps), chunk=0, first_slot=1),
        ),
        Case(
            "slot-reuse",
            "a shorter prompt in a slot that held a longer one",
            _feed([rows[SLOTS + 1]], [max(1, most // 4)], min(8, steps), first_slot=1),
        ),
    ]


def _feed(
    rows: Sequence[NDArray[np.int64]],
    prompts: Sequence[int],
    steps: int = 0,
    *,
    chunk: int | None = None,
    first_slot: int = 0,
) -> Feed:
    tokens = np.zeros((len(rows), max(prompts) + steps), np.int64)
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        tokens[index, : prompt + steps] = row[: prompt + steps]
    together = chunk == 0
    return {
        "tokens": tokens,
        "prompts": np.array(prompts, np.int64),
        "steps": np.array(steps, np.int64),
        "chunk": np.array(max(prompts) if chunk is None else chunk, np.int64),
        "first_slot": np.array(first_slot, np.int64),
        "logits_from": np.array([p - 1 if together else 0 for p in prompts], np.int64),
    }
