"""bench on a GPU: its bandwidth, and the rows, floors and memory of small bundles.

Skipped where there is no GPU; what runs a bundle also where there is no onnxruntime-gpu.
"""

import os

import numpy as np
import pytest
import torch  # before ONNX Runtime: it brings the CUDA libraries
from models_zoo import Zoo

import cla_export
from cla_export.device_bandwidth import _TILE, Reader, read_device_bandwidth
from cla_export.engines import gpu_graph
from cla_export.engines.cuda_memory import CudaMemory
from cla_export.engines.gpu_graph import graph_of

ON_GPU = pytest.mark.skipif(not gpu_graph.available(), reason="no GPU, or no onnxruntime-gpu")
ALONE = pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" in os.environ, reason="looks at the GPU's memory; run it without -n"
)
LONG = {"kv_owner": (0, 0), "head_dim": 64, "max_position_embeddings": 8192}
TOKEN = 2 * 2 * 64 * 2  # bytes of keys and values, of one group with two heads, in 16 bits
WARM = 3  # steps that a slot has room for beside those that are timed


def test_every_byte_is_read(memory: CudaMemory) -> None:
    """A thread tells of a needle, wherever it lies."""
    size = 777 * _TILE
    data, found, reader = memory.allocate(size), memory.allocate(4), Reader(memory)
    answer = np.ones(1, np.int32)
    reader.queue(data, size, 0xABCDEF01, found)
    memory.download(found, answer)
    assert answer[0] == 0
    words = size // 4
    places = [0, words - 1, *np.random.default_rng(0).integers(0, words, 50).tolist()]
    for place in places:
        memory.upload(data + 4 * place, np.array([0xABCDEF01], np.uint32))
        memory.upload(found, np.zeros(1, np.int32))
        reader.queue(data, size, 0xABCDEF01, found)
        memory.download(found, answer)
        assert answer[0] == 1, place
        memory.upload(data + 4 * place, np.zeros(1, np.uint32))


@ALONE
def test_bandwidth(memory: CudaMemory) -> None:
    """A plausible one, hardly less than a sum by PyTorch gets; and the memory comes back."""
    memory.trim()
    before, total = memory.read_free()
    assert 0 < before <= total
    rate = max(read_device_bandwidth(memory) for _ in range(3))
    after, _ = memory.read_free()
    assert before - after < 64 << 20
    assert 5e10 < rate < 3e13
    if torch.cuda.is_available():
        assert rate > 0.95 * torch_rate()


def torch_rate() -> float:
    """Bytes per second that PyTorch sums."""
    numbers = torch.ones(1 << 28, dtype=torch.int32, device="cuda")
    numbers.sum()
    seconds = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        numbers.sum()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return numbers.nbytes / min(seconds)


def test_the_driver(memory: CudaMemory) -> None:
    assert memory.read_driver()[0].isdigit() or memory.read_driver().startswith("CUDA ")


@ON_GPU
@ALONE
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_rows(zoo: Zoo, dtype: str) -> None:
    bundle = zoo.bundle("onnxruntime", dtype, **LONG)
    steps, batches, contexts = 8, (200, 1), (4000, 500)
    found = cla_export.bench(bundle, batches=batches, contexts=contexts, steps=steps, prompt=300)
    assert [(row.phase, row.batch, row.context) for row in found.rows] == [
        *(("decode", batch, context) for batch in batches for context in contexts),
        ("prefill", 1, 300),
    ]
    for row in found.rows:
        assert 0 < row.ms_p10 <= row.ms_per_step <= row.ms_p90
        assert row.tokens_per_s > 0
        assert row.kv_bytes == row.batch * row.context * TOKEN
        room = row.context + (WARM + steps if row.phase == "decode" else 0)
        assert row.peak_device_bytes is not None
        assert row.batch * room * TOKEN <= row.peak_device_bytes < 8 << 30
        if row.phase == "decode":
            assert row.floor_share is not None
            assert 0 < row.floor_share < 1.05
        else:
            assert row.floor_share is None
    large, _, _, small, _ = found.rows
    pools = (large.batch * large.context - small.batch * small.context) * TOKEN  # 409 MB
    assert large.peak_device_bytes - small.peak_device_bytes > pools / 2, "a cell's memory is freed"
    assert found.machine["gpu"] == CudaMemory().name
    assert found.machine["driver"]
    assert found.graph == graph_of(bundle)[0].name
    assert found.bandwidth_bytes_per_s is not None
    assert 5e10 < found.bandwidth_bytes_per_s < 3e13
    assert cla_export.benchmark.Bench.from_json(found.to_json()) == found
