"""Doctor: what is installed on this machine, what each target needs, and how to get it.

Nothing here raises: a package that is installed but does not load is reported with its own words.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Literal

import cla_export
from cla_export.engines.rtx_wheel import rtx_library, rtx_link
from cla_export.errors import MissingEnvironment
from cla_export.plugin import compile_cpu

State = Literal["ready", "builds only", "missing", "broken"]
ME = "cla-export"
_NVIDIA_SMI_SECONDS = 10
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_OPERATORS = ("<=", ">=", "==", "!=", "~=", "<", ">")

# distribution -> module; the first distribution of a module that is installed is the one meant
PACKAGES: Mapping[str, str] = {
    "torch": "torch",
    "onnx": "onnx",
    "onnx-ir": "onnx_ir",
    "onnxscript": "onnxscript",
    "polygraphy": "polygraphy",
    "onnxruntime": "onnxruntime",
    "onnxruntime-gpu": "onnxruntime",
    "onnxruntime-genai": "onnxruntime_genai",
    "transformers": "transformers",
    "tensorrt": "tensorrt",
    "tensorrt-rtx-cu13": "tensorrt_rtx",
}
_BASE = ("torch", "onnx", "onnx-ir", "onnxscript")  # every export needs these


@dataclass(frozen=True, slots=True)
class Package:
    """A distribution: what is installed, what cla-export asks for, whether it loads."""

    name: str
    version: str | None  # None: not installed
    wanted: str | None  # version range of cla-export's own metadata; None: it asks for none
    extra: str | None  # the extra that brings it; None: always installed
    in_range: bool | None  # None where there is nothing to compare
    error: str | None  # why it does not load, if it is installed and does not

    @property
    def ok(self) -> bool:
        """Installed, loads, and in range."""
        return self.version is not None and self.error is None and self.in_range is not False

    @property
    def trouble(self) -> str:
        """What is wrong in a few words; empty if nothing is."""
        if self.version is None:
            return f"{self.name} is not installed"
        if self.error is not None:
            return f"{self.name} {self.version} does not load: {self.error}"
        if self.in_range is False:
            return f"{self.name} is {self.version}; cla-export wants {self.wanted}"
        return ""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU, as nvidia-smi gives it."""

    name: str
    memory: str
    driver: str


@dataclass(frozen=True, slots=True)
class Target:
    """One way to run an exported model, and whether it can be done here."""

    name: str
    state: State
    found: tuple[str, ...]
    needs: tuple[str, ...]  # what is missing or wrong; empty when ready
    install: str | None  # the command that brings what is missing


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """This machine, and what can be done on it."""

    version: str  # of cla-export
    installed: bool  # whether its metadata, and so the wanted ranges, could be read
    python: str
    executable: str
    platform: str
    cpus: int  # that this process may use
    memory: int | None  # bytes; what the container allows, if that is less
    packages: tuple[Package, ...]
    providers: tuple[str, ...]  # execution providers that ONNX Runtime was built with
    torch_cuda: str | None  # the CUDA version PyTorch was built for; None: none, or no PyTorch
    gpus: tuple[Gpu, ...]
    gpu_note: str  # why there are none; empty if there are
    targets: tuple[Target, ...]
    fast_cpu: bool  # whether our own operators for CPUs can be compiled here
    fast_cpu_note: str  # by what, or why not

    @property
    def ok(self) -> bool:
        """Whether at least one target can be run and nothing that is always needed is wrong."""
        base = all(package.ok for package in self.packages if package.name in _BASE)
        return base and any(target.state == "ready" for target in self.targets)

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        return {**asdict(self), "ok": self.ok}


def doctor() -> Diagnosis:
    """Look at this machine; loads every package of PACKAGES that is installed."""
    ranges = _wanted_ranges()
    packages = tuple(_package(name, module, ranges) for name, module in PACKAGES.items())
    by_name = {package.name: package for package in packages}
    gpus, gpu_note = nvidia_gpus()
    providers = _providers(by_name)
    fast_cpu, fast_cpu_note = _fast_cpu()
    return Diagnosis(
        version=cla_export.__version__,
        installed=bool(ranges),
        python=platform.python_version(),
        executable=sys.executable,
        platform=platform.platform(),
        cpus=cpus(),
        memory=memory(),
        packages=packages,
        providers=providers,
        torch_cuda=_torch_cuda(by_name["torch"]),
        gpus=gpus,
        gpu_note=gpu_note,
        targets=_targets(by_name, providers, gpus, gpu_note),
        fast_cpu=fast_cpu,
        fast_cpu_note=fast_cpu_note,
    )


