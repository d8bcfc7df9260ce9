"""The README's commands and Python run as they stand, one after another, in an empty folder."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import cla_export

ROOT = Path(__file__).parents[1]


def blocks(*languages: str) -> list[tuple[str, str]]:
    """Language and text of each block, in the order they stand."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    wanted = rf"^```({'|'.join(languages)})\n(.*?)^```"
    return re.findall(wanted, text, flags=re.DOTALL | re.MULTILINE)


def files() -> list[tuple[str, str]]:
    """Name and text of each block that is a file."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```python (\S+)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def test_readme_commands_run(tmp_path):
    assert [name for name, _ in files()] == ["my_model.py"]
    for name, text in files():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "demo-model").symlink_to(cla_export.demo_checkpoint())
    bin_folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    printed = []
    for language, block in blocks("console", "python"):
        lines = [block] if language == "python" else block.splitlines()
        for line in lines:
            command = [sys.executable, "-c", line]
            if language == "console":
                assert line.startswith("$ "), line
                command = shlex.split(line[2:])
            done = subprocess.run(command, **run)
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            printed.append((language, done.stdout))
    assert len(printed) >= 11
    for name in ("parity-report/parity.json", "parity-report/parity.xml", "plan.png"):
        assert (tmp_path / name).stat().st_size > 200, name
    assert any(language == "python" and len(text.split()) > 8 for language, text in printed)
    discovered = [text for _, text in printed if "2 layers in 1 group" in text]
    assert len(discovered) == 2, "a module's and a graph's"
    assert sum("greedy, free-running" in text and "PASSED" in text for _, text in printed) == 2


def test_readme_scripts_exist():
    for _, block in blocks("sh"):
        for line in block.splitlines():
            script = ROOT / line.split()[0]
            assert os.access(script, os.X_OK), line
