"""OpenAI's own client against the real server."""

import json
import socket

import httpx
import numpy as np
import openai
import pytest
from running import PATIENCE, ServerProcess, metrics, running, wait_until

import cla_export
from cla_export.generation import LoadedModel

KEYS = ("sk-one", "sk-two")
GREEDY = {"temperature": 0, "max_tokens": 16}


@pytest.fixture(scope="module")
def server(demo_bundle, template):
    keys = [argument for key in KEYS for argument in ("--api-key", key)]
    options = ("--slots", 4, "--chunk", 16, "--threads", 1, "--max-body", "64KiB")
    with ServerProcess(
        demo_bundle, *options, *keys, "--chat-template", template, "--served-model-name", "demo"
    ) as made:
        yield made


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[0], max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def http(server):
    headers = {"authorization": f"Bearer {KEYS[0]}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def model(demo_bundle) -> LoadedModel:
    return cla_export.load(demo_bundle, threads=1)


def connection(server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE)


def test_completions_are_what_generate_gives(client, model):
    for prompt in ("In the beginning", "And it came to pass", "Blessed are the"):
        got = client.completions.create(model="demo", prompt=prompt, **GREEDY)
        assert got.object == "text_completion"
        assert got.choices[0].text == model.generate(prompt, 16)
        assert got.choices[0].finish_reason == "length"
        ids = model.encode(prompt)
        assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(ids), 16)
        assert got.usage.total_tokens == len(ids) + 16
        same = client.completions.create(model="demo", prompt=ids, **GREEDY)
        assert same.choices[0].text == got.choices[0].text


def test_batches_of_prompts_and_choices(client, model):
    texts = ["In the beginning", "Verily"]
    got = client.completions.create(model="demo", prompt=texts, n=2, seed=7, max_tokens=8)
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    assert got.choices[0].text != got.choices[1].text  # choices of one seed differ
    again = client.completions.create(
        model="demo", prompt=[model.encode(text) for text in texts], n=2, seed=7, max_tokens=8
    )
    assert [c.text for c in again.choices] == [c.text for c in got.choices]
    assert got.usage.prompt_tokens == sum(len(model.encode(text)) for text in texts)
    assert got.usage.completion_tokens == 4 * 8


