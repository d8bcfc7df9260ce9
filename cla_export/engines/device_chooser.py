"""Choosing tokens on a GPU: what each row is chosen by goes there, and only tokens come back."""

import importlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cla_export.engines.cuda_memory import Memory
from cla_export.errors import RunError
from cla_export.plugin.compile import compile_choice
from cla_export.sampling import Choice

_THREADS = 1024
_BLOCK = 256  # tokens
_MOST = 4096 * _BLOCK  # tokens of a vocabulary
_COLDEST = 1e-20  # a lower temperature is as good as 0, and may be 0 in float32
# `Pick` and `Change` of choose_tokens.cu
_PICK = np.dtype(
    [
        ("top_p", np.float64),
        ("key", np.uint64),
        ("temperature", np.float32),
        ("lowest", np.float32),
        ("repetition", np.float32),
        ("inverse", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("top_k", np.int32),
        ("biased", np.int32),
        ("seen", np.int32),
        ("barred", np.int32),
        ("end", np.int32),
        ("unused", np.int32),
    ]
)
_CHANGE = np.dtype([("token", np.int32), ("value", np.float32)])


class DeviceChooser:
    """Tokens for rows of logits in 16 bits, by the kernel in `plugin/choose_tokens.cu`.

    Args:
        memory: of the GPU; its stream orders the work.
        dtype: of the logits: float16 or bfloat16.
        vocab: tokens.
        rows: at most.
        capability: the GPU's compute capability.

    Raises:
        RunError: the vocabulary is larger than a million tokens, or the GPU has no room.
        MissingEnvironment: NVRTC is not installed.
    """

    def __init__(
        self, memory: Memory, dtype: str, vocab: int, rows: int, capability: tuple[int, int]
    ) -> None:
        if vocab > _MOST:
            raise RunError(f"a vocabulary of {vocab:,} tokens; expected at most {_MOST:,}")
        self._memory, self._vocab, self._rows = memory, vocab, rows
        self._core = importlib.import_module("cuda.core")
        self._stream = self._core.Stream.from_handle(memory.stream)
        module = compile_choice(dtype == "bfloat16", capability)
        self._kernel = module.get_kernel("choose_tokens")
        self._picks = memory.allocate(rows * _PICK.itemsize)
        self._tokens = memory.allocate(rows * 8)
        self._changes, self._room = 0, 0  # address and size
        self._scratch = 0

    def prepare(self, choices: Sequence[Choice]) -> None:
        """Take what the rows of the next step are chosen by to the GPU."""
        picks, changes = pack(choices)
        if not self._scratch and (len(changes) or picks["temperature"].any()):
            size = self._rows * -(-self._vocab // _BLOCK) * _BLOCK * 4
            self._scratch = self._memory.allocate(size)
        if changes.nbytes > self._room:
            if self._room:
                self._memory.free(self._changes)
            self._room = 2 * changes.nbytes
            self._changes = self._memory.allocate(self._room)
        if len(changes):
            self._memory.upload(self._changes, changes)
        self._memory.upload(self._picks, picks)

    def choose(self, logits: int, rows: int) -> list[int | None]:
        """Tokens by logits [rows, V] at an address; None for a row that is not numbers."""
        config = self._core.LaunchConfig(grid=rows, block=_THREADS)
        self._core.launch(
            self._stream, config, self._kernel, logits, self._picks, self._changes, self._scratch,
            self._tokens, np.int32(self._vocab),
        )  # fmt: skip
        tokens = np.empty(rows, np.int64)
        self._memory.download(self._tokens, tokens)
        return [None if token < 0 else token for token in tokens.tolist()]


def pack(choices: Sequence[Choice]) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """Choices as the kernel takes them: a `Pick` each, and the `Change`s of all rows' tokens."""
    picks, tokens, values, end = [], [], [], 0
    for params, key, biased, seen, barred in choices:
        starts = [end]
        for changed, value in (biased, seen, (barred, np.zeros(len(barred), np.float32))):
            end += len(changed)
            starts.append(end)
            if len(changed):
                tokens.append(changed)
                values.append(value)
        heat, penalty = params.temperature, params.repetition_penalty
        picks.append(
            (
                params.top_p,
                key,
                max(heat, _COLDEST) if heat else 0.0,
                math.log(params.min_p) if params.min_p else -math.inf,
                penalty,
                1 / penalty,
                params.presence_penalty,
                params.frequency_penalty,
                min(params.top_k, _MOST),
                *starts,
                0,
            )
        )
    changes = np.empty(end, _CHANGE)
    if end:
        np.concatenate(tokens, out=changes["token"], casting="same_kind")
        np.concatenate(values, out=changes["value"])
    return np.array(picks, _PICK), changes
