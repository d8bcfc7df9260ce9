"""Where a bundle's steps run: what bench reads there of memory's speed and of memory in use."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from cla_export.bandwidth import read_bandwidth
from cla_export.bundle import Bundle
from cla_export.device_bandwidth import read_device_bandwidth
from cla_export.engines import gpu_graph, onnxruntime
from cla_export.engines.cuda_memory import CudaMemory
from cla_export.engines.tensorrt_build import FLAVOURS
from cla_export.environment import cpus
from cla_export.errors import MissingEnvironment


class Place(Protocol):
    """Memory that a bundle computes in."""

    graph: Path | None  # of the weights that a step reads; None: there is no floor
    machine: Mapping[str, str]  # what names it, where it is not the processor

    def read_bandwidth(self) -> float:
        """Bytes per second that it delivers."""

    def release(self) -> None:
        """Give memory back that is held for nothing, so that the next cell's is its own."""

    def read_growth(self) -> int | None:
        """Bytes by which a GPU's memory in use grew since this was made; None: not on a GPU."""


class Host:
    """A processor, with the threads that read."""

    machine: Mapping[str, str] = {}

    def __init__(self, graph: Path | None, threads: int | None) -> None:
        self.graph, self._threads = graph, threads or cpus()

    def read_bandwidth(self) -> float:
        return read_bandwidth(self._threads)

    def release(self) -> None:
        pass  # what Python frees it gives back, or uses again

    def read_growth(self) -> int | None:
        return None


class Device:
    """The first GPU. Raises MissingEnvironment if there is none."""

    def __init__(self, graph: Path | None) -> None:
        self.graph = graph
        self._memory = CudaMemory()
        self.machine: Mapping[str, str] = {
            "gpu": self._memory.name,
            "driver": self._memory.read_driver(),
        }
        self.release()
        self._free, _ = self._memory.read_free()

    def read_bandwidth(self) -> float:
        return read_device_bandwidth(self._memory)

    def release(self) -> None:
        self._memory.trim()

    def read_growth(self) -> int | None:
        free, _ = self._memory.read_free()
        return self._free - free


def place_of(bundle: Bundle, backend: str, threads: int | None) -> Place:
    """Where a backend runs a bundle; a floor is known where ONNX Runtime runs one of its graphs."""
    if backend in FLAVOURS:
        with suppress(MissingEnvironment):  # opening the engine says better what is missing
            return Device(None)
    if backend != "onnxruntime":
        return Host(None, threads)
    if gpu_graph.takes(bundle):
        return Device(gpu_graph.graph_of(bundle)[0])
    return Host(onnxruntime.graph_of(bundle)[0], threads)
