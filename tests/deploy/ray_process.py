"""`cla-export deploy ray` as a user starts it, and a look at its processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import openai
import psutil

PATIENCE = 120  # seconds that a test waits for what should be there soon


class RayProcess:
    """The command on a free port, in a session of its own, so that it can be sent Ctrl-C."""

    def __init__(self, bundle: Path, *arguments: object, **environment: str) -> None:
        command = [sys.executable, "-m", "cla_export.cli", "deploy", "ray", bundle, "--port", 0]
        self.process = subprocess.Popen(
            [*map(str, command), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **environment},
        )
        self.stderr: list[str] = []
        self.url = ""
        for line in self.process.stderr:
            self.stderr.append(line)
            if line.startswith("serving "):
                self.url = line.split()[-1]
                break
        assert self.url, "".join(self.stderr)
        self._reader = threading.Thread(
            target=lambda: self.stderr.extend(self.process.stderr), daemon=True
        )
        self._reader.start()

    def __enter__(self) -> "RayProcess":
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children():  # a test failed
            with suppress(psutil.Error):
                child.kill()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
        self.process.stdout.close()
        self.process.stderr.close()

    def stop(self, number: int = signal.SIGTERM, *, group: bool = False) -> tuple[int, str]:
        """Exit code and standard output, once nothing that it started is left."""
        started = self.children()
        (os.killpg if group else os.kill)(self.process.pid, number)
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        _, left = psutil.wait_procs(started, timeout=10)
        assert left == []
        return code, self.process.stdout.read()

    def children(self) -> list[psutil.Process]:
        if self.process.poll() is not None:
            return []
        return psutil.Process(self.process.pid).children(recursive=True)

    def replicas(self) -> list[psutil.Process]:
        """The processes of replicas."""
        found = []
        for child in self.children():
            try:
                if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::ServeReplica"):
                    found.append(child)
            except psutil.Error:
                pass  # gone meanwhile
        return found

    def names(self) -> set[str]:
        """The replicas that tell metrics, by the names that answers give in `x-replica`."""
        text = httpx.get(f"{self.url}/metrics", timeout=PATIENCE).text
        lines = [line for line in text.splitlines() if line.startswith("cla_export_num_slots{")]
        return {line.split('replica="')[1].split('"')[0] for line in lines}

    def client(self, **options: object) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="-", timeout=PATIENCE, **options)


class Stream(threading.Thread):
    """A completion that is read as it comes, by a client that does not try again."""

    def __init__(self, ray: RayProcess, prompt: list[int], max_tokens: int) -> None:
        super().__init__(daemon=True)
        self.tokens: list[int] = []
        self.error: Exception | None = None
        client = ray.client(max_retries=0)
        raw = client.completions.with_raw_response.create(
            model="demo",
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        self.replica = raw.headers["x-replica"]
        self._events = raw.parse()
        self.start()

    def run(self) -> None:
        try:
            for event in self._events:
                for choice in event.choices:
                    self.tokens += choice.token_ids
        except (openai.APIError, httpx.HTTPError) as error:
            self.error = error


def wait_until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.1)
