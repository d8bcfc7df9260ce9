"""bench: how fast a bundle decodes and reads prompts, and how near that is to memory's speed.

The time in which memory delivers what a decode step reads is the floor under it (`floor`). A row
says which share of the measured time that is. A model that fits in a processor's cache can beat it.
"""

import gc
import json
import os
import platform
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from cla_export import __version__
from cla_export.bandwidth import read_bandwidth
from cla_export.bundle import Bundle, Progress, open_bundle
from cla_export.engines import onnxruntime_cuda
from cla_export.engines.executor import Executor
from cla_export.engines.onnxruntime import graph_of
from cla_export.engines.opening import backend_of, open_executor
from cla_export.engines.tensorrt_build import FLAVOURS
from cla_export.environment import processor
from cla_export.errors import BadInput
from cla_export.floor import Weights, kv_bytes, read_weights

PHASES = ("decode", "prefill")
_CONTEXTS = (512, 8192)
NOISE = 0.10  # of a time: what two runs on a quiet machine may differ by
_LARGEST_NOISE = 0.5  # what a run's own spread may excuse
_WARM = 3  # steps before those that are timed: TensorRT captures its graph in the second
_PROMPTS = 5  # that are timed, at most: each is as long as hundreds of steps
_SAME_MACHINE = ("processor", "cpus", "threads")
_SAME_WORK = ("backend", "graph", "weight_bytes")
_MODULES: Mapping[str, str] = {"onnxruntime": "onnxruntime", "torch": "torch", **FLAVOURS}


@dataclass(frozen=True, slots=True)
class Row:
    """One cell: decode steps of `batch` rows that hold `context` tokens, or one prompt's prefill.

    Times are milliseconds of a step (of the whole prompt): the median, and where the fastest and
    the slowest tenth begin. `tokens_per_s` is of all rows together.
    """

    phase: str  # decode or prefill
    batch: int
    context: int  # tokens; of prefill, the prompt's
    ms_per_step: float
    ms_p10: float
    ms_p90: float
    tokens_per_s: float
    floor_share: float | None  # the floor's time over the median; None: prefill, or no floor known
    kv_bytes: int  # of the keys and values that a step can see, once for each group
    peak_rss_bytes: int  # of this process, from opening the bundle on

    @property
    def name(self) -> str:
        return _name(self.phase, self.batch, self.context)

    @property
    def spread(self) -> float:
        """From p10 to p90, as a share of the median."""
        return (self.ms_p90 - self.ms_p10) / self.ms_per_step


@dataclass(frozen=True, slots=True)
class Bench:
    """What was measured, on what."""

    bundle: str
    backend: str
    graph: str | None  # the file that ONNX Runtime ran; None: another backend
    date: str
    machine: Mapping[str, str | int | None]
    tools: Mapping[str, str]  # versions
    bandwidth_bytes_per_s: (
        float | None
    )  # median of the run; None: not the memory that the backend computes in
    weight_bytes: int | None  # that every step reads; see `read_weights`
    rows: tuple[Row, ...]
    command: str | None = None

    def to_json(self) -> dict[str, object]:
        """Plain data; `from_json` reads it back."""
        content = {**asdict(self), "rows": [asdict(row) for row in self.rows]}
        if self.command is None:
            del content["command"]
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Bench":
        """Read what `to_json` wrote; TypeError or KeyError for anything else."""
        return cls(**{**content, "rows": tuple(Row(**row) for row in content["rows"])})


@dataclass(frozen=True, slots=True)
class Comparison:
    """A line for each finding: regressions fail, notes do not."""

    regressions: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Cell:
    """What is to be measured, and how often."""

    phase: str
    batch: int
    context: int
    times: int

    @property
    def capacity(self) -> int:
        """Tokens that a slot must hold."""
        return self.context + (_WARM + self.times if self.phase == "decode" else 0)


def _name(phase: str, batch: int, context: int) -> str:
    return f"{phase}, batch {batch}, context {context:,}"


def _silent(_what: str, _done: int, _of: int) -> None:
    pass


