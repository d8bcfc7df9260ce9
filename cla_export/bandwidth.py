"""How fast this machine reads memory: the floor under a decode step, which reads all weights."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from time import perf_counter

import numpy as np

_BYTES = 256 << 20  # of each thread's array: far more than its share of a cache
_ALL = 4 << 30  # of all arrays together, at most
_PARTS = 64
_PASSES = 6  # the best counts: whatever else runs can only make one slower

Span = tuple[float, float]  # when a pass of one thread began and ended


def read_bandwidth(threads: int) -> float:
    """Bytes per second that `threads` threads read together, each its own array, best of several.

    Each goes through 256 MiB of float32 in parts, for their maximum: NumPy finds that faster than
    memory delivers, which a sum's additions do not quite, and lets other threads run meanwhile.
    Takes 256 MiB of memory a thread, 4 GiB in all, and a quarter of a second on two threads.
    """
    barrier, size = Barrier(threads), min(_BYTES, _ALL // threads)
    with ThreadPoolExecutor(threads) as pool:
        spans = list(pool.map(_read, [barrier] * threads, [size] * threads))
    seconds: list[float] = [
        max(end for _, end in together) - min(began for began, _ in together)
        for together in zip(*spans, strict=True)
    ]
    return threads * size / min(seconds)


def _read(barrier: Barrier, size: int) -> list[Span]:
    """Every pass of one thread; it fills its array itself, so that the pages are near it."""
    parts = np.split(np.ones(size // 4, np.float32), _PARTS)
    spans = []
    for _ in range(_PASSES):
        barrier.wait()
        began = perf_counter()
        for part in parts:
            part.max()
        spans.append((began, perf_counter()))
    return spans
