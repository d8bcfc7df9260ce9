"""The Dockerfile's steps, run as they stand, in folders of their own in place of the image's.

No image is built: what the base image brings is this machine's Python and C compiler.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import DEVNULL

import httpx
import pytest
from dockerfile_parse import DockerfileParser

import cla_export

ROOT = Path(__file__).parents[2]
PATIENCE = 120  # seconds


@pytest.fixture(scope="module")
def steps() -> dict[str, list[str]]:
    """Instruction -> values, in order."""
    found: dict[str, list[str]] = {}
    parser = DockerfileParser(str(ROOT), cache_content=True)
    for step in parser.structure:
        found.setdefault(step["instruction"], []).append(step["value"])
    return found


@pytest.fixture(scope="module")
def image(steps, tmp_path_factory) -> Path:
    """The folder that is /opt/cla-export in the image."""
    context, opt = tmp_path_factory.mktemp("src"), tmp_path_factory.mktemp("opt") / "cla-export"
    for copied in steps["COPY"][:2]:
        *sources, target = copied.split()
        for source in map(ROOT.joinpath, sources):
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, context / target, ignore=ignored)
            else:
                shutil.copy(source, context / target)
    (install,) = [run for run in steps["RUN"] if "pip install" in run]
    command = install.replace("/opt/cla-export", str(opt)).replace(
        "python -m venv", "$PYTHON -m venv"
    )
    environment = {**os.environ, "PYTHON": sys.executable, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment.pop("PYTHONPATH", None)
    subprocess.run(command, shell=True, check=True, cwd=context, env=environment)
    return opt


def test_it_has_what_serving_takes_and_no_pytorch(image):
    listed = subprocess.run(
        [image / "bin" / "python", "-m", "pip", "list", "--format=json"],
        capture_output=True,
        check=True,
    )
    names = {entry["name"] for entry in json.loads(listed.stdout)}
    assert {"cla-export", "onnxruntime", "fastapi"} <= names
    assert not any(name == "torch" or name.startswith("nvidia") for name in names)


def test_its_entry_point_serves_and_its_health_check_passes(image, steps, tmp_path):
    cla_export.export(cla_export.demo_checkpoint(), tmp_path / "bundle")
    (entry,) = map(json.loads, steps["ENTRYPOINT"])
    assert entry[entry.index("--port") + 1] in steps["EXPOSE"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    entry = [port if part in steps["EXPOSE"] else part for part in entry]
    entry[entry.index("/bundle")] = str(tmp_path / "bundle")
    home = tmp_path / "tmp"
    home.mkdir()
    environment = {"PATH": f"{image / 'bin'}:{os.environ['PATH']}", "HOME": str(home)}
    server = subprocess.Popen([*entry, "--allow-no-key", "--threads=1"], env=environment)
    try:
        check = json.loads(steps["HEALTHCHECK"][0].split("CMD", 1)[1])
        check[-1] = check[-1].replace(steps["EXPOSE"][0], port)
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: subprocess.run(check, env=environment, stderr=DEVNULL).returncode == 0)
        wait_until(lambda: httpx.get(f"{url}/ready").status_code == 200)
        asked = {"prompt": "In the beginning", "max_tokens": 12, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=PATIENCE).json()
        alone = cla_export.load(tmp_path / "bundle").generate("In the beginning", 12)
        assert answer["choices"][0]["text"] == alone
        compiled = list(home.glob(".cache/cla-export/kernels/*.so"))
        assert compiled, "the attention operator was not compiled"
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(PATIENCE)
    assert code == 0


def wait_until(condition: Callable[[], bool]) -> None:
    """AssertionError if it never holds."""
    ends = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.5)
