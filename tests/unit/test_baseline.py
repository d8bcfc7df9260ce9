"""A stored run as a baseline, and the folder that a failing run leaves."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
from models_zoo import MIXED, Zoo
from test_parity import mutant, scale

from cla_export.compare.baseline import read_baseline, regressions
from cla_export.compare.files import failure, write_report
from cla_export.compare.gate import compare_bundle
from cla_export.compare.report import ParityReport
from cla_export.errors import BadInput


@pytest.fixture(scope="module")
def stored(zoo: Zoo, tmp_path_factory) -> tuple[ParityReport, Path]:
    report = compare_bundle(zoo.bundle(**MIXED), threads=1)
    write_report(report, tmp_path_factory.mktemp("report"))
    folder = tmp_path_factory.mktemp("report")
    write_report(report, folder)
    return report, folder / "parity.json"


def test_the_same_run_again_is_no_regression(zoo: Zoo, stored):
    report = compare_bundle(zoo.bundle(**MIXED), threads=2, baseline=stored[1])
    assert report.passed
    assert report.baseline == str(stored[1])
    assert report.regressions == []


def test_what_was_better_then_is_named(stored):
    report, path = stored
    baseline = read_baseline(path)
    worse = [
        replace(r, max_error=0.9 * r.tolerance) if (r.case, r.output) == ("decode", "logits") else r
        for r in report.tensors[:-1]
    ]
    greedy = [replace(report.greedy[0], agreeing=report.greedy[0].agreeing - 1), *report.greedy[1:]]
    score = replace(report.perplexity, difference=0.9 * report.perplexity.tolerance)
    now = replace(report, tensors=worse, greedy=greedy, perplexity=score)
    found = regressions(now, baseline, path)
    lost = report.tensors[-1]
    assert [r.what for r in found] == [
        "decode, logits: largest error",
        f"{lost.case}, {lost.output}",
        "greedy prompt 0: tokens agreeing",
        "perplexity: relative difference",
    ]
    now.regressions += found
    assert not now.passed
    assert failure(now).startswith("worse than the baseline; decode, logits: largest error")


def test_rounding_that_comes_and_goes_is_not(stored):
    report, path = stored
    noisy = [replace(r, max_error=0.15 * r.tolerance, mean_error=1.9 * r.mean_error)
             for r in report.tensors]  # fmt: skip
    assert regressions(replace(report, tensors=noisy), read_baseline(path), path) == []


def test_a_baseline_of_something_else_is_refused(zoo: Zoo, stored, tmp_path):
    other = zoo.bundle("portable", **MIXED)
    with pytest.raises(BadInput, match=r"target is 'onnxruntime' there and 'portable' in this run"):
        compare_bundle(other, threads=1, baseline=stored[1])
    with pytest.raises(BadInput, match="no such file"):
        read_baseline(tmp_path / "gone.json")
    (tmp_path / "text.json").write_text("hello")
    with pytest.raises(BadInput, match="not a stored parity report"):
        read_baseline(tmp_path / "text.json")
    old = {**json.loads(stored[1].read_text()), "schema": 1}
    (tmp_path / "old.json").write_text(json.dumps(old))
    with pytest.raises(BadInput, match="schema 1; this version"):
        read_baseline(tmp_path / "old.json")


def replayed(command: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        shlex.split(command), capture_output=True, text=True, env={**os.environ, "PATH": path}
    )


def test_a_failing_call_can_be_run_again(zoo: Zoo, tmp_path):
    """polygraphy finds the first wrong output where the gate did; a right graph passes it all."""
    bundle = mutant(zoo, tmp_path / "bundle", "onnxruntime", scale)
    folder = tmp_path / "debug folder"
    report = compare_bundle(bundle, threads=1, debug_dir=folder)
    assert report.debug is not None
    (command,) = report.debug.commands
    done = replayed(command)
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stdout.splitlines() if "FAILED | Output" in line]
    inside = [line for line in lines if "'layer." in line]
    assert "'layer.1.attention'" in inside[0], "before it, every step agrees"
    model = ir.load(folder / "model.onnx")
    node = next(n for n in model.graph if n.metadata_props.get("cla.layer") == "1")
    right = node.attributes.get_float("scale", 0) / 1.01
    node.attributes["scale"] = ir.AttrFloat32("scale", right)
    ir.save(model, folder / "model.onnx")
    done = replayed(str(shlex.quote(str(folder / "replay.sh"))))
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_debug_folder_with_other_things_in_it_is_refused(zoo: Zoo, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(BadInput, match=r"holds 'thesis\.tex'"):
        compare_bundle(zoo.bundle(**MIXED), threads=1, debug_dir=tmp_path)