def test_streaming_gives_the_same_text_and_usage(client):
    options = {"model": "demo", "prompt": "The LORD is my", "max_tokens": 24, "seed": 3}
    whole = client.completions.create(**options)
    chunks = list(
        client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    assert len(chunks) > 12
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [
        "length"
    ]
    assert {c.usage for c in chunks[:-1]} == {None}
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_can_come_with_every_chunk(client):
    chunks = client.completions.create(
        model="demo", prompt="And", max_tokens=6, stream=True, temperature=0,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )  # fmt: skip
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 6


def test_echo_gives_the_prompts_logprobs(client, model):
    prompt = model.encode("In the beginning God created the heaven and the earth.")
    got = client.completions.create(
        model="demo", prompt=[prompt], echo=True, logprobs=1, max_tokens=1, temperature=0
    ).choices[0]
    logits = model.executor.prefill(0, prompt, 0, keep=len(prompt)).astype(np.float64)
    log = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = [log[i, token] for i, token in enumerate(prompt[1:])]
    assert got.logprobs.token_logprobs[0] is None
    assert got.logprobs.token_logprobs[1:-1] == pytest.approx(expected, abs=1e-4)
    assert got.logprobs.token_logprobs[-1] == pytest.approx(log[-1].max(), abs=1e-4)
    assert "".join(got.logprobs.tokens) == got.text
    assert got.logprobs.text_offset[:3] == [0, 2, 6]
    tops = [max(top.values()) for top in got.logprobs.top_logprobs[1:]]
    assert tops == pytest.approx(log.max(1), abs=1e-4)
    only = client.completions.create(
        model="demo", prompt=[prompt], echo=True, logprobs=0, max_tokens=0
    )
    assert only.choices[0].logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert only.usage.completion_tokens == 0


def test_echo_of_text_alone(client):
    got = client.completions.create(model="demo", prompt="Selah", echo=True, **GREEDY)
    bare = client.completions.create(model="demo", prompt="Selah", **GREEDY)
    assert got.choices[0].text == "Selah" + bare.choices[0].text


def test_chat(client, http, model):
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Who?"}]
    got = client.chat.completions.create(model="demo", messages=messages, **GREEDY)
    assert got.object == "chat.completion"
    assert got.choices[0].message.role == "assistant"
    text = "<bos>system: Be brief\nuser: Who?\nassistant:"
    ids = model.tokenizer.encode(text, add_special_tokens=False).ids
    assert got.usage.prompt_tokens == len(ids)
    assert got.choices[0].message.content == model.generate(ids, 16)
    parts = [{"role": "user", "content": [{"type": "text", "text": "Who?"}]}]
    same = client.chat.completions.create(model="demo", messages=[messages[0], *parts], **GREEDY)
    assert same.choices[0].message.content == got.choices[0].message.content
    chunks = list(
        client.chat.completions.create(model="demo", messages=messages, stream=True, **GREEDY)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == (
        got.choices[0].message.content
    )
    assert chunks[-1].choices[0].finish_reason == "length"


def test_chat_logprobs(client):
    got = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Who?"}],
        logprobs=True, top_logprobs=3, max_completion_tokens=5, temperature=0, n=2,
    )  # fmt: skip
    for choice in got.choices:
        entries = choice.logprobs.content
        assert "".join(entry.token for entry in entries) == choice.message.content
        for entry in entries:
            assert len(entry.top_logprobs) == 3
            assert entry.logprob == entry.top_logprobs[0].logprob  # greedy
            assert bytes(entry.bytes).decode() == entry.token
    assert got.choices[0].message.content == got.choices[1].message.content


def test_stops_and_extensions(client, http):
    options = {"model": "demo", "prompt": "In the beginning", "temperature": 0, "max_tokens": 40}
    free = client.completions.create(**options).choices[0].text
    stop = free[10:14]
    got = client.completions.create(**options, stop=["\0never", stop]).choices[0]
    assert got.text == free.partition(stop)[0]
    assert got.finish_reason == "stop"
    pieces = client.completions.create(**options, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == got.text
    ids = client.completions.create(**options, extra_body={"return_token_ids": True})
    tokens = ids.choices[0].token_ids
    assert len(tokens) == 40
    first = next(i for i, token in enumerate(tokens) if token == tokens[6])
    ended = client.completions.create(**options, extra_body={"stop_token_ids": [tokens[6]]})
    assert ended.usage.completion_tokens == first + 1
    assert ended.choices[0].stop_reason == tokens[6]
    other = client.completions.create(**options, logit_bias={str(tokens[0]): -100})
    assert not other.choices[0].text.startswith(free[:3])
    one = client.completions.create(
        **options | {"temperature": 5, "seed": 1}, extra_body={"top_k": 1}
    )
    assert one.choices[0].text == free


def test_a_cached_prefix_changes_nothing_and_is_its_owners(client, server):
    options = {"model": "demo", "prompt": "Blessed is he " * 20, "seed": 5, "max_tokens": 12}
    first = client.completions.create(**options)
    again = client.completions.create(**options)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens >= 64
    assert again.choices[0].text == first.choices[0].text
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[1]) as other:
        theirs = other.completions.create(**options)
    assert theirs.usage.prompt_tokens_details.cached_tokens == 0
    assert theirs.choices[0].text == first.choices[0].text


def test_the_other_endpoints(client, http, server, model):
    (card,) = client.models.list().data
    assert (card.id, card.max_model_len) == ("demo", 2048)
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")
    text = "The grace of our Lord"
    found = http.post("/tokenize", json={"prompt": text}).json()
    assert found["tokens"] == model.encode(text)
    assert found["count"] == len(found["tokens"])
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    assert http.get("/version").json() == {"version": cla_export.__version__}
    for path in ("/health", "/ready"):
        assert httpx.get(server.url + path).status_code == 200  # without a key
    before = metrics(http)
    client.completions.create(model="demo", prompt="And", **GREEDY)
    after = metrics(http)
    assert after["generation_tokens_total"] - before["generation_tokens_total"] == 16
    finished = 'request_success_total{finished_reason="length"}'
    assert after[finished] - before[finished] == 1
    assert after['kv_cache_bytes{group="3"}'] == 0
    assert "application/json" in http.get("/openapi.json").headers["content-type"]


HELLO = {"prompt": "Hello", "max_tokens": 2}
FULL = [5] * 2048
ASK = {"messages": [{"role": "user", "content": "x"}]}
LONG = "context_length_exceeded"


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        ("completions", HELLO | {"suffix": "x"}, 400, "suffix", "unsupported_parameter"),
        ("completions", HELLO | {"frobnicate": 1}, 400, "frobnicate", "unsupported_parameter"),
        ("completions", HELLO | {"\ud83d": 1}, 400, None, None),
        ("completions", HELLO | {"prompt": "\ud83d"}, 400, None, None),
        ("completions", HELLO | {"best_of": 3}, 400, "best_of", None),
        ("completions", HELLO | {"temperature": -1}, 400, "temperature", None),
        ("completions", HELLO | {"temperature": "1"}, 400, "temperature", None),
        ("completions", HELLO | {"top_p": 0}, 400, "top_p", None),
        ("completions", HELLO | {"n": 0}, 400, "n", None),
        ("completions", HELLO | {"max_tokens": -1}, 400, "max_tokens", None),
        ("completions", HELLO | {"max_tokens": 0}, 400, "max_tokens", None),
        ("completions", HELLO | {"max_tokens": 10**30}, 400, "max_tokens", LONG),
        ("completions", HELLO | {"max_tokens": 2048}, 400, "max_tokens", LONG),
        ("completions", HELLO | {"min_tokens": 3}, 400, "min_tokens", None),
        ("completions", HELLO | {"logprobs": 21}, 400, "logprobs", None),
        ("completions", HELLO | {"stop": [""]}, 400, "stop", None),
        ("completions", HELLO | {"logit_bias": {"x": 1}}, 400, "logit_bias", None),
        ("completions", HELLO | {"logit_bias": {"9999": 1}}, 400, "logit_bias", None),
        ("completions", HELLO | {"model": "gpt"}, 404, "model", "model_not_found"),
        ("completions", {"max_tokens": 2}, 400, "prompt", None),
        ("completions", HELLO | {"prompt": ""}, 400, "prompt", None),
        ("completions", HELLO | {"prompt": []}, 400, "prompt", None),
        ("completions", HELLO | {"prompt": [[]]}, 400, "prompt", None),
        ("completions", HELLO | {"prompt": [1, "x"]}, 400, "prompt", None),
        ("completions", HELLO | {"prompt": [2048]}, 400, "prompt", None),
        ("completions", HELLO | {"prompt": [-1]}, 400, "prompt", None),
        ("completions", HELLO | {"prompt": [10**40]}, 400, "prompt", None),
        ("completions", HELLO | {"prompt": [*FULL, 5]}, 400, "prompt", LONG),
        ("completions", HELLO | {"prompt": FULL}, 400, "prompt", LONG),
        ("completions", [], 400, None, "invalid_json"),
        ("chat/completions", {"messages": []}, 400, "messages", None),
        ("chat/completions", {"messages": [{"role": "me"}]}, 400, "messages", "invalid_messages"),
        ("chat/completions", ASK | {"tools": []}, 400, "tools", "unsupported_parameter"),
        (
            "chat/completions", ASK | {"response_format": {"type": "json_object"}},
            400, "response_format.type", None,
        ),
        ("chat/completions", ASK | {"top_logprobs": 3}, 400, "top_logprobs", None),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(http, path, body, status, param, code):
    headers = {"content-type": "application/json"}
    got = http.post(f"/v1/{path}", content=json.dumps(body), headers=headers)
    error = got.json()["error"]
    assert (got.status_code, error["param"], error["code"]) == (status, param, code), error
    assert error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert got.headers["x-request-id"]


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"",
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
        b"null",
        b"[" * 20_000 + b"]" * 20_000,
        b'{"prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    ],
)
def test_bodies_that_are_no_json(http, content):
    got = http.post(
        "/v1/completions", content=content, headers={"content-type": "application/json"}
    )
    assert got.status_code == 400
    assert got.json()["error"]["type"] == "invalid_request_error"


