"""The ONNX Runtime executor on an NVIDIA GPU: pools on the device, decode as CUDA graphs.

A decode step over the first rows is captured on its first use, one graph for each number of rows:
it holds the addresses of pools, inputs and logits, so what changes between steps is only what these
hold. Prompts are not captured; several share a call, but where attention is GroupQueryAttention,
which takes several rows only for decode.

Rules of ONNX Runtime's CUDA provider that this file keeps, beside those of `cuda_session`:

    1. Captured attention must have been told the capacity as its total length, since that decides
       what it launches. The graph reads it off its own caches, and nobody can say otherwise.
    2. Capturing runs a step more than once, and the first run's tokens are in place of its input
       by then: it is fed again and run anew.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cla_export.bundle import Bundle
from cla_export.engines.cuda_memory import CudaMemory
from cla_export.engines.cuda_session import UNCAPTURED, Bound, CudaSession, OnDevice
from cla_export.engines.device_chooser import DeviceChooser
from cla_export.engines.device_pools import Inputs
from cla_export.engines.executor import capacity_of
from cla_export.engines.gpu_executor import GpuExecutor
from cla_export.engines.gpu_graph import graph_of
from cla_export.engines.prompt_calls import PromptCall, plan_prompts
from cla_export.errors import BadInput
from cla_export.graph_names import KEEP

TOKENS = "tokens"  # output: the greedy choice of each row of logits
_CHUNK = 2048  # prompt tokens of one call
_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)  # rows of a step that tokens are chosen for
_MOST_LOGITS = 128 << 20  # bytes, of prompts that are read together
_DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class OnnxRuntimeCudaExecutor(GpuExecutor):
    """Runs a bundle's graph for GPUs on ONNX Runtime's CUDA provider.

    Args:
        bundle: an opened bundle of target `onnxruntime`, in float16 or bfloat16.
        capacity: tokens a slot can hold; at most the model's positions (None: all of them).
        slots: rows that can run side by side.
        device: number of the GPU.
        graphs: capture decode steps as CUDA graphs.
        stock: run the graph of ONNX Runtime's own operators in any case; else the one with ours,
            where a C compiler and NVRTC are installed.

    Raises:
        BadInput: the capacity is more than the model's positions.
        BundleError: the bundle has no graph for GPUs.
        MissingEnvironment: onnxruntime-gpu or cuda-core is not installed, or there is no GPU.
        RunError: ONNX Runtime refuses the graph, or the GPU has no room.
    """

    backend = "onnxruntime"
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
        memory = CudaMemory(device)
        self._session = CudaSession(
            self.graph, library, memory, bundle.dtype, device=device, capture=graphs
        )
        self.reads_rows_at_once = self._session.attends_itself
        self._graphs = graphs
        self._dtype = _DTYPES[bundle.dtype]
        caches = [f"{group.index}.{p}" for group in self.layout.groups for p in ("key", "value")]
        dtypes = dict.fromkeys(caches, self._dtype)
        self._allocate(memory, dtypes, self._dtype, partial(DeviceChooser, memory))
        inputs = ("input_ids", "write_indices", "kv_lengths", KEEP)
        self._inputs = Inputs(slots, _CHUNK, dict.fromkeys(inputs, np.int64))
        self._inputs_at = self._memory.allocate(self._inputs.size)
        self._keep = np.ones((), np.int64)  # on the host: shapes are computed from it
        self._steps: dict[tuple[int, int], Bound] = {}  # by the first slot, and rows

    @property
    def device_bytes(self) -> dict[str, int]:
        """As `GpuExecutor.device_bytes`; weights are ONNX Runtime's own."""
        return {**super().device_bytes, "inputs": self._inputs.size}

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

    def _queue_step(self, first: int, tokens: Sequence[int], lengths: Sequence[int]) -> None:
        self._feed(np.array(tokens, np.int64)[:, None], np.array(lengths, np.int64), 1)
        self._step_at(first, len(tokens))

    def _queue_wider_step(self, first: int, tokens: Sequence[int], lengths: Sequence[int]) -> None:
        """In one of few sizes, so that there are few to capture; rows that it adds read one place.

        Only our own rotation leaves a row alone that says it is full.
        """
        rows = len(tokens)
        if not self.reads_rows_at_once or not self._graphs:
            self._queue_step(first, tokens, lengths)
            return
        size = next((size for size in _SIZES if size >= rows), -(-rows // 16) * 16)
        idle = min(size, self.slots - first) - rows
        ids = np.array([*tokens, *[0] * idle], np.int64)[:, None]
        starts = np.array([*lengths, *[self.capacity] * idle], np.int64)
        ends = starts + 1
        ends[rows:] = 1
        self._feed(ids, starts, 1, ends)
        self._step_at(first, rows + idle)

    def _step_at(self, first: int, rows: int) -> None:
        """Queue a decode step of rows whose inputs are there: one launch, once it is captured."""
        step = self._steps.get((first, rows))
        if step is None:
            self._keep[...] = 1
            number = len(self._steps) + 1 if self._graphs else UNCAPTURED
            step = self._bind(first, (rows, 1), 1, self._stepped.address, number)
            self._steps[first, rows] = step
            if self._graphs:  # rule 2
                self._session.run(step)
                self._memory.upload(self._inputs_at, self._inputs.block)
        self._session.run(step)

    def _plan(self, counts: Sequence[int], keep: int) -> Iterator[PromptCall]:
        return plan_prompts(counts, keep, _CHUNK, self._fit)

    def _fit(self, rows: int, length: int, kept: int) -> bool:
        few = rows * length <= _CHUNK and rows * kept * self._prompted.row_bytes <= _MOST_LOGITS
        return few and self.reads_rows_at_once

    def _queue_prompt(
        self,
        first: int,
        input_ids: NDArray[np.int64],
        starts: NDArray[np.int64],
        kept: int,
        logits: int,
    ) -> None:
        self._feed(input_ids, starts, kept)
        self._session.run(self._bind(first, input_ids.shape, kept, logits))

    def _bind(
        self,
        first: int,
        shape: tuple[int, ...],
        kept: int,
        logits: int,
        captured_as: int = UNCAPTURED,
    ) -> Bound:
        """A call of tokens [B, S]; those that a decode step chooses become the next one's input."""
        rows, length = shape
        ids = OnDevice(np.int64, shape, self._input("input_ids"))
        inputs = {
            "input_ids": ids,
            "write_indices": OnDevice(np.int64, (rows,), self._input("write_indices")),
            "kv_lengths": OnDevice(np.int64, (rows,), self._input("kv_lengths")),
        }
        outputs = {"logits": OnDevice(self._dtype, (rows, kept, self.vocab_size), logits)}
        if length == 1:
            outputs[TOKENS] = ids
        for name, pool in self.pools.by_name.items():
            cache = OnDevice(self._dtype, (rows, *pool.shape), pool.address(first))
            inputs[f"past_key_values.{name}"] = outputs[f"present.{name}"] = cache
        return self._session.bind(inputs, outputs, {KEEP: self._keep}, captured_as)

    def _feed(
        self,
        input_ids: NDArray[np.int64],
        starts: NDArray[np.int64],
        kept: int,
        ends: NDArray[np.int64] | None = None,
    ) -> None:
        self._keep[...] = kept
        self._inputs.fill(input_ids, starts, kept, ends)
        self._memory.upload(self._inputs_at, self._inputs.block)

    def _input(self, name: str) -> int:
        """Where an input lies on the device."""
        return self._inputs_at + self._inputs.offsets[name]
