"""--debug-dir: the call that went wrong first, as files that polygraphy runs again.

    model.onnx            the bundle's graph with every layer's values as outputs, and the call's
                          logits_to_keep built in; a copy of its weights
    inputs.json           what the call was given, caches as they were then (polygraphy's format)
    expected.json         what PyTorch gives for it
    got.json              what the bundle gave
    compare.py            the tolerance of each output
    replay.sh             the command

Here PyTorch computes all of it from the call's tokens alone, so that a graph put right passes.
Padding, and places of the caches past a row's length, are nobody's business: there, expected.json
holds what the bundle gave.
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from polygraphy.comparator import RunResults
from polygraphy.json import save_json
from polygraphy.logger import G_LOGGER

from cla_export.bundle import WEIGHTS, Bundle
from cla_export.compare.cases import Case
from cla_export.compare.marks import Call, MarkedExecutor, mark
from cla_export.compare.probe import Key, torch_tensors
from cla_export.compare.reference import GroupKV, Reference
from cla_export.compare.replay import describe, episodes_of
from cla_export.compare.report import DebugFiles, ParityReport
from cla_export.compare.runners import held_before
from cla_export.compare.thresholds import Threshold
from cla_export.errors import BadInput
from cla_export.graph_names import KEEP
from cla_export.kv_scales import PARTS, to_int8
from cla_export.linked_weights import read_in_place

_SCRIPT = '''"""Each output may be off by this much; cla-export parity derived it for this call."""

from polygraphy.comparator import CompareFunc

compare_outputs = CompareFunc.simple(
    atol={tolerances},
    rtol=0.0,
)
'''
_FILES = ("model.onnx", "inputs.json", "expected.json", "got.json", "compare.py", "replay.sh")


def check_debug_dir(folder: Path) -> None:
    """Refuse a folder that holds anything but an earlier call's files."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder}: a file; expected a folder to write the failing call to")
    others = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if strange := sorted(others - {*_FILES, WEIGHTS}):
        raise BadInput(
            f"{folder}: holds {strange[0]!r}, which --debug-dir did not write; choose another "
            "folder"
        )


def call_of_interest(report: ParityReport, case: Case, calls: list[Call]) -> int:
    """The call that the first divergence is in, else the one that made the worst value."""
    if report.divergence is not None:
        return report.divergence.call
    failed = [r for r in report.tensors if r.case == case.name and not r.passed]
    if not failed:
        return len(calls) - 1
    covering = [
        number
        for number, episodes in enumerate(episodes_of(calls, case))
        for index, episode in enumerate(episodes)
        if episode.row == failed[0].row
        and 0 <= failed[0].position - calls[number].starts[index] < len(calls[number].tokens[index])
    ]
    return covering[-1] if covering else len(calls) - 1


