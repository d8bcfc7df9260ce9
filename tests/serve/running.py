"""Servers for tests: the real command in its own process, or an application in this one."""

import asyncio
import contextlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import httpx
import uvicorn

from cla_export.bundle import Bundle
from cla_export.engines.executor import Executor
from cla_export.serve.engine import Engine
from cla_export.serve.gate import Gate
from cla_export.serve.model import ServedModel
from cla_export.serve.pool import size_pool
from cla_export.serve.server import Opened, Options, create_server

PATIENCE = 60  # seconds that a test waits for what should be there at once


class ServerProcess:
    """`cla-export serve` on a free port.

    Args:
        bundle: what is served.
        arguments: of the command.
        fault: of the executor, one of `faulty_command.FAULTS`, and the file that it waits for.
        loading: do not wait for the model to be loaded.
        through: a command that runs the server's.
    """

    def __init__(
        self,
        bundle: Path,
        *arguments: object,
        fault: tuple[str, Path] | None = None,
        loading: bool = False,
        through: Sequence[str] = (),
    ) -> None:
        module = ["-m", "cla_export.cli"]
        if fault is not None:
            module = [str(Path(__file__).with_name("faulty_command.py")), *map(str, fault)]
        command = [*through, sys.executable, *module, "serve", str(bundle), "--port", "0"]
        self._log = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115
        began = time.monotonic()
        self.process = subprocess.Popen([*command, *map(str, arguments)], stderr=self._log)
        first = "loading" if loading else "serving"
        told = re.compile(rf"^{first} .*?(https?://[^/\s]+)", re.MULTILINE)
        wait_until(lambda: told.search(self.stderr) or self.process.poll() is not None)
        found = told.search(self.stderr)
        assert found, self.stderr
        self.url = found[1]
        self.seconds_to_ready = time.monotonic() - began

    @property
    def stderr(self) -> str:
        """All that it has written so far."""
        return Path(self._log.name).read_text()

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
        self._log.close()


@contextlib.contextmanager
def application(
    executor: Executor,
    folder: Path,
    *,
    tokenizer: object = None,
    routes: Mapping[str, Callable] | None = None,
    **given,
) -> Iterator[tuple[str, Engine]]:
    """An application over an executor, on a free port of this process; its address and engine.

    `routes` are more paths, each with what answers it.
    """
    options = Options(**given)
    layout = executor.layout
    bundle = Bundle(folder, {"dtype": "float32"}, layout)
    model = ServedModel("fake", 0, executor.capacity, executor.vocab_size, tokenizer, None)
    pool = size_pool(layout, "float32", executor.capacity, executor.slots, None)
    app, engine = create_server(Opened(bundle, model, executor, pool), options)
    for path, endpoint in (routes or {}).items():
        app.add_route(path, endpoint)
    gate = Gate(app, options.keys, options.most_body, app.state.metrics.refused, engine)
    config = uvicorn.Config(gate, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(
        target=lambda: asyncio.run(server._serve([listening])), name="http", daemon=True
    )
    engine.start()
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", engine
    finally:
        engine.stop(0.5)
        server.should_exit = True
        thread.join(PATIENCE)


def wait_until(condition, seconds: float = PATIENCE) -> float:
    """Seconds until it holds; AssertionError if it never does."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "waited in vain"
        time.sleep(0.002)
    return time.monotonic() - began


def in_threads(count, work):
    found = [None] * count

    def one(index):
        found[index] = work(index)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    return found


def metrics(client: httpx.Client) -> dict[str, float]:
    """Name with labels, without the prefix -> value."""
    found = {}
    for line in client.get("/metrics").text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name.removeprefix("cla_export_")] = float(value)
    return found


def running(client: httpx.Client) -> float:
    now = metrics(client)
    return now["num_requests_running"] + now["num_requests_waiting"]
