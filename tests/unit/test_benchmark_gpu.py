"""What bench does for a GPU, over one that is made up: its steps run on the CPU."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from models_zoo import Zoo
from rich.console import Console
from simulated_gpu import Gpu

import cla_export
from cla_export.benchmark import Bench, compare, measure, places, timing
from cla_export.bundle import Bundle
from cla_export.engines import gpu_graph, onnxruntime_cuda
from cla_export.engines.onnxruntime import OnnxRuntimeExecutor
from cla_export.errors import BadInput
from cla_export.floor import Weights, read_weights
from cla_export.views.benchmark import markdown, render

BANDWIDTH = 1e9  # bytes per second
SLOT = 3 << 20  # that each slot of an executor takes there
TINY = {"kv_owner": (0, 0)}  # tied, 24 wide, MLP 20, vocabulary 61, 4 query heads on 2, of 16
WEIGHTS = 2 * (2 * (2 * 24 * 64) + 2 * 24 * 32 + 2 * 3 * 24 * 20 + 5 * 24 + 61 * 24)
ROPE = 2 * 8 * 4  # bytes of a token's cosines and sines, float32 in the file


class Counting(Gpu):
    """With a word on every call of `decode_greedy`: slots, lengths, steps."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []


@contextmanager
def made_up() -> Iterator[Counting]:
    """A GPU, and an executor on it that chooses tokens itself."""
    gpu = Counting()

    class Executor(OnnxRuntimeExecutor):
        def __init__(self, bundle: Bundle, *, capacity: int, slots: int) -> None:
            super().__init__(bundle, capacity=capacity, slots=slots, threads=1)
            self.took = gpu.allocate(SLOT * slots)

        def __del__(self) -> None:
            gpu.free(self.took)

        def decode_greedy(
            self, slots: range, tokens: list[int], lengths: list[int], steps: int = 1
        ) -> np.ndarray:
            gpu.calls.append((tuple(slots), tuple(lengths), steps))
            made = []
            for step in range(steps):
                logits = self.decode(slots, tokens, [length + step for length in lengths])
                tokens = logits.argmax(-1).tolist()
                made.append(tokens)
            return np.array(made).T

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_graph, "takes", lambda bundle: bundle.cuda_graph is not None)
        patch.setattr(onnxruntime_cuda, "OnnxRuntimeCudaExecutor", Executor)
        patch.setattr(places, "CudaMemory", lambda: gpu)
        patch.setattr(places, "read_device_bandwidth", lambda _memory: BANDWIDTH)
        yield gpu
    assert not gpu.blocks, "an executor outlived its cell"


@pytest.fixture
def gpu() -> Iterator[Counting]:
    with made_up() as gpu:
        yield gpu


@pytest.fixture(scope="module")
def run(zoo: Zoo) -> tuple[Bench, Counting]:
    """All cells of a few, and the GPU afterwards."""
    bundle = zoo.bundle("onnxruntime", "fp16", **TINY)
    with made_up() as gpu:
        found = cla_export.bench(bundle, batches=(2, 1), contexts=(8, 16), steps=3, prompt=20)
    return found, gpu


@pytest.fixture
def measured(run: tuple[Bench, Counting]) -> Bench:
    return run[0]


# Rows


def test_rows(zoo: Zoo, measured: Bench) -> None:
    assert [(row.phase, row.batch, row.context) for row in measured.rows] == [
        ("decode", 2, 8), ("decode", 2, 16), ("decode", 1, 8), ("decode", 1, 16),
        ("prefill", 1, 20),
    ]  # fmt: skip
    for row in measured.rows:
        assert 0 < row.ms_p10 <= row.ms_per_step <= row.ms_p90
        tokens = row.batch if row.phase == "decode" else row.context
        assert row.tokens_per_s == pytest.approx(tokens / row.ms_per_step * 1e3)
        assert row.kv_bytes == row.batch * 2 * 2 * 16 * row.context * 2
        assert row.peak_device_bytes == SLOT * row.batch, "a cell's own, not what the last one held"
    machine = measured.machine
    assert (machine["gpu"], machine["driver"]) == ("NVIDIA H200", "580.65.06")
    graph, _ = gpu_graph.graph_of(zoo.bundle("onnxruntime", "fp16", **TINY))
    assert measured.graph == graph.name


def test_steps_are_timed_as_one(run: tuple[Bench, Counting]) -> None:
    _, gpu = run
    once = 1 + timing._TIMINGS
    assert gpu.calls == [
        (tuple(range(batch)), (context,) * batch, 3)
        for batch in (2, 1)
        for context in (8, 16)
        for _ in range(once)
    ]


