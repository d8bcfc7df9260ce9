"""Launching the kernels of a graph's own operators on a GPU, when ONNX Runtime comes to them.

`plugin/host_ops.c` calls back with a node's number, addresses and shapes, and does by itself what
was done here for a call of the same shapes.
"""

import ctypes
import weakref
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from cla_export.engines.cuda_memory import Memory
from cla_export.engines.cuda_notes import Call, Copied, Multiplied, Notes
from cla_export.errors import MissingEnvironment, RunError
from cla_export.graph_names import OWN_DOMAINS
from cla_export.plugin.compile import compile_operators
from cla_export.plugin.contract import Problem
from cla_export.plugin.launch import Launched, Launcher, Pointers, ProductPointers
from cla_export.plugin.product import BLOCK, ProductPlan, plan_product

_LINEAR, _ROTATE, _ROTATE_APPEND, _ATTENTION = range(4)
_THREADS = 256
_WIDEST = 8192  # numbers that `rms_norm` takes
_COLUMNS = 8  # that a thread of `unpack` makes
_KINDS = {"float16": 2, "bfloat16": 14}  # cuBLAS's numbers of types
_FLOAT32, _TRANSPOSED, _PLAIN, _DEFAULT = 68, 1, 0, -1
_CUBLAS_BYTES = 32 << 20


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Call))
_by_stream: "weakref.WeakValueDictionary[int, CudaOperators]" = weakref.WeakValueDictionary()


@_CALLBACK  # type: ignore[untyped-decorator]
def _dispatch(call: Any) -> int:  # noqa: ANN401
    operators = _by_stream[call.contents.stream or 0]
    try:
        operators.launch(call.contents)
    except Exception as error:  # ONNX Runtime gets a number; whoever runs the step gets this
        operators.error = error
        return 1
    return 0


def own_nodes(graph: Path) -> dict[int, dict[str, Any]]:
    """Attributes of each node of ours, by its number."""
    import onnx_ir as ir

    return {
        node.attributes.get_int("node"): {key: attr.value for key, attr in node.attributes.items()}
        for node in ir.load(graph).graph
        if node.domain in OWN_DOMAINS.values()
    }


def attends(nodes: dict[int, dict[str, Any]]) -> bool:
    """Whether attention is among a graph's own nodes: all layers' is, or none's."""
    return any("window" in attributes for attributes in nodes.values())


