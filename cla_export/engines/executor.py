"""The one interface that parity, generate, bench and serve drive, and what all executors share.

A pool per group, [slots, kv_heads, capacity, head_dim], is allocated once and written in place. A
step runs on the view of consecutive slots, so no cache is ever copied. Rows are checked before a
step: one that would write outside its slot fails alone, before anything is computed.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from cla_export.bundle import Bundle
from cla_export.errors import BadInput
from cla_export.layout import KVLayout

if TYPE_CHECKING:
    from cla_export.sampling import Choice

Array = NDArray[np.generic]
Logits = NDArray[np.float32]
Cache = tuple[Array, Array]  # keys and values


class Executor(Protocol):
    """Runs steps of one model over its own slots."""

    backend: str  # what runs them: onnxruntime, tensorrt, tensorrt-rtx or torch
    layout: KVLayout
    capacity: int  # tokens a slot can hold
    slots: int
    vocab_size: int
    reads_rows_at_once: bool  # whether several rows of prefill_rows take less time than one by one
    chunk: int  # tokens of a prompt that one call should have while other rows wait to decode
    rounds_activations: bool  # to int8, where they are multiplied by quantised weights

    @property
    def chooser(self) -> "TokenChooser | None":
        """Itself, if it chooses tokens too."""

    def prefill(self, slot: int, tokens: Sequence[int], start: int, keep: int = 1) -> Logits:
        """Append a chunk of tokens to a slot that holds `start`; logits [keep, V] of its last."""

    def prefill_rows(self, first: int, rows: Sequence[Sequence[int]]) -> Logits:
        """Start consecutive slots with prompts of different lengths; logits [B, V]."""

    def decode(self, slots: Sequence[int], tokens: Sequence[int], lengths: Sequence[int]) -> Logits:
        """Append one token to each of consecutive slots that hold `lengths`; logits [B, V]."""

    def read(self, group: int, slot: int) -> Cache:
        """Keys and values that a slot holds, each [Hkv, C, D]; to be read only."""

    def write(self, group: int, slot: int, keys: Array, values: Array) -> None:
        """Put keys and values, each [Hkv, T, D], into the first places of a slot."""

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Give one slot the first `tokens` that another holds, in all groups."""


class TokenChooser(Protocol):
    """An executor that chooses tokens where their logits are, so that these need not be moved.

    Between `begin_decode` and `end_decode` the caller is free, and may prefill and copy: that
    happens after the step. A step whose tokens nobody wants need not be ended.
    """

    def begin_decode(
        self,
        slots: Sequence[int],
        tokens: Sequence[int],
        lengths: Sequence[int],
        choices: Iterable["Choice"],
    ) -> None:
        """Start a step as `decode` is, and the choice of each row's next token.

        It may run already when the choices are asked for.
        """

    def end_decode(self) -> list[int | None]:
        """Those tokens, when they are there; None for a row that is not numbers."""

    def prefill_and_choose(
        self,
        first: int,
        rows: Sequence[Sequence[int]],
        starts: Sequence[int],
        choices: Iterable["Choice"],
    ) -> list[int | None]:
        """Append the ends of prompts to consecutive slots that hold `starts`: their first tokens.

        None for a row that is not numbers.
        """

    def logits_of(self, row: int) -> Logits:
        """Logits [V] of a row of the tokens that were given last, until something else runs."""


