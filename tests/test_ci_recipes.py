"""The README's CI recipes, run as pasted: only what GitHub and an index provide is stood in for.

`pip install` is answered by a script that checks what it is asked for; GitHub's own actions are
not run, and their names and inputs are compared with those that exist.
"""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from models_zoo import make_checkpoint
from test_readme import ROOT, blocks

ACTIONS = {  # what each takes, of what the workflow gives
    "actions/checkout@v4": set(),
    "actions/setup-python@v5": {"python-version"},
    "actions/upload-artifact@v4": {"name", "path"},
}
PIP = f"""#!{sys.executable}
import sys, tomllib
assert sys.argv[1:] == ["install", "cla-export[cpu]"], sys.argv
with open({str(ROOT / "pyproject.toml")!r}, "rb") as file:
    project = tomllib.load(file)["project"]
assert project["name"] == "cla-export" and "cpu" in project["optional-dependencies"]
"""


@pytest.fixture
def place(tmp_path):
    """A repository with a model folder, and the environment of a CI job in it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pip").write_text(PIP)
    (tmp_path / "bin" / "pip").chmod(0o755)
    repository = tmp_path / "repository"
    model = repository / "my-model"
    make_checkpoint(model, kv_owner=(0, 0))
    folders = [str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {
        **os.environ,
        "PATH": ":".join(folders),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        "PRE_COMMIT_HOME": str(tmp_path / "pre-commit"),
        "HOME": str(tmp_path),
    }
    return repository, environment


def run(command, place, expected=0, **options):
    repository, environment = place
    done = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, **options
    )
    assert done.returncode == expected, f"{done.stdout}\n{done.stderr}"
    return done


def test_github_workflow(place, tmp_path):
    ((_, text),) = blocks("yaml github")
    workflow = yaml.safe_load(text)
    assert set(workflow) == {"name", True, "jobs"}  # YAML 1.1 reads `on` as true
    (job,) = workflow["jobs"].values()
    for step in job["steps"]:
        if "uses" in step:
            assert set(step.get("with", {})) == ACTIONS[step["uses"]]
        else:
            run(["bash", "-e", "-o", "pipefail", "-c", step["run"]], place)
    assert "Parity passed" in (tmp_path / "summary.md").read_text()
    assert (place[0] / "parity-report" / "parity.xml").is_file()


def test_shell(place):
    ((_, text),) = blocks("sh ci")
    repository, _ = place
    (repository / "ci.sh").write_text(text)
    run(["sh", "ci.sh"], place)
    stored = repository / "parity-report" / "parity.json"
    content = json.loads(stored.read_text())
    (repository / "parity-baseline.json").write_text(json.dumps(content))
    assert "nothing is worse than in parity-baseline.json" in run(["sh", "ci.sh"], place).stdout
    for result in content["tensors"]:
        result["case"] = result["case"].replace("prefill", "a case that is gone")
    (repository / "parity-baseline.json").write_text(json.dumps(content))
    assert "worse than the baseline" in run(["sh", "ci.sh"], place, 1).stderr


def test_pre_commit_hook(place):
    ((_, text),) = blocks("yaml pre-commit")
    repository, _ = place
    (repository / ".pre-commit-config.yaml").write_text(text)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    run([*git, "init", "-q"], place)
    run([*git, "add", "my-model", ".pre-commit-config.yaml"], place)
    done = run(["pre-commit", "run", "--verbose"], place)
    assert "Passed" in done.stdout
    assert "PASSED" in done.stdout
    config = json.loads((repository / "my-model" / "config.json").read_text())
    (repository / "my-model" / "config.json").write_text(json.dumps({**config, "kv_owner": [0]}))
    run([*git, "add", "my-model"], place)
    assert "kv_owner" in run(["pre-commit", "run"], place, 1).stdout


def test_what_recipes_need_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "cla-export" in project["scripts"]
