"""Figures for what goes wrong: overload, clients that leave or do not read, signals, hangs.

The demo model is served by the real command; what only an executor can do wrong is done by a fake
one. `tests/serve/test_faults.py` asserts that each is handled; here it is said how fast.
"""

import argparse
import asyncio
import http.client
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
from provenance import heading, provenance

import cla_export
from cla_export.environment import cpus
from cla_export.serve.engine import Limits

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "serve"))
from fake import FakeExecutor
from running import ServerProcess, application, metrics, running, wait_until

SLOTS = 4
BODY = {"prompt": "And it came to pass", "max_tokens": 48, "ignore_eos": True, "stream": True}
Ms = Sequence[float]


def percentiles(values: Ms) -> str:
    if not len(values):
        return "none"
    p50, p99 = np.percentile(values, [50, 99])
    return f"p50 {p50:.1f}, p99 {p99:.1f} ms ({len(values)})"


async def one(
    streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], asking: bytes
) -> tuple[int, list[float]]:
    """One request on a connection: its status, and the milliseconds between its events.

    By hand, since the crowd shares the machine: a client library needs more of it than the server.
    """
    reader, writer = streams
    writer.write(asking)
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head.split(maxsplit=2)[1])
    if status != 200:
        length = head.lower().partition(b"content-length:")[2].split(maxsplit=1)[0]
        await reader.readexactly(int(length))
        return status, []
    gaps: list[float] = []
    last, event = 0.0, b""
    while not event.startswith(b"0\r"):  # the last chunk
        event = await reader.readline()
        if event.startswith(b"data: {"):
            now = time.perf_counter()
            gaps += [(now - last) * 1e3] if last else []
            last = now
    await reader.readline()
    return status, gaps


async def load(url: str, clients: int, seconds: float, rest: float) -> dict[str, list[float]]:
    """Clients that ask again as soon as they are answered, and `rest` seconds after a 429."""
    host, _, port = url.removeprefix("http://").partition(":")
    content = json.dumps(BODY)
    asking = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n\r\n{content}"
    ).encode()
    found: dict[str, list[float]] = {"gaps": [], "statuses": []}
    ends = time.perf_counter() + seconds

    async def again(index: int) -> None:
        await asyncio.sleep(index / clients)  # they come within a second
        streams = await asyncio.open_connection(host, int(port))
        while time.perf_counter() < ends:
            status, gaps = await one(streams, asking)
            found["gaps"] += gaps
            found["statuses"].append(status)
            if status != 200:
                await asyncio.sleep(rest)
        streams[1].close()

    await asyncio.gather(*(again(index) for index in range(clients)))
    return found


def rss(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(next(s.split()[1] for s in status.splitlines() if s.startswith("VmRSS"))) / 1024


def overload(bundle: Path, crowds: Sequence[int], seconds: float, rest: float) -> None:
    """The crowd is a process of its own; a client beside it asks how long a refusal takes."""
    options = ("--slots", SLOTS, "--max-queued-requests", SLOTS)
    with ServerProcess(bundle, *options) as server, httpx.Client(base_url=server.url) as client:
        print(f"ready {server.seconds_to_ready:.2f} s after the start of the process")
        for times in crowds:
            command = [sys.executable, __file__, "--load", server.url, "--rest", str(rest)]
            command += ["--clients", str(times * SLOTS), "--seconds", str(seconds)]
            busy, before = processor_seconds(server.process.pid), metrics(client)
            refused = []
            with tempfile.TemporaryFile("w+") as told:
                crowd = subprocess.Popen(command, stdout=told)
                while crowd.poll() is None:
                    took, status = probe(server.url)
                    if status == 429:
                        refused.append(took)
                    time.sleep(0.1)
                told.seek(0)
                found = json.load(told)
            after, name = metrics(client), "time_per_output_token_seconds"
            each, times_each = (
                after[f"{name}_{part}"] - before.get(f"{name}_{part}", 0)
                for part in ("sum", "count")
            )
            counts = Counter(map(int, found["statuses"]))
            print(
                f"{times:>3} x as many clients as slots: answers {dict(sorted(counts.items()))}; "
                f"a token each {1e3 * each / times_each:.1f} ms by the server, "
                f"{percentiles(found['gaps'])} by its clients; one more client is refused after "
                f"{percentiles(refused)}; processor "
                f"{processor_seconds(server.process.pid) - busy:.1f} s; "
                f"RSS {rss(server.process.pid):.0f} MiB"
            )


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def probe(url: str) -> tuple[float, int]:
    """Milliseconds until the answer to one small request, and its status."""
    host, _, port = url.removeprefix("http://").partition(":")
    began = time.perf_counter()
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps({"prompt": [5]}), headers)
    status = connection.getresponse().status
    took = (time.perf_counter() - began) * 1e3
    connection.close()
    return took, status


