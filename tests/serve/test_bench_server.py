"""bench-server against a server whose every step takes a known time, and against an engine."""

import csv
import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from fake import FakeExecutor
from running import application

from cla_export.benchmark.engine_load import bench_engine
from cla_export.benchmark.load import Answer, LoadBench, Work, flat, measure_level, read_load
from cla_export.benchmark.load_comparison import compare_loads
from cla_export.benchmark.server import bench_server
from cla_export.errors import BadInput, RunError
from cla_export.serve.engine import Limits

STEP = 0.02  # seconds


@pytest.fixture
def url(tmp_path):
    executor = FakeExecutor(slots=2, capacity=64, vocab=250)
    executor.before = lambda _rows: time.sleep(STEP)
    with application(executor, tmp_path, limits=Limits(queued_requests=2)) as (address, _):
        yield address


def test_times_are_those_of_the_steps(url):
    work = Work((1, 2, 8), 4, 3, 6, first_token_limit_ms=30_000, between_tokens_limit_ms=30_000)
    found = bench_server(url, work)
    assert found.model == "fake"
    one, two, eight = found.levels
    assert (one.request_count, one.refused, two.request_count) == (4, 0, 4)
    assert eight.request_count + eight.refused == 16
    assert eight.refused > 0
    for level in found.levels:
        assert level.time_to_first_token.p50 >= 1e3 * STEP
        assert level.inter_chunk_latency.p50 >= 0.9e3 * STEP
        assert level.inter_token_latency.p50 >= 0.9e3 * STEP
        assert level.request_latency.p50 >= 5e3 * STEP
        seconds = level.benchmark_duration
        assert level.output_token_throughput == pytest.approx(level.request_count * 6 / seconds)
        assert level.goodput == level.request_throughput
        assert level.request_throughput == pytest.approx(level.request_count / seconds)
    strict = bench_server(url, Work((1,), 2, 3, 6, between_tokens_limit_ms=1e3 * STEP / 2))
    assert strict.levels[0].goodput == 0


def test_what_cannot_be_measured(url):
    with pytest.raises(BadInput, match="expected one such as"):
        bench_server("localhost:8000", Work())
    with pytest.raises(BadInput, match="at least 1 of each"):
        Work((0,))
    with pytest.raises(BadInput, match="at least 1 of each"):
        Work(())
    with pytest.raises(RunError, match="status 400"):
        bench_server(url, Work((1,), prompt_tokens=64))
    with pytest.raises(RunError, match="does not answer"):
        bench_server("http://127.0.0.1:9", Work())


def test_figures_of_a_level_by_hand():
    work = Work((2,), 2, 1, 3, first_token_limit_ms=150, between_tokens_limit_ms=40)
    answers = [
        Answer(200, 1.0, (1.1, 1.12, 1.16), 3),  # ms: 100, then 20 and 40
        Answer(200, 1.0, (1.2, 1.21), 3),  # 200, too late; two tokens in its second event
        Answer(429, 1.0, (), 0),
    ]
    level = measure_level(work, 2, answers, 0.5)
    assert (level.request_count, level.refused) == (2, 1)
    assert level.output_token_throughput == pytest.approx(12)
    assert (level.request_throughput, level.goodput) == (4, 2)
    assert level.time_to_first_token.avg == pytest.approx(150)
    assert level.inter_token_latency.avg == pytest.approx((30 + 5) / 2)
    assert level.inter_chunk_latency.p50 == pytest.approx(20)
    assert level.request_latency.p50 == pytest.approx((160 + 210) / 2)
    with pytest.raises(RunError, match="none of 1 requests"):
        measure_level(work, 2, answers[2:], 0.5)


def loaded(*levels):
    return LoadBench("somewhere", "model", "2026-11-29", Work((1, 2)), levels)


def test_a_comparison_names_what_is_worse():
    work = Work((1,), 1, 1, 2)
    then = measure_level(work, 1, [Answer(200, 0.0, (0.1, 0.12), 2)], 0.12)
    assert compare_loads(loaded(then), loaded(then)).regressions == ()
    later = replace(then.time_to_first_token, p95=then.time_to_first_token.p95 * 1.3)
    worse = replace(then, time_to_first_token=later, goodput=then.goodput * 0.7)
    named = compare_loads(loaded(worse), loaded(then)).regressions
    assert [line.split()[2] for line in named] == ["goodput", "time_to_first_token_p95"]
    assert compare_loads(loaded(worse), loaded(then), noise=0.4).regressions == ()
    assert compare_loads(loaded(then), loaded(worse)).regressions == ()
    assert compare_loads(loaded(), loaded(then)).regressions == ("1 streams: not measured now",)
    other = replace(loaded(then), work=work)
    assert "load is" in compare_loads(other, loaded(then)).notes[0]


def test_an_engine_in_this_process(demo_bundle):
    found = bench_engine(
        demo_bundle, Work((1, 3), 3, 5, 4), slots=2, threads=1, prefill_seconds=0.01
    )
    assert [level.request_count for level in found.levels] == [3, 6]
    assert [level.refused for level in found.levels] == [0, 0]
    for level in found.levels:
        seconds = level.benchmark_duration
        assert level.output_token_throughput == pytest.approx(level.request_count * 4 / seconds)
        assert 0 < level.time_to_first_token.p50 < level.request_latency.p50
    with pytest.raises(BadInput, match="positions"):
        bench_engine(demo_bundle, Work(prompt_tokens=10**6))


def test_the_command(url, tmp_path):
    command = [sys.executable, "-m", "cla_export.cli", "bench-server", url, "--concurrency", "1"]
    command += ["--requests", "2", "--prompt", "3", "-n", "4"]
    stored, table, figure = (tmp_path / name for name in ("load.json", "load.csv", "load.svg"))
    files = ["--output", stored, "--csv", table, "--plot", figure]
    done = subprocess.run([*command, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout
    found = read_load(stored)
    assert found.to_json() == json.loads(stored.read_text())
    (level,) = found.levels
    assert level.request_count == 2
    (row,) = csv.DictReader(table.open())
    assert {name: float(value) for name, value in row.items()} == flat(level)
    assert "inter_token_latency_p99" in row
    assert "time to the first token" in figure.read_text()
    content = found.to_json()
    content["levels"][0]["goodput"] = 1e9
    stored.write_text(json.dumps(content))
    done = subprocess.run([*command, "--compare", stored], capture_output=True, text=True)
    assert done.returncode == 1
    assert "goodput is" in done.stderr
    stored.write_text("{}")
    with pytest.raises(BadInput, match="not a stored load"):
        read_load(stored)
