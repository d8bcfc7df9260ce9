"""The ONNX Runtime executor on an NVIDIA GPU: pools on the device, decode as CUDA graphs.

A prompt runs in chunks, and several short ones in one call; but row by row where attention is
GroupQueryAttention, which takes several rows only for decode. A decode step over the first rows is
captured on its first use, one graph for each number of rows: it holds the addresses of pools,
inputs and logits, so what changes between steps is only what these hold. Tokens are chosen on the
device, greedy ones are handed from step to step there.

Rules of ONNX Runtime's CUDA provider that this file keeps:

    1. All runs go to one stream, ours: copies and steps follow each other without waiting.
    2. A graph that is captured has a number of its own; runs that are not to be captured have -1.
    3. Captured attention must have been told the capacity as its total length, since that decides
       what it launches. The graph reads it off its own caches, and nobody can say otherwise.
    4. XQA, the provider's other decode kernel, is slower where many layers read one cache; it is
       chosen when a session is opened, by an environment variable.
    5. Capturing runs a step more than once, and the first run's tokens are in place of its input
       by then: it is fed again and run anew.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cla_export.bundle import CUDA_GRAPH, CUDA_PLUGIN_GRAPH, Bundle
from cla_export.engines.cuda_memory import CudaMemory
from cla_export.engines.cuda_operators import CudaOperators, attends, own_nodes
from cla_export.engines.device_chooser import DeviceChooser
from cla_export.engines.device_pools import DevicePools, Inputs
from cla_export.engines.executor import (
    Array,
    Cache,
    Logits,
    PooledExecutor,
    TokenChooser,
    capacity_of,
)
from cla_export.errors import BadInput, BundleError, MissingEnvironment, RunError
from cla_export.graph_names import KEEP
from cla_export.plugin import compile_cpu
from cla_export.sampling import Choice

TOKENS = "tokens"  # output: the greedy choice of each row of logits
PROVIDER = "CUDAExecutionProvider"
_CHUNK = 2048  # prompt tokens of one call
_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)  # rows of a step that tokens are chosen for
_MOST_LOGITS = 128 << 20  # bytes, of prompts that are read together
_INT64 = 7  # ONNX's numbers of element types
_TYPES: dict[str, tuple[Any, int]] = {
    "float16": (np.float16, 10),
    "bfloat16": (ml_dtypes.bfloat16, 16),
}
_QUIET = 3  # log errors only
_UNCAPTURED = "-1"
_log = logging.getLogger(__name__)


class OnnxRuntimeCudaExecutor(PooledExecutor):
    """Runs a bundle's graph for GPUs on ONNX Runtime's CUDA provider.

    Args:
        bundle: an opened bundle of target `onnxruntime`, in float16 or bfloat16.
        capacity: tokens a slot can hold; at most the model's positions (None: all of them).
        slots: rows that can run side by side.
        device: number of the GPU.
        graphs: capture decode steps over the first slots as CUDA graphs.
        stock: run the graph of ONNX Runtime's own operators in any case; else the one with ours,
            where a C compiler and NVRTC are installed.

    Raises:
        BadInput: the capacity is more than the model's positions.
        BundleError: the bundle has no graph for GPUs.
        MissingEnvironment: onnxruntime-gpu or cuda-core is not installed, or there is no GPU.
        RunError: ONNX Runtime refuses the graph, or the GPU has no room.
    """

    backend = "onnxruntime"
    reads_rows_at_once = False
    rounds_activations = False  # MatMulNBits does so on a CPU alone
    chunk = 512  # fewer take as long: a call of so many is bound by what the host does for it

    def __init__(
        self,
        bundle: Bundle,
        *,
        capacity: int | None = None,
        slots: int = 1,
        device: int = 0,
        graphs: bool = True,
        stock: bool = False,
    ) -> None:
        capacity = capacity_of(bundle, capacity)
        super().__init__(bundle.layout, capacity, slots, bundle.vocab_size)
        self.graph, library = graph_of(bundle, stock=stock)
        self._graphs = graphs
        self._dtype, self._kind = _TYPES[bundle.dtype]
        self._device = device
        self._memory = CudaMemory(device)
        self._operators = None
        if library is not None:
            nodes = own_nodes(self.graph)
            self.reads_rows_at_once = attends(nodes)
            self._operators = CudaOperators(library, self._memory, nodes, bundle.dtype, device)
        self._ort, self._session = _open(self.graph, device, self._memory.stream, graphs, library)
        caches = [f"{group.index}.{p}" for group in self.layout.groups for p in ("key", "value")]
        self.pools = DevicePools(
            self._memory, self.layout, self.capacity, slots, dict.fromkeys(caches, self._dtype)
        )
        inputs = ("input_ids", "write_indices", "kv_lengths", KEEP)
        self._inputs = Inputs(slots, _CHUNK, dict.fromkeys(inputs, np.int64))
        self._inputs_at = self._memory.allocate(self._inputs.size)
        self._keep = np.ones((), np.int64)  # on the host: shapes are computed from it
        self._logits_at = self._memory.allocate(slots * self._row_bytes)
        self._chooser = DeviceChooser(self._memory, bundle.dtype, self.vocab_size, slots)
        self._steps: dict[tuple[int, int], tuple[Any, Any]] = {}  # first, rows -> a bound step

    @property
    def device_bytes(self) -> dict[str, int]:
        """Bytes of GPU memory that this executor allocated; weights are ONNX Runtime's own."""
        return {
            "caches": self.pools.bytes,
            "inputs and logits": self._inputs.size + self.slots * self._row_bytes,
        }

    def read(self, group: int, slot: int) -> Cache:
        return self.pools.read(group, slot)

    def write(self, group: int, slot: int, keys: Array, values: Array) -> None:
        self.pools.write(group, slot, keys, values)

    def copy(self, source: int, target: int, _tokens: int) -> None:
        self.pools.copy(source, target)

    def decode_greedy(
        self, slots: Sequence[int], tokens: Sequence[int], lengths: Sequence[int], steps: int = 1
    ) -> NDArray[np.int64]:
        """So many steps of `decode`, each fed the likeliest token of the one before; [B, steps].

        Nothing goes to or from the host between the steps. Errors as for `decode`.
        """
        rows, starts = len(slots), np.array(lengths, np.int64)
        if steps < 1 or (rows and int(starts.max()) + steps > self.capacity):
            raise BadInput(
                f"{steps} steps from {max(lengths, default=0)} tokens; expected at least one, and "
                f"the capacity is {self.capacity}"
            )
        first = self._check_decode(slots, tokens, lengths)
        memory, size = self._memory, rows * 8
        ahead = starts + np.arange(steps + 1)[:, None]  # [steps + 1, B]: held before each step
        table = memory.allocate(ahead.nbytes)
        made = memory.allocate(steps * size)
        try:
            memory.upload(table, ahead)
            self._feed(np.array(tokens, np.int64)[:, None], starts, 1)
            for step in range(steps):
                memory.copy(table + step * size, self._input("write_indices"), size)
                memory.copy(table + (step + 1) * size, self._input("kv_lengths"), size)
                self._step_at(first, rows)
                memory.copy(self._input("input_ids"), made + step * size, size)
            chosen = np.empty((steps, rows), np.int64)
            memory.download(made, chosen)
        finally:
            memory.free(table)
            memory.free(made)
        return chosen.T

    @property
    def chooser(self) -> TokenChooser:
        return self

    def begin_decode(
        self,
        slots: Sequence[int],
        tokens: Sequence[int],
        lengths: Sequence[int],
        choices: Sequence[Choice],
    ) -> None:
        """As `TokenChooser.begin_decode`. Errors as for `decode`."""
        first, rows = self._check_decode(slots, tokens, lengths), len(slots)
        self._chooser.prepare(choices)
        # Rows that write nothing, and read one place, make up a size that is captured once.
        idle = self._captured_rows(first, rows) - rows
        ids = np.array([*tokens, *[0] * idle], np.int64)[:, None]
        starts = np.array([*lengths, *[self.capacity] * idle], np.int64)
        ends = starts + 1
        ends[rows:] = 1
        self._feed(ids, starts, 1, ends)
        self._step_at(first, rows + idle)
        self._chooser.choose(self._logits_at, rows)

    def _captured_rows(self, first: int, rows: int) -> int:
        """Rows of the step that some rows run in: so there are few sizes to capture.

        Only our own rotation leaves a row alone that says it is full.
        """
        if not self.reads_rows_at_once or not self._graphs:
            return rows
        wanted = next((size for size in _SIZES if size >= rows), -(-rows // 16) * 16)
        return min(wanted, self.slots - first)

    def end_decode(self) -> list[int | None]:
        """As `TokenChooser.end_decode`."""
        return self._chooser.tokens()

    def logits_of(self, row: int) -> Logits:
        """As `TokenChooser.logits_of`."""
        logits = np.empty(self.vocab_size, self._dtype)
        self._memory.download(self._logits_at + row * self._row_bytes, logits)
        return logits.astype(np.float32)

    def _run(
        self,
        first: int,
        input_ids: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        keep: int,
    ) -> Logits:
        rows, length = input_ids.shape
        if length == 1:
            self._feed(input_ids, starts, 1)
            self._step_at(first, rows)
            logits = np.empty((rows, 1, self.vocab_size), self._dtype)
            self._memory.download(self._logits_at, logits)
            return logits.astype(np.float32)
        if rows == 1:
            return self._prefill_row(first, input_ids[0], int(starts[0]), keep)[None]
        longest, kept = int(counts.max()), int(counts.max() - counts.min()) + keep
        together = rows * longest <= _CHUNK and rows * kept * self._row_bytes <= _MOST_LOGITS
        if together and self.reads_rows_at_once:
            ids = input_ids[:, :longest]
            return self._prefill_together(first, ids, starts, counts, keep, kept)
        half = rows // 2
        parts = (slice(0, half), slice(half, rows))
        return np.concatenate(
            [
                self._run(
                    first + part.start,
                    input_ids[part, : counts[part].max()],
                    starts[part],
                    counts[part],
                    keep,
                )
                for part in parts
            ]
        )

    def _prefill_together(
        self,
        first: int,
        input_ids: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        keep: int,
        kept: int,
    ) -> Logits:
        """Prompts side by side, padded on the right; logits [B, keep, V].

        Their last `kept` places have logits, which are those of each row's last tokens and more.
        What is behind a row's tokens in its slot is overwritten before anything reads it.
        """
        rows, longest = input_ids.shape
        self._feed(input_ids, starts, kept)
        logits_at = self._memory.allocate(rows * kept * self._row_bytes)
        try:
            binding = self._bind(first, rows, longest, kept, logits_at)
            self._queue(binding, self._options(_UNCAPTURED))
            logits = np.empty((rows, keep, self.vocab_size), self._dtype)
            for row, count in enumerate(counts.tolist()):
                place = row * kept + kept - keep - (longest - count)
                self._memory.download(logits_at + place * self._row_bytes, logits[row])
        finally:
            self._memory.free(logits_at)
        return logits.astype(np.float32)

    def _prefill_row(
        self, slot: int, tokens: NDArray[np.int64], start: int, keep: int
    ) -> NDArray[np.float32]:
        """A prompt, in chunks; logits [keep, V]."""
        kept = []
        for at in range(0, len(tokens), _CHUNK):
            piece = tokens[at : at + _CHUNK]
            wanted = min(len(piece), at + len(piece) - (len(tokens) - keep))
            self._feed(piece[None], np.array([start + at]), max(1, wanted))
            logits_at = self._memory.allocate(max(1, wanted) * self._row_bytes)
            binding = self._bind(slot, 1, len(piece), max(1, wanted), logits_at)
            self._queue(binding, self._options(_UNCAPTURED))
            logits = np.empty((max(1, wanted), self.vocab_size), self._dtype)
            self._memory.download(logits_at, logits)
            self._memory.free(logits_at)
            if wanted > 0:
                kept.append(logits.astype(np.float32))
        return np.concatenate(kept)

    def _step_at(self, first: int, rows: int) -> None:
        """Queue a decode step of rows whose inputs are there: one launch, once it is captured."""
        if (first, rows) not in self._steps:
            self._keep[...] = 1
            binding = self._bind(first, rows, 1, 1, self._logits_at)
            number = str(len(self._steps) + 1) if self._graphs else _UNCAPTURED  # rule 2
            self._steps[first, rows] = binding, self._options(number)
            if self._graphs:  # rule 5
                self._queue(*self._steps[first, rows])
                self._memory.upload(self._inputs_at, self._inputs.block)
        self._queue(*self._steps[first, rows])

    def _bind(self, first: int, rows: int, length: int, keep: int, logits_at: int) -> Any:  # noqa: ANN401
        binding = self._session.io_binding()

        def put(name: str, kind: int, shape: Sequence[int], address: int) -> None:
            output = name.startswith(("present.", "logits", TOKENS))
            bind = binding.bind_output if output else binding.bind_input
            bind(name, "cuda", self._device, kind, list(shape), address)

        put("input_ids", _INT64, (rows, length), self._input("input_ids"))
        put("write_indices", _INT64, (rows,), self._input("write_indices"))
        put("kv_lengths", _INT64, (rows,), self._input("kv_lengths"))
        binding.bind_input(KEEP, "cpu", 0, _INT64, [], self._keep.ctypes.data)
        put("logits", self._kind, (rows, keep, self.vocab_size), logits_at)
        if length == 1:  # the next step's input
            put(TOKENS, _INT64, (rows, 1), self._input("input_ids"))
        for name, pool in self.pools.by_name.items():
            shape, at = (rows, *pool.shape), pool.address(first)
            put(f"past_key_values.{name}", self._kind, shape, at)
            put(f"present.{name}", self._kind, shape, at)
        return binding

    def _queue(self, binding: Any, options: Any) -> None:  # noqa: ANN401
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as error:  # ONNX Runtime's own exception types derive from it alone
            own = None if self._operators is None else self._operators.take_error()
            if own is not None:
                raise own from error
            raise RunError(
                f"{self.graph}: ONNX Runtime {self._ort.__version__} failed to run it: {error}"
            ) from error

    def _options(self, graph: str) -> Any:  # noqa: ANN401
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", graph)
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options

    def _feed(
        self,
        input_ids: NDArray[np.int64],
        starts: NDArray[np.int64],
        keep: int,
        ends: NDArray[np.int64] | None = None,
    ) -> None:
        self._keep[...] = keep
        self._inputs.fill(input_ids, starts, keep, ends)
        self._memory.upload(self._inputs_at, self._inputs.block)

    def _input(self, name: str) -> int:
        """Where an input lies on the device."""
        return self._inputs_at + self._inputs.offsets[name]

    @property
    def _row_bytes(self) -> int:
        return self.vocab_size * int(np.dtype(self._dtype).itemsize)


def graph_of(bundle: Bundle, *, stock: bool = False) -> tuple[Path, Path | None]:
    """The graph that runs on a GPU here, and the library of operators that it needs."""
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


def _open(
    graph: Path, device: int, stream: int, graphs: bool, library: Path | None
) -> tuple[Any, Any]:
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
        "user_compute_stream": str(stream),
        "enable_cuda_graph": "1" if graphs else "0",
        "arena_extend_strategy": "kSameAsRequested",
        "enable_skip_layer_norm_strict_mode": "1",  # statistics in float32
    }
    try:
        with environment_variable("ORT_ENABLE_XQA", "0"):  # rule 4
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
