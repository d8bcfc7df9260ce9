"""What goes wrong, injected: clients, executors, overload, signals, bundles."""

import contextlib
import json
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import product

import httpx
import numpy as np
import openai
import pytest
from fake import FakeDevice, FakeExecutor, expected
from running import (
    PATIENCE,
    ServerProcess,
    application,
    in_threads,
    metrics,
    running,
    wait_until,
)

from cla_export.bundle import open_bundle
from cla_export.errors import BadInput, MissingEnvironment
from cla_export.serve.engine import Limits
from cla_export.serve.pool import size_pool
from cla_export.serve.process import listen
from cla_export.serve.server import Options, check_options, open_model

SLOW = 0.02  # seconds of a slow executor's step


both_kinds = pytest.mark.parametrize("kind", [FakeExecutor, FakeDevice])


def slow(slots=2, capacity=200, seconds=SLOW, kind=FakeExecutor):
    executor = kind(slots, capacity)
    executor.before = lambda _rows: time.sleep(seconds)
    return executor


def ask(url, prompt=(1, 2, 3), **given):
    body = {"prompt": list(prompt), "max_tokens": 5, "temperature": 0, "return_token_ids": True}
    return httpx.post(f"{url}/v1/completions", json=body | given, timeout=PATIENCE)


def tokens_of(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


def events_of(response):
    """The events of a stream, as they are read."""
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


@contextlib.contextmanager
def streaming(url, **given):
    body = {"prompt": [1, 2, 3], "max_tokens": 150, "temperature": 0, "return_token_ids": True}
    body |= {"stream": True, "ignore_eos": True} | given
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE) as response:
        yield response


def test_overload_is_answered_at_once_and_those_inside_finish(tmp_path):
    limits = Limits(queued_requests=4)
    with application(slow(seconds=0.1), tmp_path, limits=limits) as (url, engine):
        answers = in_threads(40, lambda i: (ask(url, (1, i)), time.monotonic()))
        accepted = [a for a, _ in answers if a.status_code == 200]
        refused = [a for a, _ in answers if a.status_code == 429]
        assert len(accepted) + len(refused) == 40
        assert len(accepted) >= 4
        assert len(refused) > 10
        for answer in refused:
            assert answer.json()["error"]["code"] == "queue_full"
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        for index, (answer, _) in enumerate(answers):
            if answer.status_code == 200:
                assert tokens_of(answer) == expected([1, index], 5)
        assert engine.load.decoding == engine.load.waiting == 0


def test_the_queue_is_bounded_in_tokens_too(tmp_path):
    limits, long = Limits(queued_tokens=100), slow(1, 20_000, 0.001)
    with application(long, tmp_path, limits=limits) as (url, engine):
        with streaming(url, max_tokens=19_000) as busy:
            events = events_of(busy)  # the stream is closed with its reader
            next(events)
            waiting = threading.Thread(target=ask, args=(url,), kwargs={"max_tokens": 90})
            waiting.start()
            wait_until(lambda: engine.load.waiting == 1)
            refused = ask(url, max_tokens=50)
        waiting.join(PATIENCE)
        assert refused.status_code == 429
        assert "tokens wait" in refused.json()["error"]["message"]


