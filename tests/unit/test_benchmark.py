"""What bench measures, what it takes for the floor, and what it calls slower."""

import io
import json
import os
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from models_zoo import MIXED, Zoo
from rich.console import Console

import cla_export
from cla_export.benchmark import (
    Bench,
    Comparison,
    Row,
    compare,
    measure,
    places,
    read_bench,
    timing,
)
from cla_export.benchmark.cells import Cell
from cla_export.engines.onnxruntime import OnnxRuntimeExecutor, graph_of
from cla_export.errors import BadInput, MissingEnvironment
from cla_export.floor import Weights, kv_bytes, read_weights
from cla_export.layout import KVLayout
from cla_export.peak_memory import forget_peak, read_peak
from cla_export.views.benchmark import markdown, plot, render

BANDWIDTH = 1e9  # bytes per second, of every test
TINY = {"kv_owner": (0, 0)}  # tied, 24 wide, MLP 20, vocabulary 61, 4 query heads on 2, of 16
# Weights by hand: Q and O of two layers, K and V of one, two MLPs.
LINEAR = 2 * (24 * 64 + 64 * 24) + 2 * 24 * 32 + 2 * 3 * 24 * 20
NORMS, HEAD = 5 * 24, 61 * 24
ROPE = 2 * 8 * 4  # bytes of a token's cosines and sines


@pytest.fixture(autouse=True)
def _bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "read_bandwidth", lambda _threads: BANDWIDTH)


@pytest.fixture(scope="module")
def measured(zoo: Zoo) -> Bench:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "read_bandwidth", lambda _threads: BANDWIDTH)
        return cla_export.bench(
            zoo.bundle(**TINY), batches=(1, 2), contexts=(8, 16), steps=3, prompt=100, threads=1
        )


def made(ms: float = 10.0, batch: int = 1, phase: str = "decode", spread: float = 0.0) -> Row:
    low, high = ms * (1 - spread / 2), ms * (1 + spread / 2)
    share = 0.5 if phase == "decode" else None
    return Row(phase, batch, 512, ms, low, high, batch / ms * 1e3, share, 4096, 2**27)


def run_of(*rows: Row, **changes: Any) -> Bench:
    machine = {"processor": "A", "cpus": 2, "threads": None}
    known = Bench(
        "my-bundle", "onnxruntime", "model.onnx", "2026-11-28", machine,
        {"onnxruntime": "1.32.0"}, BANDWIDTH, 2**20, rows,
    )  # fmt: skip
    return replace(known, **changes)


# Rows


def test_a_row_for_each_batch_and_context_and_one_of_prefill(zoo: Zoo, measured: Bench) -> None:
    assert [(row.phase, row.batch, row.context) for row in measured.rows] == [
        ("decode", 1, 8), ("decode", 1, 16), ("decode", 2, 8), ("decode", 2, 16),
        ("prefill", 1, 64),  # as many as the model has positions
    ]  # fmt: skip
    for row in measured.rows:
        assert 0 < row.ms_p10 <= row.ms_per_step <= row.ms_p90
        tokens = row.batch if row.phase == "decode" else row.context
        assert row.tokens_per_s == pytest.approx(tokens / row.ms_per_step * 1e3)
        assert row.kv_bytes == row.batch * 2 * 2 * 16 * row.context * 4
        assert row.peak_rss_bytes > 2**24
        assert (row.floor_share is None) == (row.phase == "prefill")
    assert measured.backend == "onnxruntime"
    assert measured.graph == graph_of(zoo.bundle(**TINY))[0].name
    assert measured.bandwidth_bytes_per_s == BANDWIDTH
    assert set(measured.tools) == {"cla-export", "numpy", "onnxruntime"}
    assert measured.machine["threads"] == 1


def test_the_floor_by_hand(measured: Bench) -> None:
    weights = 4 * (LINEAR + NORMS + HEAD)
    assert measured.weight_bytes == weights
    for row in measured.rows[:4]:
        cache = row.batch * row.context * 2 * 2 * 16 * 4  # one group's keys and values
        floor_ms = (weights + row.batch * ROPE + cache) / BANDWIDTH * 1e3
        assert row.floor_share == pytest.approx(floor_ms / row.ms_per_step)


def test_phases_by_themselves_and_doubles(zoo: Zoo) -> None:
    bundle, options = zoo.bundle(**TINY), {"steps": 1, "threads": 1}
    found = cla_export.bench(bundle, phases=["prefill"], contexts=(10**6,), prompt=5, **options)
    assert [(row.phase, row.context) for row in found.rows] == [("prefill", 5)]
    found = cla_export.bench(
        str(bundle.folder), phases=["decode"], batches=[1, 1], contexts=[9, 9], **options
    )
    assert [(row.batch, row.context) for row in found.rows] == [(1, 9)]


