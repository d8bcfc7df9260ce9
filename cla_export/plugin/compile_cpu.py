"""Compile operators in C for the processor they are to run on, once, with a C compiler.

The library is cached by source, compiler, options and processor. Without a compiler the stock graph
of a bundle still runs; `doctor` says which it will be.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from cla_export.errors import MissingEnvironment

ATTENTION = Path(__file__).with_name("cla_attention_cpu.c")
HOST_OPERATORS = Path(__file__).with_name("host_ops.c")
READER = Path(__file__).with_name("read_memory_cpu.c")
_HEADERS = [Path(__file__).with_name(f"{name}.h") for name in ("onnxruntime_abi", "host_launches")]
CACHE = Path.home() / ".cache/cla-export/kernels"
OPTIONS = (
    "-std=gnu11",
    "-O3",
    "-march=native",
    "-falign-loops=64",  # or a change elsewhere moves a loop, and makes prompts 5 % slower
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
)
_COMPILERS = ("cc", "gcc", "clang")
_INSTALL = "install one (apt install gcc, or pip install ziglang), or set CC"


def compiler() -> list[str]:
    """The command of a C compiler: $CC, what is on the path, or Zig's, which pip installs.

    Raises MissingEnvironment if there is none.
    """
    if chosen := os.environ.get("CC"):
        return shlex.split(chosen)
    for name in _COMPILERS:
        if shutil.which(name):
            return [name]
    if find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc"]
    raise MissingEnvironment(
        f"no C compiler ({', '.join(_COMPILERS)}, ziglang); operators for ONNX Runtime are "
        f"compiled where they run: {_INSTALL}"
    )


@lru_cache
def library(source: Path = ATTENTION) -> Path:
    """A source's operator library for this machine, compiled on first use.

    Raises MissingEnvironment where there is no compiler, or it fails, or this is no Linux or macOS.
    """
    return build(compiler(), CACHE, source=source)


def build(
    command: list[str],
    cache: Path,
    options: tuple[str, ...] = OPTIONS,
    source: Path = ATTENTION,
) -> Path:
    """Compile into a folder, or find there what was compiled from the same."""
    if os.name != "posix":
        raise MissingEnvironment("operators for ONNX Runtime are built on Linux and macOS only")
    path = cache / f"{source.stem}-{_key(command, options, source)}.so"
    if path.is_file():
        return path
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = Path(folder) / path.name
            _compile([*command, *options, str(source), "-o", str(made), "-lm"])
            made.replace(path)
    except OSError as error:
        raise MissingEnvironment(
            f"{shlex.join(command)}: cannot compile operators for ONNX Runtime into {cache} "
            f"({error}); {_INSTALL}"
        ) from error
    return path


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MissingEnvironment(
            f"{shlex.join(command)} failed with {done.returncode}: "
            f"{done.stderr.strip()[-500:] or 'no message'}; {_INSTALL}"
        )


def _key(command: list[str], options: tuple[str, ...], source: Path) -> str:
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in (source, *_HEADERS)))
    digest.update(repr((command, options, platform.machine(), _processor())).encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What -march=native depends on: a cache on a shared home serves machines that differ."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return platform.processor()
    lines = path.read_text(encoding="utf-8").splitlines()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
