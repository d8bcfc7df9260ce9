"""Who is in which slot, and what a slot holds that a later prompt may reuse.

Active sequences, those that decode, are in slots 0..n-1: a step runs on consecutive slots. Behind
them one slot may be prefilling, or several at once, the others are free, and keep what they hold.

What can be reused is a prompt's first tokens in whole chunks. A chunk begins at a multiple of the
chunk size whatever was reused, so the calls that compute a prompt's cache, and with them its bits,
are the same for every request that has it. Tokens that were decoded are not reused: other kernels
computed theirs.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from cla_export.engines.executor import Executor

Tokens = NDArray[np.int64]
_NOTHING: Tokens = np.empty(0, np.int64)


class Slots:
    """The slots of an executor."""

    def __init__(self, executor: Executor, chunk: int) -> None:
        self._executor = executor
        self._chunk = chunk
        self.held: list[Tokens] = [_NOTHING] * executor.slots
        self._tenant = [""] * executor.slots
        self._used = [0] * executor.slots  # when; 0: never
        self._clock = 0

    def take(self, prompt: Sequence[int], tenant: str, free: Sequence[int]) -> tuple[int, int]:
        """Choose one of the free slots for a prompt; the slot, and how many tokens it has of it.

        1. The slot that holds the most of it;
        2. unless a busy slot holds more, or none anything: the first, which is next to the active
           ones. What that holds is kept in the slot that was used longest ago.
        """
        wanted = np.array(prompt[:-1], np.int64)  # the last token's logits are needed
        found = [self._common(slot, wanted, tenant) for slot in range(len(self.held))]
        source = max(range(len(found)), key=found.__getitem__)
        slot, reused = max(free, key=found.__getitem__), found[source]
        if found[slot] < reused or not reused:  # 2
            slot, oldest = free[0], min(free, key=self._used.__getitem__)
            if oldest != slot:
                self._transfer(slot, oldest, len(self.held[slot]))
            if reused:
                self._executor.copy(source, slot, reused)
        self.held[slot], self._tenant[slot] = wanted[:reused], tenant
        self._touch(slot)
        return slot, reused

    def computed(self, slot: int, prompt: Sequence[int]) -> None:
        """Note the tokens that a prompt's chunks have put into a slot so far."""
        self.held[slot] = np.array(prompt[: self._whole(len(prompt))], np.int64)

    def move(self, source: int, target: int, length: int, free: Iterable[int]) -> None:
        """Bring what a sequence of `length` tokens holds from one slot to another.

        What the target holds is kept in the free slot that was used longest ago, if that was used
        before the target.
        """
        others = (slot for slot in free if slot not in (source, target))
        spare = min(others, key=self._used.__getitem__, default=target)
        if self._used[spare] < self._used[target]:
            self._transfer(target, spare, len(self.held[target]))
        self._transfer(source, target, length)

    def forget(self, slot: int) -> None:
        """Give up what a slot holds."""
        self.held[slot], self._used[slot] = _NOTHING, 0

    def _transfer(self, source: int, target: int, length: int) -> None:
        if length:
            self._executor.copy(source, target, length)
        self.held[target], self._tenant[target] = self.held[source], self._tenant[source]
        self._used[target] = self._used[source]
        self.forget(source)

    def _touch(self, slot: int) -> None:
        self._clock += 1
        self._used[slot] = self._clock

    def _common(self, slot: int, wanted: Tokens, tenant: str) -> int:
        """Tokens that a slot holds of a prompt, in whole chunks."""
        size = min(len(wanted), len(self.held[slot]))
        if self._tenant[slot] != tenant or size < self._chunk:
            return 0
        differ = np.flatnonzero(wanted[:size] != self.held[slot][:size])
        return self._whole(int(differ[0]) if len(differ) else size)

    def _whole(self, tokens: int) -> int:
        return tokens // self._chunk * self._chunk
