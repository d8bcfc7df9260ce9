"""The engine: one thread that drives a scheduler, a bounded queue in front of it, and its state."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from cla_export.engines.executor import Executor
from cla_export.errors import BadInput, ClaExportError
from cla_export.serve.detokenizer import decoder
from cla_export.serve.requests import DEAD, SHUTDOWN, STALLED, Failure, Request
from cla_export.serve.scheduler import Load, Observer, Outputs, Scheduler, SlotView
from cla_export.serve.sequence import Sequence, fits

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_log = logging.getLogger(__name__)
Deliver = Callable[[Outputs], None]
_LONGEST_WAIT = 60  # seconds that a client is told to wait at most


class State(StrEnum):
    """What the engine does with a new request."""

    ready = "ready"  # takes it
    draining = "draining"  # refuses it; those that run go on
    stopped = "stopped"
    dead = "dead"  # the executor failed for good, or the thread


class QueueFull(ClaExportError):
    """There is no room for a request now. `retry_after` is seconds, estimated."""

    def __init__(self, message: str, reason: str, retry_after: int) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after


class NotReady(ClaExportError):
    """The engine takes no requests any more."""

    def __init__(self, message: str, state: State) -> None:
        super().__init__(message)
        self.state = state


@dataclass(frozen=True, slots=True)
class Limits:
    """What may wait: requests, and tokens that they may come to. And how long a step may take."""

    queued_requests: int = 256
    queued_tokens: int = 262_144
    step_seconds: float = 60.0  # after which the engine is taken for stalled


class Engine:
    """Runs requests on an executor, in a thread of its own.

    Args:
        executor: owned from now on.
        deliver: called in the engine's thread with the outputs of a tick. It must not block.
        tokenizer: the model's; None: outputs have no text.
        ends: the model's end tokens.
        chunk: as of `Scheduler`.
        prefill_seconds: as of `Scheduler`.
        limits: of the queue.
        observer: told of steps and ends, in the engine's thread.
        clock: seconds; only ever forward.
    """

    def __init__(
        self,
        executor: Executor,
        deliver: Deliver,
        *,
        tokenizer: "Tokenizer | None" = None,
        ends: frozenset[int] = frozenset(),
        chunk: int | None = None,
        prefill_seconds: float | None = None,
        limits: Limits | None = None,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if chunk is not None and chunk < 1:
            raise BadInput(f"chunk is {chunk}; expected at least one token")
        self.executor = executor
        self.limits = limits or Limits()
        self.clock = clock
        self.deliver = deliver
        self._decode = {
            skip: None if tokenizer is None else decoder(tokenizer, skip_special_tokens=skip)
            for skip in (False, True)
        }
        self._ends = ends
        self._scheduler = Scheduler(
            executor, clock, chunk=chunk, prefill_seconds=prefill_seconds, observer=observer
        )
        self._changed = threading.Condition()
        self._state = State.ready  # this and the next five are the lock's
        self._incoming: deque[Sequence] = deque()
        self._cancelled: set[int] = set()
        self._failure: Failure | None = None  # what ends all that run
        self._died = ""  # why the thread ended before it was told to
        self._next = 0
        self._step_began: float | None = None
        self._queued_tokens = 0
        self._tick_seconds = 0.0  # smoothed, while rows decode; 0: nothing measured yet
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._idle = threading.Event()
        self._idle.set()

    def start(self) -> None:
        self._thread.start()

    @property
    def state(self) -> State:
        return self._state

    @property
    def dead(self) -> str:
        """Why the executor was given up, or the thread has ended; empty while neither is so."""
        return self._scheduler.dead or self._died

    @property
    def load(self) -> Load:
        """How full it is, as of the last tick."""
        load = self._scheduler.load
        waiting = load.waiting + len(self._incoming)
        return Load(waiting, load.prefilling, load.decoding, load.slots, load.tokens)

    @property
    def generated(self) -> int:
        """Tokens generated since the start."""
        return self._scheduler.generated

    def slots(self) -> list[SlotView]:
        """What each slot holds."""
        return self._scheduler.view()

    @property
    def stalled(self) -> bool:
        """Whether the step that runs takes longer than any should."""
        began = self._step_began
        return began is not None and self.clock() - began > self.limits.step_seconds

    def check(self, request: Request) -> None:
        """Raise BadInput for a request that no empty server of this kind could run."""
        reason = fits(request, self.executor.capacity, self.executor.vocab_size)
        if reason:
            raise BadInput(reason)

    def submit(self, requests: Many[Request]) -> list[int]:
        """Queue requests, all or none; their numbers, by which outputs are delivered.

        Raises:
            BadInput: one cannot be run here.
            QueueFull: they do not fit behind those that wait.
            NotReady: the engine is draining, stopped, dead or stalled.
        """
        for request in requests:
            self.check(request)
        tokens = sum(request.total for request in requests)
        with self._changed:
            self._check_room(len(requests), tokens)
            now, numbers = self.clock(), []
            for request in requests:
                decode = self._decode[request.skip_special_tokens]
                sequence = Sequence(self._next, request, self._ends, decode, now)
                self._incoming.append(sequence)
                numbers.append(self._next)
                self._next += 1
            self._queued_tokens += tokens
            self._idle.clear()
            self._changed.notify()
        return numbers

    def check_room(self) -> None:
        """Raise QueueFull or NotReady where not even the smallest request would be taken."""
        with self._changed:
            self._check_room(1, 1)

    def cancel(self, numbers: Many[int]) -> None:
        """Let go of sequences, before the next step; those that ended already are no error."""
        with self._changed:
            self._cancelled.update(numbers)
            self._changed.notify()

    def drain(self) -> None:
        """Refuse new requests from now on."""
        with self._changed:
            if self._state == State.ready:
                self._state = State.draining
                self._changed.notify()

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return self._idle.is_set()

    def stop(self, seconds: float = 5.0) -> None:
        """End all that run with an error, and the thread; a step that hangs is left behind."""
        with self._changed:
            self._failure = Failure(SHUTDOWN, "the server is shutting down")
            self._state = State.stopped
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _what(self) -> str:
        if self._state == State.dead:
            return f"dead: {self.dead}"
        return "stalled: its step does not end" if self.stalled else self._state.value

    def _check_room(self, requests: int, tokens: int) -> None:
        """Raise NotReady or QueueFull; an idle server takes whatever fits its slots."""
        if self._state != State.ready or self.stalled:
            raise NotReady(f"the engine is {self._what()}", self._state)
        waiting = len(self._incoming) + len(self._scheduler.waiting)
        if waiting + requests > self.limits.queued_requests:
            raise QueueFull(
                f"{waiting} requests wait, and at most {self.limits.queued_requests} may",
                "requests",
                self._retry_after(),
            )
        if waiting and self._queued_tokens + tokens > self.limits.queued_tokens:
            raise QueueFull(
                f"requests of {self._queued_tokens} tokens wait, and at most "
                f"{self.limits.queued_tokens} may",
                "tokens",
                self._retry_after(),
            )

    def _retry_after(self) -> int:
        """Seconds until a slot's share of the queue is done, at a token a tick."""
        wanted = self._queued_tokens * self._tick_seconds / self.executor.slots
        return max(1, min(_LONGEST_WAIT, math.ceil(wanted)))

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # even an exit that a library asks for ends this thread
            _log.exception("the engine's thread failed")
            with self._changed:
                self._died = f"its thread ended: {error!r}"
                self._state = State.dead

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not self._has_work():
                    self._idle.set()
                    if self._state == State.stopped:
                        return
                    self._changed.wait()
                cancelled, failure = frozenset(self._cancelled), self._failure
                self._cancelled.clear()
                self._failure = None
                self._scheduler.waiting.extend(self._incoming)
                self._incoming.clear()
            if failure is not None:
                self.deliver(self._scheduler.fail_all(failure))
                continue
            self._tick(cancelled)

    def _has_work(self) -> bool:
        return bool(self._incoming or self._scheduler.busy or self._failure)

    def _tick(self, cancelled: frozenset[int]) -> None:
        self._step_began = began = self.clock()
        for outputs in self._scheduler.tick(cancelled):
            self._note()
            self._tell(outputs)
        self._step_began = None
        if self._scheduler.active:
            self._tick_seconds += 0.1 * (self.clock() - began - self._tick_seconds)
        self._note()

    def _note(self) -> None:
        """Take over what the scheduler has come to, before anybody hears of it."""
        with self._changed:
            self._queued_tokens = sum(
                sequence.request.total for sequence in (*self._incoming, *self._scheduler.waiting)
            )
            if self._scheduler.dead and self._state != State.stopped:
                self._state = State.dead
                message = f"the engine is dead: {self._scheduler.dead}"
                self._failure = Failure(DEAD, message) if self._incoming else None

    def _tell(self, outputs: Outputs) -> None:
        try:
            self.deliver(outputs)
        except Exception:  # whoever listens is gone; the others are not
            _log.exception("outputs could not be delivered")


STALLED_FAILURE = Failure(STALLED, "the engine is stalled: its step does not end")