def bench(
    bundle: Bundle | Path | str,
    *,
    batches: Sequence[int] = (1, 8),
    contexts: Sequence[int] | None = None,
    phases: Sequence[str] = PHASES,
    steps: int = 16,
    prompt: int = 512,
    backend: str | None = None,
    engine: Path | None = None,
    threads: int | None = None,
    progress: Progress = _silent,
) -> Bench:
    """Measure a bundle: decode for each batch and context, and one prompt's prefill.

    Decode steps run one after another behind caches of made-up keys and values, so the first timed
    one sees a few tokens more than `context`. A cell's floor is by the bandwidth just before and
    just after it: what slows memory down for a while slows steps down too.

    Args:
        bundle: an opened bundle, or its folder (verified before use).
        batches: rows side by side, of decode.
        contexts: tokens that each row holds before the first step, of decode; None: 512 and 8192,
            or what the model's positions allow.
        phases: some of `PHASES`.
        steps: decode steps to time. Of prefill, as many prompts, but five at most.
        prompt: tokens of the prompt that prefill reads in one call, at batch 1; at most the model's
            positions are taken.
        backend: what runs it; None: what it was exported for.
        engine: folder of a TensorRT engine; None: the only one that the bundle has.
        threads: intra-operator threads (onnxruntime only); None: its own choice, and all processors
            for the floor.
        progress: called with (what, cells done, of).

    A floor is given for `onnxruntime` on a CPU. Peak memory is that of the process from
    the opening of each cell's executor on; outside Linux, where it cannot be reset, from the
    process's start.

    Raises:
        BadInput: an option is wrong, or a cell needs more positions than the model or engine has.
        BundleError, MissingEnvironment: as `open_executor`.
    """
    if not isinstance(bundle, Bundle):
        bundle = open_bundle(bundle)
    runs_on = backend_of(bundle, backend)
    if threads is not None:
        _at_least_one("threads", threads)
    if contexts is None:
        most = max(1, bundle.max_positions - _WARM - steps)
        contexts = [min(context, most) for context in _CONTEXTS]
    cells = list(_cells(bundle, batches, contexts, phases, steps, prompt))
    if not cells:
        raise BadInput("nothing to measure; give a phase and, for decode, a batch and a context")
    on_cpu = runs_on == "onnxruntime" and not onnxruntime_cuda.takes(bundle)
    rows, readings = [], []
    for index, cell in enumerate(cells):
        progress(_name(cell.phase, cell.batch, cell.context), index, len(cells))
        if on_cpu:
            readings.append(read_bandwidth(threads or _cpus()))
        _forget_peak()
        rows.append(_measure(bundle, cell, backend, engine, threads))
        gc.collect()  # the executor's caches and weights go before the next is opened
    graph = weights = bandwidth = None
    if on_cpu:
        readings.append(read_bandwidth(threads or _cpus()))
        graph, bandwidth = graph_of(bundle)[0], median(readings)
        weights = read_weights(graph)
        around = [sum(pair) / 2 for pair in pairwise(readings)]
        rows = [
            replace(row, floor_share=_share(row, weights, read))
            for row, read in zip(rows, around, strict=True)
        ]
    progress("done", len(cells), len(cells))
    return Bench(
        bundle=str(bundle.folder),
        backend=runs_on,
        graph=None if graph is None else graph.name,
        date=date.today().isoformat(),
        machine=_machine(threads),
        tools={
            "cla-export": __version__,
            "numpy": np.__version__,
            runs_on: str(import_module(_MODULES[runs_on]).__version__),
        },
        bandwidth_bytes_per_s=bandwidth,
        weight_bytes=None if weights is None else weights.whole,
        rows=tuple(rows),
    )


