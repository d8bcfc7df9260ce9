"""The ONNX Runtime executor: a bundle's graph over pools bound as past and present at once.

A bundle for CPUs has two graphs over one set of weights. The one with our own attention operator
runs wherever that can be compiled; the stock one, with ONNX Runtime's own operators, elsewhere.
"""

import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cla_export.bundle import GRAPH, MANIFEST, Bundle
from cla_export.engines.executor import Array, Cache, Logits, PooledExecutor, capacity_of
from cla_export.errors import BadInput, BundleError, MissingEnvironment, RunError
from cla_export.graph_names import KEEP
from cla_export.kv_scales import from_int8, read_scales, to_int8
from cla_export.layout import KVLayout
from cla_export.plugin import compile_cpu

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    Change = Callable[[ir.Model], object]

_NUMPY = {"float32": np.float32, "float16": np.float16}
_log = logging.getLogger(__name__)
_LINE = 64  # bytes of a cache line, which a vector of the CPU operators does not straddle
_QUIET = 3  # log errors only; ONNX Runtime warns about overridable initialisers, which we use


class OnnxRuntimeExecutor(PooledExecutor):
    """Runs a bundle on ONNX Runtime's CPU provider.

    Args:
        bundle: an opened bundle of target `onnxruntime` or `portable`.
        capacity: tokens a slot can hold; at most the model's positions (None: all of them).
        slots: rows that can run side by side.
        threads: intra-operator threads, None for ONNX Runtime's own choice.
        stock: run the graph of ONNX Runtime's own operators, model.onnx, in any case.
        change: called with the graph before it is opened, to edit it.
    """

    backend = "onnxruntime"

    def __init__(
        self,
        bundle: Bundle,
        *,
        capacity: int | None = None,
        slots: int = 1,
        threads: int | None = None,
        stock: bool = False,
        change: "Change | None" = None,
    ) -> None:
        if bundle.dtype not in _NUMPY:
            raise MissingEnvironment(
                f"{bundle.folder}: dtype {bundle.dtype}; ONNX Runtime's CPU provider computes "
                f"{' and '.join(_NUMPY)}. Export with --dtype fp32, or run it on a GPU"
            )
        capacity = capacity_of(bundle, capacity)
        super().__init__(bundle.layout, capacity, slots, bundle.vocab_size)
        self.graph, library = graph_of(bundle, stock=stock)
        self._ort, self._session = _open(self.graph, threads, change, library)
        self._by_mask = bundle.target == "onnxruntime" and self.graph == bundle.graph
        narrow = bundle.cache_dtype == "int8"
        self.scales = read_scales(self.graph, self.layout) if narrow else None
        kind = np.dtype(np.int8 if narrow else _NUMPY[bundle.dtype])
        self._pools = _empty_pools(self.layout, slots, capacity, kind)
        self._views: dict[tuple[int, int], list[tuple[str, Any]]] = {}
        self._check_caches()

    def cache(self, group: int) -> Cache:
        """The group's pools themselves, [slots, Hkv, C, D]."""
        return self._pools[group]

    def read(self, group: int, slot: int) -> Cache:
        """As `Executor.read`: the pool itself, or what an int8 one stands for, in float32."""
        keys, values = (pool[slot] for pool in self._pools[group])
        if self.scales is None:
            return keys, values
        return from_int8(keys, self.scales[group][0]), from_int8(values, self.scales[group][1])

    def write(self, group: int, slot: int, keys: Array, values: Array) -> None:
        if self.scales is not None:
            of_keys, of_values = self.scales[group]
            keys, values = to_int8(keys, of_keys), to_int8(values, of_values)
        for pool, new in zip(self._pools[group], (keys, values), strict=True):
            pool[slot, :, : new.shape[1]] = new

    def copy(self, source: int, target: int, tokens: int) -> None:
        for pools in self._pools:
            for pool in pools:
                pool[target, :, :tokens] = pool[source, :, :tokens]

    def _run(
        self,
        first: int,
        input_ids: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        keep: int,
    ) -> Logits:
        return self._run_with(first, input_ids, starts, counts, keep, ())[0]

    def _run_with(
        self,
        first: int,
        input_ids: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        keep: int,
        more: Iterable[str],
    ) -> tuple[Logits, list[NDArray[np.generic]]]:
        """Run one step; also return the outputs named in `more`."""
        rows, length = input_ids.shape
        if self._by_mask and rows > 1 and length > 1 and starts.any():
            raise BadInput(
                f"{rows} rows of up to {length} new tokens, some after held ones: "
                "GroupQueryAttention takes several rows only for first prompts and for decode; "
                "prefill one slot at a time"
            )
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", input_ids)
        wanted = np.array(keep, np.int64)  # kept alive until the run: OrtValue only aliases it
        binding.bind_ortvalue_input(KEEP, self._ort.OrtValue.ortvalue_from_numpy(wanted))
        for name, array in self._lengths(starts, counts, length).items():
            binding.bind_cpu_input(name, array)
        for name, value in self._views_of(first, rows):
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        more = list(more)
        wanted_outputs = ["logits", *dict.fromkeys(more)]  # binding one twice gives it once
        for name in wanted_outputs:
            binding.bind_output(name)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's own exception types derive from it alone
            raise RunError(
                f"{self.graph}: ONNX Runtime {self._ort.__version__} failed to run it: {error}"
            ) from error
        bound = binding.get_outputs()[-len(wanted_outputs) :]  # in the order they were bound
        made = dict(zip(wanted_outputs, (value.numpy() for value in bound), strict=True))
        return made["logits"].astype(np.float32, copy=False), [made[name] for name in more]

    def _lengths(
        self, starts: NDArray[np.int64], counts: NDArray[np.int64], length: int
    ) -> dict[str, NDArray[np.int64]]:
        held = starts + counts
        if not self._by_mask:
            return {"write_indices": starts, "kv_lengths": held}
        width = int((starts + length).max())
        return {"attention_mask": (np.arange(width) < held[:, None]).astype(np.int64)}

    def _check_caches(self) -> None:
        """Raise BundleError if the graph has other caches than the layout says."""
        ours = {
            f"past_key_values.{group}.{part}": (pool.shape[1], pool.shape[3])
            for group, pools in enumerate(self._pools)
            for part, pool in zip(("key", "value"), pools, strict=True)
        }
        takes = {
            value.name: (value.shape[1], value.shape[3])
            for value in self._session.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        differ = sorted(ours.items() ^ takes.items())
        if differ:
            name = differ[0][0]
            raise BundleError(
                f"{self.graph}: {name} is {_heads(takes.get(name))}, and {_heads(ours.get(name))} "
                f"by {MANIFEST}'s layout of {len(self.layout.groups)} groups; export it again"
            )

    def _views_of(self, first: int, rows: int) -> list[tuple[str, Any]]:
        """Cache name -> OrtValue over the consecutive slots; aliases the pool, which we keep."""
        if (first, rows) not in self._views:
            self._views[first, rows] = [
                (
                    f"{group}.{part}",
                    self._ort.OrtValue.ortvalue_from_numpy(pool[first : first + rows]),
                )
                for group, pools in enumerate(self._pools)
                for part, pool in zip(("key", "value"), pools, strict=True)
            ]
        return self._views[first, rows]


def _heads(shape: tuple[int, int] | None) -> str:
    return "no input" if shape is None else f"{shape[0]} heads of {shape[1]}"


def _empty_pools(
    layout: KVLayout, slots: int, capacity: int, dtype: np.dtype[np.generic]
) -> list[Cache]:
    """Keys and values of each group, [slots, Hkv, C, D], zeroed, each from a cache line on.

    They share one array: NumPy asks for huge pages for a large one, and aligns it to 16 bytes only.
    """
    shapes = [(slots, group.kv_heads, capacity, group.head_dim) for group in layout.groups]
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
    steps = [size + -size % _LINE for size in sizes]
    memory = np.zeros(2 * sum(steps) + _LINE, np.uint8)
    at, pools = -memory.ctypes.data % _LINE, []
    for shape, size, step in zip(shapes, sizes, steps, strict=True):
        keys, values = (
            memory[place : place + size].view(dtype).reshape(shape) for place in (at, at + step)
        )
        pools.append((keys, values))
        at += 2 * step
    return pools


def graph_of(bundle: Bundle, *, stock: bool = False) -> tuple[Path, Path | None]:
    """The graph that runs here, and the library of operators that it needs."""
    if bundle.cpu_graph is None or stock:
        return bundle.graph, None
    try:
        return bundle.cpu_graph, compile_cpu.library()
    except MissingEnvironment as error:
        _log.warning("%s runs in place of %s: %s", GRAPH, bundle.cpu_graph.name, error)
        return bundle.graph, None


def _open(
    graph: Path, threads: int | None, change: "Change | None", library: Path | None
) -> tuple[Any, Any]:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingEnvironment(
            "onnxruntime is not installed; pip install 'cla-export[cpu]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _QUIET
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        source: str | bytes = str(graph)
        if change is not None:
            source = _changed(graph, change).SerializeToString()
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(graph.parent)
            )
        if library is not None:
            options.register_custom_ops_library(str(library))
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exception types derive from Exception alone
        raise RunError(
            f"{graph}: ONNX Runtime {onnxruntime.__version__} cannot open it: {error}"
        ) from error
    return onnxruntime, session


def _changed(graph: Path, change: "Change") -> "onnx.ModelProto":
    import onnx_ir as ir

    model = ir.load(graph)
    change(model)
    return ir.to_proto(model)
