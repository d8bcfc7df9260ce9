"""What deploy ray decides before Ray starts; tests/deploy has the rest, with Ray itself."""

import asyncio
import json
import socket
import sys
import traceback

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cla_export.deploy import ray_local
from cla_export.deploy.ray_affinity import HEADER, Affinity, prefix_key
from cla_export.deploy.ray_args import ReplicaArgs
from cla_export.deploy.ray_config import config
from cla_export.deploy.ray_metrics import merged
from cla_export.deploy.ray_plan import RayOptions, make_plan
from cla_export.deploy.replicas import Replicas
from cla_export.errors import BadInput, MissingEnvironment
from cla_export.layout import KVLayout
from cla_export.serve.metrics import Metrics

LONG = "x" * 300


def key(**body):
    return prefix_key(json.dumps(body).encode())


def test_keys_are_of_how_a_prompt_begins():
    assert key(prompt=LONG + "a") == key(prompt=LONG + "b", max_tokens=3) != key(prompt="y" + LONG)
    assert key(prompt=[5] * 64 + [1]) == key(prompt=[5] * 64 + [2]) != key(prompt=[6] * 64)
    said = [{"role": "system", "content": LONG}, {"role": "user", "content": "a"}]
    other = [{"role": "system", "content": [{"type": "text", "text": LONG}]}]
    assert key(messages=said) == key(messages=other) != key(prompt=LONG)
    body = json.dumps({"prompt": LONG}).encode()
    assert prefix_key(body, b"Bearer one") != prefix_key(body, b"Bearer two")
    assert key(prompt="\ud800 half of a pair")


ANYTHING = st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=10)
BODIES = ANYTHING.map(lambda found: json.dumps({"prompt": found, "messages": found}).encode())


@settings(deadline=None)
@given(st.binary(max_size=60) | BODIES)
def test_any_body_has_a_key_or_none(body):
    assert len(prefix_key(body)) in (0, 32)


@pytest.mark.parametrize(
    ("path", "headers", "gets"),
    [
        ("/v1/completions", [], True),
        ("/v1/chat/completions", [(b"authorization", b"Bearer k")], True),
        ("/v1/completions", [(HEADER, b"own")], False),
        ("/tokenize", [], False),
    ],
)
def test_the_proxy_adds_the_key_and_passes_the_body_on(path, headers, gets):
    body = json.dumps({"prompt": LONG}).encode()
    sent = [
        {"type": "http.request", "body": body[:100], "more_body": True},
        {"type": "http.request", "body": body[100:], "more_body": False},
        {"type": "http.disconnect"},
    ]
    seen = {}

    async def behind(scope, receive, _send):
        seen["headers"] = scope["headers"]
        seen["messages"] = [await receive() for _ in sent]

    async def receive(coming=iter(sent)):  # noqa: B008 - one iterator for this call
        return next(coming)

    scope = {"type": "http", "path": path, "headers": headers}
    asyncio.run(Affinity(behind)(scope, receive, None))
    assert seen["messages"] == sent
    added = [pair for pair in seen["headers"] if pair not in headers]
    expected = prefix_key(body, dict(headers).get(b"authorization", b"")).encode()
    assert added == ([(HEADER, expected)] if gets else [])


def test_metrics_of_all_replicas_are_one_text():
    layout = KVLayout.create([0, 0], kv_heads=1, head_dim=8)
    one, two = (Metrics("m", layout, "float32") for _ in range(2))
    two.refused(429, "queue_full")
    text = merged({"one": one._registry.collect(), "two": two._registry.collect()}).decode()
    assert text.count("# TYPE cla_export_error_responses_total counter") == 1
    assert 'error_responses_total{code="queue_full",replica="two",status="429"} 1.0' in text
    for replica in ("one", "two"):
        assert f'cla_export_model_info{{model="m",replica="{replica}"}} 1.0' in text


def test_arguments_survive_a_config():
    args = ReplicaArgs("/b", slots=3, kv_memory="8MiB", threads=2, request_timeout=9.0)
    assert ReplicaArgs.read(json.loads(json.dumps(args.to_json()))) == args
    options = args.options()
    assert (options.kv_memory, options.slots, options.request_seconds) == (8 * 2**20, 3, 9.0)
    with pytest.raises(BadInput, match="args has no bundle; expected bundle and any of api_key"):
        ReplicaArgs.read({"slots": 3})
    with pytest.raises(BadInput, match="args has 'slot'"):
        ReplicaArgs.read({"bundle": "/b", "slot": 3})


@pytest.mark.parametrize("text", ["0", "-1:2", "3:2", "a", "1:2:3", ""])
def test_bad_replicas(text):
    with pytest.raises(BadInput, match="--replicas is"):
        Replicas.parse(text)


@pytest.fixture
def plan(zoo):
    folder = zoo.bundle("onnxruntime").folder

    def make(replicas="2", *, slots=3, **given):
        args = ReplicaArgs(str(folder), slots=slots, served_model_name="org/model:8b")
        return make_plan(RayOptions(args, Replicas.parse(replicas), port=0, **given))

    return make


def test_a_deployment_follows_from_the_pool(plan):
    fixed, scaled = plan().deployment(), plan("1:8", affinity="prefix").deployment()
    assert (fixed["num_replicas"], "autoscaling_config" in fixed) == (2, False)
    scaling = scaled["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (1, 8)
    assert scaling["target_ongoing_requests"] == 3
    assert scaled["max_ongoing_requests"] == 6
    assert scaled["request_router_config"]["request_router_kwargs"] == {"slots": 3}
    assert scaled["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 0.0}
    assert config(plan())["applications"][0]["name"] == "org-model-8b"


def test_other_machines_need_a_key(plan):
    with pytest.raises(BadInput, match="there is no API key"):
        plan(host="0.0.0.0")
    assert plan(host="0.0.0.0", allow_no_key=True).http()["host"] == "0.0.0.0"


def test_what_does_not_fit_is_refused_before_ray_starts(plan, monkeypatch):
    monkeypatch.setattr(ray_local, "cpus", lambda: 4)
    with pytest.raises(MissingEnvironment, match=r"5 replicas of 1 CPU each .* has 4 CPU"):
        ray_local.run(plan("5"), print)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(MissingEnvironment, match=r"2 replicas of 0\.5 GPU each .* has 0 GPU"):
        ray_local.run(plan(gpus=0.5), print)
    monkeypatch.setattr(ray_local, "memory", lambda: 10_000)
    with pytest.raises(BadInput, match="more than the 10,000 bytes of this machine"):
        ray_local.run(plan("1", slots=64), print)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = RayOptions(plan().options.replica, Replicas(1, 1), port=taken.getsockname()[1])
        with pytest.raises(BadInput, match="cannot listen there"):
            ray_local.run(make_plan(options), print)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingEnvironment, match=r"cla-export\[ray\]"):
        ray_local.check_installed()


def test_of_a_replica_that_cannot_start_its_exception_is_told():
    said = "no room\n  per slot   4 MiB\ngive less"

    def fail():
        raise BadInput(said)

    try:
        fail()
    except BadInput as error:
        message = "It failed to start:\nRuntimeError: " + "".join(traceback.format_exception(error))
    assert message.count("File") == 2
    assert ray_local.raised(message) == f"cla_export.errors.BadInput: {said}"
    assert ray_local.raised("no replica is left") == "no replica is left"
