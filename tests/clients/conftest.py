"""A server over the demo model, and clients that run in a venv of their own."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cla_export

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
from running import ServerProcess

ROOT = Path(__file__).parents[2]
SECONDS = 600  # that a client may take


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clients") / "demo"
    cla_export.export(cla_export.demo_checkpoint(), path)
    return path


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[ServerProcess]:
    with ServerProcess(bundle, "--slots", 4, "--threads", 1) as made:
        yield made


@pytest.fixture(scope="session")
def client() -> Callable[..., str]:
    """Runs a client's command, without a hub; what it wrote."""

    def run(name: str, *arguments: object, **environment: str) -> str:
        command = ROOT / ".venv-clients" / "bin" / name
        assert command.exists(), f"{command} is missing; run scripts/test_clients.sh"
        done = subprocess.run(
            [str(command), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **environment},
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout + done.stderr

    return run
