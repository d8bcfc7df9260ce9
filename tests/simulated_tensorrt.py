"""A *simulated* TensorRT: no GPU and no engine runs, but addresses, shapes and rules are real.

An engine's own build.json says what its inputs and profiles are. A call runs the portable graph of
the same weights in ONNX Runtime, over the memory at the addresses that were bound, whatever they
are. What TensorRT's documentation forbids is an AssertionError here:

    memory outside of what was allocated is touched
    a context runs without all shapes and addresses, or with ones outside its profile
    a cache and what is written into it have two addresses
    a context is captured before it ran with its shapes, or changed after it was captured
    a context's own memory is missing, too small or not aligned
"""

import ctypes
from collections.abc import Callable, Iterable
from functools import partial
from types import SimpleNamespace

import numpy as np
import onnxruntime

from cla_export.bundle import Bundle
from cla_export.draw import Scratch
from cla_export.engines.tensorrt_build import Built
from cla_export.engines.tensorrt_runtime import Loaded
from cla_export.layout import KVLayout
from cla_export.sampling import Choice, pick_by

STREAM = 77
ACTIVATIONS = 4096
KINDS = {"float16": ("HALF", np.float16), "float32": ("FLOAT", np.float32)}


def simulate(portable: Bundle, **changes) -> Callable[[Bundle, Built], Loaded]:
    """Loads engines as if they ran: `portable` has the same weights, `changes` spoil the engine."""

    def load(_: Bundle, built: Built) -> Loaded:
        memory = SimulatedMemory()
        engine = SimulatedEngine(portable, built, memory, **changes)
        return Loaded(engine, engine.new_context, memory, partial(SimulatedChooser, memory))

    return load


class SimulatedChooser:
    """What stands for `DeviceChooser`: it looks at the logits when tokens are asked for."""

    def __init__(self, memory: "SimulatedMemory", dtype: str, vocab: int, rows: int) -> None:
        self.memory, self.dtype, self.vocab, self.rows = memory, np.dtype(dtype), vocab, rows

    def prepare(self, choices: Iterable[Choice]) -> None:
        self.choices = list(choices)

    def choose(self, logits: int, rows: int) -> None:
        assert len(self.choices) == rows <= self.rows
        found = self.memory.at(logits, (rows, self.vocab), self.dtype).astype(np.float32)
        self.chosen: list[int | None] = [
            pick_by(choice, row, Scratch(self.vocab))
            for choice, row in zip(self.choices, found, strict=True)
        ]

    def tokens(self) -> list[int | None]:
        return self.chosen