def _fast_cpu() -> tuple[bool, str]:
    try:
        command = compile_cpu.compiler()
        compile_cpu.library()
    except MissingEnvironment as error:
        return False, str(error)
    return True, f"compiled with {' '.join(command)}"


def in_range(version: str, wanted: str) -> bool:
    """Whether a version lies in a range such as `>=1.31,<1.33`.

    Compares the numbers of the release only: 2.13.0+cpu is 2.13.0, and so is 2.13.0rc1.
    """
    have = _numbers(version)
    for part in filter(None, (part.strip() for part in wanted.split(","))):
        operator = next((op for op in _OPERATORS if part.startswith(op)), None)
        if operator is None:
            raise ValueError(f"version range {wanted!r} has {part!r}; expected one of {_OPERATORS}")
        text = part.removeprefix(operator).strip()
        limit = _numbers(text.removesuffix(".*"))
        if text.endswith(".*"):
            meets = (have[: len(limit)] == limit) is (operator == "==")
        elif operator == "~=":
            meets = _order(have, limit) >= 0 and have[: len(limit) - 1] == limit[:-1]
        else:
            order = _order(have, limit)
            meets = {
                "<=": order <= 0, ">=": order >= 0, "==": order == 0,
                "!=": order != 0, "<": order < 0, ">": order > 0,
            }[operator]  # fmt: skip
        if not meets:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"v?(?:\d+!)?(\d+(?:\.\d+)*)", version.strip())
    return tuple(int(part) for part in release[1].split(".")) if release else ()


def _order(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    length = max(len(a), len(b))
    a, b = a + (0,) * (length - len(a)), b + (0,) * (length - len(b))
    return (a > b) - (a < b)


def _wanted_ranges() -> dict[str, tuple[str, str | None]]:
    """Distribution -> (version range, extra) from cla-export's own metadata; empty without it."""
    try:
        requirements = metadata.requires(ME) or []
    except metadata.PackageNotFoundError:
        return {}
    ranges: dict[str, tuple[str, str | None]] = {}
    for requirement in requirements:
        what, _, marker = requirement.partition(";")
        match = re.match(r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^\]]*\])?\s*\(?([^)]*)\)?", what)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
        if match:
            limits = sorted((limit.strip() for limit in match[2].split(",")), reverse=True)
            ranges.setdefault(match[1].lower(), (",".join(limits), extra[1] if extra else None))
    return ranges


def _package(name: str, module: str, ranges: Mapping[str, tuple[str, str | None]]) -> Package:
    wanted, extra = ranges.get(name, (None, None))
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Package(name, None, wanted, extra, None, None)
    fits = in_range(version, wanted) if wanted else None
    return Package(name, version, wanted, extra, fits, _load_error(module))


def _load_error(module: str) -> str | None:
    try:
        import_module(module)
    except Exception as error:  # whatever a broken installation throws is the finding
        first = (str(error).strip() or "no message").splitlines()[0]
        return f"{type(error).__name__}: {first}"
    return None


def _providers(packages: Mapping[str, Package]) -> tuple[str, ...]:
    if not (_loads(packages["onnxruntime"]) or _loads(packages["onnxruntime-gpu"])):
        return ()
    try:
        return tuple(import_module("onnxruntime").get_available_providers())
    except Exception:  # a namespace left by a broken installation has no such function
        return ()


def _torch_cuda(torch: Package) -> str | None:
    if not _loads(torch):
        return None
    version = getattr(getattr(import_module("torch"), "version", None), "cuda", None)
    return None if version is None else str(version)


def _loads(package: Package) -> bool:
    return package.version is not None and package.error is None