def test_openais_client_waits_and_tries_again(tmp_path):
    limits, long = Limits(queued_requests=1), slow(1, 20_000, 0.001)
    with (
        application(long, tmp_path, limits=limits) as (url, engine),
        contextlib.ExitStack() as stack,
    ):
        client = stack.enter_context(openai.OpenAI(base_url=f"{url}/v1", api_key="-"))
        busy = stack.enter_context(streaming(url, max_tokens=19_000))
        events = events_of(busy)
        next(events)
        waiting = threading.Thread(target=ask, args=(url,))
        waiting.start()
        wait_until(lambda: engine.load.waiting == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            client.with_options(max_retries=0).completions.create(model="fake", prompt=[4])
        assert caught.value.response.headers["retry-after"] == "1"
        threading.Timer(0.3, busy.close).start()
        got = client.completions.create(model="fake", prompt=[4], max_tokens=2)
        assert got.usage.completion_tokens == 2
        waiting.join(PATIENCE)


def test_more_choices_than_may_wait_are_refused_together(tmp_path):
    limits = Limits(queued_requests=3)
    with application(FakeExecutor(), tmp_path, limits=limits) as (url, engine):
        assert ask(url, n=4).status_code == 429
        assert engine.load.waiting == 0
        assert len(ask(url, n=3).json()["choices"]) == 3


def connect(url, **body):
    """A connection whose request was sent, and whose answer nobody reads."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps({"prompt": [1], "max_tokens": 1500} | body)
    connection = socket.create_connection((host, int(port)))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.sendall(
        (
            f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(content)}\r\n\r\n{content}"
        ).encode()
    )
    return connection


@pytest.mark.parametrize(
    ("kind", "stream", "when"),
    [
        *product([FakeExecutor], [True, False], ["at once", "waiting", "decoding"]),
        (FakeDevice, True, "decoding"),
    ],
)
def test_clients_that_leave_free_their_slots(tmp_path, kind, stream, when):
    with application(slow(4, 20_000, 0.001, kind), tmp_path) as (url, engine):
        for _ in range(5):
            with connect(url, stream=stream, n=6, max_tokens=19_000):
                if when != "at once":
                    wait_until(lambda: engine.load.waiting == 2 and engine.load.decoding == 4)
                if when == "decoding":
                    wait_until(lambda: engine.load.tokens > 40)
            wait_until(lambda: engine.load.decoding == 0 and engine.idle)
        assert engine.load.prefilling == engine.load.waiting == 0
        assert tokens_of(ask(url)) == expected([1, 2, 3], 5)


def test_a_slow_reader_delays_nobody(tmp_path):
    one = FakeExecutor(2, capacity=2000)
    with application(one, tmp_path) as (url, engine), connect(url, stream=True, logprobs=20):
        wait_until(lambda: engine.load.decoding == 1)
        assert tokens_of(ask(url)) == expected([1, 2, 3], 5)
        wait_until(lambda: engine.idle)  # its slot is free though it never read
        assert tokens_of(ask(url, (9,))) == expected([9], 5)


def test_requests_have_a_time(tmp_path):
    with application(slow(slots=1), tmp_path, request_seconds=1.2) as (url, engine):
        late = ask(url, max_tokens=150)
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "timeout"
        assert late.headers["x-should-retry"] == "false"
        with streaming(url) as response:
            found = list(events_of(response))
        assert found[-1]["error"]["code"] == "timeout"
        assert len(found) > 2
        with openai.OpenAI(base_url=f"{url}/v1", api_key="-") as client:
            with pytest.raises(openai.InternalServerError):
                client.completions.create(model="fake", prompt=[1], max_tokens=150)
            with pytest.raises(openai.APIError):
                list(
                    client.completions.create(model="fake", prompt=[1], max_tokens=150, stream=True)
                )
        wait_until(lambda: engine.idle)


def test_a_clock_that_jumps_ends_nothing(tmp_path, monkeypatch):
    with application(slow(), tmp_path, request_seconds=20) as (url, _):
        monkeypatch.setattr(time, "time", lambda: 4e9)
        assert tokens_of(ask(url)) == expected([1, 2, 3], 5)


@both_kinds
def test_rows_without_numbers_fail_alone(tmp_path, kind):
    executor = slow(slots=4, seconds=0.005, kind=kind)
    executor.change = lambda tokens, logits: (
        np.full_like(logits, np.nan) if tokens[0] == 13 and len(tokens) > 5 else logits
    )
    with application(executor, tmp_path) as (url, _):
        answers = in_threads(4, lambda i: ask(url, (10 + i, 1), max_tokens=20))
        assert [answer.status_code for answer in answers] == [200, 200, 200, 500]
        assert answers[3].json()["error"]["code"] == "bad_logits"
        for i, answer in enumerate(answers[:3]):
            assert tokens_of(answer) == expected([10 + i, 1], 20)


@both_kinds
def test_an_executor_that_raises_once_and_then_for_good(tmp_path, kind):
    executor = kind(2)
    with application(executor, tmp_path) as (url, _):

        def fail(_rows):
            raise RuntimeError("device lost")

        executor.before = fail
        failed = ask(url)
        assert failed.status_code == 500
        assert failed.json()["error"]["code"] == "step_failed"
        executor.before = lambda _rows: None
        assert tokens_of(ask(url)) == expected([1, 2, 3], 5)
        assert httpx.get(f"{url}/health").status_code == 200
        executor.before = fail
        assert [ask(url).status_code for _ in range(4)] == [500, 500, 500, 503]
        dead = httpx.get(f"{url}/health")
        assert dead.status_code == 503
        assert "device lost" in dead.json()["error"]["message"]
        assert ask(url).headers["retry-after"]


def test_a_step_that_hangs_turns_health_red(tmp_path):
    executor, hang = FakeExecutor(2), threading.Event()
    limits = Limits(step_seconds=0.3)
    with application(executor, tmp_path, limits=limits) as (url, _):
        executor.before = lambda _rows: hang.wait(PATIENCE)
        began = time.monotonic()
        answer = ask(url)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_stalled")
        assert time.monotonic() - began < 10
        assert httpx.get(f"{url}/health").status_code == 503
        assert ask(url).status_code == 503
        executor.before = lambda _rows: None
        hang.set()
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 200, 5)
        assert tokens_of(ask(url)) == expected([1, 2, 3], 5)


def test_metrics_can_be_read_while_it_works(tmp_path):
    with application(slow(), tmp_path) as (url, _), httpx.Client(base_url=url) as client:
        work = threading.Thread(target=ask, args=(url,), kwargs={"max_tokens": 40})
        work.start()
        found = []
        while work.is_alive():
            found.append(metrics(client))
            time.sleep(0.05)
        assert max(now["num_requests_running"] for now in found) == 1
        last = metrics(client)
        assert last["generation_tokens_total"] == 40
        assert last['step_tokens_total{phase="prefill"}'] == 3
        assert last['step_tokens_total{phase="decode"}'] == 39
        assert running(client) == 0


# --- the real process -------------------------------------------------------------------------


def long_stream(url):
    return streaming(url, prompt="And it came to pass", max_tokens=1800)


def test_sigterm_lets_running_streams_finish(demo_bundle):
    with ServerProcess(demo_bundle, "--slots", 2, "--threads", 1) as server:
        with streaming(server.url, prompt="And", max_tokens=1200) as response:
            events = events_of(response)
            first = next(events)
            server.signal()
            wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 503, 5)
            assert httpx.get(f"{server.url}/health").status_code == 200
            refused = ask(server.url)
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            rest = list(events)
        tokens = [t for e in (first, *rest) for t in e["choices"][0]["token_ids"]]
        assert len(tokens) == 1200
        assert rest[-1]["choices"][0]["finish_reason"] == "length"
        assert server.wait() == 0
        assert "Traceback" not in server.stderr


def test_sigterm_ends_what_takes_too_long_with_an_error(demo_bundle):
    options = ("--slots", 2, "--threads", 1, "--shutdown-timeout", 0.3)
    with ServerProcess(demo_bundle, *options) as server:
        with long_stream(server.url) as response:
            events = events_of(response)
            next(events)
            server.signal()
            *_, last = events
        assert last["error"]["code"] == "shutting_down"
        assert server.wait() == 0


def test_a_second_signal_stops_at_once(demo_bundle):
    server = ServerProcess(demo_bundle, "--slots", 2, "--threads", 1)
    with server, long_stream(server.url) as response:
        events = events_of(response)
        next(events)
        server.signal()
        wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 503, 5)
        began = time.monotonic()
        server.signal(signal.SIGINT)
        assert server.wait() == 130
        assert time.monotonic() - began < 5


def test_seeds_give_the_same_text_whatever_happens(demo_bundle):
    """Alone, after a prefix hit, in a full batch with others waiting, and after a restart."""
    prompt = "And it came to pass in those days, that there went out a decree. " * 6
    body = {"prompt": prompt, "max_tokens": 30, "seed": 11, "ignore_eos": True}
    others = [{"prompt": f"Verse {i}: behold", "seed": i, "max_tokens": 60} for i in range(7)]
    texts = []
    for number in (signal.SIGKILL, signal.SIGTERM):
        with ServerProcess(demo_bundle, "--threads", 1, "--slots", 4) as server:

            def complete(more, url=server.url):
                got = httpx.post(f"{url}/v1/completions", json=body | more, timeout=PATIENCE)
                return got.json()

            alone, again = complete({}), complete({})
            assert alone["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 64
            *_, full = in_threads(8, lambda i, ask=complete: ask([*others, {}][i]))
            texts += [answer["choices"][0]["text"] for answer in (alone, again, full)]
            server.signal(number)
            assert server.wait() == (0 if number == signal.SIGTERM else -number)
    assert len(set(texts)) == 1
    assert len(texts) == 6


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "cla_export.cli", "serve", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_check_prints_the_pool_and_exits(demo_bundle):
    done = command(demo_bundle, "--kv-memory", "64MiB", "--max-len", 1024, "--check", "--json")
    assert done.returncode == 0, done.stderr
    pool = json.loads(done.stdout)["pool"]
    assert (pool["slots"], pool["bytes_per_token"], pool["dense_bytes_per_token"]) == (
        32,
        2048,
        4096,
    )
    assert "per slot" in done.stderr
    assert "without sharing" in done.stderr


def test_a_bundle_that_was_changed_is_not_served(demo_bundle, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(demo_bundle, broken)
    with (broken / "model.onnx.data").open("r+b") as file:
        file.write(b"\xff")
    done = command(broken, "--check")
    assert done.returncode == 2
    assert "changed after export" in done.stderr
    (broken / "model.onnx.data").unlink()
    done = command(broken, "--check")
    assert done.returncode == 2
    assert "missing from the bundle" in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Options(host="0.0.0.0"), "--api-key-file"),
        (Options(private_key="key.pem"), "--ssl-certfile"),
        (Options(slots=0), "--slots is 0"),
        (Options(max_len=0), "--max-len is 0"),
        (Options(chunk=-1), "--chunk is -1"),
    ],
)
def test_options_that_are_refused(options, words):
    with pytest.raises(BadInput, match=words):
        check_options(options)


def test_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MissingEnvironment, match=r"pip install 'cla-export\[serve\]'"):
        check_options(Options())


def test_an_engines_pool_is_what_it_was_built_for(demo_bundle):
    bundle = open_bundle(demo_bundle, verify=False)
    bundle = replace(bundle, manifest={**bundle.manifest, "target": "tensorrt"})
    with pytest.raises(BadInput, match="--kv-memory does not fit tensorrt"):
        open_model(bundle, Options(kv_memory=2**30))


def test_tls(demo_bundle, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", str(key), "-out", str(certificate)],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    options = ("--threads", 1, "--ssl-certfile", certificate, "--ssl-keyfile", key)
    with ServerProcess(demo_bundle, *options) as server:
        assert server.url.startswith("https://")
        context = ssl.create_default_context(cafile=str(certificate))
        assert httpx.get(f"{server.url}/ready", verify=context).status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/ready")


def test_other_machines_need_a_key_or_leave():
    check_options(Options(host="0.0.0.0", keys=("sk",)))
    check_options(Options(host="0.0.0.0", allow_no_key=True))


def test_a_pool_that_this_machine_cannot_hold_is_refused_with_its_table(demo_bundle):
    bundle = open_bundle(demo_bundle, verify=False)
    with pytest.raises(BadInput, match="no room for a KV pool") as caught:
        open_model(bundle, Options(slots=10**7))
    assert "without sharing" in str(caught.value)
    with pytest.raises(BadInput, match="does not hold one slot"):
        size_pool(bundle.layout, "float32", 2048, None, 10**6)


def test_a_port_that_is_taken(demo_bundle):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = command(demo_bundle, "--port", taken.getsockname()[1])
    assert done.returncode == 2
    assert "cannot listen" in done.stderr


def test_events_do_not_wait_for_acknowledgements():
    """asyncio leaves TCP_NODELAY off for connections of a socket that socket.create_server made."""
    with (
        listen("127.0.0.1", 0) as listening,
        socket.create_connection(listening.getsockname()),
        listening.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
