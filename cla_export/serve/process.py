"""The server's process: it listens, loads, serves, drains, and ends with a code."""

import asyncio
import logging
import math
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cla_export.bundle import Bundle
from cla_export.errors import BadInput
from cla_export.serve.door import Door
from cla_export.serve.engine import State
from cla_export.serve.requests import SHUTDOWN, Failure
from cla_export.serve.server import Opened, Options, create_server, open_model

if TYPE_CHECKING:
    import uvicorn

    from cla_export.serve.streams import Streams

DEAD_CODE = 70  # an internal software error, by sysexits.h: whoever supervises starts it again
_INTERRUPTED = 130
_LOOK_SECONDS = 0.05
_IDLE_SECONDS = 75  # of a connection: more than the minute after which load balancers close theirs
_FAREWELL_SECONDS = 2.0  # that the clients of a dead engine have to be told


@dataclass(frozen=True, slots=True)
class Told:
    """Who is told how far the start has come. Both are called in the event loop."""

    listening: Callable[[str], None]  # with the address, which answers that the model is loading
    serving: Callable[[str, Opened], None]  # once requests are taken


def serve(folder: Bundle | Path | str, options: Options, told: Told) -> int:
    """Load a bundle and serve it until told to stop; the process's exit code.

    SIGTERM or SIGINT drains: new requests are refused, those that run may finish for
    `shutdown_seconds`, then end with an error; the code is 0. A second signal stops at once, with
    130; while the model loads the first one does, with 0. Where the engine dies, running requests
    end with an error, and the process with 70.

    Raises what `open_model` does, and BadInput for an address that cannot be listened on.
    """
    listening = listen(options.host, options.port)
    _allow_open_files()
    scheme = "http" if options.certificate is None else "https"
    address = f"{scheme}://{options.host}:{listening.getsockname()[1]}"

    async def run() -> int:
        return await _Process(options, told).run(folder, listening, address)

    return asyncio.run(run())


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; BadInput where it cannot.

    Its connections send each event when it is written. asyncio sees to that by itself, but not for
    a socket made this way, whose protocol is 0 in place of TCP's number: events then waited until
    the client had acknowledged the one before, which it does after 40 ms.
    """
    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        raise BadInput(
            f"--host {host} --port {port}: cannot listen there ({error.strerror})"
        ) from error
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted ones inherit it
    return listening


def _allow_open_files() -> None:
    """As many as the system lets us: each client is one, and shells give about a thousand."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class _Process:
    """One server's life. All methods are the event loop's."""

    def __init__(self, options: Options, told: Told) -> None:
        self._options = options
        self._told = told
        self._door = Door()
        self._server = _server(self._door, options)
        self._stopping = asyncio.Event()

    async def run(self, folder: Bundle | Path | str, listening: socket.socket, address: str) -> int:
        """Everything from the open port to the closed one; the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop)
        http = asyncio.create_task(self._server.serve(sockets=[listening]))
        while not self._server.started and not http.done():
            await asyncio.sleep(0.01)
        self._told.listening(address)
        code = 0
        try:
            loading = _in_thread(lambda: open_model(folder, self._options))
            while not (loading.done() or self._stopping.is_set() or http.done()):
                await asyncio.wait({loading}, timeout=_LOOK_SECONDS)
            if loading.done():
                code = await self._serve(loading.result(), address)
        finally:
            self._server.should_exit = True
            await http
        return _INTERRUPTED if self._server.force_exit else code

    def _stop(self) -> None:
        """A signal came."""
        if self._stopping.is_set():
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # of what is cut short
            self._server.should_exit = self._server.force_exit = True
        self._stopping.set()

    async def _serve(self, opened: Opened, address: str) -> int:
        """From the first request to the last."""
        from cla_export.serve.gate import Gate

        options = self._options
        app, engine = create_server(opened, options)
        streams: Streams = app.state.streams
        async with app.router.lifespan_context(app):
            engine.start()
            self._door.app = Gate(
                app, options.keys, options.most_body, app.state.metrics.refused, engine
            )
            self._told.serving(address, opened)
            await self._until(lambda: self._stopping.is_set() or engine.state == State.dead)
            died = engine.state == State.dead
            engine.drain()
            if died:  # the watchdog tells them
                await self._until(lambda: not streams.open, _FAREWELL_SECONDS)
            else:
                await self._until(lambda: engine.idle, options.shutdown_seconds)
            engine.stop(0.0 if self._server.force_exit or died else 2.0)
            await asyncio.sleep(0)  # the last outputs are on their way
            streams.fail_all(Failure(SHUTDOWN, "the server is shutting down"))  # if a step hangs
        return DEAD_CODE if died else 0

    async def _until(self, so: Callable[[], bool], seconds: float = math.inf) -> None:
        """Return once something is so, the time is up, or all must stop at once."""
        clock = asyncio.get_running_loop().time
        ends = clock() + seconds
        while not so() and not self._server.should_exit and clock() < ends:
            await asyncio.sleep(_LOOK_SECONDS)


def _in_thread(work: Callable[[], Opened]) -> "asyncio.Future[Opened]":
    """What work gives; its thread keeps neither the event loop nor the process from ending."""
    found: Future[Opened] = Future()
    found.set_running_or_notify_cancel()

    def run() -> None:
        try:
            found.set_result(work())
        except BaseException as error:  # whoever waits raises it
            found.set_exception(error)

    threading.Thread(target=run, name="loading", daemon=True).start()
    return asyncio.wrap_future(found)


def _server(door: Door, options: Options) -> "uvicorn.Server":
    import uvicorn

    from cla_export.serve.http_protocol import HttpProtocol

    class Server(uvicorn.Server):
        """Leaves signals to us: uvicorn would refuse connections before anybody has noticed."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    config = uvicorn.Config(
        door,
        http=HttpProtocol,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=5,
        timeout_keep_alive=_IDLE_SECONDS,
        ssl_certfile=options.certificate,
        ssl_keyfile=options.private_key,
    )
    return Server(config)
