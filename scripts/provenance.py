"""What figures were measured with: date, command, machine and versions."""

import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from cla_export.environment import machine

TOOLS = ("torch", "onnxruntime", "onnxruntime-genai", "numpy")


def provenance(threads: int) -> dict[str, Any]:
    """The head of a run's JSON."""
    return {
        "date": str(date.today()),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(threads),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what takes part and is installed."""
    found = {}
    for name in TOOLS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def heading(run: Mapping[str, Any]) -> str:
    """The same as a paragraph of Markdown."""
    place = run["machine"]
    tools = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    return (
        f"{run['date']}, {place['processor']}, {place['threads']} of {place['cpus']} CPUs; "
        f"{tools}; float32. `{run['command']}`\n"
    )
