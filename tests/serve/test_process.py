"""The process, as a supervisor sees it: it loads, dies, is told to stop, has no room to write."""

import json
import shutil
import signal
import socket
import time
from contextlib import ExitStack

import httpx
import pytest
from faulty_command import TRIGGER
from running import PATIENCE, ServerProcess, in_threads, wait_until
from test_faults import ask, command, events_of, streaming


def code_of(answer):
    return answer.json()["error"]["code"]


def waiting(server):
    return httpx.get(f"{server.url}/status").json()["waiting"]


def test_while_it_loads_it_is_alive_and_not_ready(demo_bundle, tmp_path):
    fault = ("loads slowly", tmp_path / "loaded")
    with ServerProcess(demo_bundle, "--api-key", "sk", fault=fault, loading=True) as server:
        health = httpx.get(f"{server.url}/health")
        assert (health.status_code, health.json()) == (200, {"status": "loading"})
        refused = [httpx.get(f"{server.url}/{path}") for path in ("ready", "v1/models", "nowhere")]
        for answer in (*refused, ask(server.url)):
            assert (answer.status_code, code_of(answer)) == (503, "loading")
            assert int(answer.headers["retry-after"]) > 0
        fault[1].touch()
        wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 200)
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
        assert ask(server.url).status_code == 401
        server.signal()
        assert server.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_loads_stops_it_at_once(demo_bundle, tmp_path, number):
    fault = ("loads slowly", tmp_path / "never")
    with ServerProcess(demo_bundle, fault=fault, loading=True) as server:
        began = time.monotonic()
        server.signal(number)
        assert server.wait() == 0
        assert time.monotonic() - began < 10  # of an hour
        assert "Traceback" not in server.stderr


def lose_weights(folder):
    (folder / "model.onnx.data").unlink()


def change_layout(**entries):
    def change(folder):
        manifest = json.loads((folder / "bundle.json").read_text())
        manifest["kv_layout"] |= entries
        (folder / "bundle.json").write_text(json.dumps(manifest))

    return change


def cut_manifest(folder):
    text = (folder / "bundle.json").read_text()
    (folder / "bundle.json").write_text(text[: len(text) // 2])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose_weights, "missing from the bundle"),
        (cut_manifest, "damaged"),
        (change_layout(kv_owner=[0, 0, 0, 0, 4, 4, 6, 6]), "no input by bundle.json's layout of 3"),
        (change_layout(head_dim=[32] * 8), "is 1 heads of 64, and 1 heads of 32 by bundle.json"),
    ],
)
def test_a_bundle_that_cannot_be_loaded_ends_it(demo_bundle, tmp_path, damage, words):
    broken = tmp_path / "broken"
    shutil.copytree(demo_bundle, broken)
    damage(broken)
    done = command(broken, "--port", 0)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("fault", ["raises", "exits"])
def test_a_dead_engine_tells_its_clients_and_ends_the_process(demo_bundle, tmp_path, fault):
    """One stream runs, one prompt brings the fault about, six wait behind it."""
    file = tmp_path / "now"
    with ServerProcess(demo_bundle, "--slots", 2, "--threads", 1, fault=(fault, file)) as server:
        with streaming(server.url, prompt="And", max_tokens=1800) as response:
            events = events_of(response)
            next(events)

            def work(index):
                if index < 7:
                    return ask(server.url, (TRIGGER,))
                wait_until(lambda: waiting(server) == 6)
                return file.touch()

            *answers, _ = in_threads(8, work)
            *_, last = events
        codes = [code_of(answer) for answer in answers]
        if fault == "raises":  # the steps of a prompt, of the stream, and of other prompts
            assert last["error"]["code"] == "step_failed"
            assert set(codes) == {"step_failed", "engine_dead"}
        else:
            assert last["error"]["code"] == "engine_dead"
            assert set(codes) == {"engine_dead"}
        assert {a.status_code for a in answers} <= {500, 503}
        assert server.wait() == 70
        assert ("device lost" if fault == "raises" else "SystemExit") in server.stderr


def test_a_step_that_hangs_does_not_keep_it_from_stopping(demo_bundle, tmp_path):
    file = tmp_path / "now"
    file.touch()
    options = ("--threads", 1, "--shutdown-timeout", 0.2)
    with ServerProcess(demo_bundle, *options, fault=("hangs", file)) as server:
        began = time.monotonic()

        def work(index):
            if index == 0:
                return ask(server.url, (TRIGGER,))
            wait_until(lambda: httpx.get(f"{server.url}/status").json()["running"] == 1)
            return server.signal()

        answer, _ = in_threads(2, work)
        assert (answer.status_code, code_of(answer)) == (503, "shutting_down")
        assert server.wait() == 0
        assert time.monotonic() - began < 30  # of an hour


def test_more_clients_than_a_shell_allows_files(demo_bundle):
    limited = ("sh", "-c", 'ulimit -Sn 64; exec "$@"', "sh")
    with (
        ServerProcess(demo_bundle, "--threads", 1, through=limited) as server,
        ExitStack() as open_,
    ):
        host, _, port = server.url.removeprefix("http://").partition(":")
        for _ in range(150):
            open_.enter_context(socket.create_connection((host, int(port)), PATIENCE))
        assert ask(server.url).status_code == 200
        assert "Too many open files" not in server.stderr


def test_a_log_that_cannot_be_written_stops_nothing(demo_bundle, tmp_path):
    """A file that may not grow stands for a full disk; each trigger logs a traceback."""
    file, most = tmp_path / "now", 2048
    file.touch()
    through = ("bash", "-c", f'ulimit -f {most // 1024}; exec "$@"', "bash")
    with ServerProcess(demo_bundle, fault=("stumbles", file), through=through) as server:
        good = [ask(server.url, (5, 6))]
        for _ in range(4):
            assert code_of(ask(server.url, (TRIGGER,))) == "step_failed"
            good.append(ask(server.url, (5, 6)))
        assert len({json.dumps(answer.json()["choices"]) for answer in good}) == 1
        assert len(server.stderr.encode()) == most  # full long ago
        assert httpx.get(f"{server.url}/ready").status_code == 200
        server.signal()
        assert server.wait() == 0
