"""Continuous batching: sequences join and leave between the steps of one batch.

Single-threaded, and knows nothing of queues' limits, threads or HTTP: the engine drives it.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from cla_export.engines.executor import Executor, Logits
from cla_export.sampling import choose
from cla_export.serve.ahead import Ahead, Landed
from cla_export.serve.prefill_budget import PrefillBudget
from cla_export.serve.requests import (
    BAD_LOGITS,
    CANCELLED,
    DEAD,
    STEP_FAILED,
    TIMEOUT,
    Failure,
    Output,
    Request,
)
from cla_export.serve.sequence import Sequence
from cla_export.serve.slots import Slots

Tokens = tuple[int, ...]
Outputs = list[tuple[int, Output]]  # by the sequence's number
Found = TypeVar("Found")

_FATAL = 3  # failed steps after which the executor is given up, if none of their phase succeeds
_log = logging.getLogger(__name__)


class Observer(Protocol):
    """Who is told of steps and ends, for metrics."""

    def stepped(self, phase: str, seconds: float, rows: int, tokens: int) -> None:
        """A step of phase `prefill` or `decode` ran: rows that it had, tokens that it took."""

    def admitted(self, sequence: Sequence) -> None:
        """A sequence has a slot."""

    def ended(self, sequence: Sequence, reason: str) -> None:
        """A sequence has left, for a finish reason or a failure's kind."""


@dataclass(frozen=True, slots=True)
class Load:
    """How full it is."""

    waiting: int
    prefilling: int
    decoding: int
    slots: int
    tokens: int  # held by sequences that run


@dataclass(frozen=True, slots=True)
class SlotView:
    """What a slot holds: `state` is decoding, prefilling, kept (for reuse) or free."""

    state: str
    tokens: int


