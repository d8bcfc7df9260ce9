"""Server-sent events over ASGI: written as they come, and noticed when nobody reads them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response

from cla_export.serve.gate import Message, Receive, Scope, Send

PING_SECONDS = 15.0  # of silence, after which a comment keeps proxies from closing
WRITE_SECONDS = 60.0  # that a client may take to read what is buffered, before one looks
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def event(content: dict[str, Any]) -> bytes:
    return b"data: " + to_json(content) + b"\n\n"


DONE = b"data: [DONE]\n\n"
_PING = b": ping\n\n"


class EventStream(Response):
    """Sends pieces of bytes as they come.

    Args:
        pieces: what is sent.
        left: called when the client has closed its connection, or does not read any more.
    """

    def __init__(self, pieces: AsyncIterator[bytes], left: Callable[[], None]) -> None:
        super().__init__()
        self._pieces = pieces
        self._left = left
        self._writing_since: float | None = None  # by the event loop's clock

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        watching = asyncio.create_task(watch(receive, self._left))
        writing = asyncio.create_task(self._write(send))
        try:
            await self._tend(writing, send)
        except (OSError, TimeoutError):
            pass  # gone: what still runs is dropped below
        finally:
            watching.cancel()
            writing.cancel()
            self._left()

    async def _write(self, send: Send) -> None:
        """Send everything. A task of its own: a piece that comes wakes all who wait for it."""
        clock = asyncio.get_running_loop().time

        async def write(message: Message) -> None:
            self._writing_since = clock()
            await send(message)
            self._writing_since = None

        await write({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        async for piece in self._pieces:
            await write({"type": "http.response.body", "body": piece, "more_body": True})
        await write({"type": "http.response.body", "body": b"", "more_body": False})

    async def _tend(self, writing: asyncio.Task[None], send: Send) -> None:
        """Wait for the end, and break silences; TimeoutError if the client does not read.

        It looks now and then: a timer for each write would cost as much as the write does.
        """
        clock = asyncio.get_running_loop().time
        while not (await asyncio.wait({writing}, timeout=PING_SECONDS))[0]:
            since = self._writing_since
            if since is None:
                async with asyncio.timeout(WRITE_SECONDS):
                    await send({"type": "http.response.body", "body": _PING, "more_body": True})
            elif clock() - since > WRITE_SECONDS:
                raise TimeoutError
        await writing


async def watch(receive: Receive, left: Callable[[], None]) -> None:
    """Call `left` once the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
    left()
