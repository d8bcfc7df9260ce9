"""Memory and work on one GPU, as an executor needs them, through NVIDIA's cuda-core.

Everything happens in the order of one stream. What is allocated lives as long as this object.
"""

import ctypes
import importlib
import threading
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cla_export.errors import MissingEnvironment, RunError

Work = Callable[[], None]
_ALIGNED = 256  # bytes
_LEAST_STAGED = 1 << 18  # bytes: inputs and choices of many steps


class Memory(Protocol):
    """Device memory by address. `stream` is the handle of the stream that orders everything."""

    stream: int

    def allocate(self, size: int) -> int:
        """Address of `size` new bytes, zeroed, a multiple of 256."""

    def free(self, address: int) -> None:
        """Give back what `allocate` gave; work that is queued may use it still."""

    def upload(self, address: int, array: NDArray[np.generic]) -> None:
        """Copy a contiguous array to an address; the array may change as soon as this returns."""

    def download(self, address: int, array: NDArray[np.generic]) -> None:
        """Fill a contiguous array from an address, after all work before it."""

    def copy(self, source: int, target: int, size: int) -> None:
        """Queue a copy from one place on the device to another."""

    def capture(self, work: Work) -> Work:
        """What queues that work again as one launch: addresses and shapes are as they were."""


class CudaMemory:
    """Memory of a GPU of this machine.

    Raises:
        MissingEnvironment: there is no driver or no GPU, or cuda-core is not installed.
        RunError: the GPU has no room for an allocation.
    """

    def __init__(self, device: int = 0) -> None:
        try:
            self._core = importlib.import_module("cuda.core")
            self._driver = importlib.import_module("cuda.bindings.driver")
            self._device = self._core.Device(device)
            self._device.set_current()
        except ImportError as error:
            raise MissingEnvironment(
                f"executors on a GPU go through cuda-core: {error}; "
                "pip install cuda-core cuda-bindings"
            ) from error
        except Exception as error:  # cuda-core's own, for a missing driver and a missing GPU alike
            raise MissingEnvironment(f"no GPU to run on: {error}") from error
        capability = self._device.compute_capability
        self.capability = int(capability.major), int(capability.minor)
        self.compute_capability = f"{capability.major}.{capability.minor}"
        self.name = str(self._device.name)
        self.multiprocessors = int(self._device.properties.multiprocessor_count)
        self._stream = self._device.create_stream()
        self.stream = int(self._stream.handle)
        self._pinned = self._core.LegacyPinnedMemoryResource()
        self._buffers: dict[int, Any] = {}
        self._staging = Staging(self._pin, self._stream.sync)
        self._entered = threading.local()
        self._entered.so = True

    def enter(self) -> None:
        """Make this GPU the calling thread's: what CUDA does is by a thread's own setting."""
        if not getattr(self._entered, "so", False):
            self._device = self._core.Device(self._device.device_id)
            self._device.set_current()
            self._entered.so = True

    def allocate(self, size: int) -> int:
        self.enter()
        try:
            buffer = self._device.allocate(size, stream=self._stream)
        except Exception as error:  # cuda-core's own
            raise RunError(
                f"{self.name} has no {size:,} bytes left ({error}); take fewer slots or a smaller "
                "capacity"
            ) from error
        buffer.fill(0, stream=self._stream)
        address = int(buffer.handle)
        self._buffers[address] = buffer
        return address

    def free(self, address: int) -> None:
        self.enter()
        self._buffers.pop(address).close(self._stream)

    def upload(self, address: int, array: NDArray[np.generic]) -> None:
        self.enter()
        host = self._staging.part(array.nbytes)
        host[:] = _bytes(np.ascontiguousarray(array))
        staged = self._part(host.ctypes.data, array.nbytes)
        staged.copy_to(self._part(address, array.nbytes), stream=self._stream)

    def download(self, address: int, array: NDArray[np.generic]) -> None:
        self.enter()
        host = self._staging.part(array.nbytes)
        staged = self._part(host.ctypes.data, array.nbytes)
        self._part(address, array.nbytes).copy_to(staged, stream=self._stream)
        self._staging.wait()
        _bytes(array)[:] = host

    def copy(self, source: int, target: int, size: int) -> None:
        self.enter()
        self._part(source, size).copy_to(self._part(target, size), stream=self._stream)

    def capture(self, work: Work) -> Work:
        self.enter()
        builder = self._stream.create_graph_builder().begin_building("relaxed")
        work()
        graph = builder.end_building().complete()
        return lambda: graph.launch(self._stream)

    def read_free(self) -> tuple[int, int]:
        """Bytes of the GPU's memory that no process holds, and of all of it.

        What was freed here is held for later allocations until `trim`.
        """
        self.enter()
        status, free, total = self._driver.cuMemGetInfo()
        self._check(status, "cuMemGetInfo")
        return int(free), int(total)

    def trim(self) -> None:
        """Give back to the GPU what was freed here and is held for later allocations."""
        self.enter()
        self._device.sync()
        pool = getattr(self._device.memory_resource, "handle", None)  # there are others than pools
        if pool is not None:
            (status,) = self._driver.cuMemPoolTrimTo(pool, 0)
            self._check(status, "cuMemPoolTrimTo")

    def read_driver(self) -> str:
        """The driver's version, such as 580.65.06; where it is not told, CUDA's that it brings."""
        try:
            *first, last = self._core.system.get_kernel_mode_driver_version()
        except Exception:  # cuda-core's own, without NVML
            status, version = self._driver.cuDriverGetVersion()
            self._check(status, "cuDriverGetVersion")
            return f"CUDA {version // 1000}.{version % 1000 // 10}"
        return ".".join([*map(str, first), f"{last:02}"])

    def _check(self, status: Any, what: str) -> None:  # noqa: ANN401
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise RunError(f"{what} failed on {self.name}: {status}")

    def _pin(self, size: int) -> tuple[Any, NDArray[np.uint8]]:
        """So much pinned host memory: what owns it, and the array that lies in it."""
        buffer = self._pinned.allocate(size, stream=self._stream)
        memory = (ctypes.c_uint8 * size).from_address(int(buffer.handle))
        return buffer, np.ctypeslib.as_array(memory)

    def _part(self, address: int, size: int) -> Any:  # noqa: ANN401
        return self._core.Buffer.from_handle(address, size)


class Staging:
    """Host memory that copies go through, handed out part by part: none twice before they are over.

    Args:
        pin: makes so many bytes of it, and what owns them.
        wait: waits for all copies.
    """

    def __init__(
        self, pin: Callable[[int], tuple[Any, NDArray[np.uint8]]], wait: Callable[[], None]
    ) -> None:
        self._pin, self._wait = pin, wait
        self._owner: Any = None
        self._room = np.empty(0, np.uint8)
        self._used = 0

    def part(self, size: int) -> NDArray[np.uint8]:
        """Bytes that no copy uses; it may have to wait for them."""
        if self._used + size > len(self._room):
            self.wait()
            if size > len(self._room):
                self._owner, self._room = self._pin(max(size, _LEAST_STAGED))
        begin = self._used
        self._used = begin + -(-size // _ALIGNED) * _ALIGNED
        return self._room[begin : begin + size]

    def wait(self) -> None:
        """Wait for all copies: every part is free then, but what it holds is there until `part`."""
        self._wait()
        self._used = 0


def _bytes(array: NDArray[np.generic]) -> NDArray[np.uint8]:
    return array.reshape(-1).view(np.uint8)
