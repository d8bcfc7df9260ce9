"""The doctor: versions against ranges, packages that are broken, and what each target needs."""

import io
import json
import sys
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from cla_export import environment
from cla_export.environment import Diagnosis, doctor, in_range
from cla_export.plugin import compile_cpu
from cla_export.views.environment import render


def shown(found: Diagnosis) -> str:
    console = Console(width=80, no_color=True, record=True, file=io.StringIO())
    render(found, console)
    return console.export_text()


def install(site: Path, name: str, version: str, module: str | None = None, code: str = "") -> None:
    """Put a distribution, and a module if it has one, where Python finds them first."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if module is not None:
        (site / f"{module}.py").write_text(code)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with nothing of PACKAGES but cla-export's own metadata; install() adds to it."""
    site = tmp_path / "site"
    site.mkdir()
    requires = metadata.requires("cla-export") or []
    info = site / "cla_export-0.1.0.dist-info"
    info.mkdir()
    lines = "".join(f"Requires-Dist: {line}\n" for line in requires)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: cla-export\nVersion: 0.1.0\n{lines}"
    )
    monkeypatch.setattr(sys, "path", [str(site)])
    modules = {*environment.PACKAGES.values(), "tensorrt_rtx_libs"}
    for module in modules:
        monkeypatch.delitem(sys.modules, module, raising=False)
    for module in modules:  # put back after the test
        monkeypatch.setitem(sys.modules, module, sys)
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return site


def add_gpu(machine: Path, script: str) -> None:
    folder = machine.parent / "bin"
    folder.mkdir()
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)


ONNXRUNTIME = "def get_available_providers():\n    return {}\n"
BASE = (("torch", "2.13.0+cpu"), ("onnx", "1.23.2"), ("onnx-ir", "1.1.0"), ("onnxscript", "0.7.2"))


def install_base(machine: Path) -> None:
    for name, version in BASE:
        install(machine, name, version, environment.PACKAGES[name])


# Versions


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("2.13.0+cpu", ">=2.11,<2.14", True),
        ("2.14.0", ">=2.11,<2.14", False),
        ("2.9.1", ">=2.11,<2.14", False),  # numbers, not text
        ("1.31", ">=1.31.0", True),
        ("1.31.0", "==1.31", True),
        ("1.31.5", "==1.31.*", True),
        ("1.32.0", "==1.31.*", False),
        ("1.31.5", "!=1.31.*", False),
        ("1.32.0", "!=1.31.*", True),
        ("1.4.9", "~=1.4.2", True),
        ("1.5.0", "~=1.4.2", False),
        ("1.4.1", "~=1.4.2", False),
        ("11.1.0.106", ">=11.0,<12", True),
        ("3", ">3", False),
        ("3.0.1", ">3", True),
        ("2", "!=2.0", False),
        ("1.0", "<=1", True),
        ("5.0", "", True),
    ],
)
def test_ranges(version: str, wanted: str, fits: bool) -> None:
    assert in_range(version, wanted) is fits


def test_a_range_that_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="expected one of"):
        in_range("1.0", "around 2")


# This machine


def test_the_environment_that_runs_the_tests() -> None:
    found = doctor()
    packages = {package.name: package for package in found.packages}
    assert found.installed
    assert packages["torch"].version == metadata.version("torch")
    assert packages["torch"].wanted == ">=2.11,<2.14"
    assert packages["onnxruntime-gpu"].extra == "gpu"
    assert found.cpus >= 1
    assert found.memory is not None
    assert found.memory > 2**28
    targets = {target.name: target for target in found.targets}
    assert list(targets) == [
        "portable", "onnxruntime CPU", "onnxruntime GPU", "tensorrt", "tensorrt-rtx",
    ]  # fmt: skip
    assert targets["portable"].state == "ready"
    assert targets["tensorrt"].state == "missing"
    assert targets["tensorrt-rtx"].state == "builds only"
    assert json.loads(json.dumps(found.to_json()))["ok"]
    assert "portable: ready" in shown(found)


# Other machines


def test_a_machine_with_nothing(machine: Path) -> None:
    found = doctor()
    assert not found.ok
    assert {package.version for package in found.packages} == {None}
    assert found.providers == ()
    assert found.gpu_note == "nvidia-smi is not there: no NVIDIA driver"
    targets = {target.name: target for target in found.targets}
    assert targets["portable"].needs[0] == "torch is not installed"
    assert targets["portable"].install == "pip install cla-export"
    assert targets["onnxruntime CPU"].install == "pip install 'cla-export[cpu]'"
    assert targets["onnxruntime GPU"].install == "pip install 'cla-export[gpu]'"
    assert targets["tensorrt-rtx"].install == "pip install 'cla-export[rtx]'"
    assert machine.is_dir()


