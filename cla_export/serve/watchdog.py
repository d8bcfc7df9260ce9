"""Notices an engine that answers nobody any more, and tells those that wait for it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cla_export.serve.engine import STALLED_FAILURE, State
from cla_export.serve.requests import DEAD, Failure
from cla_export.serve.streams import Streams

_LOOK_SECONDS = 0.5


@asynccontextmanager
async def keep_watch(streams: Streams) -> AsyncIterator[None]:
    """Watch an engine meanwhile."""
    watching = asyncio.create_task(_watch(streams))
    try:
        yield
    finally:
        watching.cancel()


async def _watch(streams: Streams) -> None:
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        tell(streams)


def tell(streams: Streams) -> None:
    """End what waits for an engine whose step does not end, or that is dead."""
    engine = streams.engine
    if streams.open and engine.state == State.dead:
        streams.fail_all(Failure(DEAD, f"the engine is dead: {engine.dead}"))
    elif streams.open and engine.stalled:
        streams.fail_all(STALLED_FAILURE)
