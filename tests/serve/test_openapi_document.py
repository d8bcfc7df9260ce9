"""The OpenAPI document against the real server: schemathesis sends what it allows and forbids."""

import re
import subprocess
import sys

import httpx
from running import ServerProcess, running, wait_until

NOT_SAID = "positive_data_acceptance"  # a schema cannot say that prompt and answer must fit a slot


def test_every_answer_is_as_the_document_says(demo_bundle, template, tmp_path):
    options = ("--slots", 4, "--max-len", 96, "--threads", 1, "--chat-template", template)
    with ServerProcess(demo_bundle, *options) as server:
        done = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json",
             "--phases", "coverage,fuzzing", "--max-examples", "5", "--generation-deterministic",
             "--exclude-checks", NOT_SAID, "--workers", "2", "--request-timeout", "120",
             "--no-color"],
            capture_output=True,
            text=True,
            cwd=tmp_path,  # it leaves files
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        assert int(re.search(r"(\d+) generated", done.stdout)[1]) > 300
        assert "11 selected / 11 total" in done.stdout
        with httpx.Client(base_url=server.url) as client:
            wait_until(lambda: running(client) == 0)
            assert client.get("/ready").status_code == 200
        assert "Traceback" not in server.stderr