def test_a_package_that_does_not_load(machine: Path) -> None:
    install_base(machine)
    code = "raise OSError('libcudart.so.13: cannot open [/file]\\nmore')"
    install(machine, "onnxruntime", "1.31.1", "onnxruntime", code)
    found = doctor()
    target = found.targets[1]
    assert (target.name, target.state) == ("onnxruntime CPU", "broken")
    words = "onnxruntime 1.31.1 does not load: OSError: libcudart.so.13: cannot open [/file]"
    assert target.needs == (words,)
    assert found.providers == ()
    assert found.targets[0].state == "ready"
    assert "libcudart" in shown(found)


def test_a_package_that_is_too_old(machine: Path) -> None:
    install_base(machine)
    install(machine, "onnxruntime", "1.20.0", "onnxruntime", ONNXRUNTIME.format("()"))
    found = doctor()
    assert found.targets[1].needs == ("onnxruntime is 1.20.0; cla-export wants >=1.31,<1.33",)
    assert found.targets[1].state == "missing"
    assert "out of range" in shown(found)


def test_a_gpu_machine(machine: Path) -> None:
    install_base(machine)
    providers = ONNXRUNTIME.format("['CUDAExecutionProvider', 'CPUExecutionProvider']")
    install(machine, "onnxruntime-gpu", "1.31.1", "onnxruntime", providers)
    install(machine, "tensorrt", "11.1.0.106", "tensorrt")
    add_gpu(machine, "echo 'NVIDIA H200, 143771 MiB, 580.95.05'")
    found = doctor()
    assert [(gpu.name, gpu.memory, gpu.driver) for gpu in found.gpus] == [
        ("NVIDIA H200", "143771 MiB", "580.95.05")
    ]
    targets = {target.name: target for target in found.targets}
    assert targets["onnxruntime GPU"].state == "ready"
    assert targets["onnxruntime GPU"].install is None
    assert targets["onnxruntime CPU"].state == "ready"  # the GPU build has the CPU provider too
    tensorrt = targets["tensorrt"]
    assert (tensorrt.state, tensorrt.found) == ("ready", ("tensorrt 11.1.0.106",))
    assert tensorrt.install is None
    assert found.ok


def test_two_onnxruntimes_at_once(machine: Path) -> None:
    install_base(machine)
    install(machine, "onnxruntime", "1.31.1", "onnxruntime", ONNXRUNTIME.format("()"))
    install(machine, "onnxruntime-gpu", "1.31.1")
    gpu = doctor().targets[2]
    assert gpu.state == "missing"
    assert any("both installed and overwrite each other" in need for need in gpu.needs)
    assert gpu.install is not None
    assert gpu.install.startswith("pip uninstall -y onnxruntime onnxruntime-gpu && pip install")


def test_fast_attention_on_cpus(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor()
    assert not found.fast_cpu, "a machine with nothing has no compiler"
    assert found.fast_cpu_note.startswith("no C compiler")
    assert found.to_json()["fast_cpu"] is False
    monkeypatch.setenv("CC", "false")
    compile_cpu.library.cache_clear()
    assert "false" in doctor().fast_cpu_note
    compile_cpu.library.cache_clear()


@pytest.mark.parametrize(
    ("script", "note"),
    [
        ("echo 'NVIDIA-SMI has failed'; exit 9", "nvidia-smi failed: NVIDIA-SMI has failed"),
        ("exit 9", "nvidia-smi failed: exit code 9"),
        ("true", "nvidia-smi lists no GPU"),
    ],
)
def test_a_driver_that_does_not_answer(machine: Path, script: str, note: str) -> None:
    add_gpu(machine, script)
    assert doctor().gpu_note == note


def test_without_metadata_of_its_own(machine: Path) -> None:
    for file in (machine / "cla_export-0.1.0.dist-info").iterdir():
        file.unlink()
    (machine / "cla_export-0.1.0.dist-info").rmdir()
    install_base(machine)
    found = doctor()
    assert not found.installed
    assert found.packages[0].in_range is None
    assert found.targets[0].state == "ready"
    assert "version ranges cannot be checked" in shown(found)


def test_the_link_that_the_rtx_wheel_lacks(machine: Path) -> None:
    """Explained while it is missing, made once, and no more said of it."""
    install_base(machine)
    install(machine, "tensorrt-rtx-cu13", "1.7.1.116", "tensorrt_rtx")
    libraries = machine / "tensorrt_rtx_libs"
    libraries.mkdir()
    (libraries / "__init__.py").write_text("")
    (libraries / "libtensorrt_rtx.so.1").write_text("")
    rtx = doctor().targets[-1]
    assert rtx.state == "builds only"
    assert rtx.needs[0].startswith("engines run on an RTX GPU: no NVIDIA GPU")
    assert "aborts the process" in rtx.needs[-1]
    assert environment.fix() == [f"{libraries / 'libtensorrt_rtx.so'} -> libtensorrt_rtx.so.1"]
    assert (libraries / "libtensorrt_rtx.so").resolve() == libraries / "libtensorrt_rtx.so.1"
    assert environment.fix() == []
    assert len(doctor().targets[-1].needs) == 1
