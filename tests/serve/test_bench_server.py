"""bench-server against a server whose every step takes a known time."""

import json
import subprocess
import sys
import time

import pytest
from fake import FakeExecutor
from running import application

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
    found = bench_server(
        url, concurrency=[1, 2, 8], requests=4, prompt_tokens=3, new_tokens=6,
        first_token_limit_ms=30_000, between_tokens_limit_ms=30_000,
    )  # fmt: skip
    assert found.model == "fake"
    one, two, eight = found.levels
    assert (one.answered, one.refused, two.answered) == (4, 0, 4)
    assert eight.answered + eight.refused == 16
    assert eight.refused > 0
    for level in found.levels:
        assert level.first_token.p50 >= 1e3 * STEP
        assert level.between_tokens.p50 >= 0.9e3 * STEP
        assert level.whole.p50 >= 5e3 * STEP
        assert level.tokens_per_s == pytest.approx(level.answered * 6 / level.seconds)
        assert level.good_per_s == pytest.approx(level.answered / level.seconds)
    assert two.tokens_per_s > one.tokens_per_s
    strict = bench_server(
        url, concurrency=[1], requests=2, prompt_tokens=3, new_tokens=6,
        between_tokens_limit_ms=1e3 * STEP / 2,
    )  # fmt: skip
    assert strict.levels[0].good_per_s == 0


def test_what_cannot_be_measured(url):
    with pytest.raises(BadInput, match="expected one such as"):
        bench_server("localhost:8000")
    with pytest.raises(BadInput, match="at least 1 of each"):
        bench_server(url, concurrency=[0])
    with pytest.raises(RunError, match="status 400"):
        bench_server(url, concurrency=[1], prompt_tokens=64)
    with pytest.raises(RunError, match="does not answer"):
        bench_server("http://127.0.0.1:9")


def test_the_command(url, tmp_path):
    command = [sys.executable, "-m", "cla_export.cli", "bench-server", url, "--concurrency", "1"]
    few = ["--requests", "2", "--prompt", "3", "-n", "4", "--output", str(tmp_path / "load.json")]
    done = subprocess.run([*command, *few], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout
    (level,) = json.loads((tmp_path / "load.json").read_text())["levels"]
    assert level["answered"] == 2
    assert level["first_token"]["p50"] > 0
