"""Launch ClaAttention: on raw device pointers and a stream, or on torch CUDA tensors."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cla_export.errors import BadInput, MissingEnvironment
from cla_export.plugin.compile import (
    CACHE,
    MERGE_BLOCKS,
    MERGE_WARPS,
    TILE,
    AnyVariant,
    compile_kernel,
    compile_product,
)
from cla_export.plugin.contract import DTYPES, Problem, check
from cla_export.plugin.gpu import Gpu
from cla_export.plugin.plan import Plan, make_plan
from cla_export.plugin.product import ProductPlan
from cla_export.plugin.prompt import THREADS, PromptPlan

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Pointers:
    """Device addresses of a call's tensors; workspace: the plan's bytes, 16-byte aligned."""

    q: int
    key_cache: int
    value_cache: int
    kv_lengths: int
    y: int
    workspace: int = 0


@dataclass(frozen=True, slots=True)
class ProductPointers:
    """Device addresses of a product's tensors, 16-byte aligned; residual, scales: 0 for none."""

    w: int
    x: int
    y: int
    residual: int = 0
    scales: int = 0


@dataclass(frozen=True, slots=True)
class Settings:
    """How a kernel is launched; the grid is of clusters, where those have several blocks."""

    grid: tuple[int, int, int]
    threads: int
    cluster: int
    shared_bytes: int
    overlap: bool  # starts while the kernel in front still runs, if that allows it
    config: Any  # cuda-core's


@dataclass(frozen=True, slots=True)
class Launched:
    """A kernel that was queued. Of its arguments, plain integers are addresses."""

    kernel: int
    settings: Settings
    arguments: tuple[int | np.generic, ...]