def test_pytorch_has_no_floor(zoo: Zoo) -> None:
    found = cla_export.bench(
        zoo.bundle(**TINY), batches=[2], contexts=[8], steps=1, prompt=4, backend="torch"
    )
    assert (found.graph, found.weight_bytes, found.bandwidth_bytes_per_s) == (None, None, None)
    assert [row.floor_share for row in found.rows] == [None, None]
    assert "torch" in found.tools


def test_an_engine_has_the_capacity_that_it_was_built_for(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, asked = zoo.bundle(**TINY), []

    def open_executor(*_: Any, **options: Any) -> OnnxRuntimeExecutor:
        asked.append((options["capacity"], options["slots"]))
        return OnnxRuntimeExecutor(bundle, capacity=24, slots=options["slots"], threads=1)

    for module in (measure, timing):
        monkeypatch.setattr(module, "backend_of", lambda *_: "tensorrt")
    monkeypatch.setattr(timing, "open_executor", open_executor)
    monkeypatch.setitem(measure._MODULES, "tensorrt", "numpy")
    found = cla_export.bench(bundle, batches=[2], contexts=[8], steps=2, prompt=9)
    assert asked == [(None, 2), (None, 1)]
    assert [row.floor_share for row in found.rows] == [None, None]
    with pytest.raises(BadInput, match=r"takes 40 tokens a slot.* built for 24.*--capacity 40"):
        cla_export.bench(bundle, contexts=[35], steps=2)


def test_caches_are_filled_and_not_copied(zoo: Zoo) -> None:
    executor = OnnxRuntimeExecutor(zoo.bundle(**MIXED), capacity=40, slots=2, threads=1)
    timing.fill(executor, Cell("decode", 2, 32, 1))
    pools = [part[:, :, :32] for group in range(2) for part in executor.cache(group)]
    for pool in pools:  # [slots, Hkv, T, D]
        assert 0.5 < pool.std() < 2
        assert len(np.unique(pool[:, 0, :, 0])) == 2 * 32
    assert not any(np.array_equal(pools[0], other) for other in pools[1:])
    layout, context = KVLayout.create([0], 4, 64), 4096
    stub: Any = SimpleNamespace(layout=layout, write=lambda *_: None)
    tracemalloc.start()
    timing.fill(stub, Cell("decode", 1, context, 1))
    assert tracemalloc.get_traced_memory()[1] < kv_bytes(layout, "float32", 1, context) / 8
    tracemalloc.stop()


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks stay")
def test_the_peak_starts_anew() -> None:
    block = np.ones(2**25)  # 256 MiB
    high = read_peak()
    del block
    forget_peak()
    assert read_peak() < high - 2**27


# What a step reads


@pytest.mark.parametrize("stock", [False, True])
def test_weights_of_a_tied_and_an_untied_head(zoo: Zoo, stock: bool) -> None:
    tied = zoo.bundle(**TINY)
    assert read_weights(graph_of(tied, stock=stock)[0]) == Weights(
        4 * (LINEAR + NORMS + HEAD), ROPE
    )
    untied = zoo.bundle(**TINY, tie_word_embeddings=False)
    assert read_weights(graph_of(untied, stock=stock)[0]) == Weights(
        4 * (LINEAR + NORMS + HEAD), ROPE + 24 * 4
    )


def test_weights_in_4_bits(zoo: Zoo) -> None:
    bundle = zoo.bundle(quantize="int4", **TINY)
    block = 16 + 4  # bytes of 32 weights, the last ones padded, and of their scale
    rows = 2 * (64 + 2 * 24) + 2 * 32 + 2 * (20 + 20 + 24)  # O's have two blocks each
    head = 61 * (32 + 4)  # in 8 bits, beside the embedding, of which a step looks up a row
    expected = Weights(rows * block + head + 4 * NORMS, ROPE + 24 * 4)
    assert read_weights(bundle.graph) == read_weights(graph_of(bundle)[0]) == expected


def test_keys_and_values_of_a_window_and_of_16_bits() -> None:
    layout = KVLayout.create([0, 0, 2], 2, 16, [None, None, 6])
    assert kv_bytes(layout, "float32", 3, 4) == 3 * 2 * (2 * 2 * 16 * 4) * 4
    assert kv_bytes(layout, "float16", 3, 100) == 3 * (2 * 2 * 16) * (100 + 6) * 2


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": [1, 0]}, "batch is 0; expected a whole number, at least 1"),
        ({"contexts": [-5]}, "context is -5"),
        ({"contexts": [True]}, "context is True"),
        ({"steps": 0}, "steps is 0"),
        ({"prompt": 0}, "prompt is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"contexts": [8, 44]}, "context is 44; .* has 64 positions, and the steps take 21 .*: "
                                "expected at most 43"),
        ({"phases": ["decode", "sleep"]}, "phase is 'sleep'; expected decode or prefill"),
        ({"phases": []}, "nothing to measure"),
        ({"batches": [], "phases": ["decode"]}, "nothing to measure"),
        ({"backend": "abacus"}, "backend is 'abacus'"),
        ({"engine": Path("x")}, "onnxruntime takes no engine"),
    ],
)  # fmt: skip
def test_refusals(zoo: Zoo, change: dict[str, Any], message: str) -> None:
    options = {"batches": [1], "contexts": [8], "steps": 18, "prompt": 4, **change}
    with pytest.raises(BadInput, match=message):
        cla_export.bench(zoo.bundle(**TINY), **options)


