"""Ray Serve: replicas that are killed, overloaded, scaled and stopped, as operators see it."""

import signal
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import httpx
import openai
import pytest
import yaml
from ray.serve import Application
from ray_process import PATIENCE, RayProcess, Stream, wait_until

import cla_export
from cla_export.deploy.ray import app
from cla_export.deploy.ray_replica import Replica
from cla_export.deploy.ray_router import PrefixRouter
from cla_export.errors import BadInput
from cla_export.serve.engine import State

SLOTS, QUEUED = 4, 6
LONG = 1900  # tokens: seconds, even on a fast machine
TEXT = "And the LORD said unto Moses, " * 12  # longer than what a key is made of


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deploy") / "demo"
    cla_export.export(cla_export.demo_checkpoint(), folder)
    return folder


@pytest.fixture(scope="module")
def two(bundle, tmp_path_factory):
    """Two replicas; what the tests leave of them is stopped by the last one."""
    given = ("--replicas", 2, "--slots", SLOTS, "--max-queued-requests", QUEUED)
    with RayProcess(bundle, *given, "--affinity", "prefix") as ray:
        yield ray


def ask(ray, prompt, max_tokens=24, **options):
    """Token ids, and the replica that gave them."""
    raw = ray.client(**options).completions.with_raw_response.create(
        model="demo",
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    return raw.parse().choices[0].token_ids, raw.headers["x-replica"]


def test_both_replicas_answer_as_the_bundle_alone(two, bundle):
    alone = replace(cla_export.load(bundle, threads=1), eos=frozenset())
    seen = set()
    for first in range(16):  # prompts of their own, so that keys fall to both
        prompt = [first + 3, 100 + first, 7]
        tokens, replica = ask(two, prompt)
        assert tokens == list(alone.generate_ids(prompt, 24))
        seen.add(replica)
    assert seen == two.names()
    assert len(seen) == 2
    streamed = Stream(two, [5, 6, 7], 40)
    streamed.join(PATIENCE)
    assert streamed.error is None
    assert streamed.tokens == list(alone.generate_ids([5, 6, 7], 40))


def test_prompts_that_begin_alike_share_a_replica_and_its_cache(two):
    client = two.client()
    found, cached = set(), []
    for end in ("Go down", "Rise up early", "Take thee", "Speak"):
        raw = client.completions.with_raw_response.create(
            model="demo", prompt=TEXT + end, max_tokens=4
        )
        found.add(raw.headers["x-replica"])
        cached.append(raw.parse().usage.prompt_tokens_details.cached_tokens)
    assert len(found) == 1
    assert cached[0] == 0
    assert min(cached[1:]) >= 64


def test_errors_are_those_of_serve(two):
    with pytest.raises(openai.NotFoundError, match="this server has 'demo'"):
        two.client().completions.create(model="other", prompt="x")
    assert httpx.get(f"{two.url}/ready", timeout=PATIENCE).json() == {"status": "ready"}
    answer = httpx.get(f"{two.url}/v1/models", timeout=PATIENCE, headers={"x-request-id": "mine"})
    assert answer.headers.get_list("x-request-id") == ["mine"]


def test_more_than_replicas_and_queue_hold_is_answered_429(two):
    body = {"prompt": [3, 4], "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    inside = 2 * 2 * SLOTS + QUEUED
    answers = []
    replicas = two.replicas()
    with httpx.Client(base_url=two.url, timeout=PATIENCE) as client:

        def one():
            answers.append(client.post("/v1/completions", json=body))

        threads = [threading.Thread(target=one) for _ in range(3 * inside)]
        for replica in replicas:  # held, so that how fast they are does not matter
            replica.suspend()
        try:
            for thread in threads:
                thread.start()
            wait_until(lambda: len(answers) >= 5, 20)
            assert {answer.status_code for answer in answers} == {429}
            assert {answer.headers["retry-after"] for answer in answers} == {"1"}
        finally:
            for replica in replicas:
                replica.resume()
        for thread in threads:
            thread.join(PATIENCE)
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 429}
    assert len(codes) == 3 * inside


def test_a_client_that_leaves_frees_its_slot(two):
    stream = Stream(two, [9, 9], LONG)
    wait_until(lambda: stream.tokens)
    stream._events.close()

    def running():
        text = httpx.get(f"{two.url}/metrics", timeout=PATIENCE).text
        lines = [n for n in text.splitlines() if n.startswith("cla_export_num_requests_running{")]
        assert len(lines) == 2
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    wait_until(lambda: running() == 0)
    stream.join(PATIENCE)
    assert len(stream.tokens) < LONG
    text = httpx.get(f"{two.url}/metrics", timeout=PATIENCE).text
    assert 'kind="cancelled"' in text


def test_a_killed_replica_takes_only_its_own_streams_and_is_replaced(two):
    before, streams = two.names(), []
    while {stream.replica for stream in streams} != before:
        assert len(streams) <= SLOTS
        streams.append(Stream(two, [11 + len(streams), 4], LONG))
    two.replicas()[0].kill()
    tokens, survivor = ask(two, [30, 31], 8)  # with OpenAI's own retries
    assert len(tokens) == 8
    for stream in streams:
        stream.join(PATIENCE)
    broken = [stream for stream in streams if stream.error is not None]
    assert {stream.replica for stream in broken} == before - {survivor}
    assert all(len(stream.tokens) < LONG for stream in broken)
    assert all(len(stream.tokens) == LONG for stream in streams if stream not in broken)
    wait_until(lambda: len(two.names()) == 2)
    assert survivor in two.names()
    assert two.names() != before
    wait_until(lambda: two.stderr[-1] == "replicas: 2 running\n")
    assert any(line.startswith("replicas: 1 running, 1 starting") for line in two.stderr)


def test_sigterm_lets_a_stream_end_and_leaves_no_process(two):
    stream = Stream(two, [12, 13], LONG)
    wait_until(lambda: stream.tokens)
    code, out = two.stop()
    stream.join(PATIENCE)
    assert (code, out) == (0, "")
    assert stream.error is None
    assert len(stream.tokens) == LONG
    assert "Traceback" not in "".join(two.stderr)


def test_load_adds_a_replica_and_its_end_takes_it_away(bundle):
    given = ("--replicas", "1:2", "--slots", 2, "--upscale-delay", 1, "--downscale-delay", 1)
    often = {  # Ray's own: how often it is told of load
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    }
    with RayProcess(bundle, *given, **often) as ray:
        assert len(ray.names()) == 1
        enough = threading.Event()

        def load(number):
            while not enough.is_set():
                ask(ray, [number + 3, 8], 300)

        threads = [threading.Thread(target=load, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        try:
            wait_until(lambda: len(ray.names()) == 2)
        finally:
            enough.set()
            for thread in threads:
                thread.join(PATIENCE)
        wait_until(lambda: len(ray.names()) == 1)
        assert ray.stop(signal.SIGINT, group=True) == (0, "")


def test_what_cannot_run_here_is_said_with_what_to_do(bundle):
    given = ("--port", "0", "--num-cpus", "1000")
    command = [sys.executable, "-m", "cla_export.cli", "deploy", "ray", str(bundle), *given]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3
    assert "1 replicas of 1000 CPU each are asked for" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_written_config_is_what_ray_takes(bundle, tmp_path):
    keys, file = tmp_path / "keys", tmp_path / "serve.yaml"
    keys.write_text("secret-key\n")
    given = ("--replicas", "1:8", "--affinity", "prefix", "--kv-memory", "64MiB")
    shown = ("--host", "0.0.0.0", "--api-key-file", keys, "--write", file)
    command = [sys.executable, "-m", "cla_export.cli", "deploy", "ray", bundle, *given, *shown]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "secret-key" not in file.read_text()
    (application,) = yaml.safe_load(file.read_text())["applications"]
    assert application["import_path"] == "cla_export.deploy.ray:app"
    assert application["args"]["api_key_file"] == str(keys)
    (deployment,) = application["deployments"]
    assert deployment["autoscaling_config"]["max_replicas"] == 8
    assert isinstance(app(application["args"]), Application)
    with pytest.raises(BadInput, match="args has 'slotz'"):
        app({"bundle": str(bundle), "slotz": 3})


def test_a_replica_whose_engine_is_dead_or_stalled_is_not_healthy():
    def check(**engine):
        Replica.check_health(SimpleNamespace(_engine=SimpleNamespace(**engine)))

    check(state=State.ready, stalled=False)
    check(state=State.draining, stalled=False)
    with pytest.raises(RuntimeError, match="dead: three steps"):
        check(state=State.dead, dead="three steps failed", stalled=False)
    with pytest.raises(RuntimeError, match="too long"):
        check(state=State.ready, stalled=True)


@pytest.mark.parametrize("gone", [1, 3])
def test_a_replica_that_goes_moves_only_its_own_keys(gone):
    import asyncio

    replicas = [
        SimpleNamespace(replica_id=SimpleNamespace(unique_id=f"replica-{number}"))
        for number in range(5)
    ]
    running: dict[object, int] = {}
    router = PrefixRouter.__new__(PrefixRouter)
    router._replica_queue_len_cache = SimpleNamespace(get=lambda who: running.get(id(who)))
    router.initialize_state(slots=2)

    def first(key, among):
        request = SimpleNamespace(
            metadata=SimpleNamespace(session_id=key), routing_context=SimpleNamespace()
        )
        ranks = asyncio.run(router.choose_replicas(among, request))
        assert sorted(map(id, ranks[-1])) == sorted(map(id, among))
        return ranks[0]

    keys = [f"key-{number}" for number in range(60)]
    own = {key: first(key, replicas) for key in keys}
    assert {len(group) for group in own.values()} == {1}
    assert {group[0].replica_id.unique_id for group in own.values()} == {
        replica.replica_id.unique_id for replica in replicas
    }
    fewer = [replica for replica in replicas if replica is not replicas[gone]]
    for key in keys:
        assert first(key, fewer) == own[key] or own[key] == [replicas[gone]]
    assert len(first("", replicas)) == 5
    running[id(own[keys[0]][0].replica_id)] = 2  # every slot taken
    assert len(first(keys[0], replicas)) == 5
