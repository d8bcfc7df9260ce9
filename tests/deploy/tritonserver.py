"""A real tritonserver: the one in nvidia-pytriton's wheel, in a virtual environment of its own."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx

VENV = Path(__file__).parents[2] / ".venv-triton"  # scripts/test_deploy.sh makes it
PATIENCE = 120  # seconds that a test waits for what should be there soon
_FACTS = """
import json, sys, sysconfig
print(json.dumps({"prefix": sys.base_prefix, "packages": sysconfig.get_path("purelib"),
                  "version": sysconfig.get_python_version()}))
"""


class Triton:
    """The server on a repository, with one model loaded; `folder` is for its log and backend."""

    def __init__(self, repository: Path, model: str, folder: Path) -> None:
        said = subprocess.run([VENV / "bin/python", "-c", _FACTS], capture_output=True, check=True)
        self._facts = json.loads(said.stdout)
        self._server = Path(self._facts["packages"], "pytriton", "tritonserver")
        self._log = folder / "tritonserver.log"
        backends = self._backends(folder)
        for _ in range(3):  # another process may take a port first
            http, metrics = _free_port(), _free_port()
            command = [
                self._server / "bin" / "tritonserver",
                f"--model-repository={repository}",
                f"--backend-directory={backends}",
                "--model-control-mode=explicit",
                f"--load-model={model}",
                "--allow-grpc=false",
                "--http-address=127.0.0.1",
                f"--http-port={http}",
                f"--metrics-port={metrics}",
            ]
            with self._log.open("wb") as log:
                self.process = subprocess.Popen(
                    command, env=self._environment(), stdout=log, stderr=log
                )
            self.client = httpx.Client(base_url=f"http://127.0.0.1:{http}", timeout=PATIENCE)
            self._metrics = f"http://127.0.0.1:{metrics}/metrics"
            if self._is_up(model):
                return
        raise AssertionError(self.log)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def metrics(self) -> dict[str, float]:
        """Ours: name with labels, without the prefix -> value."""
        found = {}
        for line in self.client.get(self._metrics).text.splitlines():
            if line.startswith("cla_export_"):
                name, _, value = line.rpartition(" ")
                found[name.removeprefix("cla_export_")] = float(value)
        return found

    def stop(self) -> int:
        """Its exit code after SIGTERM."""
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()

    def _is_up(self, model: str) -> bool:
        def ready() -> bool:
            if self.process.poll() is not None:
                return True
            try:
                return self.client.get(f"/v2/models/{model}/ready").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(ready)
        return self.process.poll() is None

    def _backends(self, folder: Path) -> Path:
        """The Python backend with the stub for the environment's version of Python."""
        backends = folder / "backends"
        if not backends.exists():
            stub = self._server / "python_backend_stubs" / self._facts["version"]
            shutil.copytree(self._server / "backends", backends)
            shutil.copytree(stub, backends / "python", dirs_exist_ok=True)
        return backends

    def _environment(self) -> dict[str, str]:
        """The backend takes its Python from PATH, and the library of it from where that lies."""
        libraries = [
            Path(self._facts["prefix"], "lib"),
            Path(self._facts["packages"], "nvidia_pytriton.libs"),
        ]
        return {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "PATH": f"{VENV / 'bin'}:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        }


def wait_until(condition: Callable[[], bool]) -> None:
    """AssertionError if it never holds."""
    ends = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.1)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])