class PooledExecutor(ABC):
    """Checks rows and arranges them as a batch; a runtime implements the rest."""

    backend: str
    reads_rows_at_once = True
    chunk = 64
    rounds_activations = True

    def __init__(self, layout: KVLayout, capacity: int, slots: int, vocab_size: int) -> None:
        if capacity < 1 or slots < 1:
            raise BadInput(f"capacity is {capacity} and slots {slots}; both must be at least 1")
        self.layout = layout
        self.capacity = capacity
        self.slots = slots
        self.vocab_size = vocab_size

    @property
    def chooser(self) -> TokenChooser | None:
        return None

    def prefill(self, slot: int, tokens: Sequence[int], start: int, keep: int = 1) -> Logits:
        if tokens and not 1 <= keep <= len(tokens):
            raise BadInput(f"keep is {keep}; expected 1 to {len(tokens)}, the tokens of the chunk")
        logits: Logits = self._step(slot, [tokens], [start], keep)[0]
        return logits

    def prefill_rows(self, first: int, rows: Sequence[Sequence[int]]) -> Logits:
        return self._step(first, rows, [0] * len(rows), 1)[:, 0]

    def decode(self, slots: Sequence[int], tokens: Sequence[int], lengths: Sequence[int]) -> Logits:
        first = _consecutive(slots, tokens, lengths)
        return self._step(first, [[token] for token in tokens], lengths, 1)[:, 0]

    def _check_decode(
        self, slots: Sequence[int], tokens: Sequence[int], lengths: Sequence[int]
    ) -> int:
        """Raise BadInput for a decode that cannot be; returns its first slot."""
        first = _consecutive(slots, tokens, lengths)
        self._check_rows(first, [[token] for token in tokens], lengths)
        return first

    def _step(
        self, first: int, rows: Sequence[Sequence[int]], starts: Sequence[int], keep: int
    ) -> Logits:
        return self._run(first, *self._batch(first, rows, starts), keep)

    def _batch(
        self, first: int, rows: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Checked rows: input_ids [B, S], padded on the right, starts [B] and counts [B]."""
        self._check_rows(first, rows, starts)
        counts = np.array([len(row) for row in rows], np.int64)
        input_ids = np.zeros((len(rows), int(counts.max())), np.int64)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = row
        return input_ids, np.array(starts, np.int64), counts

    def _check_rows(self, first: int, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> None:
        if not rows:
            raise BadInput("no rows; a step runs at least one")
        if first < 0 or first + len(rows) > self.slots:
            raise BadInput(
                f"slots {first} to {first + len(rows) - 1}; expected some of 0 to {self.slots - 1}"
            )
        longest = max(len(row) for row in rows)
        for slot, (row, start) in enumerate(zip(rows, starts, strict=True), first):
            if not row:
                raise BadInput(f"slot {slot}: no tokens; a step appends at least one")
            if start < 0 or start + longest > self.capacity:
                raise BadInput(
                    f"slot {slot}: {start} tokens held and {longest} new ones; the capacity is "
                    f"{self.capacity} tokens"
                )
            for token in row:
                if not 0 <= token < self.vocab_size:
                    raise BadInput(
                        f"slot {slot}: token id {token}; expected 0 to {self.vocab_size - 1}"
                    )

    @abstractmethod
    def _run(
        self,
        first: int,
        input_ids: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        keep: int,
    ) -> Logits:
        """Run checked rows: input_ids [B, S], starts and counts [B]; logits [B, keep, V]."""

    def copy(self, source: int, target: int, tokens: int) -> None:
        for group in range(self.layout.num_groups):
            keys, values = self.read(group, source)
            self.write(group, target, keys[:, :tokens], values[:, :tokens])

    @abstractmethod
    def read(self, group: int, slot: int) -> Cache:
        """As `Executor.read`."""

    @abstractmethod
    def write(self, group: int, slot: int, keys: Array, values: Array) -> None:
        """As `Executor.write`."""


def capacity_of(bundle: Bundle, wanted: int | None) -> int:
    """Tokens of a slot: those wanted, or all of the model's positions; BadInput if it has fewer."""
    limit = bundle.max_positions
    if wanted is not None and wanted > limit:
        raise BadInput(f"capacity is {wanted}; the model has {limit} positions")
    return limit if wanted is None else wanted


def _consecutive(slots: Sequence[int], tokens: Sequence[int], lengths: Sequence[int]) -> int:
    """The first of some slots in a row, as many as there are tokens and lengths."""
    if not len(slots) == len(tokens) == len(lengths):
        raise BadInput(
            f"{len(slots)} slots, {len(tokens)} tokens and {len(lengths)} lengths; expected as "
            "many of each"
        )
    first = slots[0] if slots else 0
    if list(slots) != list(range(first, first + len(slots))):
        raise BadInput(f"slots are {list(slots)}; a step runs on consecutive slots")
    return first
