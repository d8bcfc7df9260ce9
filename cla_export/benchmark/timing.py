"""One cell timed: a bundle opened for it, its caches filled, its steps or prompts run."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from cla_export.benchmark.cells import WARM, Cell
from cla_export.benchmark.results import Row
from cla_export.bundle import Bundle
from cla_export.engines.executor import Executor
from cla_export.engines.opening import backend_of, cache_dtype, open_executor
from cla_export.engines.tensorrt_build import FLAVOURS
from cla_export.errors import BadInput
from cla_export.floor import kv_bytes
from cla_export.peak_memory import read_peak

_TIMINGS = 7  # of steps that are timed as one


@runtime_checkable
class _Greedy(Protocol):
    """An executor that chooses tokens itself, as OnnxRuntimeCudaExecutor does."""

    def decode_greedy(
        self, slots: Sequence[int], tokens: Sequence[int], lengths: Sequence[int], steps: int = 1
    ) -> NDArray[np.int64]: ...


def time_cell(
    bundle: Bundle,
    cell: Cell,
    backend: str | None,
    engine: Path | None,
    threads: int | None,
    module: str | None = None,
    read_growth: Callable[[], int | None] = lambda: None,
) -> Row:
    """Open the bundle for a cell, and time it; the executor goes when this returns.

    `read_growth`: bytes by which memory in use on a GPU grew, asked while the executor is open.
    """
    runs_on = backend_of(bundle, backend)
    fixed = runs_on in FLAVOURS  # an engine's capacity is what it was built for
    executor = open_executor(
        bundle,
        backend,
        engine=engine,
        capacity=None if fixed else cell.capacity,
        slots=cell.batch,
        threads=threads,
        module=module,
    )
    if cell.capacity > executor.capacity:
        raise BadInput(
            f"{cell.phase} with context {cell.context} takes {cell.capacity} tokens a slot; the "
            f"engine was built for {executor.capacity}: build it again with --capacity "
            f"{cell.capacity}"
        )
    decoding = cell.phase == "decode"
    times = list((decode_ms if decoding else prefill_ms)(executor, cell))
    ms, dtype = median(times), cache_dtype(bundle, runs_on)
    low, high = np.percentile(times, (10, 90)).tolist()
    return Row(
        phase=cell.phase,
        batch=cell.batch,
        context=cell.context,
        ms_per_step=ms,
        ms_p10=low,
        ms_p90=high,
        tokens_per_s=(cell.batch if decoding else cell.context) / ms * 1e3,
        floor_share=None,
        kv_bytes=kv_bytes(bundle.layout, dtype, cell.batch, cell.context),
        peak_rss_bytes=read_peak(),
        peak_device_bytes=read_growth(),
    )


def decode_ms(executor: Executor, cell: Cell) -> Iterator[float]:
    """Milliseconds of a step behind full caches: of each, or where tokens stay, of many as one."""
    fill(executor, cell)
    rows = range(cell.batch)
    tokens = np.random.default_rng(1).integers(0, executor.vocab_size, cell.batch).tolist()
    if isinstance(executor, _Greedy):
        for timing in range(1 + _TIMINGS):  # the first captures the step
            began = perf_counter()
            executor.decode_greedy(rows, tokens, [cell.context] * cell.batch, cell.times)
            if timing:
                yield (perf_counter() - began) * 1e3 / cell.times
        return
    for step in range(WARM + cell.times):
        lengths = [cell.context + step] * cell.batch
        began = perf_counter()
        executor.decode(rows, tokens, lengths)
        if step >= WARM:
            yield (perf_counter() - began) * 1e3


def prefill_ms(executor: Executor, cell: Cell) -> Iterator[float]:
    """Milliseconds of each prompt into a slot that counts as empty; the first warms up."""
    tokens = np.random.default_rng(1).integers(0, executor.vocab_size, cell.context).tolist()
    for prompt in range(1 + cell.times):
        began = perf_counter()
        executor.prefill(0, tokens, 0)
        if prompt:
            yield (perf_counter() - began) * 1e3


def fill(executor: Executor, cell: Cell) -> None:
    """Let every slot hold made-up tokens, without a second copy of even one slot.

    A token's key is a stretch of one long row of normal numbers, the next token's begins one later,
    and all heads have the same: a view, which only the pool it is written into spells out.
    """
    random = np.random.default_rng(0)
    for group in executor.layout.groups:
        shape = (group.kv_heads, cell.context, group.head_dim)
        for slot in range(cell.batch):
            keys, values = (
                np.broadcast_to(sliding_window_view(numbers, group.head_dim), shape)
                for numbers in random.standard_normal(
                    (2, cell.context + group.head_dim - 1), np.float32
                )
            )
            executor.write(group.index, slot, keys, values)