def read_bench(path: Path) -> Bench:
    """A stored result of `bench`; BadInput for anything else."""
    try:
        return Bench.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise BadInput(
            f"{path}: no such file; expected the JSON of an earlier run, as `cla-export bench "
            "BUNDLE --output FILE` writes it"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: not a stored bench ({error!r})") from error


def compare(now: Bench, old: Bench, noise: float = NOISE) -> Comparison:
    """What is slower than it was, or not measured any more.

    A row may take longer by `noise`, a share of its time, or by the spread of either run's own
    times if that is more, up to a half. Another machine, graph or model is a note.
    """
    regressions = []
    rows = {(row.phase, row.batch, row.context): row for row in now.rows}
    for before in old.rows:
        after = rows.get((before.phase, before.batch, before.context))
        if after is None:
            regressions.append(f"{before.name}: {before.ms_per_step:.2f} ms then, not measured now")
            continue
        allowed = max(noise, min(max(before.spread, after.spread), _LARGEST_NOISE))
        slower = after.ms_per_step / before.ms_per_step - 1
        if slower > allowed:
            regressions.append(
                f"{after.name}: {after.ms_per_step:.2f} ms, {before.ms_per_step:.2f} ms then: "
                f"{slower:.0%} slower, and {allowed:.0%} is noise"
            )
    return Comparison(
        tuple(regressions),
        tuple(
            f"{what} is {is_!r} now and was {was!r} then"
            for what, is_, was in (
                *((key, now.machine.get(key), old.machine.get(key)) for key in _SAME_MACHINE),
                *((key, getattr(now, key), getattr(old, key)) for key in _SAME_WORK),
            )
            if is_ != was
        ),
    )


def _cells(
    bundle: Bundle,
    batches: Sequence[int],
    contexts: Sequence[int],
    phases: Sequence[str],
    steps: int,
    prompt: int,
) -> Iterator[_Cell]:
    """Every cell, once; BadInput for what cannot be measured."""
    given = {"batch": batches, "context": contexts, "steps": [steps], "prompt": [prompt]}
    for what, numbers in given.items():
        for number in numbers:
            _at_least_one(what, number)
    for phase in phases:
        if phase not in PHASES:
            raise BadInput(f"phase is {phase!r}; expected {' or '.join(PHASES)}")
    positions = bundle.max_positions
    if "decode" in phases:
        most = positions - _WARM - steps
        for context in contexts:
            if context > most:
                raise BadInput(
                    f"context is {context}; {bundle.folder} has {positions} positions, and the "
                    f"steps take {_WARM + steps} of them: expected at most {most}"
                )
        for batch in dict.fromkeys(batches):
            for context in dict.fromkeys(contexts):
                yield _Cell("decode", batch, context, steps)
    if "prefill" in phases:
        yield _Cell("prefill", 1, min(prompt, positions), min(steps, _PROMPTS))


def _at_least_one(what: str, number: int) -> None:
    if type(number) is not int or number < 1:
        raise BadInput(f"{what} is {number!r}; expected a whole number, at least 1")


def _measure(
    bundle: Bundle, cell: _Cell, backend: str | None, engine: Path | None, threads: int | None
) -> Row:
    """Open the bundle for a cell, and time it; the executor goes when this returns."""
    runs_on = backend_of(bundle, backend)
    fixed = runs_on in FLAVOURS  # an engine's capacity is what it was built for
    executor = open_executor(
        bundle,
        backend,
        engine=engine,
        capacity=None if fixed else cell.capacity,
        slots=cell.batch,
        threads=threads,
    )
    if cell.capacity > executor.capacity:
        raise BadInput(
            f"{cell.phase} with context {cell.context} takes {cell.capacity} tokens a slot; the "
            f"engine was built for {executor.capacity}: build it again with --capacity "
            f"{cell.capacity}"
        )
    decode = cell.phase == "decode"
    times = list((_decode if decode else _prefill)(executor, cell))
    ms, dtype = median(times), "float32" if runs_on == "torch" else bundle.dtype
    low, high = np.percentile(times, (10, 90)).tolist()
    return Row(
        phase=cell.phase,
        batch=cell.batch,
        context=cell.context,
        ms_per_step=ms,
        ms_p10=low,
        ms_p90=high,
        tokens_per_s=(cell.batch if decode else cell.context) / ms * 1e3,
        floor_share=None,
        kv_bytes=kv_bytes(bundle.layout, dtype, cell.batch, cell.context),
        peak_rss_bytes=_peak(),
    )


def _decode(executor: Executor, cell: _Cell) -> Iterator[float]:
    """Milliseconds of each step behind full caches."""
    _fill(executor, cell)
    tokens = np.random.default_rng(1).integers(0, executor.vocab_size, cell.batch).tolist()
    for step in range(_WARM + cell.times):
        lengths = [cell.context + step] * cell.batch
        began = perf_counter()
        executor.decode(range(cell.batch), tokens, lengths)
        if step >= _WARM:
            yield (perf_counter() - began) * 1e3


def _prefill(executor: Executor, cell: _Cell) -> Iterator[float]:
    """Milliseconds of each prompt into a slot that counts as empty; the first warms up."""
    tokens = np.random.default_rng(1).integers(0, executor.vocab_size, cell.context).tolist()
    for prompt in range(1 + cell.times):
        began = perf_counter()
        executor.prefill(0, tokens, 0)
        if prompt:
            yield (perf_counter() - began) * 1e3


def _fill(executor: Executor, cell: _Cell) -> None:
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


def _share(row: Row, weights: Weights, bandwidth: float) -> float | None:
    """The floor's time over the row's; None for prefill, which computes more than it reads."""
    if row.phase != "decode":
        return None
    read = weights.whole + row.batch * weights.row + row.kv_bytes
    return read / bandwidth * 1e3 / row.ms_per_step


def _forget_peak() -> None:
    """Let the peak of this process's memory start anew, where Linux allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak() -> int:
    """Bytes of this process's memory at their highest."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _machine(threads: int | None) -> dict[str, str | int | None]:
    """Where it was measured; `threads` None is the runtime's own choice."""
    return {
        "processor": processor(),
        "cpus": _cpus(),
        "threads": threads,
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def _cpus() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