# Comparing


def test_faster_and_within_noise_is_no_regression() -> None:
    old = run_of(made(10), made(20, batch=8), made(300, phase="prefill"))
    now = run_of(made(5), made(21.9, batch=8), made(329, phase="prefill"))
    assert compare(now, old) == Comparison((), ())
    assert len(compare(now, old, noise=0.05).regressions) == 2


def test_slower_is() -> None:
    found = compare(run_of(made(11.5), made(3, batch=2)), run_of(made(10)))
    assert found.regressions == (
        "decode, batch 1, context 512: 11.50 ms, 10.00 ms then: 15% slower, and 10% is noise",
    )


@pytest.mark.parametrize("noisy", ["now", "old"])
def test_a_runs_own_spread_counts_up_to_a_half(noisy: str) -> None:
    def slower(by: float, spread: float) -> int:
        now, old = (spread if noisy == name else 0.0 for name in ("now", "old"))
        runs = run_of(made(10 * (1 + by), spread=now)), run_of(made(10, spread=old))
        return len(compare(*runs).regressions)

    assert [slower(0.25, 0.3), slower(0.35, 0.3)] == [0, 1]
    assert [slower(0.45, 1.5), slower(0.55, 1.5)] == [0, 1]


def test_a_row_that_is_gone_is_named() -> None:
    found = compare(run_of(made(9)), run_of(made(10), made(20, batch=8)))
    assert found.regressions == ("decode, batch 8, context 512: 20.00 ms then, not measured now",)


def test_another_machine_or_graph_is_a_note() -> None:
    old = run_of(made(10), machine={"processor": "B", "cpus": 2, "threads": 4}, weight_bytes=7)
    found = compare(run_of(made(10)), old)
    assert not found.regressions
    assert found.notes == (
        "processor is 'A' now and was 'B' then",
        "threads is None now and was 4 then",
        f"weight_bytes is {2**20} now and was 7 then",
    )


# Stored and shown


def test_json_reads_back(measured: Bench, tmp_path: Path) -> None:
    text = json.dumps(measured.to_json(), allow_nan=False)
    assert Bench.from_json(json.loads(text)) == measured
    content = json.loads(text)
    assert list(content) == [
        "bundle", "backend", "graph", "date", "machine", "tools", "bandwidth_bytes_per_s",
        "weight_bytes", "rows",
    ]  # fmt: skip
    assert content["rows"][-1]["floor_share"] is None
    (tmp_path / "old.json").write_text(text)
    assert read_bench(tmp_path / "old.json") == measured


def test_files_that_are_no_bench(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no such file.*cla-export bench BUNDLE --output"):
        read_bench(tmp_path / "gone.json")
    for text in ("hello", "[1]", "{}", '{"rows": [{"ms": 1}]}', '{"rows": []}'):
        (tmp_path / "old.json").write_text(text)
        with pytest.raises(BadInput, match="not a stored bench"):
            read_bench(tmp_path / "old.json")


def test_the_table_fits_80_columns(measured: Bench) -> None:
    console = Console(width=80, no_color=True, file=io.StringIO(), record=True)
    render(measured, console)
    wide = run_of(replace(made(12345.678, batch=128, spread=0.4), context=131072))
    render(wide, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "12,345.68" in text


def test_markdown(measured: Bench) -> None:
    text = markdown(replace(measured, command="cla-export bench b"))
    head, _, what, _, *table = text.splitlines()
    assert measured.date in head
    assert "`cla-export bench b`" in head
    assert str(measured.graph) in what
    assert len(table) == 2 + len(measured.rows)
    assert {line.count("|") for line in table} == {9}
    assert table[-1].split(" | ")[-2] == "-", "prefill has no floor"


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_figure(measured: Bench, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"bench.{suffix}"
    plot(measured, file)
    start = file.read_bytes()[:200]
    assert start.startswith(b"\x89PNG") if suffix == "png" else b"<?xml" in start


def test_figures_that_are_refused(
    measured: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadInput, match=r"plots are written as \.png, \.svg, \.pdf"):
        plot(measured, tmp_path / "bench.txt")
    with pytest.raises(BadInput, match="a plot shows decode steps"):
        plot(run_of(made(phase="prefill")), tmp_path / "bench.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingEnvironment, match=r"pip install 'cla-export\[plot\]'"):
        plot(measured, tmp_path / "bench.png")
