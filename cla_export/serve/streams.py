"""From the engine's thread to the event loop: outputs find the request that waits for them."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from cla_export.serve.engine import Engine
from cla_export.serve.requests import Failure, Output, Request
from cla_export.serve.scheduler import Outputs

Indexed = tuple[int, Output]  # by the sequence's place in its body


class Group:
    """The sequences of one body, and what they have given and nobody has read yet.

    That is at most what the sequences may give in all: a slow reader makes nobody wait.
    """

    def __init__(self, streams: "Streams", count: int) -> None:
        self.numbers: list[int] = []
        self._streams = streams
        self._open = count
        self._arrived: list[Indexed] = []
        self._reader: asyncio.Future[None] | None = None  # who waits for something to arrive

    def put(self, index: int, output: Output) -> None:
        """Take what a sequence has given."""
        self._arrived.append((index, output))
        self._open -= output.last
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def read(self) -> list[Indexed]:
        """All that has come, at least one output; empty once every sequence has ended."""
        if not self._arrived and self._open:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        found, self._arrived = self._arrived, []
        return found

    async def __aiter__(self) -> AsyncIterator[Indexed]:
        while found := await self.read():
            for indexed in found:
                yield indexed

    def cancel(self) -> None:
        """Let the engine drop what still runs."""
        self._streams.cancel(self)


class Streams:
    """An engine, as the event loop sees it. All methods are the loop's but `deliver`."""

    def __init__(self) -> None:
        self.engine: Engine  # set once, before anything is asked
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[int, tuple[Group, int]] = {}

    def listen(self) -> None:
        """Outputs go to the running loop from now on."""
        self._loop = asyncio.get_running_loop()

    def deliver(self, outputs: Outputs) -> None:
        """The engine's `deliver`: one call into the loop for all outputs of a tick."""
        if outputs and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch, outputs)

    def submit(self, requests: Sequence[Request]) -> Group:
        """Queue a body's sequences. Errors as for `Engine.submit`."""
        group = Group(self, len(requests))
        group.numbers = self.engine.submit(requests)
        for index, number in enumerate(group.numbers):
            self._waiting[number] = (group, index)
        return group

    def cancel(self, group: Group) -> None:
        running = [number for number in group.numbers if number in self._waiting]
        if running:
            self.engine.cancel(running)

    def fail_all(self, failure: Failure) -> None:
        """End what waits for an engine that does not answer; if it ever does, it drops them."""
        numbers = list(self._waiting)
        self.engine.cancel(numbers)
        self._dispatch([(number, Output(failure=failure)) for number in numbers])

    @property
    def open(self) -> int:
        """Sequences that have not ended."""
        return len(self._waiting)

    def _dispatch(self, outputs: Outputs) -> None:
        for number, output in outputs:
            found = self._waiting.get(number)
            if found is None:
                continue  # failed here already
            group, index = found
            group.put(index, output)
            if output.last:
                del self._waiting[number]
