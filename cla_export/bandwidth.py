"""How fast this machine reads memory: the floor under a decode step, which reads all weights."""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from cla_export.errors import MissingEnvironment
from cla_export.plugin import compile_cpu

_BYTES = 256 << 20  # of each thread's array: far more than its share of a cache
_ALL = 4 << 30  # of all arrays together, at most
_PARTS = 64
_PASSES = 6  # the best counts: whatever else runs can only make one slower

Span = tuple[float, float]  # when a pass of one thread began and ended
Read = Callable[[NDArray[np.float32]], object]


def read_bandwidth(threads: int) -> float:
    """Bytes per second that `threads` threads read together, each its own array, best of several.

    Each goes through 256 MiB of float32 in parts, by a loop in C that fetches ahead what is used
    once; without a C compiler by NumPy, for their maximum, which gets a tenth less. Takes 256 MiB
    of memory a thread, 4 GiB in all, and a quarter of a second on two threads.
    """
    barrier, size = Barrier(threads), min(_BYTES, _ALL // threads)
    read = reader()
    with ThreadPoolExecutor(threads) as pool:
        spans = list(pool.map(lambda _: _read(barrier, size, read), range(threads)))
    seconds: list[float] = [
        max(end for _, end in together) - min(began for began, _ in together)
        for together in zip(*spans, strict=True)
    ]
    return threads * size / min(seconds)


@lru_cache
def reader() -> Read:
    """What reads an array, and lets other threads run meanwhile."""
    try:
        library = ctypes.CDLL(str(compile_cpu.library(compile_cpu.READER)))
    except MissingEnvironment:
        return np.max
    function = library.cla_read_memory
    function.restype, function.argtypes = ctypes.c_float, (ctypes.c_void_p, ctypes.c_size_t)
    return lambda numbers: function(numbers.ctypes.data, numbers.size)


def _read(barrier: Barrier, size: int, read: Read) -> list[Span]:
    """Every pass of one thread; it fills its array itself, so that the pages are near it."""
    parts = np.split(np.ones(size // 4, np.float32), _PARTS)
    spans = []
    for _ in range(_PASSES):
        barrier.wait()
        began = perf_counter()
        for part in parts:
            read(part)
        spans.append((began, perf_counter()))
    return spans
