"""Server-sent events over ASGI: written as they come, and noticed when nobody reads them."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from starlette.responses import Response

from cla_export.serve.gate import Receive, Scope, Send

PING_SECONDS = 15.0  # of silence, after which a comment keeps proxies from closing
_WRITE_SECONDS = 60.0  # that a client may take to read what is buffered
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


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

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        watching = asyncio.create_task(watch(receive, self._left))
        pinging: asyncio.Task[None] | None = None
        writing = asyncio.Lock()

        async def write(piece: bytes) -> None:
            async with writing, asyncio.timeout(_WRITE_SECONDS):
                await send({"type": "http.response.body", "body": piece, "more_body": True})

        async def ping() -> None:
            with suppress(OSError, TimeoutError):
                while True:
                    await asyncio.sleep(PING_SECONDS)
                    await write(b": ping\n\n")

        try:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            pinging = asyncio.create_task(ping())
            async for piece in self._pieces:
                await write(piece)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (OSError, TimeoutError):
            pass  # gone: what still runs is dropped below
        finally:
            watching.cancel()
            if pinging is not None:
                pinging.cancel()
            self._left()


async def watch(receive: Receive, left: Callable[[], None]) -> None:
    """Call `left` once the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
    left()
