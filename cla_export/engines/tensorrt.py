"""The TensorRT executor: an engine over pools that are bound as past and present at once.

An engine has a profile for decode, batch 1..slots of one token each, and one for prefill, batch 1
of up to `chunk` tokens. Pools stay where they are; a call binds the addresses of its first slot.

TensorRT's rules that this file keeps (developer guide, "CUDA Graphs" and "Dynamic Shapes"):

    1. A captured graph depends on the shapes, addresses and state of its context. So each captured
       size of a decode has a context of its own, which nothing changes afterwards.
    2. Contexts may share memory for activations if they never run at the same time. All of them
       run on one stream, so one block serves all.
    3. After a change of shapes a context must run once before it is captured.
    4. A cache and what is written into it have one address.
    5. Inputs that shapes are computed from lie in host memory, and hold their values from before
       the shapes are inferred until the call has run: there is one for each value.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cla_export.bundle import Bundle
from cla_export.engines.cuda_memory import Work
from cla_export.engines.device_pools import Inputs
from cla_export.engines.gpu_executor import GpuExecutor
from cla_export.engines.prompt_calls import PromptCall, plan_prompts
from cla_export.engines.tensorrt_build import Built, find_engine, open_engine
from cla_export.engines.tensorrt_runtime import Loaded, load_engine
from cla_export.errors import BadInput, RunError
from cla_export.graph_names import KEEP

DECODE, PREFILL = 0, 1  # profiles, in the order of the build
_ALIGNED = 256  # bytes
_DTYPES: dict[str, Any] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "INT32": np.int32,
    "INT64": np.int64,
}


class TensorRTExecutor(GpuExecutor):
    """Runs an engine on a GPU.

    Args:
        bundle: the bundle the engine was built from.
        engine: the engine's folder; None: the only one that the bundle has of the flavour.
        flavour: `tensorrt` or `tensorrt-rtx`; None: the bundle's target.
        slots: rows that can run side by side; None: as many as the engine takes.
        graphs: capture decode steps over the first slots as CUDA graphs.
        load: loads the engine (tests pass a simulated one).

    Raises:
        BundleError: there is no such engine, or it is not for this graph, version or GPU.
        BadInput: more slots than the engine was built for.
        MissingEnvironment: the flavour is not installed, or there is no GPU.
    """

    reads_rows_at_once = False  # its prefill profile has one row

    def __init__(
        self,
        bundle: Bundle,
        engine: Path | None = None,
        *,
        flavour: str | None = None,
        slots: int | None = None,
        graphs: bool = True,
        load: Callable[[Bundle, Built], Loaded] = load_engine,
    ) -> None:
        built = open_engine(bundle, find_engine(bundle, flavour) if engine is None else engine)
        self.backend = str(built.record["flavour"])
        if flavour not in (None, self.backend):
            raise BadInput(f"{built.folder}: an engine for {self.backend}, not for {flavour}")
        options = built.record["options"]
        most = int(options["slots"])
        if slots is not None and slots > most:
            raise BadInput(f"slots is {slots}; {built.folder} was built for {most}")
        super().__init__(bundle.layout, int(options["capacity"]), slots or most, bundle.vocab_size)
        self.folder = built.folder
        self.chunk = int(options["chunk"])
        self._graphs = graphs
        self._loaded = loaded = load(bundle, built)
        self._engine = loaded.engine
        self._names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        dtypes = {name: self._dtype(name) for name in self._names}
        self._check_aliases()
        pasts = [name for name in self._names if name.startswith("past_key_values.")]
        caches = {name.removeprefix("past_key_values."): dtypes[name] for name in pasts}
        self._allocate(loaded.memory, caches, dtypes["logits"], loaded.new_chooser)
        self._activations = max(int(self._engine.device_memory_size_v2), _ALIGNED)
        self._scratch = self._memory.allocate(self._activations)
        self._inputs = Inputs(self.slots, self.chunk, dtypes)
        self._inputs_at = self._memory.allocate(self._inputs.size)
        self._prefill = self._new_call(PREFILL, fixed=False)
        self._elsewhere = self._new_call(DECODE, fixed=False)  # decode from a later slot on
        self._keeps: dict[int, NDArray[np.int64]] = {}
        self._steps: dict[int, _Call] = {}  # rows -> decode of the first slots

    @property
    def device_bytes(self) -> dict[str, int]:
        """As `GpuExecutor.device_bytes`; weights as the engine's file has them."""
        return {
            "weights": self.folder.joinpath("model.engine").stat().st_size,
            "activations": self._activations,
            "inputs": self._inputs.size,
            **super().device_bytes,
        }

    def _plan(self, counts: Sequence[int], keep: int) -> Iterator[PromptCall]:
        return plan_prompts(counts, keep, self.chunk)

    def _queue_prompt(
        self,
        first: int,
        input_ids: NDArray[np.int64],
        starts: NDArray[np.int64],
        kept: int,
        logits: int,
    ) -> None:
        self._feed(input_ids, starts, kept)
        self._bind(self._prefill, first, input_ids.shape, kept, logits)
        self._prefill.run(self._memory.stream)

    def _queue_step(self, first: int, tokens: Sequence[int], lengths: Sequence[int]) -> None:
        rows = len(tokens)
        call = self._elsewhere
        if first == 0:
            if rows not in self._steps:
                self._steps[rows] = self._new_call(DECODE, fixed=True)
            call = self._steps[rows]
        self._feed(np.array(tokens, np.int64)[:, None], np.array(lengths, np.int64), 1)
        if first != 0 or not call.runs:
            self._bind(call, first, (rows, 1), 1, self._stepped.address)
        if first == 0 and self._graphs and call.runs == 1:  # rule 3
            call.capture(self._memory.stream, self._memory.capture)
        call.run(self._memory.stream)

    def _new_call(self, profile: int, *, fixed: bool) -> "_Call":
        context = self._loaded.new_context(fixed)
        if context is None:
            raise RunError(f"{self.folder}: TensorRT made no execution context; see its log")
        context.set_device_memory(self._scratch, self._activations)
        if not context.set_optimization_profile_async(profile, self._memory.stream):
            raise RunError(f"{self.folder}: the engine has no profile {profile}; rebuild it")
        return _Call(context, str(self.folder))

    def _bind(
        self, call: "_Call", first: int, ids: tuple[int, ...], kept: int, logits: int
    ) -> None:
        """Give a context the shapes and addresses of a call; `ids` is the shape of its tokens."""
        context, rows = call.context, ids[0]
        shapes: dict[str, tuple[int, ...]] = {
            "input_ids": ids,
            "write_indices": (rows,),
            "kv_lengths": (rows,),
        }
        addresses = {
            name: self._inputs_at + offset for name, offset in self._inputs.offsets.items()
        }
        for name, pool in self.pools.by_name.items():
            shapes[f"past_key_values.{name}"] = (rows, *pool.shape)
            at = pool.address(first)
            addresses[f"past_key_values.{name}"] = addresses[f"present.{name}"] = at  # rule 4
        if self._engine.get_tensor_location(KEEP).name == "HOST":
            addresses[KEEP] = self._keeps.setdefault(kept, np.array(kept)).ctypes.data  # rule 5
        else:
            addresses[KEEP] = self._inputs_at + self._inputs.offsets[KEEP]
        addresses["logits"] = logits
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise RunError(f"{call.where}: {name} takes no shape {shape} in this profile")
        for name in self._names:
            if not context.set_tensor_address(name, addresses[name]):
                raise RunError(f"{call.where}: {name} takes no address; see TensorRT's log")
        if missing := context.infer_shapes():
            raise RunError(f"{call.where}: {', '.join(missing)} not set before a call")
        got, expected = tuple(context.get_tensor_shape("logits")), (rows, kept, self.vocab_size)
        if got != expected:
            raise RunError(f"{call.where}: logits are {got}, expected {expected}; rebuild it")

    def _feed(self, input_ids: NDArray[np.int64], starts: NDArray[np.int64], kept: int) -> None:
        self._inputs.fill(input_ids, starts, kept)
        self._memory.upload(self._inputs_at, self._inputs.block)

    def _dtype(self, name: str) -> Any:  # noqa: ANN401
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise RunError(f"{self.folder}: {name} is {kind}; expected one of {', '.join(_DTYPES)}")
        return _DTYPES[kind]

    def _check_aliases(self) -> None:
        for name in self._names:
            if not name.startswith("present."):
                continue
            past = name.replace("present.", "past_key_values.")
            got = self._engine.get_aliased_input_tensor(name)
            if got != past:
                raise RunError(
                    f"{self.folder}: {name} lies in {got or 'memory of its own'}, expected "
                    f"{past}: the cache would not be written in place"
                )


class _Call:
    """A context, and its CUDA graph once there is one."""

    def __init__(self, context: Any, where: str) -> None:  # noqa: ANN401
        self.context = context
        self.where = where
        self.runs = 0
        self._graph: Work | None = None

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def run(self, stream: int) -> None:
        """Queue the call; after a capture, as one launch."""
        if self._graph is not None:
            self._graph()
        else:
            self._queue(stream)
        self.runs += 1

    def capture(self, stream: int, capture: Callable[[Work], Work]) -> None:
        """Capture the call, where TensorRT says that it can be."""
        capturable = getattr(self.context, "is_stream_capturable", None)  # TensorRT-RTX has it
        if capturable is None or capturable(stream):
            self._graph = capture(lambda: self._queue(stream))

    def _queue(self, stream: int) -> None:
        if not self.context.execute_async_v3(stream):
            raise RunError(f"{self.where}: TensorRT failed to run the engine; see its log")