def write_call(
    folder: Path,
    bundle: Bundle,
    executor: MarkedExecutor,
    sides: Reference,
    threshold: Threshold,
    case: Case,
    held: GroupKV,
    limits: Mapping[str, float],
) -> DebugFiles:
    """Write the call that `executor` recorded; `limits` are of the case's outputs."""
    recorded, number = executor.recorded, executor.record
    assert recorded is not None
    folder.mkdir(parents=True, exist_ok=True)
    names = _write_graph(bundle, folder, recorded.keep)
    got = {names[key]: value for key, value in recorded.outputs.items()}
    got |= {**recorded.presents, "logits": recorded.logits}
    expected = {name: array.copy() for name, array in got.items()}
    scales = {
        f"present.{group}.{part}": scale
        for group, pair in enumerate(sides.native.scales or ())
        for part, scale in zip(PARTS, pair, strict=True)
    }
    tolerances = {
        name: limits[name.replace("present", "cache")] / float(np.min(scales.get(name, 1.0)))
        for name in recorded.presents
    }
    tolerances["logits"] = limits["logits"]
    call = executor.calls[number]
    for row, episode in enumerate(episodes_of(executor.calls, case)[number]):
        before = held_before(held, episode.held, bundle.layout)
        tokens = np.array(episode.tokens, np.int64)
        start = call.starts[row] - episode.held
        span = slice(start, start + len(call.tokens[row]))
        exact, felt = torch_tensors(sides.exact, tokens, {}, before, feel=True)
        natives = [torch_tensors(side, tokens, {}, before)[0] for side in sides.yardstick]
        for key, name in names.items():
            if key in exact:
                _fill(expected[name][row], exact[key][span])
                scores = felt[key[0]] if key[1] == "attention" else 0.0
                limit = threshold.of(exact[key], [native[key] for native in natives], scores=scores)
                tolerances[name] = max(limit, tolerances.get(name, 0.0))
        logits, groups = sides.exact.forward(tokens, before)
        kept = min(recorded.keep, len(call.tokens[row]))
        expected["logits"][row, :kept] = logits[span.stop - kept : span.stop]
        for group, pair in enumerate(groups):
            for part, values in zip(PARTS, pair, strict=True):
                name = f"present.{group}.{part}"
                cache = expected[name][row]  # [Hkv, C, D]
                whole = values[: span.stop].transpose(1, 0, 2)
                as_held = to_int8(whole, scales[name]) if name in scales else whole
                cache[:, episode.held : episode.held + span.stop] = as_held
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        save_json([recorded.inputs], str(folder / "inputs.json"))
        for name, runner, outputs in (("expected", "pytorch", expected), ("got", "bundle", got)):
            results = RunResults()
            results.add([outputs], runner_name=runner)
            results.save(str(folder / f"{name}.json"))
    script = _SCRIPT.format(tolerances=json.dumps(tolerances, indent=4).replace("\n", "\n    "))
    (folder / "compare.py").write_text(script, encoding="utf-8")
    paths = [
        shlex.quote(str(folder.absolute() / name))
        for name in ("model.onnx", "inputs.json", "expected.json", "compare.py")
    ]
    command = (
        f"polygraphy run {paths[0]} --onnxrt --load-inputs {paths[1]} --load-outputs {paths[2]} "
        f"--compare-func-script {paths[3]}"
    )
    (folder / "replay.sh").write_text(f"#!/bin/sh\nexec {command}\n", encoding="utf-8")
    (folder / "replay.sh").chmod(0o755)
    return DebugFiles(str(folder), f"{case.name}, {describe(call)}", [command])


def _write_graph(bundle: Bundle, folder: Path, keep: int) -> dict[Key, str]:
    """Save the marked graph; returns the outputs' names there, such as `layer.3.attention`."""
    model = ir.load(bundle.graph)
    marks = mark(model)
    graph = model.graph
    outputs = {str(value.name): value for value in graph.outputs}
    names = {}
    for (layer, role), old in marks.items():
        value, names[layer, role] = outputs[old], f"layer.{layer}.{role}"
        copy = ir.node("Identity", [value], name=names[layer, role])
        copy.outputs[0].name = names[layer, role]
        copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
        graph.append(copy)
        graph.outputs[graph.outputs.index(value)] = copy.outputs[0]
    for value in [value for value in graph.inputs if value.name == KEEP]:
        value.const_value = ir.tensor(np.array(keep, np.int64), name=KEEP)
        graph.inputs.remove(value)
    read_in_place(model, bundle.folder)  # and copied: readers of external data refuse links
    ir.save(model, folder / "model.onnx", external_data=WEIGHTS)
    return names


def _fill(array: NDArray[np.generic], expected: NDArray[np.float64]) -> None:
    """Write [tokens, width] over the row's first tokens in [H, S, D] or [S, width]."""
    if array.ndim == 3:
        heads, _, dim = array.shape
        array[:, : len(expected)] = expected.reshape(-1, heads, dim).transpose(1, 0, 2)
    else:
        array[: len(expected)] = expected
