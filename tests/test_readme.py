"""The README's commands and Python run as they stand, one after another, in an empty folder."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import cla_export

ROOT = Path(__file__).parents[1]


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def test_readme_commands_run(tmp_path):
    (tmp_path / "demo-model").symlink_to(cla_export.demo_checkpoint())
    bin_folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    commands = [line for block in blocks("console") for line in block.splitlines()]
    assert len(commands) >= 8
    for line in commands:
        assert line.startswith("$ "), line
        done = subprocess.run(
            shlex.split(line[2:]), cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    for name in ("parity-report/parity.json", "parity-report/parity.xml", "plan.png"):
        assert (tmp_path / name).stat().st_size > 200, name
    (python,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", python], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 8


def test_readme_scripts_exist():
    for block in blocks("sh"):
        for line in block.splitlines():
            script = ROOT / line.split()[0]
            assert os.access(script, os.X_OK), line