class Scheduler:
    """Runs sequences on an executor's slots.

    Args:
        executor: owned from now on; what it holds is overwritten.
        clock: seconds; deadlines are by it.
        chunk: prompt tokens of one call, between two steps of the others, who wait for it; None:
            what is right for the executor.
        prefill_seconds: that prompts may take of each round in which others decode, on average;
            None: one call a round.
        observer: who is told.
    """

    def __init__(
        self,
        executor: Executor,
        clock: Callable[[], float],
        *,
        chunk: int | None = None,
        prefill_seconds: float | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.executor = executor
        self.chunk = chunk = executor.chunk if chunk is None else chunk
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []  # one, or several that one call reads
        self.active: list[Sequence] = []  # active[i] is in slot i
        self.generated = 0  # tokens, ever
        self.dead = ""  # why the executor was given up
        self._slots = Slots(executor, chunk)
        self._budget = PrefillBudget(prefill_seconds)
        self._clock = clock
        self._observer = observer
        self._failures: Counter[str] = Counter()  # by phase, since a step of it last succeeded
        self._outputs: Outputs = []
        chooser = executor.chooser
        self._ahead = None if chooser is None else Ahead(chooser, clock)

    @property
    def load(self) -> Load:
        running = [*self.active, *self.prefilling]
        return Load(
            waiting=len(self.waiting),
            prefilling=len(running) - len(self.active),
            decoding=len(self.active),
            slots=self.executor.slots,
            tokens=sum(sequence.length for sequence in running),
        )

    def view(self) -> list[SlotView]:
        """Every slot, as of now; another thread may ask, and sees some moment of a tick."""
        held = [len(tokens) for tokens in self._slots.held]
        views = [SlotView("kept" if tokens else "free", tokens) for tokens in held]
        for sequence in list(self.active):
            views[sequence.slot] = SlotView("decoding", sequence.length)
        for reading in list(self.prefilling):
            if reading.slot >= 0:
                views[reading.slot] = SlotView("prefilling", reading.length)
        return views

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.prefilling or self.active)

    def tick(self, cancelled: frozenset[int] = frozenset()) -> Iterator[Outputs]:
        """One round: who leaves, one token for all, who joins, and a part of their prompts.

        Outputs are yielded as they come; the round is done when there are no more.
        """
        try:
            self._drop(cancelled)
            self._decode()
            if self._outputs:  # nobody waits for the others' prompts
                yield self._told()
            self._read_prompts()
        except Exception as error:  # not of a step: ours, or a copy between slots
            _log.exception("a tick failed")
            failure = Failure(STEP_FAILED, f"the engine failed: {error!r}")
            self._outputs += self.fail_all(failure, waiting=False)
            self._count_failure("decode", error)
        if self._outputs:
            yield self._told()

    def _told(self) -> Outputs:
        outputs, self._outputs = self._outputs, []
        return outputs

    def _drop(self, cancelled: frozenset[int]) -> None:
        """Let go of sequences that nobody waits for, or that took too long."""
        now = self._clock()
        running = [*self.waiting, *self.prefilling, *self.active]
        for sequence in reversed(running):
            deadline = sequence.request.deadline
            if sequence.number in cancelled:
                self._fail(sequence, Failure(CANCELLED, "the request was cancelled"))
            elif deadline is not None and now >= deadline:
                where = f"{sequence.made} tokens" if sequence.made else "before its first token"
                self._fail(sequence, Failure(TIMEOUT, f"the request's time was up ({where})"))

    def _read_prompts(self) -> None:
        """Read as much of prompts as the round has time for; one call if nobody decodes."""
        self._budget.begin()
        decoding = bool(self.active)
        while self._budget.left or not decoding:
            self._admit()
            if not self.prefilling:
                return
            began = self._clock()
            self._prefill()
            self._budget.spend(self._clock() - began)
            if not decoding:
                return

    def _admit(self) -> None:
        """Give free slots to who waits longest: to one, or to several that one call can read.

        That is at most a chunk, padding included, and only whole prompts shorter than a chunk: what
        they leave is never reused, so a chunk that is was computed by itself (see `slots`).
        """
        if self.prefilling:
            return
        longest = 0
        while self.waiting and len(self.active) + len(self.prefilling) < self.executor.slots:
            request = self.waiting[0].request
            longest = max(longest, len(request.prompt) if self._is_short(request) else self.chunk)
            if self.prefilling and longest * (len(self.prefilling) + 1) > self.chunk:
                return
            self._place(self.waiting.popleft())

    def _is_short(self, request: Request) -> bool:
        """Whether a call may read its prompt together with others."""
        return (
            self.executor.reads_rows_at_once
            and len(request.prompt) < self.chunk
            and request.plain_prompt
        )

    def _place(self, sequence: Sequence) -> None:
        """Give a sequence a slot."""
        free = range(len(self.active) + len(self.prefilling), self.executor.slots)
        self.prefilling.append(sequence)  # now: if the copy fails, it is known to be here
        reuse = sequence.request.prompt_logprobs is None
        prompt = sequence.request.prompt if reuse else ()
        sequence.slot, sequence.cached = self._slots.take(prompt, sequence.request.tenant, free)
        sequence.length = sequence.cached
        sequence.admitted = self._clock()
        if self._observer:
            self._observer.admitted(sequence)

    def _prefill(self) -> None:
        """Read one chunk, or several prompts; sequences whose last it was join the others."""
        rows = list(self.prefilling)
        pieces = [s.request.prompt[s.length : s.length + self.chunk] for s in rows]
        if not all(s.ends_plainly(piece) for s, piece in zip(rows, pieces, strict=True)):
            self._read_chunk(rows[0], pieces[0])
            return
        read = partial(self._first_tokens, rows, pieces)
        landed = self._step("prefill", rows, sum(map(len, pieces)), read)
        if landed is None:
            return
        for sequence in rows:
            self._hold(sequence, len(sequence.request.prompt))
            self._join(sequence)
        self._take(landed)

    def _first_tokens(self, rows: list[Sequence], pieces: list[Tokens]) -> dict[Sequence, Landed]:
        """Read the last pieces of prompts, and choose what follows them: where the logits are."""
        if self._ahead is not None:
            return self._ahead.read_prompts(rows, pieces)
        first = rows[0]
        if len(rows) == 1:
            return self._choose(rows, self.executor.prefill(first.slot, pieces[0], first.length))
        return self._choose(rows, self.executor.prefill_rows(first.slot, pieces))

    def _read_chunk(self, sequence: Sequence, piece: Tokens) -> None:
        """Read a part of a prompt, or one of which more is wanted than a token."""
        request, start = sequence.request, sequence.length
        keep = 1 if request.prompt_logprobs is None else len(piece)
        read = partial(self.executor.prefill, sequence.slot, piece, start, keep)
        logits = self._step("prefill", [sequence], len(piece), read)
        if logits is None:
            return
        self._hold(sequence, start + len(piece))
        sequence.read_prompt(start, logits)
        if sequence.prompt_done:
            self._join(sequence)
            if request.max_tokens == 0:
                sequence.end_without_tokens()
                self._settle([sequence])
            else:
                self._take(self._choose([sequence], logits[-1:]))

    def _hold(self, sequence: Sequence, length: int) -> None:
        """Note how much of its prompt a sequence's slot holds."""
        sequence.length = length
        self._slots.computed(sequence.slot, sequence.request.prompt[:length])

    def _decode(self) -> None:
        """One token for every active sequence."""
        if self._ahead is not None:
            self._decode_ahead(self._ahead)
            return
        rows = list(self.active)
        if not rows:
            return
        last, lengths = [s.tokens[-1] for s in rows], [s.length for s in rows]
        logits = self._step(
            "decode",
            rows,
            len(rows),
            lambda: self.executor.decode(range(len(rows)), last, lengths),
        )
        if logits is not None:
            for sequence in rows:
                sequence.length += 1
            self._take(self._choose(rows, logits))

    def _decode_ahead(self, ahead: Ahead) -> None:
        """The tokens of the step begun in the last round; before they are told, the next begins."""
        landed: dict[Sequence, Landed] = {}
        rows = frozenset(self.active).intersection(ahead.rows)  # others have left since
        if rows:
            end = partial(ahead.end, rows)
            landed = self._step("decode", list(rows), len(rows), end, ahead.began) or {}
        failed = None
        if self.active:
            try:
                ahead.begin(self.active, landed)
            except Exception as error:  # as in `_step`; those that have a token are told it first
                failed = error
        self._take(landed)
        if failed is not None:
            self._fail_step("decode", list(self.active), failed)

    def _step(
        self,
        phase: str,
        rows: list[Sequence],
        tokens: int,
        run: Callable[[], Found],
        began: float | None = None,
    ) -> Found | None:
        """Run a step, or its end; None, and its rows have failed, if the executor raises."""
        began = self._clock() if began is None else began
        try:
            found = run()
        except Exception as error:  # whatever a runtime raises, the others go on
            self._fail_step(phase, rows, error)
            return None
        del self._failures[phase]
        if self._observer:
            self._observer.stepped(phase, self._clock() - began, len(rows), tokens)
        return found

    def _fail_step(self, phase: str, rows: list[Sequence], error: Exception) -> None:
        _log.error("a %s step of %d rows failed", phase, len(rows), exc_info=error)
        failure = Failure(STEP_FAILED, f"the {phase} step failed: {error}")
        for sequence in reversed(rows):
            self._fail(sequence, failure)
        self._count_failure(phase, error)

    def _choose(self, rows: list[Sequence], logits: Logits) -> dict[Sequence, Landed]:
        """A token for each row of logits [B, V]."""
        tokens = choose(logits, [sequence.sampler for sequence in rows])
        return dict(zip(rows, map(Landed, tokens, logits), strict=True))

    def _take(self, landed: Mapping[Sequence, Landed]) -> None:
        """Note and tell tokens; let go of who is done."""
        now = self._clock()
        bad = []
        for sequence, (token, logits) in landed.items():
            if token is None:
                bad.append(sequence)
                continue
            sequence.add(token, logits)
            self.generated += 1
            sequence.first_token = sequence.first_token or now
            sequence.last_token = now
        for sequence in reversed(bad):
            what = f"the model's logits after {len(sequence.tokens)} tokens are not numbers"
            self._fail(sequence, Failure(BAD_LOGITS, what))
        self._settle([sequence for sequence in landed if sequence not in bad])

    def _settle(self, rows: list[Sequence]) -> None:
        """Tell what is new; those that are done leave, the last slot's first."""
        for sequence in reversed(rows):
            output = sequence.output()
            if output is not None:
                self._outputs.append((sequence.number, output))
            if sequence.finish is not None:
                self._leave(sequence, sequence.finish.reason)

    def _join(self, sequence: Sequence) -> None:
        """Move a sequence whose prompt was read to the end of the active ones."""
        target = len(self.active)
        self.prefilling.remove(sequence)
        self.active.append(sequence)
        if sequence.slot != target:
            source, sequence.slot = sequence.slot, target
            self._slots.move(source, target, sequence.length, self._free())

    def _leave(self, sequence: Sequence, reason: str) -> None:
        """Take a sequence out; the last active one moves into its place."""
        if self._observer:
            self._observer.ended(sequence, reason)
        if sequence in self.prefilling:
            self.prefilling.remove(sequence)
        elif sequence.slot < 0:
            self.waiting.remove(sequence)
        else:
            hole, last = sequence.slot, self.active.pop()
            if last is not sequence:
                self.active[hole], last.slot = last, hole
                length = last.length
                if self._ahead is not None and last in self._ahead.rows:
                    length += 1  # that step writes one more
                self._slots.move(len(self.active), hole, length, self._free())

    def _free(self) -> list[int]:
        busy = {sequence.slot for sequence in self.prefilling}
        return [s for s in range(len(self.active), self.executor.slots) if s not in busy]

    def _fail(self, sequence: Sequence, failure: Failure) -> None:
        self._outputs.append((sequence.number, sequence.fail(failure)))
        if failure.kind in (BAD_LOGITS, STEP_FAILED) and sequence.slot >= 0:
            self._slots.forget(sequence.slot)
        self._leave(sequence, failure.kind)

    def fail_all(self, failure: Failure, *, waiting: bool = True) -> Outputs:
        """End every sequence, with or without those that wait; what slots hold is given up."""
        running = [*self.active, *self.prefilling]
        self.active, self.prefilling = [], []
        if self._ahead is not None:
            self._ahead.drop()
        if waiting:
            running += self.waiting
            self.waiting.clear()
        for slot in range(self.executor.slots):
            self._slots.forget(slot)
        ended = [(sequence.number, sequence.fail(failure)) for sequence in running]
        if self._observer:
            for sequence in running:
                self._observer.ended(sequence, failure.kind)
        return ended

    def _count_failure(self, phase: str, error: Exception) -> None:
        self._failures[phase] += 1
        if self._failures.total() >= _FATAL:
            self.dead = (
                f"{_FATAL} steps failed and none of their kind has worked since, the last with: "
                f"{error}"
            )
            self._outputs += self.fail_all(Failure(DEAD, self.dead))