def leaving(bundle: Path, times: int) -> None:
    with (
        ServerProcess(bundle, "--slots", SLOTS) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        for stream in (True, False):
            freed = []
            for _ in range(times):
                gone = threading.Event()
                body = BODY | {"max_tokens": 1500, "stream": stream}

                def leave(body: object = body, gone: threading.Event = gone) -> None:
                    with suppress(httpx.ReadTimeout), httpx.Client(timeout=0.15) as other:
                        address = f"{server.url}/v1/completions"
                        with other.stream("POST", address, json=body) as response:
                            next(response.iter_raw())
                    gone.set()

                threading.Thread(target=leave).start()
                gone.wait()
                freed.append(wait_until(lambda: running(client) == 0) * 1e3)
            now = metrics(client)
            print(
                f"a client leaves {'a stream' if stream else 'while it waits'}: slot free after "
                f"{percentiles(freed)}; cache in use then: {now['kv_cache_usage_perc']:.0%}"
            )


def signals(bundle: Path) -> None:
    for what, numbers in (
        ("SIGTERM when idle", (signal.SIGTERM,)),
        ("SIGTERM with a stream of 200 tokens", (signal.SIGTERM,)),
        ("two signals with that stream", (signal.SIGTERM, signal.SIGINT)),
        ("SIGKILL", (signal.SIGKILL,)),
    ):
        with ServerProcess(bundle, "--slots", SLOTS) as server:
            if "stream" in what:
                body = BODY | {"max_tokens": 200}
                threading.Thread(target=_read, args=(server.url, body), daemon=True).start()
                with httpx.Client(base_url=server.url) as client:
                    wait_until(lambda: running(client) == 1)
            began = time.perf_counter()
            for number in numbers:
                server.signal(number)
                time.sleep(0.02 if len(numbers) > 1 else 0)
            code = server.wait()
            print(f"{what}: exit {code} after {time.perf_counter() - began:.2f} s")


def _read(url: str, body: object) -> None:
    with suppress(httpx.HTTPError):
        httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def executors() -> None:
    for what, step, limit in (("hangs", 60.0, 0.5), ("raises", 0.0, 60.0)):
        executor, release = FakeExecutor(2), threading.Event()

        def before(_rows: object, step: float = step, release: threading.Event = release) -> None:
            if not step:
                raise RuntimeError("device lost")
            release.wait(step)

        limits = Limits(step_seconds=limit)
        with (
            tempfile.TemporaryDirectory() as folder,
            application(executor, Path(folder), limits=limits) as (url, _),
        ):
            executor.before = before
            began = time.perf_counter()
            answers = [
                httpx.post(f"{url}/v1/completions", json={"prompt": [1]}, timeout=60).status_code
                for _ in range(3)
            ]
            health = httpx.get(f"{url}/health").status_code
            print(
                f"an executor that {what}: answers {answers}, /health {health} after "
                f"{time.perf_counter() - began:.2f} s"
                + (f", {limit} s allowed to a step" if step else "")
            )
            release.set()


def scraping(bundle: Path, seconds: float) -> None:
    with ServerProcess(bundle, "--slots", SLOTS) as server:
        stop = threading.Event()

        def scrape() -> None:
            with httpx.Client(base_url=server.url) as client:
                while not stop.wait(0.1):
                    metrics(client)

        for what in ("alone", "with /metrics read ten times a second"):
            thread = threading.Thread(target=scrape)
            if what != "alone":
                thread.start()
            gaps = asyncio.run(load(server.url, SLOTS, seconds, 0.0))["gaps"]
            stop.set()
            if what != "alone":
                thread.join()
            print(f"token to token {what}: {percentiles(gaps)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load")
    parser.add_argument("--times", type=int, default=20, help="that clients leave")
    parser.add_argument("--load", help="be a crowd of clients of this server, and nothing else")
    parser.add_argument("--clients", type=int, default=SLOTS)
    parser.add_argument("--crowds", default="1,2,10,25,100", help="clients, as times the slots")
    parser.add_argument("--rest", type=float, default=1.0, help="seconds after an answer of 429")
    parser.add_argument("--only", help="one of overload, leaving, signals, executors, scraping")
    given = parser.parse_args()
    if given.load is not None:
        print(json.dumps(asyncio.run(load(given.load, given.clients, given.seconds, given.rest))))
        return
    logging.disable()  # failures that are meant are told below
    print(heading(provenance(cpus())))
    with tempfile.TemporaryDirectory() as work:
        bundle = Path(work) / "demo"
        cla_export.export(cla_export.demo_checkpoint(), bundle)
        parts: dict[str, Callable[[], None]] = {
            "overload": lambda: overload(
                bundle, list(map(int, given.crowds.split(","))), given.seconds, given.rest
            ),
            "leaving": lambda: leaving(bundle, given.times),
            "signals": lambda: signals(bundle),
            "executors": executors,
            "scraping": lambda: scraping(bundle, given.seconds),
        }
        for name, run in parts.items():
            if given.only in (None, name):
                run()


if __name__ == "__main__":
    main()
