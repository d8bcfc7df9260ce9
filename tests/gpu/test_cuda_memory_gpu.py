"""`CudaMemory` on a GPU: what an executor asks of it, with kernels of ours as the work."""

import numpy as np
import pytest

from cla_export.engines.cuda_memory import CudaMemory
from cla_export.errors import RunError

SOURCE = r"""
extern "C" __global__ void add(const int *from, int *to, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) to[i] += from[i];
}
"""
COUNT = 1000


def adder(memory: CudaMemory):
    """Queues: to += from."""
    core = memory._core
    options = core.ProgramOptions(arch=f"sm_{memory.compute_capability.replace('.', '')}")
    kernel = core.Program(SOURCE, "c++", options).compile("cubin").get_kernel("add")
    config = core.LaunchConfig(grid=8, block=128)

    def queue(start: int, to: int, stream: object = None) -> None:
        core.launch(stream or memory._stream, config, kernel, start, to, np.int32(COUNT))

    return queue


def test_copies_of_any_size_come_back(memory: CudaMemory):
    for count in (1, 255, 4096, 3_000_000):
        sent = np.random.default_rng(count).integers(0, 255, count, np.uint8)
        address = memory.allocate(count)
        assert address % 256 == 0
        got = np.full(count, 7, np.uint8)
        memory.download(address, got)
        assert not got.any()  # zeroed
        memory.upload(address, sent)
        kept = sent.copy()
        sent[:] = 0  # may change as soon as upload returned
        memory.download(address, got)
        assert np.array_equal(got, kept)
        memory.free(address)


def test_part_of_an_allocation_and_other_dtypes(memory: CudaMemory):
    address = memory.allocate(4096)
    values = np.arange(24, dtype=np.float16).reshape(2, 3, 4)
    memory.upload(address + 512, values)
    got = np.empty_like(values)
    memory.download(address + 512, got)
    assert np.array_equal(got, values)
    before = np.empty(512, np.uint8)
    memory.download(address, before)
    assert not before.any()


def test_everything_happens_in_order_and_captured_work_runs_again(memory: CudaMemory):
    queue = adder(memory)
    start, to = (memory.allocate(4 * COUNT) for _ in range(2))
    total = np.zeros(COUNT, np.int32)
    got = np.empty_like(total)
    for step in range(50):  # uploads follow each other without a word in between
        memory.upload(start, np.full(COUNT, step, np.int32))
        queue(start, to)
        total += step
    memory.download(to, got)
    assert np.array_equal(got, total)
    launch = memory.capture(lambda: queue(start, to))
    memory.download(to, got)
    assert np.array_equal(got, total)  # capturing runs nothing
    for step in range(50):
        memory.upload(start, np.full(COUNT, step, np.int32))
        launch()
        total += step
    memory.download(to, got)
    assert np.array_equal(got, total)


def test_no_room_is_an_error_that_says_what_to_do(memory: CudaMemory):
    with pytest.raises(RunError, match=r"has no 900,\S+ bytes left .* fewer slots"):
        memory.allocate(9 * 10**14)
    address = memory.allocate(256)  # and what comes after it works
    got = np.ones(256, np.uint8)
    memory.download(address, got)
    assert not got.any()
