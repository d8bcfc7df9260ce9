"""What Ray Serve costs: `cla-export serve` beside `deploy ray`, asked in turn, one client.

    .venv-deploy/bin/python scripts/bench_ray.py BUNDLE [--times 60]

Prints seconds to ready, memory (each process's own share, added up), and milliseconds of a request
for one token, to a stream's first token, and between the tokens of a stream of 32: the least, the
median, and the slowest tenth.
"""

import argparse
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

import httpx
import psutil

KINDS = {
    "serve": ["serve"],
    "deploy ray, 1 replica": ["deploy", "ray", "--replicas", "1"],
    "deploy ray, 2 replicas": ["deploy", "ray", "--replicas", "2", "--num-cpus", "0.5"],
}
TOKENS = 32


@dataclass
class Server:
    process: subprocess.Popen
    client: httpx.Client
    ready: float  # seconds
    whole: list[float] = field(default_factory=list)  # these three in ms
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)


def start(arguments: list[str], bundle: str) -> Server:
    began = time.monotonic()
    options = [bundle, "--port", "0", "--threads", "1", "--slots", "4"]
    command = [sys.executable, "-m", "cla_export.cli", *arguments, *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    said = ""
    for line in process.stderr:
        said += line
        if line.startswith("serving "):
            break
    else:
        sys.exit(said)
    threading.Thread(target=process.stderr.read, daemon=True).start()
    client = httpx.Client(base_url=line.split()[-1], timeout=60)
    return Server(process, client, time.monotonic() - began)


def ask(server: Server, prompt: list[int]) -> None:
    body = {"prompt": prompt, "temperature": 0, "ignore_eos": True}
    began = time.perf_counter()
    answer = server.client.post("/v1/completions", json=body | {"max_tokens": 1})
    answer.raise_for_status()
    server.whole.append(1e3 * (time.perf_counter() - began))
    began = time.perf_counter()
    body |= {"max_tokens": TOKENS, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body) as stream:
        times = [time.perf_counter() for line in stream.iter_lines() if line.startswith("data: {")]
    server.first.append(1e3 * (times[0] - began))
    server.between.append(1e3 * (times[-1] - times[0]) / (TOKENS - 1))


def memory(server: Server) -> tuple[int, float]:
    """Processes, and their MiB."""
    own = psutil.Process(server.process.pid)
    processes = [own, *own.children(recursive=True)]
    return len(processes), sum(p.memory_full_info().pss for p in processes) / 2**20


def spread(times: list[float]) -> str:
    slow = statistics.quantiles(times, n=10)[-1]
    return f"{min(times):.1f}, {statistics.median(times):.1f}, {slow:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--times", type=int, default=60)
    given = parser.parse_args()
    servers = {name: start(arguments, given.bundle) for name, arguments in KINDS.items()}
    print("| | ready, s | processes | MiB | one token, ms | first token | between tokens |")
    print("|---|---|---|---|---|---|---|")
    try:
        for number in range(given.times):
            for server in servers.values():
                ask(server, [1, 2, number + 3])
        for name, server in servers.items():
            count, size = memory(server)
            times = " | ".join(map(spread, (server.whole, server.first, server.between)))
            print(f"| {name} | {server.ready:.1f} | {count} | {size:.0f} | {times} |")
    finally:
        for server in servers.values():
            server.process.send_signal(signal.SIGTERM)
        for server in servers.values():
            server.process.wait()


if __name__ == "__main__":
    main()