class SimulatedMemory:
    """Host memory that stands for a GPU's; every access must lie inside one allocation."""

    stream = STREAM

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[int, np.ndarray]] = {}
        self.captured: list[SimulatedContext] | None = None  # while capturing
        self.launches = 0

    def allocate(self, size: int) -> int:
        whole = np.zeros(size + 256, np.uint8)
        address = -(-whole.ctypes.data // 256) * 256
        self.blocks[address] = (size, whole)
        return address

    def free(self, address: int) -> None:
        del self.blocks[address]

    def upload(self, address: int, array: np.ndarray) -> None:
        self.at(address, array.shape, array.dtype)[...] = array

    def download(self, address: int, array: np.ndarray) -> None:
        array[...] = self.at(address, array.shape, array.dtype)

    def copy(self, source: int, target: int, size: int) -> None:
        self.at(target, (size,), np.uint8)[...] = self.at(source, (size,), np.uint8)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        assert self.captured is None
        self.captured = []
        work()
        contexts, self.captured = self.captured, None
        assert len(contexts) == 1
        (context,) = contexts
        seen = context.state()

        def launch() -> None:
            assert context.state() == seen, "a captured context was changed"
            self.launches += 1
            context.compute()

        return launch

    def at(self, address: int, shape: tuple[int, ...], dtype: object) -> np.ndarray:
        """The array at an address."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert any(
            start <= address and address + size <= start + room
            for start, (room, _) in self.blocks.items()
        ), f"{size} bytes at {address} are not inside an allocation"
        memory = (ctypes.c_uint8 * size).from_address(address)
        return np.frombuffer(memory, np.uint8).view(dtype).reshape(shape)


class SimulatedEngine:
    """What an executor asks of an ICudaEngine."""

    def __init__(
        self,
        portable: Bundle,
        built: Built,
        memory: SimulatedMemory,
        *,
        aliased: bool = True,
        late: int = 0,  # added to every kv_length: a wrong engine
        keep_on: str = "HOST",
    ) -> None:
        self.memory, self.aliased, self.late, self.keep_on = memory, aliased, late, keep_on
        self.layout: KVLayout = portable.layout
        self.vocab_size = portable.vocab_size
        self.profiles = list(built.record["profiles"].values())
        self.kind, self.dtype = KINDS[built.record["dtype"]]
        pasts = [name for name in self.profiles[0] if name.startswith("past_key_values.")]
        presents = [name.replace("past_key_values.", "present.") for name in pasts]
        self.names = [*self.profiles[0], "logits", *presents]
        self.num_io_tensors = len(self.names)
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self.session = onnxruntime.InferenceSession(str(portable.graph), options)
        self.contexts: list[SimulatedContext] = []

    def new_context(self, fixed: bool) -> "SimulatedContext":
        self.contexts.append(SimulatedContext(self, fixed))
        return self.contexts[-1]

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        whole = {"input_ids": "INT64", "logits_to_keep": "INT64"}
        lengths = {"write_indices": "INT32", "kv_lengths": "INT32"}
        return SimpleNamespace(name={**whole, **lengths}.get(name, self.kind))

    def get_tensor_location(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=self.keep_on if name == "logits_to_keep" else "DEVICE")

    def get_aliased_input_tensor(self, name: str) -> str:
        return name.replace("present.", "past_key_values.") if self.aliased else ""

    @property
    def device_memory_size_v2(self) -> int:
        return ACTIVATIONS


class SimulatedContext:
    """What an executor asks of an IExecutionContext."""

    def __init__(self, engine: SimulatedEngine, fixed: bool) -> None:
        self.engine, self.fixed = engine, fixed
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.ran = False  # with these shapes

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 256 == 0
        assert size >= ACTIVATIONS
        self.engine.memory.at(address, (size,), np.uint8)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == STREAM
        self.profile, self.shapes = index, {}
        return index < len(self.engine.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.profiles[self.profile][name]
        if len(shape) != len(least) or not all(
            low <= n <= high for low, n, high in zip(least, shape, most, strict=True)
        ):
            return False
        if self.shapes.get(name) != tuple(shape):
            self.shapes[name], self.ran = tuple(shape), False
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.names

    def infer_shapes(self) -> list[str]:
        inputs = self.engine.profiles[0]
        missing = [name for name in inputs if name != "logits_to_keep" and name not in self.shapes]
        return missing + [name for name in inputs if name not in self.addresses]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert name == "logits"
        return (self.shapes["input_ids"][0], self.keep(), self.engine.vocab_size)

    def keep(self) -> int:
        address = self.addresses["logits_to_keep"]
        if self.engine.keep_on == "HOST":
            value = ctypes.c_int64.from_address(address).value
        else:  # shapes cannot be read from there; a test that sees this asks for one
            value = int(self.engine.memory.at(address, (1,), np.int64)[0]) or 1
        (least,), _, (most,) = self.engine.profiles[self.profile]["logits_to_keep"]
        assert least <= value <= most, f"logits_to_keep is {value}, outside of the profile"
        return value

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM
        if self.engine.memory.captured is not None:
            assert self.ran, "captured before it ran with these shapes"
            self.engine.memory.captured.append(self)
            return True
        self.compute()
        self.ran = True
        return True

    def state(self) -> tuple[object, ...]:
        return self.profile, dict(self.shapes), dict(self.addresses)

    def compute(self) -> None:
        """Run the portable graph over the memory at the bound addresses."""
        assert not self.infer_shapes()
        engine, at = self.engine, self.engine.memory.at
        read = {name: at(self.addresses[name], self.shapes[name], np.int32)
                for name in ("write_indices", "kv_lengths")}  # fmt: skip
        feed = {
            "input_ids": at(self.addresses["input_ids"], self.shapes["input_ids"], np.int64),
            "write_indices": read["write_indices"].astype(np.int64),
            "kv_lengths": read["kv_lengths"].astype(np.int64) + engine.late,
            "logits_to_keep": np.array(self.keep(), np.int64),
        }
        binding = engine.session.io_binding()
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in feed.values()]
        for name, value in zip(feed, values, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in engine.names:
            if name.startswith("past_key_values."):
                present = name.replace("past_key_values.", "present.")
                assert self.addresses[name] == self.addresses[present], f"{name} is not in place"
                pool = at(self.addresses[name], self.shapes[name], engine.dtype)
                value = onnxruntime.OrtValue.ortvalue_from_numpy(pool)
                binding.bind_ortvalue_input(name, value)
                binding.bind_ortvalue_output(present, value)
        logits = at(self.addresses["logits"], self.get_tensor_shape("logits"), engine.dtype)
        binding.bind_ortvalue_output("logits", onnxruntime.OrtValue.ortvalue_from_numpy(logits))
        engine.session.run_with_iobinding(binding)