def test_strange_texts_are_only_texts(http):
    for text in ("\0", "a\0b", "\ud83d", "\u202e", "<eos>", "🙂" * 50):
        got = http.post(
            "/v1/completions",
            content=json.dumps({"prompt": text, "max_tokens": 2}),
            headers={"content-type": "application/json"},
        )
        assert got.status_code == (400 if text == "\ud83d" else 200), got.text
    assert http.get("/health").status_code == 200


def test_prompts_fill_the_last_place(client):
    got = client.completions.create(model="demo", prompt=[7] * 2047, max_tokens=1, temperature=0)
    assert got.usage.total_tokens == 2048


def test_more_choices_than_slots(client):
    got = client.completions.create(model="demo", prompt="And", n=5, max_tokens=3, seed=1)
    assert len(got.choices) == 5


def test_keys(server, http):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-wrong") as wrong:
        with pytest.raises(openai.AuthenticationError) as caught:
            wrong.models.list()
        assert caught.value.code == "invalid_api_key"
    for headers in ({}, {"authorization": KEYS[0]}, {"authorization": f"Basic {KEYS[0]}"}):
        for path in ("/v1/models", "/metrics", "/docs", "/nowhere"):
            assert httpx.get(server.url + path, headers=headers).status_code == 401


def test_bodies_that_are_too_long(http):
    for content in (b"x" * 70_000, iter([b"x" * 10_000] * 7)):  # with and without a length
        got = http.post("/v1/completions", content=content)
        assert got.status_code == 413
        assert got.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize(
    "start",
    [
        b"GET /",
        b"GET /health HTTP/1.1\r\nhost: x\r\nx-long: ",
        b"POST /tokenize HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx-end: ",
    ],
    ids=["path", "header", "trailer"],
)
def test_a_head_without_an_end(server, start):
    """Whatever reads it, it does not keep it all."""
    with connection(server) as client:
        client.sendall(start)
        with pytest.raises(ConnectionError):
            client.sendall(b"a" * 2**26)