class CudaOperators:
    """The operators of one session, whose work goes to one stream.

    Args:
        library: `plugin/host_ops.c`, compiled.
        memory: of the GPU; its stream is the session's.
        nodes: attributes of each node, by its number.
        dtype: float16 or bfloat16.
        device: number of the GPU.
    """

    def __init__(
        self,
        library: Path,
        memory: Memory,
        nodes: dict[int, dict[str, Any]],
        dtype: str,
        device: int,
    ) -> None:
        self.error: Exception | None = None
        self._memory, self._nodes, self._dtype = memory, nodes, dtype
        self._launcher = Launcher(device)
        self._launches: list[Launched | Copied | Multiplied] = []  # of the node that is computed
        self._kernels: dict[str, Any] = {}
        self._rooms: dict[str, tuple[int, int]] = {}
        self._problems: dict[Problem, Any] = {}
        self._plans: dict[tuple[int, int, int, bool, int], ProductPlan | None] = {}
        self._product = _Products(memory, dtype)
        self._notes = Notes(library, self._product.cublas)
        ctypes.CDLL(str(library)).cla_set_callback(_dispatch)
        _by_stream[memory.stream] = self

    def take_error(self) -> Exception | None:
        """What the last launch that failed raised, once: a later failure is not its own."""
        error, self.error = self.error, None
        return error

    def launch(self, call: Call) -> None:
        """Queue a node's kernels, and note them."""
        node = self._nodes[call.node]
        launches: list[Launched | Copied | Multiplied] = []
        self._launches, self._launcher.tell = launches, launches.append
        steps: dict[int, Callable[[Call, dict[str, Any]], None]] = {
            _LINEAR: self._linear,
            _ROTATE: self._rotate,
            _ROTATE_APPEND: self._rotate,
            _ATTENTION: self._attention,
        }
        steps[call.kind](call, node)
        self._notes.add(call, launches)

    def _linear(self, call: Call, node: dict[str, Any]) -> None:
        x, w, norm, residual, scales = (call.inputs[i] for i in range(5))
        y, gated = call.outputs[0].data, bool(node["gated"])
        rows, k = w.shape[0], x.shape[-1]
        bits = 16 if len(w.shape) == 2 else w.shape[2] * 8 // BLOCK
        tokens, n = prod(x.shape[:-1]), rows // (2 if gated else 1)
        if tokens == 0:
            return
        source = x.data
        if norm.data:
            source = self._normed(x.data, norm.data, tokens, k, node["epsilon"])
        shape = tokens, n, k, gated, bits
        if shape not in self._plans:
            gpu = self._launcher.gpu
            self._plans[shape] = plan_product(tokens, n, k, gpu, gated=gated, bits=bits)
        plan = self._plans[shape]
        if plan is None:
            whole = w.data if bits == 16 else self._unpacked(w.data, scales.data, rows, k, bits)
            self._multiply(source, whole, residual.data, y, tokens, rows, k, gated=gated)
            return
        pointers = ProductPointers(w.data, source, y, residual.data or 0, scales.data or 0)
        self._launcher.launch_product(
            plan, self._dtype, pointers, (tokens, n, k), self._memory.stream, gated=gated
        )

    def _normed(self, x: int, norm: int, tokens: int, k: int, epsilon: float) -> int:
        if k % 8 or k > _WIDEST:
            raise RunError(f"a norm over {k} numbers; expected a multiple of 8 up to {_WIDEST}")
        normed = self._room("normed", tokens * k * 2)
        self._queue("rms_norm", tokens, _THREADS, x, norm, normed, np.int32(k), np.float32(epsilon))
        return normed

    def _unpacked(self, packed: int, scales: int, rows: int, k: int, bits: int) -> int:
        """Where a packed weight is [rows, k] in 16 bits, until the next one is unpacked."""
        whole = self._room("unpacked", rows * k * 2)
        threads = rows * -(-k // _COLUMNS)
        self._queue(
            "unpack", -(-threads // _THREADS), _THREADS, packed, scales, whole,
            *map(np.int32, (rows, k, bits)),
        )  # fmt: skip
        return whole

    def _multiply(
        self, x: int, w: int, residual: int | None, y: int, tokens: int, rows: int, k: int,
        *, gated: bool,
    ) -> None:  # fmt: skip
        """A product of many tokens, by cuBLAS."""
        target = self._room("both", tokens * rows * 2) if gated else y
        if residual and residual != y:
            self._copy(residual, y, tokens * rows * 2)
        self._launches.append(
            self._product.multiply(x, w, target, tokens, rows, k, add=bool(residual))
        )
        if gated:
            n = rows // 2
            blocks = -(-tokens * n // 2 // _THREADS)
            self._queue("swiglu", blocks, _THREADS, target, y, np.int32(n), np.int32(tokens))

    def _rotate(self, call: Call, _node: dict[str, Any]) -> None:
        qkv, cosines, sines, starts = (call.inputs[i] for i in range(4))
        q = call.outputs[0]
        positions, half = cosines.shape
        batch, queries, width = q.shape
        kv_heads = capacity = 0
        keys = values = 0
        if call.kind == _ROTATE_APPEND:
            past = call.inputs[4]
            _, kv_heads, capacity, _ = past.shape
            for i in (0, 1):
                old, new = call.inputs[4 + i].data, call.outputs[1 + i].data
                if old != new:
                    self._copy(old, new, prod(past.shape) * 2)
            keys, values = call.outputs[1].data, call.outputs[2].data
        numbers = (
            width // (2 * half),
            kv_heads,
            2 * half,
            queries,
            capacity or positions,
            positions,
        )
        threads = min(1024, -(-(width // 4 + kv_heads * half * 2) // 32) * 32)
        self._queue(
            "rotate", batch * queries, threads, qkv.data, cosines.data, sines.data,
            starts.data, q.data, keys, values, *map(np.int32, numbers),
        )  # fmt: skip

    def _attention(self, call: Call, node: dict[str, Any]) -> None:
        q, keys, values, lengths = (call.inputs[i] for i in range(4))
        y = call.outputs[0]
        batch, queries, width = q.shape
        _, kv_heads, capacity, dim = keys.shape
        problem = Problem(
            batch=batch,
            query_heads=width // dim,
            kv_heads=kv_heads,
            head_dim=dim,
            capacity=capacity,
            queries=queries,
            scale=float(node["scale"]),
            window=int(node["window"]),
            softcap=float(node["softcap"]),
            dtype=self._dtype,
        )
        if problem not in self._problems:
            self._problems[problem] = self._launcher.plan(problem)
        plan = self._problems[problem]
        workspace = self._room("partial", plan.workspace_bytes) if plan.workspace_bytes else 0
        asked, made = q.data, y.data
        size = prod(q.shape) * 2
        swapped = queries > 1 and not plan.takes_packed
        if swapped:
            asked, made = self._room("asked", size), self._room("made", size)
            self._swap(q.data, asked, batch, queries, problem.query_heads, dim)
        pointers = Pointers(asked, keys.data, values.data, lengths.data, made, workspace)
        self._launcher.launch(
            problem,
            plan,
            pointers,
            self._memory.stream,
            overlap=True,
            packed=queries > 1 and not swapped,
        )
        if swapped:
            self._swap(made, y.data, batch, problem.query_heads, queries, dim)

    def _swap(self, source: int, target: int, batch: int, a: int, b: int, dim: int) -> None:
        self._queue("swap", batch * a * b, 64, source, target, *map(np.int32, (a, b, dim)))

    def _queue(self, name: str, blocks: int, threads: int, *arguments: Any) -> None:  # noqa: ANN401
        if name not in self._kernels:
            capability = self._launcher.gpu.compute_capability
            module = compile_operators(self._dtype == "bfloat16", capability)
            self._kernels[name] = module.get_kernel(name)
        settings = self._launcher.settings(blocks, threads, overlap=True)
        self._launcher.queue(self._memory.stream, settings, self._kernels[name], *arguments)

    def _copy(self, source: int, target: int, size: int) -> None:
        self._memory.copy(source, target, size)
        self._launches.append(Copied(target, source, size))

    def _room(self, name: str, size: int) -> int:
        """Memory of that name, at least so large; what captured steps use is never given back."""
        address, held = self._rooms.get(name, (0, 0))
        if held < size:
            address = self._memory.allocate(size)  # the old one stays: captured steps may use it
            self._rooms[name] = address, size
        return address


class _Products:
    """Matrix products of cuBLAS, on one stream."""

    def __init__(self, memory: Memory, dtype: str) -> None:
        self._kind = _KINDS[dtype]
        try:
            self.cublas = ctypes.CDLL("libcublas.so.13")
        except OSError as error:
            raise MissingEnvironment(
                f"cuBLAS does not load ({error}); pip install nvidia-cublas"
            ) from error
        self._handle = ctypes.c_void_p()
        self._check(self.cublas.cublasCreate_v2(ctypes.byref(self._handle)), "cublasCreate")
        weakref.finalize(self, self.cublas.cublasDestroy_v2, self._handle)
        stream = ctypes.c_void_p(memory.stream)
        self._check(self.cublas.cublasSetStream_v2(self._handle, stream), "cublasSetStream")
        room = ctypes.c_void_p(memory.allocate(_CUBLAS_BYTES))
        self._check(
            self.cublas.cublasSetWorkspace_v2(self._handle, room, ctypes.c_size_t(_CUBLAS_BYTES)),
            "cublasSetWorkspace",
        )

    def multiply(
        self, x: int, w: int, y: int, tokens: int, n: int, k: int, *, add: bool = False
    ) -> Multiplied:
        """Put x [tokens, k] times w [n, k] transposed into y [tokens, n], or add it to that."""
        one, beta = ctypes.c_float(1.0), ctypes.c_float(1.0 if add else 0.0)
        pointer, kind = ctypes.c_void_p, self._kind
        status = self.cublas.cublasGemmEx(
            self._handle, _TRANSPOSED, _PLAIN, n, tokens, k, ctypes.byref(one),
            pointer(w), kind, k, pointer(x), kind, k, ctypes.byref(beta),
            pointer(y), kind, n, _FLOAT32, _DEFAULT,
        )  # fmt: skip
        self._check(status, "cublasGemmEx")
        assert self._handle.value is not None
        return Multiplied(self._handle.value, x, w, y, tokens, n, k, kind, add)

    def _check(self, status: int, what: str) -> None:
        if status:
            raise RunError(f"{what} failed with {status}")
