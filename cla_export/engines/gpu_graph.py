"""Which of a bundle's graphs ONNX Runtime runs on a GPU here, and whether it runs one at all."""

import logging
from pathlib import Path

from cla_export.bundle import CUDA_GRAPH, CUDA_PLUGIN_GRAPH, Bundle
from cla_export.engines.cuda_memory import CudaMemory
from cla_export.errors import BundleError, MissingEnvironment
from cla_export.plugin import compile_cpu

PROVIDER = "CUDAExecutionProvider"
_log = logging.getLogger(__name__)


def graph_of(bundle: Bundle, *, stock: bool = False) -> tuple[Path, Path | None]:
    """The graph that runs on a GPU here, and the library of operators that it needs.

    With `stock` it is the one of ONNX Runtime's own operators in any case, which needs none.
    """
    if bundle.cuda_graph is None:
        raise BundleError(
            f"{bundle.folder}: no graph for GPUs, which bundles of target onnxruntime have in "
            f"float16 and bfloat16; this one is {bundle.target}, {bundle.dtype}"
        )
    if bundle.cuda_plugin_graph is None or stock:
        return bundle.cuda_graph, None
    try:
        return bundle.cuda_plugin_graph, compile_cpu.library(compile_cpu.HOST_OPERATORS)
    except MissingEnvironment as error:
        _log.warning("%s runs in place of %s: %s", CUDA_GRAPH, CUDA_PLUGIN_GRAPH, error)
        return bundle.cuda_graph, None


def takes(bundle: Bundle) -> bool:
    """Whether a bundle is run on a GPU here: a 16-bit one where there is one, bfloat16 anyway."""
    return bundle.cuda_graph is not None and (bundle.dtype == "bfloat16" or available())


def available() -> bool:
    """Whether ONNX Runtime has its CUDA provider here, and a GPU is there."""
    try:
        import onnxruntime

        if PROVIDER not in onnxruntime.get_available_providers():
            return False
        CudaMemory()
    except (ImportError, MissingEnvironment):
        return False
    return True
