"""What stands at the port: it says that the model is loading, until there is somebody to ask."""

import json

from cla_export.serve.errors import SOON, ApiError
from cla_export.serve.gate import App, Receive, Scope, Send, send_error


class Door:
    """An ASGI application whose `app`, once it is there, answers everything.

    Before that, /health is 200, since a process that loads is worth keeping; /ready and all else
    are 503 with `Retry-After`.
    """

    def __init__(self) -> None:
        self.app: App | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is not None:
            await self.app(scope, receive, send)
        elif scope["path"] == "/health":
            content = json.dumps({"status": "loading"}).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(content)).encode()),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": content})
        else:
            message = "the model is loading; /ready is 200 once requests are taken"
            error = ApiError(503, message, code="loading", headers={"retry-after": SOON})
            await send_error(error, send)
