"""The model repository that `deploy triton` writes, in a real tritonserver."""

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from tritonserver import PATIENCE, Triton, wait_until

import cla_export
from cla_export.sampling import Sampler, SamplingParams

PROMPTS = ("In the beginning", "And it came to pass", "Jesus said unto him,", "The LORD is my")
LONG = {"max_tokens": 600, "ignore_eos": True, "temperature": 0.0}
SLOTS = 4


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "demo"
    cla_export.export(cla_export.demo_checkpoint(), path)
    return path


@pytest.fixture(scope="module")
def alone(bundle):
    """A prompt's continuation by the bundle itself: (text, count, temperature, seed) -> ids."""
    model = cla_export.load(bundle)

    def generate(prompt, count, temperature=0.0, seed=0):
        ids = model.encode(prompt)
        sampler = Sampler(SamplingParams(temperature=temperature, seed=seed), ids)
        return list(model.generate_ids(ids, count, sampler))

    return generate


@pytest.fixture(scope="module")
def triton(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton")
    repository = folder / "repository"
    deploy(bundle, repository, "--slots", SLOTS)
    deploy(
        bundle, repository, "--name", "small", "--copy", "--slots", 1, "--max-queued-requests", 1
    )
    deploy(bundle, repository, "--name", "damaged", "--copy")
    with (repository / "damaged" / "1" / "bundle" / "tokenizer.json").open("a") as file:
        file.write(" ")
    server = Triton(repository, "demo", folder)
    yield server
    server.stop()


def deploy(*arguments: object) -> None:
    command = [sys.executable, "-m", "cla_export.cli", "deploy", "triton", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def generate(triton, model="demo", **inputs) -> httpx.Response:
    return triton.client.post(f"/v2/models/{model}/generate", json=inputs)


def stream(triton, model="demo", **inputs):
    """Events as they come."""
    inputs = {"stream": True, **inputs}
    with triton.client.stream(
        "POST", f"/v2/models/{model}/generate_stream", json=inputs
    ) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def ids(answer: dict) -> list[int]:
    """Triton writes a list of one as a number."""
    found = answer["token_ids"]
    return found if isinstance(found, list) else [found]


def load(triton, model, what="load") -> httpx.Response:
    return triton.client.post(f"/v2/repository/models/{model}/{what}")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_are_those_of_the_bundle_alone(triton, alone, prompt):
    answer = generate(triton, text_input=prompt, max_tokens=48, temperature=0.0, ignore_eos=True)
    assert answer.status_code == 200, answer.text
    content = answer.json()
    assert ids(content)[: len(alone(prompt, 48))] == alone(prompt, 48)
    assert content["finish_reason"] == "length" and content["completion_tokens"] == 48


def test_a_seed_gives_what_it_gives_alone(triton, alone):
    asked = {"text_input": PROMPTS[0], "max_tokens": 40, "ignore_eos": True}
    content = generate(triton, **asked, temperature=0.7, seed=11).json()
    expected = alone(PROMPTS[0], 40, 0.7, 11)
    assert ids(content)[: len(expected)] == expected


def test_a_stream_is_the_whole_in_pieces(triton):
    asked = {"text_input": PROMPTS[1], "max_tokens": 32, "temperature": 0.0}
    whole = generate(triton, **asked).json()
    pieces = list(stream(triton, **asked))
    assert "".join(piece["text_output"] for piece in pieces) == whole["text_output"]
    assert [token for piece in pieces for token in ids(piece)] == ids(whole)
    assert len(pieces) > 8
    assert [piece["finish_reason"] != "" for piece in pieces] == [False] * (len(pieces) - 1) + [
        True
    ]
    assert pieces[-1]["completion_tokens"] == whole["completion_tokens"]
    assert pieces[-1]["prompt_tokens"] == whole["prompt_tokens"] > 0


def test_a_stop_string_and_token_ids(triton, bundle):
    prompt = cla_export.load(bundle).encode(PROMPTS[0])
    asked = {"input_ids": prompt, "max_tokens": 24, "temperature": 0.0}
    whole = generate(triton, **asked).json()["text_output"]
    stop = whole.split()[1]
    content = generate(triton, **asked, stop=[stop, "never to be found"]).json()
    assert content["finish_reason"] == "stop"
    assert content["text_output"] == whole[: whole.index(stop)]


def test_streams_run_side_by_side_and_do_not_disturb_each_other(triton, alone):
    together = threading.Barrier(SLOTS)
    began, order = [threading.Event() for _ in PROMPTS], []

    def read(index: int) -> list[int]:
        together.wait(PATIENCE)
        tokens = []
        for event in stream(triton, text_input=PROMPTS[index], **LONG):
            began[index].set()
            tokens += ids(event)
        order.append(all(one.is_set() for one in began))
        return tokens

    with ThreadPoolExecutor(SLOTS) as pool:
        found = list(pool.map(read, range(SLOTS)))
    assert order[0], "one had ended before another began"
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        expected = alone(prompt, LONG["max_tokens"])
        assert len(tokens) == LONG["max_tokens"] and tokens[: len(expected)] == expected


def test_a_client_that_leaves_frees_its_slot(triton):
    cancelled = 'request_failures_total{kind="cancelled",model="demo",version="1"}'
    before = triton.metrics().get(cancelled, 0)
    events = stream(triton, text_input=PROMPTS[0], **LONG)
    next(events)
    events.close()
    wait_until(lambda: triton.metrics().get(cancelled, 0) == before + 1)
    running = 'num_requests_running{model="demo",version="1"}'
    wait_until(lambda: triton.metrics()[running] == 0)


def test_clients_may_leave_whenever_they_like(triton):
    """Around the last answer too: a server that is asked at that moment who left, is no more."""
    asked = {"text_input": PROMPTS[2], "temperature": 0.0, "ignore_eos": True}
    expected = ids(generate(triton, **asked, max_tokens=24).json())

    def read(index: int) -> None:
        count, leave = index % 24 + 1, index % 3 == 0
        tokens = []
        for event in stream(triton, **asked, max_tokens=count):
            tokens += ids(event)
            if leave and len(tokens) * 2 > count:
                return
        assert tokens == expected[:count]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(96)))
    assert generate(triton, text_input="a", max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "text_input and input_ids"),
        ({"text_input": "a", "temperature": -1.0}, "temperature"),
        ({"text_input": "a", "temprature": 1.0}, "temprature: this model does not have"),
        ({"text_input": "a", "max_tokens": 5000}, "this model's limit is 2048"),
        ({"input_ids": [5, 99999]}, "99999"),
        ({"text_input": "a", "max_tokens": [1, 2]}, "max_tokens"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(triton, inputs, said):
    answer = generate(triton, **inputs)
    assert answer.status_code == 400 and said in answer.json()["error"]
    assert generate(triton, text_input="a", max_tokens=1).status_code == 200


def test_a_damaged_bundle_is_not_loaded(triton):
    answer = load(triton, "damaged")
    assert answer.status_code == 400
    assert "tokenizer.json" in answer.json()["error"]


def test_overload_is_refused_and_an_unload_waits_for_what_runs(triton):
    assert load(triton, "small").status_code == 200
    running = stream(triton, "small", text_input=PROMPTS[0], **LONG)
    tokens = ids(next(running))
    asked = {"text_input": PROMPTS[1], "max_tokens": 1}
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: generate(triton, "small", **asked), range(6)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(refused) < len(answers)
    assert all("1 requests wait, and at most 1 may" in one.json()["error"] for one in refused)
    assert load(triton, "small", "unload").status_code == 200
    wait_until(lambda: triton.client.get("/v2/models/small/ready").status_code != 200)
    tokens += [token for event in running for token in ids(event)]
    assert len(tokens) == LONG["max_tokens"]


def test_sigterm_ends_server_and_engine(bundle, tmp_path):
    deploy(bundle, tmp_path / "repository", "--slots", 1)
    server = Triton(tmp_path / "repository", "demo", tmp_path)
    stubs = subprocess.run(
        ["pgrep", "-P", str(server.process.pid)], capture_output=True, text=True
    ).stdout.split()
    assert stubs
    assert server.stop() == 0, server.log
    wait_until(lambda: not any(Path("/proc", stub).exists() for stub in stubs))
