"""A process for each peer, which answers one request at a time."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TypeVar, TypeVarTuple, cast

from cla_export.bundle import Bundle
from peers import open_peer
from peers.cells import Cell
from peers.peer import Peer, Refused
from peers.timing import free_cell, open_cell

REST = 0.2  # seconds in which the threads of the last peer go to sleep
A = TypeVarTuple("A")
T = TypeVar("T")


class Failed(Exception):
    """Why a peer did not answer: it refused, raised, or died."""


class Worker:
    """A peer's process, from the first request on."""

    def __init__(self, name: str, bundle: Bundle, threads: int) -> None:
        self._arguments = name, bundle, threads
        self._process: multiprocessing.process.BaseProcess | None = None
        self._cell: Cell | None = None  # that its caches are for

    def ask(self, request: Callable[[Peer, *A], T], *arguments: *A) -> T:
        """What `request` returns, called there with the peer; raises Failed."""
        process = self._process or self._start()
        time.sleep(REST)
        try:
            self._pipe.send((request, arguments))
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self.stop()
            raise Failed(f"failed: its process ended with {process.exitcode}") from None
        if isinstance(answer, Failed):
            raise answer
        return cast("T", answer)

    def open(self, cell: Cell, steps: int, rounds: int) -> None:
        """Have caches for a cell, unless they are there already."""
        if self._cell != cell:
            self._cell = cell
            self.ask(open_cell, cell, steps, rounds)

    def close(self) -> None:
        """Free the caches."""
        if self._cell is not None:
            with suppress(Failed):
                self.ask(free_cell)
        self._cell = None

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._pipe.close()
            self._process.join()
        self._process = self._cell = None

    def _start(self) -> multiprocessing.process.BaseProcess:
        context = multiprocessing.get_context("spawn")  # peak memory without the parent's
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end, *self._arguments))
        self._process.start()
        end.close()  # so that the worker's death closes the pipe
        return self._process


def _serve(pipe: Connection, name: str, bundle: Bundle, threads: int) -> None:
    """Answer requests until the parent hangs up; whatever is printed goes to stderr."""
    os.dup2(2, 1)
    peer: Peer | None = None
    while True:
        try:
            request, arguments = pipe.recv()
        except EOFError:
            return
        answer: object
        try:
            peer = peer or open_peer(name, bundle, threads)
            answer = request(peer, *arguments)
        except Refused as error:
            answer = Failed(f"refused: {error}")
        except Exception as error:  # compilers and runtimes each have their own
            traceback.print_exc()
            answer = Failed(f"failed: {type(error).__name__}: {str(error).split(chr(10))[0]}")
        pipe.send(answer)
