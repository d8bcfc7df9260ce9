"""Run a command in a process of its own: what it printed, how long it took, the memory it had."""

import json
import subprocess
import sys

_WATCH = (  # a small process, whose only child is the command
    "import json, resource, subprocess, sys, time; start = time.monotonic();"
    "done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True);"
    "used = resource.getrusage(resource.RUSAGE_CHILDREN);"
    "print(json.dumps([done.returncode, time.monotonic() - start, used.ru_maxrss * 1024,"
    " done.stdout]))"
)


def timed(*command: str) -> tuple[float, int, str]:
    """Seconds, peak bytes resident (mapped files too) and standard output; exits if it fails."""
    done = subprocess.run(
        [sys.executable, "-c", _WATCH, *command], stdout=subprocess.PIPE, text=True, check=True
    )
    code, seconds, peak, printed = json.loads(done.stdout)
    if code:
        raise SystemExit(f"{' '.join(command)}: exit code {code}")
    return seconds, peak, printed


def cla_export(*arguments: str) -> tuple[float, int, dict]:
    """Seconds, peak bytes and JSON of one of our own commands."""
    seconds, peak, printed = timed(sys.executable, "-m", "cla_export.cli", *arguments, "--json")
    return seconds, peak, json.loads(printed)
