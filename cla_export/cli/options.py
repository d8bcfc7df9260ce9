"""What several commands take: choices, arguments, options."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Target(StrEnum):
    """What a graph is lowered for."""

    onnxruntime = "onnxruntime"
    portable = "portable"
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


class EngineTarget(StrEnum):
    """TensorRT's flavours."""

    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


class AttentionChoice(StrEnum):
    """What computes attention in a TensorRT engine."""

    auto = "auto"
    native = "native"
    plugin = "plugin"


class DType(StrEnum):
    """Dtype of weights, activations and caches."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


class Quantize(StrEnum):
    """Weight-only quantisation."""

    int4 = "int4"
    int8 = "int8"


class CacheDType(StrEnum):
    """Dtype of caches, where it is not that of everything else."""

    int8 = "int8"


class WeightsChoice(StrEnum):
    """Where a bundle has its weights from."""

    auto = "auto"
    link = "link"
    copy = "copy"


class ParityTarget(StrEnum):
    """What runs a bundle that is compared with PyTorch."""

    onnxruntime = "onnxruntime"
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


class Backend(StrEnum):
    """What runs a bundle."""

    onnxruntime = "onnxruntime"
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"
    torch = "torch"


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Source = Annotated[Path, typer.Argument(help="Model folder: config.json, model.safetensors, ...")]
BundleFolder = Annotated[Path, typer.Argument(help="Bundle folder, as export writes it.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")]
Threads = Annotated[int | None, typer.Option(help="Intra-operator threads; onnxruntime.")]
Module = Annotated[
    str | None,
    typer.Option(
        help="package.module:factory of yours that makes the PyTorch module; it is imported.",
        metavar="PACKAGE.MODULE:FACTORY",
    ),
]
EngineFolder = Annotated[
    Path | None, typer.Option(help="TensorRT engine's folder, where the bundle has several.")
]


def importable(module: str | None) -> str | None:
    """Let code in the current folder be found too, behind everything that is installed."""
    if module is not None and (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    return module