class Launcher:
    """Compiled kernels of one GPU (None: the current one), made when a call first needs them."""

    def __init__(self, device: int | None = 0, cache: Path | None = CACHE) -> None:
        try:
            self._core = importlib.import_module("cuda.core")
            self._driver = importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            raise MissingEnvironment(
                f"launching ClaAttention: {error}; "
                "pip install cuda-core cuda-bindings nvidia-cuda-nvrtc"
            ) from error
        self._device = self._core.Device(device)
        self._device.set_current()
        self._cache = cache
        self._kernels: dict[AnyVariant, tuple[Any, ...]] = {}
        self._products: dict[tuple[ProductPlan, str], Any] = {}
        self._settings: dict[tuple[Any, ...], Settings] = {}
        self.tell: Callable[[Launched], None] | None = None  # of each kernel that was queued
        self._streams: dict[int, Any] = {}
        properties = self._device.properties
        capability = self._device.compute_capability
        self.gpu = Gpu(
            (int(capability.major), int(capability.minor)),
            int(properties.multiprocessor_count),
            int(properties.max_shared_memory_per_block_optin),
            int(properties.max_shared_memory_per_multiprocessor),
        )

    def plan(self, problem: Problem) -> Plan | PromptPlan:
        """The layout of a call on this GPU; BadInput if the call breaks the contract."""
        check(problem)
        return make_plan(problem, self.gpu)

    def prepare(self, variant: AnyVariant) -> tuple[Any, ...]:
        """The kernels of a variant, loaded: attention, and where there is one its shares' merge."""
        if variant not in self._kernels:
            module = compile_kernel(variant, self.gpu.compute_capability, self._cache)
            kernels = tuple(module.get_kernel(name) for name in variant.kernels)
            self.allow_shared_memory(kernels[0], variant.shared_bytes)
            self._kernels[variant] = kernels
        return self._kernels[variant]

    def launch(
        self,
        problem: Problem,
        plan: Plan | PromptPlan,
        pointers: Pointers,
        stream: int,
        *,
        overlap: bool = False,
        packed: bool = False,
    ) -> None:
        """Queue one call on a CUDA stream, given by its handle; nothing is synchronised.

        `packed`: q and y are [B, S, Hq * D], which only a plan that takes it can have.

        `overlap`: start while the kernel in front still runs, if that allows it: which it must do
        only when every kernel before itself has ended, for the lengths are read at once.
        """
        if isinstance(plan, PromptPlan):
            self._launch_prompt(problem, plan, pointers, stream, overlap=overlap, packed=packed)
            return
        assert not packed
        attention, merge = self.prepare(plan.variant)
        variant = plan.variant
        shapes = [np.int32(n) for n in (
            problem.batch, problem.kv_heads, problem.group, problem.queries, problem.capacity,
            problem.window, plan.extra,
        )]  # fmt: skip
        sums = pointers.workspace + plan.items * TILE * variant.columns * 4
        settings = self.settings(
            plan.grid,
            variant.warps * 32,
            cluster=variant.cluster,
            shared_bytes=variant.shared_bytes,
            overlap=overlap,
        )
        self.queue(
            stream, settings, attention, pointers.q, pointers.key_cache, pointers.value_cache,
            pointers.kv_lengths, pointers.y, pointers.workspace, sums, *shapes,
            np.int32(plan.ordered), np.float32(problem.scale), np.float32(problem.softcap),
        )  # fmt: skip
        if plan.merges:
            rows = min(
                problem.group * problem.queries,
                TILE,
                max(1, MERGE_BLOCKS // (problem.batch * plan.grid[0] * plan.grid[1])),
            )
            grid = problem.batch, rows, plan.grid[0] * plan.grid[1]
            settings = self.settings(grid, MERGE_WARPS * 32, overlap=True)
            self.queue(
                stream, settings, merge, pointers.kv_lengths, pointers.y, pointers.workspace, sums,
                *shapes,
            )  # fmt: skip

    def _launch_prompt(
        self,
        problem: Problem,
        plan: PromptPlan,
        pointers: Pointers,
        stream: int,
        *,
        overlap: bool,
        packed: bool,
    ) -> None:
        (kernel,) = self.prepare(plan.variant)
        dim, queries = problem.head_dim, problem.queries
        strides = (dim, problem.query_heads * dim) if packed else (queries * dim, dim)
        shapes = problem.kv_heads, problem.group, queries, problem.capacity, problem.window
        shared = plan.variant.shared_bytes
        settings = self.settings(plan.grid, THREADS, shared_bytes=shared, overlap=overlap)
        self.queue(
            stream, settings, kernel, pointers.q, pointers.key_cache, pointers.value_cache,
            pointers.kv_lengths, pointers.y, *map(np.int64, strides), *map(np.int32, shapes),
            np.float32(problem.scale), np.float32(problem.softcap),
        )  # fmt: skip

    def launch_product(
        self,
        plan: ProductPlan,
        dtype: str,
        pointers: ProductPointers,
        shape: tuple[int, int, int],
        stream: int,
        *,
        gated: bool = False,
    ) -> None:
        """Queue y [tokens, n] = x [tokens, k] w [n, k]^T + residual; `shape`: tokens, n, k.

        Gated: w is [2n, k], and y is silu of the first half's product times the second's. Where the
        plan has fewer than 16 bits, w is packed, as `quantization` describes it. Starts while the
        kernel in front still runs, if that allows it.
        """
        key = replace(plan, clusters=0, blocks=0), dtype
        if key not in self._products:
            module = compile_product(
                dtype == "bfloat16", plan, self.gpu.compute_capability, self._cache
            )
            self._products[key] = module.get_kernel("product")
            self.allow_shared_memory(self._products[key], plan.shared_bytes)
        settings = self.settings(
            (1, plan.clusters),
            plan.threads,
            cluster=plan.blocks,
            shared_bytes=plan.shared_bytes,
            overlap=True,
        )
        self.queue(
            stream, settings, self._products[key], pointers.w, pointers.scales,
            pointers.x, pointers.residual, pointers.y, *map(np.int32, (*shape, gated)),
        )  # fmt: skip

    def queue(
        self,
        stream: int,
        settings: Settings,
        kernel: Any,  # noqa: ANN401
        *arguments: int | np.generic,
    ) -> None:
        """Queue a kernel on a CUDA stream, given by its handle."""
        if stream not in self._streams:
            self._streams[stream] = self._core.Stream.from_handle(stream)
        self._core.launch(self._streams[stream], settings.config, kernel, *arguments)
        if self.tell is not None:
            self.tell(Launched(int(kernel.handle), settings, arguments))

    def settings(
        self,
        grid: int | tuple[int, ...],
        threads: int,
        *,
        cluster: int = 1,
        shared_bytes: int = 0,
        overlap: bool = False,
    ) -> Settings:
        """How a kernel is launched; kept, since making it takes longer than a launch."""
        key = grid, threads, cluster, shared_bytes, overlap
        if key not in self._settings:
            sizes = (grid,) if isinstance(grid, int) else grid
            overlap = overlap and self.gpu.has_clusters
            config = self._core.LaunchConfig(
                grid=grid,
                cluster=(cluster, 1, 1) if cluster > 1 else None,
                block=threads,
                shmem_size=shared_bytes,
                programmatic_stream_serialization=overlap,
            )
            x, y, z = (*sizes, 1, 1)[:3]
            made = Settings((x, y, z), threads, cluster, shared_bytes, overlap, config)
            self._settings[key] = made
        return self._settings[key]

    def allow_shared_memory(self, kernel: Any, size: int) -> None:  # noqa: ANN401
        """Blocks get more than 48 KiB only where the kernel is told so."""
        driver = self._driver
        (status,) = driver.cuKernelSetAttribute(
            driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
            size,
            driver.CUkernel(int(kernel.handle)),
            driver.CUdevice(self._device.device_id),
        )
        if status != driver.CUresult.CUDA_SUCCESS:
            raise MissingEnvironment(f"this GPU gives a block no {size} bytes of memory: {status}")


def problem_of(
    q: "torch.Tensor",
    key_cache: "torch.Tensor",
    value_cache: "torch.Tensor",
    kv_lengths: "torch.Tensor",
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Problem:
    """The call that these tensors make; BadInput if they break the contract."""
    dtype = str(q.dtype).removeprefix("torch.")
    batch, query_heads, queries, head_dim = q.shape
    _, kv_heads, capacity, _ = key_cache.shape
    problem = Problem(
        batch, query_heads, kv_heads, head_dim, capacity, queries, scale, window, softcap, dtype
    )
    check(problem)
    expected = {
        "q": (q, problem.query_shape, dtype),
        "key_cache": (key_cache, problem.cache_shape, dtype),
        "value_cache": (value_cache, problem.cache_shape, dtype),
        "kv_lengths": (kv_lengths, (batch,), "int32"),
    }
    for name, (tensor, shape, kind) in expected.items():
        got = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        if got != f"{shape} {kind}":
            raise BadInput(f"ClaAttention: {name} is {got}, expected {shape} {kind}")
        if not tensor.is_contiguous() or (kind in DTYPES and tensor.data_ptr() % 16):
            raise BadInput(f"ClaAttention: {name} is not contiguous from a multiple of 16 bytes")
    return problem


def torch_attention(
    launcher: Launcher,
    q: "torch.Tensor",
    key_cache: "torch.Tensor",
    value_cache: "torch.Tensor",
    kv_lengths: "torch.Tensor",
    *,
    out: "torch.Tensor | None" = None,
    plan: Plan | PromptPlan | None = None,
    **attributes: Any,  # noqa: ANN401 (problem_of types them)
) -> "torch.Tensor":
    """Attend on torch's current stream; attributes as in the contract (scale, window, softcap).

    The workspace comes from torch's allocator, so a CUDA graph can capture the call once
    `launcher.prepare` or a first call has compiled it.
    """
    import torch

    problem = problem_of(q, key_cache, value_cache, kv_lengths, **attributes)
    plan = plan or launcher.plan(problem)
    y = torch.empty_like(q) if out is None else out
    workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=q.device)
    tensors = q, key_cache, value_cache, kv_lengths, y, workspace
    pointers = Pointers(*(tensor.data_ptr() for tensor in tensors))
    launcher.launch(problem, plan, pointers, torch.cuda.current_stream(q.device).cuda_stream)
    return y
