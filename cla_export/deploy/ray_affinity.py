"""Which requests belong together: a key of how a prompt begins, put on them before Ray routes.

Ray Serve's HTTP proxy routes a request by its headers alone. This ASGI middleware runs in the
proxy, reads the body of a completion, and adds the header by which Ray knows sessions.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

from cla_export.serve.gate import App, Message, Receive, Scope, Send

HEADER = os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY", "x-session-id").lower().encode()
CALLBACK = "cla_export.deploy.ray_affinity.middlewares"  # for RAY_SERVE_HTTP_PROXY_CALLBACK_...
_TOKENS = 64  # of token ids: a prompt's first chunk, the least that a cache is reused for
_CHARACTERS = 4 * _TOKENS  # of text, about as many tokens
_MOST_BODY = 4 * 2**20  # bytes; a longer body goes on without a key


def prefix_key(body: bytes, authorization: bytes = b"") -> str:
    """A key that requests have in common whose prompts begin alike; empty where there is none.

    Args:
        body: JSON of a completion or chat.
        authorization: the header; caches are not shared between API keys, so keys differ too.
    """
    try:
        given = json.loads(body)
        if not isinstance(given, dict):
            return ""
        begin = _beginning(given.get("messages") or given.get("prompt"))
    except (ValueError, RecursionError):  # the replica says what is wrong with it
        return ""
    return hashlib.sha256(authorization + b"\0" + begin.encode()).hexdigest()[:32] if begin else ""


def _beginning(prompt: Any) -> str:  # noqa: ANN401
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        return str(prompt[:_TOKENS])
    text = ""
    for piece in _texts(prompt):
        text += piece
        if len(text) >= _CHARACTERS:
            break
    return ascii(text[:_CHARACTERS]) if text else ""


def _texts(prompt: Any) -> Iterator[str]:  # noqa: ANN401
    """The texts of a prompt, of several, or of messages, in their order."""
    if isinstance(prompt, str):
        yield prompt
    elif isinstance(prompt, list):
        for item in prompt:
            yield from _texts(item)
    elif isinstance(prompt, dict):
        for name in ("role", "text", "content"):
            yield from _texts(prompt.get(name))


class Affinity:
    """An ASGI application around Ray's proxy: completions get the header, if they lack it."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].endswith("/completions"):
            headers = dict(scope["headers"])
            if HEADER not in headers:
                messages = await _read(receive)
                body = b"".join(message.get("body", b"") for message in messages)
                key = prefix_key(body, headers.get(b"authorization", b""))
                if key:
                    scope["headers"] = [*scope["headers"], (HEADER, key.encode())]
                receive = _again(messages, receive)
        await self._app(scope, receive, send)


async def _read(receive: Receive) -> list[Message]:
    """Messages up to the body's end, or up to too much of it."""
    messages, size = [await receive()], 0
    while messages[-1].get("more_body", False):
        size += len(messages[-1].get("body", b""))
        if size > _MOST_BODY:
            break
        messages.append(await receive())
    return messages


def _again(messages: list[Message], receive: Receive) -> Receive:
    """A `receive` that gives these messages, and then what comes after them."""
    coming = iter(messages)

    async def next_message() -> Message:
        for message in coming:
            return message
        return await receive()

    return next_message


def middlewares() -> list[Any]:
    """For Ray's proxy, which calls what RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names."""
    from starlette.middleware import Middleware

    return [Middleware(Affinity)]
