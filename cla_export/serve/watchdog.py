"""Notices an engine whose step does not end, and tells those that wait for it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cla_export.serve.engine import STALLED_FAILURE
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
        if streams.open and streams.engine.stalled:
            streams.fail_all(STALLED_FAILURE)
