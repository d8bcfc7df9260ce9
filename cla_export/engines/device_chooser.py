"""Choosing tokens on a GPU: what each row is chosen by goes there, and only tokens come back."""

import importlib
import math
from collections.abc import Iterable, Sequence
from operator import is_
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cla_export.draw import BLOCK, COLDEST
from cla_export.engines.cuda_memory import CudaMemory
from cla_export.errors import RunError
from cla_export.plugin.compile import compile_choice
from cla_export.sampling import Changes, Choice, SamplingParams

_THREADS = 1024
_MOST = 4096 * BLOCK  # tokens of a vocabulary
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
_PLACES = ("biased", "seen", "barred", "end")
_CHANGE = np.dtype([("token", np.int32), ("value", np.float32)])
_NONE = np.empty(0, _CHANGE)


class RowChooser(Protocol):
    """Chooses a token for each row of logits that lie on a device."""

    def prepare(self, choices: Iterable[Choice]) -> None:
        """Take what the rows of the next step are chosen by to the device."""

    def choose(self, logits: int, rows: int) -> None:
        """Queue the choice by logits [rows, V] at an address, as prepared."""

    def tokens(self) -> list[int | None]:
        """The tokens that were chosen last; None for a row that is not numbers."""


class DeviceChooser:
    """Tokens for rows of logits in 16 bits, by the kernel in `plugin/choose_tokens.cu`.

    Args:
        memory: of the GPU; its stream orders the work.
        dtype: of the logits: float16 or bfloat16.
        vocab: tokens.
        rows: at most.

    Raises:
        RunError: the vocabulary is larger than a million tokens, or the GPU has no room.
        MissingEnvironment: NVRTC is not installed.
    """

    def __init__(self, memory: CudaMemory, dtype: str, vocab: int, rows: int) -> None:
        if vocab > _MOST:
            raise RunError(f"a vocabulary of {vocab:,} tokens; expected at most {_MOST:,}")
        self._memory, self._vocab, self._rows = memory, vocab, rows
        self._core = importlib.import_module("cuda.core")
        self._stream = self._core.Stream.from_handle(memory.stream)
        module = compile_choice(dtype == "bfloat16", memory.capability)
        self._kernel = module.get_kernel("choose_tokens")
        self._picks = memory.allocate(rows * _PICK.itemsize)
        self._tokens = memory.allocate(rows * 8)
        self._changes, self._room = 0, 0  # address and size
        self._scratch = 0
        self._asked = 0  # rows
        self._params: tuple[SamplingParams, ...] = ()  # of the rows that `_packed` is of
        self._packed = np.empty(0, _PICK)
        self._plain = False  # whether it says that nothing is changed

    def prepare(self, choices: Iterable[Choice]) -> None:
        """As `RowChooser.prepare`."""
        params, keys, changed = zip(*choices, strict=True)
        if len(params) != len(self._params) or not all(map(is_, params, self._params)):
            self._params, self._packed = params, pack_params(params)
            self._plain = False
        picks = self._packed
        picks["key"] = keys
        changes = _NONE
        if any(changed) or not self._plain:
            changes = pack_changes(picks, changed)
            self._plain = not any(changed)
        if not self._scratch and len(changes):
            size = self._rows * -(-self._vocab // BLOCK) * BLOCK * 4
            self._scratch = self._memory.allocate(size)
        if changes.nbytes > self._room:
            if self._room:
                self._memory.free(self._changes)
            self._room = 2 * changes.nbytes
            self._changes = self._memory.allocate(self._room)
        if len(changes):
            self._memory.upload(self._changes, changes)
        self._memory.upload(self._picks, picks)

    def choose(self, logits: int, rows: int) -> None:
        """As `RowChooser.choose`."""
        config = self._core.LaunchConfig(grid=rows, block=_THREADS)
        self._core.launch(
            self._stream, config, self._kernel, logits, self._picks, self._changes, self._scratch,
            self._tokens, np.int32(self._vocab),
        )  # fmt: skip
        self._asked = rows

    def tokens(self) -> list[int | None]:
        """As `RowChooser.tokens`."""
        tokens = np.empty(self._asked, np.int64)
        self._memory.download(self._tokens, tokens)
        return [None if token < 0 else token for token in tokens.tolist()]


def pack_params(params: Sequence[SamplingParams]) -> NDArray[np.void]:
    """A `Pick` for each row, without its key and changes."""
    rows = [
        (
            each.top_p,
            0,
            max(each.temperature, COLDEST) if each.temperature else 0.0,
            math.log(each.min_p) if each.min_p else -math.inf,
            each.repetition_penalty,
            1 / each.repetition_penalty,
            each.presence_penalty,
            each.frequency_penalty,
            min(each.top_k, _MOST),
            *(0, 0, 0, 0, 0),
        )
        for each in params
    ]
    return np.array(rows, _PICK)


def pack_changes(picks: NDArray[np.void], changes: Sequence[Changes | None]) -> NDArray[np.void]:
    """The `Change`s of all rows, one after another; where they begin and end goes into `picks`."""
    tokens, values, places, end = [], [], [], 0
    for each in changes:
        places.append([end] * 4)
        if each is None:
            continue
        pairs = each.biased, each.seen, (each.barred, np.zeros(len(each.barred), np.float32))
        for kind, (changed, value) in enumerate(pairs, 1):
            end += len(changed)
            places[-1][kind:] = [end] * (4 - kind)
            tokens.append(changed)
            values.append(value)
    for name, column in zip(_PLACES, np.array(places, np.int32).T, strict=True):
        picks[name] = column
    made = np.empty(end, _CHANGE)
    if end:
        made["token"], made["value"] = np.concatenate(tokens), np.concatenate(values)
    return made
