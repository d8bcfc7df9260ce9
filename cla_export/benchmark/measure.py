"""All cells of a run, one after another, and the floor under each."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np

from cla_export import __version__
from cla_export.benchmark.cells import PHASES, WARM, at_least_one, list_cells
from cla_export.benchmark.places import place_of
from cla_export.benchmark.results import Bench, Row
from cla_export.benchmark.timing import time_cell
from cla_export.bundle import Bundle, Progress, open_bundle
from cla_export.engines import gpu_graph
from cla_export.engines.opening import backend_of
from cla_export.engines.tensorrt_build import FLAVOURS
from cla_export.environment import machine
from cla_export.errors import BadInput
from cla_export.floor import Weights, read_weights
from cla_export.peak_memory import forget_peak

_CONTEXTS = (512, 8192)
_STEPS = 16
_STEPS_TOGETHER = 64  # where they take no word from the host
_MODULES: Mapping[str, str] = {"onnxruntime": "onnxruntime", "torch": "torch", **FLAVOURS}


def _silent(_what: str, _done: int, _of: int) -> None:
    pass


def bench(
    bundle: Bundle | Path | str,
    *,
    batches: Sequence[int] = (1, 8),
    contexts: Sequence[int] | None = None,
    phases: Sequence[str] = PHASES,
    steps: int | None = None,
    prompt: int = 512,
    backend: str | None = None,
    engine: Path | None = None,
    threads: int | None = None,
    module: str | None = None,
    progress: Progress = _silent,
) -> Bench:
    """Measure a bundle: decode for each batch and context, and one prompt's prefill.

    Decode steps run one after another behind caches of made-up keys and values, so the first timed
    one sees a few tokens more than `context`. A cell's floor is by the bandwidth just before and
    just after it: what slows memory down for a while slows steps down too. It is of the memory that
    steps run in: on a GPU a kernel that only reads measures it.

    ONNX Runtime on a GPU hands greedy tokens from step to step on the device. There all steps are
    timed as one, seven times, after once that captures them as a CUDA graph.

    Args:
        bundle: an opened bundle, or its folder (verified before use).
        batches: rows side by side, of decode.
        contexts: tokens that each row holds before the first step, of decode; None: 512 and 8192,
            or what the model's positions allow.
        phases: some of `PHASES`.
        steps: decode steps to time; None: 16, or 64 where all are timed as one. Of prefill, as many
            prompts, but five at most.
        prompt: tokens of the prompt that prefill reads in one call, at batch 1; at most the model's
            positions are taken.
        backend: what runs it; None: what it was exported for.
        engine: folder of a TensorRT engine; None: the only one that the bundle has.
        threads: intra-operator threads (onnxruntime on a CPU only); None: its own choice, and all
            processors for the floor.
        module: `package.module:factory`, where the bundle was exported with one (torch only).
        progress: called with (what, cells done, of).

    A floor is given for `onnxruntime`. Peak memory is that of the process from the opening of each
    cell's executor on; outside Linux, where it cannot be reset, from the process's start. For a
    GPU's see `Row`.

    Raises:
        BadInput: an option is wrong, or a cell needs more positions than the model or engine has.
        BundleError, MissingEnvironment, RunError: as `open_executor` and `read_device_bandwidth`.
    """
    if not isinstance(bundle, Bundle):
        bundle = open_bundle(bundle)
    runs_on = backend_of(bundle, backend)
    if threads is not None:
        at_least_one("threads", threads)
    if steps is None:
        together = runs_on == "onnxruntime" and gpu_graph.takes(bundle)
        steps = _STEPS_TOGETHER if together else _STEPS
    if contexts is None:
        most = max(1, bundle.max_positions - WARM - steps)
        contexts = [min(context, most) for context in _CONTEXTS]
    cells = list(list_cells(bundle, batches, contexts, phases, steps, prompt))
    if not cells:
        raise BadInput("nothing to measure; give a phase and, for decode, a batch and a context")
    place = place_of(bundle, runs_on, threads)
    rows, readings = [], []
    for index, cell in enumerate(cells):
        progress(cell.name, index, len(cells))
        if place.graph is not None:
            readings.append(place.read_bandwidth())
        forget_peak()
        rows.append(time_cell(bundle, cell, backend, engine, threads, module, place.read_growth))
        gc.collect()  # the executor's caches and weights go before the next is opened
        place.release()
    weights = bandwidth = None
    if place.graph is not None:
        readings.append(place.read_bandwidth())
        weights, bandwidth = read_weights(place.graph), median(readings)
        around = [sum(pair) / 2 for pair in pairwise(readings)]
        rows = [
            replace(row, floor_share=_share(row, weights, read))
            for row, read in zip(rows, around, strict=True)
        ]
    progress("done", len(cells), len(cells))
    return Bench(
        bundle=str(bundle.folder),
        backend=runs_on,
        graph=None if place.graph is None else place.graph.name,
        date=date.today().isoformat(),
        machine={**machine(threads), **place.machine},
        tools={
            "cla-export": __version__,
            "numpy": np.__version__,
            runs_on: str(import_module(_MODULES[runs_on]).__version__),
        },
        bandwidth_bytes_per_s=bandwidth,
        weight_bytes=None if weights is None else weights.whole,
        rows=tuple(rows),
    )


def _share(row: Row, weights: Weights, bandwidth: float) -> float | None:
    """The floor's time over the row's; None for prefill, which computes more than it reads."""
    if row.phase != "decode":
        return None
    read = weights.whole + row.batch * weights.row + row.kv_bytes
    return read / bandwidth * 1e3 / row.ms_per_step
