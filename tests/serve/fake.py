"""An executor without a model, whose logits depend on every token that a slot holds.

Its cache is the tokens themselves: a copy that is wrong, or a length, gives other logits.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from cla_export.draw import Scratch
from cla_export.engines.executor import Array, Cache, Logits, PooledExecutor
from cla_export.layout import KVLayout
from cla_export.sampling import Choice, pick_by

VOCAB = 50


def logits_after(tokens: list[int], vocab: int = VOCAB) -> Logits:
    """Normal numbers [V], the same for the same tokens."""
    digest = hashlib.sha256(np.array(tokens, np.int64).tobytes()).digest()
    return np.random.default_rng(list(digest[:16])).standard_normal(vocab).astype(np.float32) * 3


class FakeExecutor(PooledExecutor):
    """`before` is called with the rows' tokens before each step; it may raise."""

    backend = "fake"

    def __init__(self, slots: int = 4, capacity: int = 64, vocab: int = VOCAB) -> None:
        layout = KVLayout.create([0, 0], kv_heads=1, head_dim=1)
        super().__init__(layout, capacity, slots, vocab)
        self.pool = np.full((slots, 1, capacity, 1), -7, np.int64)
        self.calls: list[tuple[int, list[int], list[int]]] = []  # first slot, starts, counts
        self.before: Callable[[list[list[int]]], None] = lambda _rows: None
        self.change: Callable[[list[int], Logits], Logits] = lambda _tokens, logits: logits

    def read(self, group: int, slot: int) -> Cache:
        return self.pool[slot], self.pool[slot]

    def write(self, group: int, slot: int, keys: Array, values: Array) -> None:
        self.pool[slot, :, : keys.shape[1]] = keys

    def _run(
        self,
        first: int,
        input_ids: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        keep: int,
    ) -> Logits:
        self.calls.append((first, starts.tolist(), counts.tolist()))
        rows = []
        for slot, (row, start, count) in enumerate(
            zip(input_ids, starts, counts, strict=True), first
        ):
            self.pool[slot, 0, start : start + count, 0] = row[:count]
            rows.append(self.pool[slot, 0, : start + count, 0].tolist())
        self.before(rows)
        return np.stack(
            [
                np.stack(
                    [
                        self.change(row[:end], logits_after(row[:end], self.vocab_size))
                        for end in range(len(row) - keep + 1, len(row) + 1)
                    ]
                )
                for row in rows
            ]
        )


class FakeDevice(FakeExecutor):
    """One that chooses tokens itself, and gives them when it is asked."""

    def __init__(self, slots: int = 4, capacity: int = 64, vocab: int = VOCAB) -> None:
        super().__init__(slots, capacity, vocab)
        self._step_logits = self._given = np.empty((0, vocab), np.float32)
        self._chosen: list[int | None] | None = None
        self.first_tokens = 0  # that it chose

    @property
    def chooser(self) -> "FakeDevice":
        return self

    def begin_decode(
        self,
        slots: Sequence[int],
        tokens: Sequence[int],
        lengths: Sequence[int],
        choices: Iterable[Choice],
    ) -> None:
        self._chosen = None
        self._step_logits = self.decode(slots, tokens, lengths)
        self._chosen = self._choose(self._step_logits, choices)

    def end_decode(self) -> list[int | None]:
        assert self._chosen is not None, "no step was begun, or its tokens were taken"
        chosen, self._chosen = self._chosen, None
        self._given = self._step_logits
        return chosen

    def prefill_and_choose(
        self,
        first: int,
        rows: Sequence[Sequence[int]],
        starts: Sequence[int],
        choices: Iterable[Choice],
    ) -> list[int | None]:
        self._given = self._step(first, rows, starts, 1)[:, 0]
        self.first_tokens += len(rows)
        return self._choose(self._given, choices)

    def _choose(self, logits: Logits, choices: Iterable[Choice]) -> list[int | None]:
        return [
            pick_by(choice, row, Scratch(self.vocab_size)) if np.isfinite(row.max()) else None
            for choice, row in zip(choices, logits, strict=True)
        ]

    def logits_of(self, row: int) -> Logits:
        return self._given[row]


def expected(prompt: list[int], count: int) -> list[int]:
    """What greedy generation gives."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_after(tokens).argmax()))
    return tokens[len(prompt) :]
