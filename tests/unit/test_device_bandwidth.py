"""What is asked of a GPU beside its work: free memory, its driver, and how fast it reads."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from simulated_gpu import ALL, Gpu

from cla_export import device_bandwidth
from cla_export.device_bandwidth import read_device_bandwidth
from cla_export.engines.cuda_memory import CudaMemory
from cla_export.errors import MissingEnvironment, RunError
from cla_export.plugin.compile import compile_reader


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """cuda-core and the driver, as far as `CudaMemory` asks them."""
    state = SimpleNamespace(free=5 << 30, failing=False, version=(580, 65, 6), trimmed=[])

    def version() -> tuple[int, ...]:
        if state.version is None:
            raise RuntimeError("NVML is not there")
        return state.version

    def trim(pool: int, keep: int) -> tuple[int]:
        assert state.trimmed.pop() == "synchronised"
        state.trimmed.append((pool, keep))
        return (0,)

    device = SimpleNamespace(
        set_current=lambda: None,
        compute_capability=SimpleNamespace(major=9, minor=0),
        name="NVIDIA H200",
        properties=SimpleNamespace(multiprocessor_count=132),
        create_stream=lambda: SimpleNamespace(handle=7, sync=lambda: None),
        sync=lambda: state.trimmed.append("synchronised"),
        memory_resource=SimpleNamespace(handle=11),
    )
    core = SimpleNamespace(
        Device=lambda _number: device,
        LegacyPinnedMemoryResource=object,
        system=SimpleNamespace(get_kernel_mode_driver_version=version),
    )
    driver = SimpleNamespace(
        CUresult=SimpleNamespace(CUDA_SUCCESS=0),
        cuMemGetInfo=lambda: (999 if state.failing else 0, state.free, ALL),
        cuMemPoolTrimTo=trim,
        cuDriverGetVersion=lambda: (0, 13020),
    )
    monkeypatch.setitem(sys.modules, "cuda.core", core)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    return state


def test_free_memory_and_trimming(cuda: SimpleNamespace) -> None:
    memory = CudaMemory()
    assert memory.read_free() == (5 << 30, ALL)
    assert memory.multiprocessors == 132
    memory.trim()
    assert cuda.trimmed == [(11, 0)]
    cuda.failing = True
    with pytest.raises(RunError, match="cuMemGetInfo failed on NVIDIA H200: 999"):
        memory.read_free()


@pytest.mark.parametrize(
    ("version", "text"),
    [((580, 65, 6), "580.65.06"), ((570, 124), "570.124"), (None, "CUDA 13.2")],
)
def test_the_drivers_version(
    cuda: SimpleNamespace, version: tuple[int, ...] | None, text: str
) -> None:
    cuda.version = version
    assert CudaMemory().read_driver() == text


class Timed(Gpu):
    """A GPU whose captured passes take so many seconds, one time after another."""

    def __init__(self, seconds: list[float], free: int) -> None:
        super().__init__()
        self.used = ALL - free
        self.seconds, self.now = iter(seconds), 0.0
        self.passes: list[tuple[int, int]] = []  # address, size

    def capture(self, work: Any) -> Any:
        assert len(self.passes) == 1, "the kernel is loaded before it is captured"
        work()

        def launch() -> None:
            self.now += next(self.seconds)

        return launch

    def download(self, address: int, array: np.ndarray) -> None:
        assert address in self.blocks


@pytest.mark.parametrize(("free", "size"), [(100 << 30, 4 << 30), (5 << 30, 5 << 29)])
def test_bandwidth_is_the_best_timing_but_not_the_first(
    monkeypatch: pytest.MonkeyPatch, free: int, size: int
) -> None:
    memory: Any = Timed([0.001, 0.02, 0.016, 0.03, 0.017, 0.02, 0.02], free)
    reader = SimpleNamespace(queue=lambda at, size, *_: memory.passes.append((at, size)))
    monkeypatch.setattr(device_bandwidth, "Reader", lambda _memory: reader)
    monkeypatch.setattr(device_bandwidth, "perf_counter", lambda: memory.now)
    assert read_device_bandwidth(memory) == pytest.approx(16 * size / 0.016)
    assert len(memory.passes) == 17
    assert {passed[1] for passed in memory.passes} == {size}
    assert (memory.blocks, memory.held) == ({}, 0)


def test_a_full_gpu_is_refused() -> None:
    full: Any = Timed([], 3 << 29)
    with pytest.raises(RunError, match=r"NVIDIA H200 has 1\.50 GiB free; .*twice that must be"):
        read_device_bandwidth(full)


def test_a_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no NVRTC")

    core = SimpleNamespace(Stream=SimpleNamespace(from_handle=lambda handle: handle))
    monkeypatch.setitem(sys.modules, "cuda.core", core)
    monkeypatch.setattr(device_bandwidth, "compile_reader", fail)
    memory: Any = Gpu()
    with pytest.raises(MissingEnvironment, match=r"no NVRTC; pip install 'cla-export\[plugin\]'"):
        device_bandwidth.Reader(memory)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_the_reading_kernel_compiles(capability: tuple[int, int]) -> None:
    threads, loads = device_bandwidth._THREADS, device_bandwidth._LOADS
    assert compile_reader(threads, loads, capability, None).code
