"""A session of ONNX Runtime's CUDA provider, on our stream and over memory that we bind.

Rules of the provider that this file keeps:

    1. All runs go to one stream, ours: copies and steps follow each other without waiting.
    2. A graph that is captured has a number of its own; runs that are not to be captured have -1.
    3. XQA, the provider's other decode kernel, is slower where many layers read one cache; it is
       chosen when a session is opened, by an environment variable.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cla_export.engines.cuda_memory import CudaMemory
from cla_export.engines.cuda_operators import CudaOperators, attends, own_nodes
from cla_export.engines.gpu_graph import PROVIDER
from cla_export.errors import MissingEnvironment, RunError

_KINDS = {"int64": 7, "float16": 10, "bfloat16": 16}  # ONNX's numbers of element types
_QUIET = 3  # log errors only
UNCAPTURED = -1  # rule 2


class OnDevice(NamedTuple):
    """An input or output that lies on the GPU."""

    dtype: Any
    shape: tuple[int, ...]
    address: int


class CudaSession:
    """Runs one graph.

    Args:
        graph: the graph's file.
        library: of the operators that it needs; None: ONNX Runtime's own.
        memory: of the GPU; work goes to its stream.
        dtype: of weights and caches: float16 or bfloat16.
        device: number of the GPU.
        capture: whether runs can be captured as CUDA graphs.

    Raises:
        MissingEnvironment: onnxruntime-gpu is not installed, or its CUDA provider does not load.
        RunError: ONNX Runtime refuses the graph.
    """

    def __init__(
        self,
        graph: Path,
        library: Path | None,
        memory: CudaMemory,
        dtype: str,
        *,
        device: int,
        capture: bool,
    ) -> None:
        self._graph, self._device = graph, device
        self._operators = None
        self.attends_itself = False  # whether attention is one of our operators
        if library is not None:
            nodes = own_nodes(graph)
            self.attends_itself = attends(nodes)
            self._operators = CudaOperators(library, memory, nodes, dtype, device)
        self._ort, self._session = _open(graph, library, device, memory.stream, capture=capture)

    def bind(
        self,
        inputs: Mapping[str, OnDevice],
        outputs: Mapping[str, OnDevice],
        host: Mapping[str, NDArray[np.int64]],
        captured_as: int = UNCAPTURED,
    ) -> "Bound":
        """Say where all of a call lies. Numbers in `host` are read when it runs.

        With a number of its own, above 0, it is captured when it first runs.
        """
        binding = self._session.io_binding()
        for places, bind in ((inputs, binding.bind_input), (outputs, binding.bind_output)):
            for name, (dtype, shape, address) in places.items():
                kind = _KINDS[np.dtype(dtype).name]
                bind(name, "cuda", self._device, kind, list(shape), address)
        for name, array in host.items():
            kind, address = _KINDS[array.dtype.name], array.ctypes.data
            binding.bind_input(name, "cpu", 0, kind, list(array.shape), address)
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(captured_as))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return Bound(binding, options)

    def run(self, call: "Bound") -> None:
        """Queue a call: one launch, once it is captured.

        Raises:
            RunError: ONNX Runtime failed; or what one of our operators raised.
        """
        try:
            self._session.run_with_iobinding(call.binding, call.options)
        except Exception as error:  # ONNX Runtime's own exception types derive from it alone
            own = None if self._operators is None else self._operators.take_error()
            if own is not None:
                raise own from error
            raise RunError(
                f"{self._graph}: ONNX Runtime {self._ort.__version__} failed to run it: {error}"
            ) from error


class Bound(NamedTuple):
    """A call whose inputs and outputs have their places."""

    binding: Any
    options: Any


def _open(
    graph: Path, library: Path | None, device: int, stream: int, *, capture: bool
) -> tuple[Any, Any]:
    """ONNX Runtime, and a session of it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingEnvironment(
            "onnxruntime-gpu is not installed; pip install 'cla-export[gpu]'"
        ) from error
    if PROVIDER not in onnxruntime.get_available_providers():
        raise MissingEnvironment(
            f"onnxruntime {onnxruntime.__version__} has no {PROVIDER}; pip uninstall -y "
            "onnxruntime && pip install 'cla-export[gpu]'"
        )
    onnxruntime.preload_dlls()  # CUDA's and cuDNN's libraries, where pip put them
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _QUIET
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    if library is not None:
        options.register_custom_ops_library(str(library))
    provider = {
        "device_id": str(device),
        "user_compute_stream": str(stream),  # rule 1
        "enable_cuda_graph": "1" if capture else "0",
        "arena_extend_strategy": "kSameAsRequested",
        "enable_skip_layer_norm_strict_mode": "1",  # statistics in float32
    }
    try:
        with environment_variable("ORT_ENABLE_XQA", "0"):  # rule 3
            session = onnxruntime.InferenceSession(
                str(graph), options, providers=[(PROVIDER, provider), "CPUExecutionProvider"]
            )
    except Exception as error:  # ONNX Runtime's own exception types derive from Exception alone
        raise RunError(
            f"{graph}: ONNX Runtime {onnxruntime.__version__} cannot open it: {error}"
        ) from error
    if PROVIDER not in session.get_providers():
        raise MissingEnvironment(f"{PROVIDER} does not load here; see ONNX Runtime's log for why")
    return onnxruntime, session


@contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """Set within the block, and as it was after it."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
