"""How fast a GPU reads its own memory: the floor under a decode step on it."""

import importlib
from time import perf_counter

import numpy as np

from cla_export.engines.cuda_memory import CudaMemory
from cla_export.errors import MissingEnvironment, RunError
from cla_export.plugin.compile import compile_reader

_BYTES = 4 << 30  # far more than a cache keeps from one pass to the next
_LEAST = 1 << 30
_PASSES = 16  # of one timing
_TIMINGS = 6  # the best counts: whatever else runs can only make one slower
_BLOCKS = 2  # on each multiprocessor
_THREADS, _LOADS = 512, 8
_TILE = _THREADS * _LOADS * 16  # bytes
_NEEDLE = 1  # memory is zeros, so nothing finds it


def read_device_bandwidth(memory: CudaMemory) -> float:
    """Bytes per second at which a kernel that only reads goes through a GPU's memory, at its best.

    It takes 4 GiB, or half of what is free where that is less, and gives it back. Passes are one
    CUDA graph, so nothing comes between them. A tenth of a second on a GPU that reads 4 TB/s.

    Raises:
        MissingEnvironment: NVRTC is not installed.
        RunError: the GPU has less than 2 GiB free.
    """
    memory.trim()
    free, _ = memory.read_free()
    size = min(_BYTES, free // 2) // _TILE * _TILE
    if size < _LEAST:
        raise RunError(
            f"{memory.name} has {free / 2**30:.2f} GiB free; its bandwidth is measured over at "
            "least 1 GiB, and twice that must be free: end what else runs there"
        )
    reader = Reader(memory)
    data, found = memory.allocate(size), memory.allocate(4)
    try:
        return _PASSES * size / min(_time_passes(memory, reader, data, size, found))
    finally:
        memory.free(data)
        memory.free(found)
        memory.trim()


def _time_passes(
    memory: CudaMemory, reader: "Reader", data: int, size: int, found: int
) -> list[float]:
    """Seconds of each timing but the first, which finds the GPU idle."""

    def read(passes: int) -> None:
        for _ in range(passes):
            reader.queue(data, size, _NEEDLE, found)

    read(1)  # loads the kernel, which no capture should
    launch, answer, times = memory.capture(lambda: read(_PASSES)), np.zeros(1, np.int32), []
    for _ in range(1 + _TIMINGS):
        memory.download(found, answer)  # waits for what was queued
        began = perf_counter()
        launch()
        memory.download(found, answer)
        times.append(perf_counter() - began)
    return times[1:]


class Reader:
    """read_memory.cu, queued on the stream of a GPU's memory.

    Raises MissingEnvironment if it cannot be compiled.
    """

    def __init__(self, memory: CudaMemory) -> None:
        self._core = importlib.import_module("cuda.core")
        self._stream = self._core.Stream.from_handle(memory.stream)
        try:
            code = compile_reader(_THREADS, _LOADS, memory.capability)
        except Exception as error:  # cuda-core's own
            raise MissingEnvironment(
                f"the kernel that measures a GPU's bandwidth does not compile: {error}; "
                "pip install 'cla-export[plugin]'"
            ) from error
        self._kernel = code.get_kernel("read_memory")
        blocks = _BLOCKS * memory.multiprocessors
        self._config = self._core.LaunchConfig(grid=blocks, block=_THREADS)

    def queue(self, data: int, size: int, needle: int, found: int) -> None:
        """Read `size` bytes, whole tiles; 1 goes into the int32 at `found` if they hold the needle.

        A thread finds it where all else that it reads is zeros.
        """
        self._core.launch(
            self._stream, self._config, self._kernel, data, np.int32(size // _TILE),
            np.uint32(needle), found,
        )  # fmt: skip
