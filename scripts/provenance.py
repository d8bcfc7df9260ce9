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


def provenance(threads: int, gpu: str | None = None) -> dict[str, Any]:
    """The head of a run's JSON; `gpu` is the name of the one that it is about."""
    return {
        "date": str(date.today()),
        "command": shlex.join(["python", *sys.argv]),
        "machine": {**machine(threads), **({} if gpu is None else {"gpu": gpu})},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what takes part and is installed."""
    found = {}
    for name in TOOLS:
        loaded = sys.modules.get(name.replace("-", "_"))
        with suppress(PackageNotFoundError):
            found[name] = str(getattr(loaded, "__version__", "")) or version(name)
    return found


def heading(run: Mapping[str, Any], dtype: str = "float32") -> str:
    """The same as a paragraph of Markdown; `dtype` is the weights' and caches'."""
    place = run["machine"]
    gpu = f"{place['gpu']} beside " if "gpu" in place else ""
    tools = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    return (
        f"{run['date']}, {gpu}{place['processor']}, {place['threads']} of {place['cpus']} CPUs; "
        f"{tools}; {dtype}. `{run['command']}`\n"
    )