def test_a_body_of_many_pieces(server):
    """What stands between them is more than a head may be."""
    content = json.dumps({"prompt": "And"}).encode() + b" " * 15_000
    pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in content)
    head = f"POST /tokenize HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEYS[0]}\r\n"
    head += "content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    with connection(server) as client:
        client.sendall(head.encode() + pieces + b"0\r\n\r\n")
        assert client.recv(65_536).startswith(b"HTTP/1.1 200 ")


def test_head_is_get_without_a_body(http):
    """aiperf asks so whether there are metrics, and load balancers whether anybody is there."""
    for path in ("/health", "/ready", "/metrics", "/v1/models"):
        got = http.head(path)
        assert (got.status_code, got.content) == (200, b"")
        assert got.headers["content-type"] == http.get(path).headers["content-type"]
    assert http.head("/v1/completions").status_code == 405


def test_request_ids(http):
    assert http.get("/health", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
    ids = {http.get("/nowhere").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_leaves_frees_its_slots(http, server, streaming):
    body = {"prompt": "And", "max_tokens": 2000, "ignore_eos": True, "stream": streaming, "n": 2}
    before = metrics(http)
    with httpx.Client(base_url=server.url, headers=http.headers) as leaving:
        if streaming:
            with leaving.stream("POST", "/v1/completions", json=body) as got:
                next(got.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                leaving.post("/v1/completions", json=body, timeout=0.3)
    wait_until(lambda: running(http) == 0, 5)
    after = metrics(http)
    kind = 'request_failures_total{kind="cancelled"}'
    assert after[kind] - before.get(kind, 0) == 2
    made = after["generation_tokens_total"] - before["generation_tokens_total"]
    assert made < 2000  # of 4000
    assert after["kv_cache_usage_perc"] == 0


def test_nothing_of_prompts_is_logged(server):
    text = server.stderr
    for words in ("beginning", "Blessed", "Selah"):
        assert words not in text
    assert "Traceback" not in text, text