def test_milliseconds_are_of_a_step(
    zoo: Zoo, gpu: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of calls that take 60 ms and make four."""
    clock = iter(np.cumsum([0, 1, *[0.060, 1] * timing._TIMINGS]))
    monkeypatch.setattr(timing, "perf_counter", lambda: float(next(clock)))
    bundle = zoo.bundle("onnxruntime", "fp16", **TINY)
    (row,) = cla_export.bench(bundle, batches=[3], contexts=[8], phases=["decode"], steps=4).rows
    assert row.ms_per_step == pytest.approx(15)
    assert row.tokens_per_s == pytest.approx(3 / 0.015)


def test_the_floor_by_hand(measured: Bench) -> None:
    assert measured.weight_bytes == WEIGHTS
    assert measured.bandwidth_bytes_per_s == BANDWIDTH
    for row in measured.rows[:4]:
        cache = row.batch * row.context * 2 * 2 * 16 * 2  # one group's keys and values, once
        floor_ms = (WEIGHTS + row.batch * ROPE + cache) / BANDWIDTH * 1e3
        assert row.floor_share == pytest.approx(floor_ms / row.ms_per_step)
    assert measured.rows[4].floor_share is None


@pytest.mark.parametrize("stock", [False, True])
def test_weights_of_graphs_for_gpus(zoo: Zoo, stock: bool) -> None:
    """Tables of cosines are looked up: by our rotations, or by a Gather behind a Cast."""
    for tied, row in ((True, ROPE), (False, ROPE + 24 * 2)):
        bundle = zoo.bundle("onnxruntime", "fp16", tie_word_embeddings=tied, **TINY)
        graph = bundle.cuda_graph if stock else bundle.cuda_plugin_graph
        assert graph is not None
        assert read_weights(graph) == Weights(WEIGHTS, row)


def test_steps_by_default(zoo: Zoo, gpu: Counting) -> None:
    options: Any = {"batches": [1], "contexts": [8], "phases": ["decode"]}
    with pytest.raises(BadInput, match="has 64 positions, and the steps take 67 of them"):
        cla_export.bench(zoo.bundle("onnxruntime", "fp16", **TINY), **options)
    found = cla_export.bench(zoo.bundle(**TINY), threads=1, **options)
    assert found.rows[0].peak_device_bytes is None, "float32 runs on the CPU"
    assert "gpu" not in found.machine
    assert not gpu.calls


def test_an_engine_of_tensorrt_takes_memory_and_has_no_floor(
    zoo: Zoo, gpu: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = zoo.bundle(**TINY)
    held: list[int] = []

    class Engine(OnnxRuntimeExecutor):
        def __init__(self) -> None:
            super().__init__(bundle, capacity=24, slots=2, threads=1)
            self.took = gpu.allocate(SLOT)

        def __del__(self) -> None:
            gpu.free(self.took)
            held.append(gpu.held)

    for module in (measure, timing):
        monkeypatch.setattr(module, "backend_of", lambda *_: "tensorrt")
    monkeypatch.setattr(timing, "open_executor", lambda *_, **__: Engine())
    monkeypatch.setitem(measure._MODULES, "tensorrt", "numpy")
    found = cla_export.bench(bundle, batches=[2], contexts=[8], steps=2, prompt=9)
    assert [row.peak_device_bytes for row in found.rows] == [SLOT, SLOT]
    assert held == [SLOT, SLOT], "what the first held was given back before the second"
    assert [row.floor_share for row in found.rows] == [None, None]
    assert (found.machine["gpu"], found.weight_bytes) == ("NVIDIA H200", None)


# Stored and shown


def test_results_from_before_gpus_read_and_compare(measured: Bench) -> None:
    content = json.loads(json.dumps(measured.to_json(), allow_nan=False))
    assert Bench.from_json(content) == measured
    for row in content["rows"]:
        del row["peak_device_bytes"]
    del content["machine"]["gpu"], content["machine"]["driver"]
    old = Bench.from_json(content)
    assert [row.peak_device_bytes for row in old.rows] == [None] * 5
    found = compare(measured, old)
    assert not found.regressions
    assert found.notes == (
        "gpu is 'NVIDIA H200' now and was None then",
        "driver is '580.65.06' now and was None then",
    )


def test_the_table_and_markdown(measured: Bench) -> None:
    wide = replace(
        measured.rows[0], batch=64, context=131072, ms_per_step=0.8612, ms_p10=0.8599,
        ms_p90=0.8634, tokens_per_s=74317.0, floor_share=0.51, peak_rss_bytes=4 << 30,
        peak_device_bytes=130 << 30,
    )  # fmt: skip
    found = replace(measured, rows=(wide, *measured.rows[1:]), bandwidth_bytes_per_s=4.5617e12)
    console = Console(width=80, no_color=True, file=io.StringIO(), record=True)
    render(found, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    cells = "decode 64 131,072 0.861 0.860 to 0.863 74,317 51% 4,096 133,120"
    assert cells in [" ".join(line.split()) for line in text.splitlines()]
    shown = markdown(found)
    for whole in (text, shown):
        assert "NVIDIA H200, driver 580.65.06" in whole
        assert "memory delivers 4,561.7 GB/s to a reading kernel" in whole
        assert "GPU MiB" in whole
    assert {line.count("|") for line in shown.splitlines()[4:]} == {10}
