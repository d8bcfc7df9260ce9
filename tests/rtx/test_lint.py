"""The lint refuses each graph that TensorRT gets wrong, by the right rule, and no right one."""

import subprocess
import sys
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from graphs_to_refuse import CRASHES, VARIANTS, WRONG, other_queries, packed, right, rotated
from models_zoo import MIXED, Zoo

from cla_export.errors import GraphError
from cla_export.lower.tensorrt_lint import RULES, check, lint

NAMES = [rule.__name__ for rule in RULES]


def graph_of(model: onnx.ModelProto) -> ir.Graph:
    return ir.from_proto(model).graph


def without_lint(model: onnx.ModelProto, folder: Path) -> str:
    """What becomes of a graph in TensorRT-RTX: refused, built, or crash."""
    onnx.save(model, folder / "model.onnx")
    command = [
        sys.executable,
        str(Path(__file__).parent / "outcome.py"),
        str(folder / "model.onnx"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode < 0:
        return "crash"
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def test_every_rule_has_a_graph_that_breaks_it():
    assert list(WRONG) == NAMES


@pytest.mark.parametrize("rule", NAMES)
def test_a_wrong_graph_is_refused_by_its_rule(rule):
    graph, _ = WRONG[rule]
    complaints = lint(graph_of(graph.model()))
    assert any(complaint.startswith(f"{rule}: ") for complaint in complaints), complaints
    with pytest.raises(GraphError, match=rule):
        check(graph_of(graph.model()))


@pytest.mark.parametrize("name", VARIANTS)
def test_so_are_its_variants(name):
    complaints = lint(graph_of(VARIANTS[name].model()))
    assert any(complaint.startswith(name.split(":")[0]) for complaint in complaints), complaints


@pytest.mark.parametrize("name", CRASHES)
def test_whatever_is_scaled_twice_is_refused(name):
    complaints = lint(graph_of(CRASHES[name].model()))
    assert any(complaint.startswith("scaled_twice") for complaint in complaints), complaints


@pytest.mark.parametrize("name", CRASHES)
def test_it_would_kill_the_builder(name, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="pip install 'cla-export[rtx]'")
    assert without_lint(CRASHES[name].model(), tmp_path) == "crash"


def test_right_graphs_pass(zoo: Zoo):
    assert lint(graph_of(right().model())) == []
    assert lint(graph_of(other_queries().model())) == []
    assert lint(graph_of(rotated().model())) == []
    assert lint(graph_of(packed().model())) == []
    for dtype in ("fp16", "fp32", "bf16"):
        bundle = zoo.bundle("tensorrt-rtx", dtype, **MIXED)
        graph = ir.load(bundle.graph).graph
        assert lint(graph, static_capacity=False) == []
        assert [c.split(":")[0] for c in lint(graph)] == ["cache_length"] * 4


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
def test_other_targets_graphs_are_refused(zoo: Zoo, target):
    """The portable graph is what TensorRT's own tools call fully supported."""
    graph = ir.load(zoo.bundle(target, "fp16", **MIXED).graph).graph
    rules = {complaint.split(":")[0] for complaint in lint(graph)}
    wanted = "lengths_ignored" if target == "portable" else "foreign_operators"
    assert wanted in rules


@pytest.mark.parametrize("rule", NAMES)
def test_what_becomes_of_it_otherwise(rule, tmp_path):
    """Executed in TensorRT-RTX's builder on this CPU; an engine that comes out is not run."""
    pytest.importorskip("tensorrt_rtx", reason="pip install 'cla-export[rtx]'")
    graph, outcome = WRONG[rule]
    assert without_lint(graph.model(), tmp_path) == outcome


@pytest.mark.parametrize("graph", [right, other_queries, rotated, packed])
def test_a_right_graph_is_built(tmp_path, graph):
    pytest.importorskip("tensorrt_rtx", reason="pip install 'cla-export[rtx]'")
    assert without_lint(graph().model(), tmp_path) == "built"