def processor() -> str:
    """The processor's name as Linux gives it, which `platform.processor` leaves out."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def cpus() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine(threads: int | None) -> dict[str, str | int | None]:
    """Where it was measured; `threads` None is the runtime's own choice."""
    return {
        "processor": processor(),
        "cpus": cpus(),
        "threads": threads,
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def memory() -> int | None:
    """Bytes of memory, or the container's limit if that is less."""
    found = []
    with suppress(ValueError, OSError, AttributeError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in _CGROUP_LIMITS:
        with suppress(ValueError, OSError):  # not there, or "max"
            found.append(int(Path(name).read_text(encoding="ascii")))
    return min(found, default=None)


def nvidia_gpus() -> tuple[tuple[Gpu, ...], str]:
    """NVIDIA GPUs, or the reason why there are none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return (), "nvidia-smi is not there: no NVIDIA driver"
    query = "--query-gpu=name,memory.total,driver_version"
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_NVIDIA_SMI_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), f"nvidia-smi failed: {error}"
    lines = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode:
        return (), f"nvidia-smi failed: {lines[0] if lines else f'exit code {done.returncode}'}"
    rows = [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines()]
    gpus = tuple(Gpu(*row) for row in rows if len(row) == 3)
    return gpus, "" if gpus else "nvidia-smi lists no GPU"


def _targets(
    packages: Mapping[str, Package],
    providers: tuple[str, ...],
    gpus: tuple[Gpu, ...],
    gpu_note: str,
) -> tuple[Target, ...]:
    base = [packages[name] for name in _BASE]
    cpu, gpu = packages["onnxruntime"], packages["onnxruntime-gpu"]
    runtime = gpu if cpu.version is None and gpu.version is not None else cpu
    cuda = "CUDAExecutionProvider"

    gpu_needs = [package.trouble for package in (*base, gpu) if not package.ok]
    gpu_install = "pip install 'cla-export[gpu]'"
    if cpu.version is not None:
        gpu_install = f"pip uninstall -y onnxruntime onnxruntime-gpu && {gpu_install}"
        if gpu.version is not None:
            gpu_needs.append("onnxruntime and onnxruntime-gpu are both installed and overwrite "
                             "each other; keep one")  # fmt: skip
    if gpu.ok and cuda not in providers:
        gpu_needs.append(f"ONNX Runtime has no {cuda}")
    device_needs = [] if gpus else [f"no NVIDIA GPU ({gpu_note})"]

    found_gpus = [f"{item.name}, driver {item.driver}" for item in gpus]
    return (
        _target("portable", base, [], "pip install cla-export"),
        _target("onnxruntime CPU", [*base, runtime], [], "pip install 'cla-export[cpu]'"),
        Target(
            "onnxruntime GPU",
            _state([*base, gpu], [*gpu_needs, *device_needs]),
            (*_found([*base, gpu]), *(p for p in providers if p == cuda), *found_gpus),
            (*gpu_needs, *device_needs),
            gpu_install if gpu_needs else None,
        ),
        _target(
            "tensorrt",
            [packages["tensorrt"]],
            device_needs,
            "pip install 'cla-export[tensorrt]'",
        ),
        _rtx(packages["tensorrt-rtx-cu13"], device_needs),
    )


def _target(name: str, packages: list[Package], more: list[str], install: str) -> Target:
    needs = (*(package.trouble for package in packages if not package.ok), *more)
    state = _state(packages, list(needs))
    return Target(name, state, _found(packages), needs, install if needs else None)


def _rtx(library: Package, device_needs: list[str]) -> Target:
    """Report TensorRT-RTX, which builds engines where nothing can run them, too."""
    needs = [] if library.ok else [library.trouble]
    install = "pip install 'cla-export[rtx]'" if needs else None
    state: State = _state([library], needs)
    if state == "ready" and device_needs:
        state, needs = "builds only", [f"engines run on an RTX GPU: {device_needs[0]}"]
    return Target("tensorrt-rtx", state, _found([library]), (*needs, *_rtx_defect()), install)


def _rtx_defect() -> list[str]:
    """What is wrong with the TensorRT-RTX wheel, if it is there and as it comes."""
    library = rtx_library()
    if library is None or rtx_link(library).exists():
        return []
    return [
        f"its parser looks for {rtx_link(library).name}, the wheel has {library.name}: a graph "
        "with a plugin aborts the process. cla-export build works around it; `cla-export doctor "
        "--fix` makes the link for other tools"
    ]


def fix() -> list[str]:
    """Put right what can be: returns a line for each thing done.

    The one link that the TensorRT-RTX wheel lacks, beside its library.
    """
    library = rtx_library()
    if library is None or rtx_link(library).exists():
        return []
    link = rtx_link(library)
    try:
        link.symlink_to(library.name)
    except OSError as error:
        raise MissingEnvironment(
            f"{link}: cannot be made ({error.strerror or error}); make it as whoever may write "
            "there"
        ) from error
    return [f"{link} -> {library.name}"]


def _state(packages: list[Package], needs: list[str]) -> State:
    if any(package.error is not None for package in packages):
        return "broken"
    return "missing" if needs else "ready"


def _found(packages: list[Package]) -> tuple[str, ...]:
    return tuple(f"{p.name} {p.version}" for p in packages if p.version is not None)
