"""What every request passes before anything looks at it: its key, size and id, and the queue."""

import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from cla_export.errors import BadInput
from cla_export.serve.engine import Engine
from cla_export.serve.errors import ApiError, check_room

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = frozenset({"/health", "/ready", "/", "/page.js", "/page.css"})  # without a key
_GENERATING = {("POST", "/v1/completions"), ("POST", "/v1/chat/completions")}
_ID_LENGTH = 128  # characters of a client's own request id


class Gate:
    """An ASGI application around another.

    Args:
        app: what is behind it.
        keys: API keys that are taken; none: everybody is.
        most_bytes: of a body.
        refused: told of the status and code of what is refused here.
        engine: whose queue is looked at before a body is: a refusal must be cheap in a crowd.
    """

    def __init__(
        self,
        app: App,
        keys: Sequence[str],
        most_bytes: int,
        refused: Callable[[int, str | None], None],
        engine: Engine | None = None,
    ) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._most = most_bytes
        self._refused = refused
        self._engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # the same headers; what sends leaves the body out
        headers = {name.lower(): value for name, value in scope["headers"]}
        named = headers.get(b"x-request-id", b"")[:_ID_LENGTH] or uuid4().hex.encode()

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", named)]
            await send(message)

        try:
            scope.setdefault("state", {})["tenant"] = self._tenant(scope["path"], headers)
            body = await self._read(headers, receive)
            if self._engine is not None and (scope["method"], scope["path"]) in _GENERATING:
                check_room(self._engine)
        except ApiError as error:
            self._refused(error.status, error.body["error"]["code"])
            await send_error(error, send_named)
            return
        except ConnectionAbortedError:
            return  # the client left while it sent
        await self._app(scope, _replay(body, receive), send_named)

    def _tenant(self, path: str, headers: dict[bytes, bytes]) -> str:
        """Who asks: a name for the key; ApiError if there must be one and is not."""
        if not self._keys:
            return ""
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        given = given.strip() if scheme.lower() == b"bearer" else b""
        known = [hmac.compare_digest(given, key) for key in self._keys]  # all, always
        if any(known):
            return hashlib.sha256(given).hexdigest()[:16]
        if path in OPEN:
            return ""
        raise ApiError(
            401,
            "the API key is missing or not known; send it as `Authorization: Bearer KEY`",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body, counted as it comes; ApiError once it is too long."""
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._most:
            raise self._too_long()
        pieces, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionAbortedError
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > self._most:
                raise self._too_long()
            more = message.get("more_body", False)
        return b"".join(pieces)

    def _too_long(self) -> ApiError:
        message = f"the body is longer than the {self._most:,} bytes that this server takes"
        return ApiError(413, message, code="body_too_large", headers={"connection": "close"})


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once, and then what comes after it."""
    given = False

    async def next_message() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message


def read_keys(file: Path) -> tuple[str, ...]:
    """API keys, one a line; empty lines and those that begin with # are none. BadInput if none."""
    if not file.is_file():
        raise BadInput(f"{file}: no such file; expected API keys, one a line")
    lines = map(str.strip, file.read_text(encoding="utf-8").splitlines())
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise BadInput(f"{file}: there is no API key in it; expected one a line")
    return keys


async def send_error(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **error.headers,
    }
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
