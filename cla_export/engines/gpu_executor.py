"""What executors on a GPU share: logits stay there, and so does the choice of tokens by them."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cla_export.engines.cuda_memory import Memory
from cla_export.engines.device_chooser import RowChooser
from cla_export.engines.device_pools import DevicePools
from cla_export.engines.executor import Array, Cache, Logits, PooledExecutor, TokenChooser
from cla_export.engines.prompt_calls import PromptCall, Take
from cla_export.sampling import Choice

NewChooser = Callable[[str, int, int], RowChooser]  # of logits' dtype, vocabulary, rows at most


class Answers:
    """Logits [rows, V] of one kind of call on a GPU, and what chooses tokens by them.

    `chooser` is None for logits of 32 bits: no kernel reads them.
    """

    def __init__(
        self, memory: Memory, rows: int, vocab: int, dtype: np.dtype[Any], new_chooser: NewChooser
    ) -> None:
        self._memory, self._vocab, self._dtype = memory, vocab, dtype
        self.row_bytes = vocab * dtype.itemsize
        self.bytes = rows * self.row_bytes
        self.address = memory.allocate(self.bytes)
        self.chooser = new_chooser(dtype.name, vocab, rows) if dtype.itemsize == 2 else None

    def row(self, index: int) -> int:
        """Where a row lies."""
        return self.address + index * self.row_bytes

    def read(self, first: int, rows: int) -> Logits:
        """Rows from `first` on, as float32 [rows, V]."""
        logits = np.empty((rows, self._vocab), self._dtype)
        self._memory.download(self.row(first), logits)
        return logits.astype(np.float32)


class GpuExecutor(PooledExecutor):
    """Arranges decode steps and prompts around a GPU's memory; a runtime queues them.

    What a decode step leaves is not where prompts leave theirs: one may be begun, prompts read, and
    then the step ended.
    """

    def _allocate(
        self,
        memory: Memory,
        caches: Mapping[str, Any],
        logits: Any,  # noqa: ANN401
        new_chooser: NewChooser,
    ) -> None:
        """Take memory for pools and answers; dtypes are of `caches`, such as `0.key`, and logits.

        A runtime calls it once it has loaded the model.
        """
        self._memory = memory
        self._logits_dtype = np.dtype(logits)
        self.pools = DevicePools(memory, self.layout, self.capacity, self.slots, caches)
        self._stepped, self._prompted = (
            Answers(memory, self.slots, self.vocab_size, self._logits_dtype, new_chooser)
            for _ in range(2)
        )
        self._given = self._stepped  # by which tokens were given last

    @property
    def device_bytes(self) -> dict[str, int]:
        """Bytes of GPU memory that this executor holds, by what they are for."""
        return {"caches": self.pools.bytes, "logits": self._stepped.bytes + self._prompted.bytes}

    def read(self, group: int, slot: int) -> Cache:
        return self.pools.read(group, slot)

    def write(self, group: int, slot: int, keys: Array, values: Array) -> None:
        self.pools.write(group, slot, keys, values)

    def copy(self, source: int, target: int, _tokens: int) -> None:
        self.pools.copy(source, target)

    def decode(self, slots: Sequence[int], tokens: Sequence[int], lengths: Sequence[int]) -> Logits:
        self._queue_step(self._check_decode(slots, tokens, lengths), tokens, lengths)
        return self._stepped.read(0, len(slots))

    @property
    def chooser(self) -> TokenChooser | None:
        return None if self._stepped.chooser is None else self

    def begin_decode(
        self,
        slots: Sequence[int],
        tokens: Sequence[int],
        lengths: Sequence[int],
        choices: Iterable[Choice],
    ) -> None:
        """As `TokenChooser.begin_decode`. Errors as for `decode`."""
        chooser = self._stepped.chooser
        assert chooser is not None
        self._queue_wider_step(self._check_decode(slots, tokens, lengths), tokens, lengths)
        chooser.prepare(choices)  # while the step runs
        chooser.choose(self._stepped.address, len(slots))

    def end_decode(self) -> list[int | None]:
        """As `TokenChooser.end_decode`."""
        return self._tokens_by(self._stepped)

    def prefill_and_choose(
        self,
        first: int,
        rows: Sequence[Sequence[int]],
        starts: Sequence[int],
        choices: Iterable[Choice],
    ) -> list[int | None]:
        """As `TokenChooser.prefill_and_choose`. Errors as for `prefill`."""
        chooser = self._prompted.chooser
        assert chooser is not None
        for source, take in self._read_prompts(first, *self._batch(first, rows, starts), 1):
            self._memory.copy(source, self._prompted.row(take.row), self._prompted.row_bytes)
        chooser.prepare(choices)  # while they are read
        chooser.choose(self._prompted.address, len(rows))
        return self._tokens_by(self._prompted)

    def logits_of(self, row: int) -> Logits:
        """As `TokenChooser.logits_of`."""
        logits: Logits = self._given.read(row, 1)[0]
        return logits

    def _tokens_by(self, answers: Answers) -> list[int | None]:
        assert answers.chooser is not None
        self._given = answers
        return answers.chooser.tokens()

    def _run(
        self,
        first: int,
        input_ids: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        keep: int,
    ) -> Logits:
        logits = np.empty((len(input_ids), keep, self.vocab_size), self._logits_dtype)
        for source, take in self._read_prompts(first, input_ids, starts, counts, keep):
            self._memory.download(source, logits[take.row, take.to : take.to + take.length])
        return logits.astype(np.float32)

    def _read_prompts(
        self,
        first: int,
        input_ids: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        keep: int,
    ) -> Iterator[tuple[int, Take]]:
        """Queue the calls of `_run`; where logits that are kept lie, until the next is asked for.

        What is behind a row's tokens in its slot is overwritten before anything reads it.
        """
        for call in self._plan(counts.tolist(), keep):
            rows = slice(call.first, call.last)
            ids = input_ids[rows, call.at : call.at + call.length]
            size = self._prompted.row_bytes
            logits = self._memory.allocate(len(ids) * call.kept * size)
            try:
                held = starts[rows] + call.at
                self._queue_prompt(first + call.first, ids, held, call.kept, logits)
                for take in call.takes:
                    yield logits + take.source * size, take
            finally:
                self._memory.free(logits)

    @abstractmethod
    def _plan(self, counts: Sequence[int], keep: int) -> Iterable[PromptCall]:
        """In which calls prompts of so many tokens are read, as `plan_prompts` says."""

    @abstractmethod
    def _queue_prompt(
        self,
        first: int,
        input_ids: NDArray[np.int64],
        starts: NDArray[np.int64],
        kept: int,
        logits: int,
    ) -> None:
        """Queue a call: input_ids [B, S] and starts [B]; logits [B, kept, V] go to an address."""

    @abstractmethod
    def _queue_step(self, first: int, tokens: Sequence[int], lengths: Sequence[int]) -> None:
        """Queue a decode step, whose logits go to `_stepped`."""

    def _queue_wider_step(self, first: int, tokens: Sequence[int], lengths: Sequence[int]) -> None:
        """The same; there may be more rows, which write nothing."""
        self._queue_step(first, tokens, lengths)
