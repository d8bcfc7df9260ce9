"""aiperf profiles the server, and counts what the server and our own load generator count."""

import json
import subprocess
import sys

import httpx
import pytest
from running import metrics

REQUESTS, CLIENTS, PROMPT, NEW = 24, 4, 48, 24


@pytest.fixture(scope="module")
def profile(client, server, bundle, tmp_path_factory):
    """aiperf's summary, and how the server's counters grew meanwhile."""
    folder = tmp_path_factory.mktemp("aiperf")
    with httpx.Client(base_url=server.url) as http:
        before = metrics(http)
        client(
            "aiperf", "profile", "--model", "demo", "--url", server.url, "--tokenizer", bundle,
            "--endpoint-type", "completions", "--streaming", "--concurrency", CLIENTS,
            "--request-count", REQUESTS, "--synthetic-input-tokens-mean", PROMPT,
            "--output-tokens-mean", NEW, "--extra-inputs", "ignore_eos:true", "--random-seed", 1,
            "--output-artifact-dir", folder, "--ui", "none",
        )  # fmt: skip
        after = metrics(http)
    (summary,) = folder.rglob("profile_export_aiperf.json")
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    return json.loads(summary.read_text()), grown


def test_all_requests_are_answered_in_full(profile):
    found, grown = profile
    assert found["request_count"]["avg"] == REQUESTS
    assert found.get("error_request_count", {"avg": 0})["avg"] == 0
    assert grown['request_success_total{finished_reason="length"}'] == REQUESTS
    assert grown["generation_tokens_total"] == REQUESTS * NEW
    assert not {k: v for k, v in grown.items() if v and k.startswith("error_responses_total")}


def test_its_times_are_the_servers_own(profile):
    """Seen from outside each is longer, by the way through HTTP and the client's process."""
    found, grown = profile

    def mean(name):
        return 1e3 * grown[f"{name}_seconds_sum"] / grown[f"{name}_seconds_count"]

    assert found["time_to_first_token"]["avg"] >= mean("time_to_first_token")
    assert found["request_latency"]["avg"] >= mean("e2e_request_latency")
    assert found["time_to_first_token"]["min"] > 0
    assert found["output_token_throughput"]["avg"] > 0


def test_bench_server_finds_the_same(profile, server):
    """Both share the machine with the server and whatever else runs: a factor, not per cent."""
    command = [
        sys.executable, "-m", "cla_export.cli", "bench-server", server.url, "--json",
        "--concurrency", CLIENTS, "--requests", REQUESTS, "--prompt", PROMPT, "-n", NEW,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (level,) = json.loads(done.stdout)["levels"]
    found, _ = profile
    ratios = {
        "throughput": found["output_token_throughput"]["avg"] / level["output_token_throughput"]
    }
    for name in ("time_to_first_token", "inter_token_latency", "request_latency"):
        ratios[name] = found[name]["p50"] / level[name]["p50"]
    assert all(0.2 < ratio < 5 for ratio in ratios.values()), ratios
