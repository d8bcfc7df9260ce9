"""HTTP/1.1 on one connection, by httptools: a parser in C, and events that cost less to send."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

LONGEST_HEAD = 65_536  # bytes of a request that are not of its body; as h11, uvicorn's other choice


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's, with a limit: a client that sends headers for ever would fill the memory."""

    _beside = 0  # bytes since the last that were of a body, or ended a request

    def data_received(self, data: bytes) -> None:
        self._beside += len(data)
        super().data_received(data)
        if self._beside > LONGEST_HEAD and not self.transport.is_closing():
            self.send_400_response(f"The headers are longer than {LONGEST_HEAD} bytes.")

    def on_body(self, body: bytes) -> None:
        self._beside = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._beside = 0
        super().on_message_complete()
