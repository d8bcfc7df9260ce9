"""graphs/: the specs, the example of each pass, and the script that writes the goldens."""

import csv
import shutil
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

import cla_export.rewrite
from cla_export.errors import GraphError
from cla_export.graph_reading import read_model
from cla_export.graph_text import from_text, to_text
from cla_export.layout import layout_from_config, paper_layout, parse_paper_name
from cla_export.lower import CPU
from cla_export.lower.onnxruntime_cpu import MIN_HEAD_DIM
from cla_export.models import family_of
from cla_export.rewrite.structure import check_structure

HERE = Path(__file__).parent
GRAPHS = HERE.parents[1] / "graphs"
sys.path.insert(0, str(HERE.parents[1] / "scripts"))

import pass_examples  # noqa: E402
import regen_graphs  # noqa: E402

SPECS = {
    path.stem: tomllib.loads(path.read_text()) for path in sorted((GRAPHS / "specs").glob("*.toml"))
}
ROWS = list(csv.DictReader((HERE / "paper_rows.csv").open()))
LAYOUTS = tomllib.loads((GRAPHS / "onnx/layouts.toml").read_text())
TINY = {
    name: LAYOUTS["defaults"] | config for name, config in LAYOUTS.items() if name != "defaults"
}
EXAMPLES = sorted(path.parent.name for path in (GRAPHS / "passes").glob("*/before.onnxtxt"))
NOT_PASSES = (
    "__init__", "attention_meaning", "builder", "report", "spelt_attention", "structure", "values",
)  # fmt: skip
# Same numbers before and after. One rounding may move from K to Q: hoist_key_scale.
SAME_NUMBERS = (
    "strip_repeat_kv",
    "fuse_rotary",
    "hoist_key_scale",
    "simplify",
    "name_nodes",
    "group_attention",
)
SIZES = {"batch": 2, "sequence": 5, "capacity": 8, "rows": 8, "columns": 10}


def golden(name):
    return (GRAPHS / name).read_text(encoding="utf-8")


# Specs.


@pytest.mark.parametrize("stem", SPECS)
def test_spec_is_a_paper_row(stem):
    spec = SPECS[stem]
    assert stem == f"{spec['scale'].lower()}-{spec['name']}"
    rows = [row for row in ROWS if (row["scale"], row["name"]) == (spec["scale"], spec["name"])]
    assert rows
    for row in rows:
        config = spec["config"]
        assert int(row["kv_bytes_per_token"]) == spec["kv_bytes_per_token"]
        assert int(row["kv_layers"]) == spec["kv_layers"]
        assert int(row["n_layers"]) == config["num_hidden_layers"]
        assert int(row["d_head"]) == config["head_dim"]
        assert int(row["q_heads"]) == config["num_attention_heads"]
        assert int(row["kv_heads"]) == config["num_key_value_heads"]


@pytest.mark.parametrize("twin", [False, True], ids=["full", "twin"])
@pytest.mark.parametrize("stem", SPECS)
def test_spec_is_the_model_it_names(stem, twin):
    spec = SPECS[stem]["twin"] if twin else SPECS[stem]
    model = family_of(spec["config"]).read_spec(spec["config"])
    assert model.layout.bytes_per_token("float16") == spec["kv_bytes_per_token"]
    assert model.layout.num_groups == spec["kv_layers"]
    assert model.layout == paper_layout(spec["name"], model.num_layers, model.q_heads)
    assert model.separate_kv_norm
    assert model.tie_embeddings
    owners = [name for name in model.weights() if name.endswith("k_proj.weight")]
    assert len(owners) == spec["kv_layers"]


@pytest.mark.parametrize("stem", SPECS)
def test_twin_has_the_pattern_and_kind_of_its_model(stem):
    named, twin = (parse_paper_name(spec["name"]) for spec in (SPECS[stem], SPECS[stem]["twin"]))
    assert twin._replace(head_dim=named.head_dim) == named
    assert 2 <= SPECS[stem]["twin"]["config"]["num_hidden_layers"] <= 6


def test_every_paper_row_has_a_spec():
    assert {f"{row['scale'].lower()}-{row['name']}" for row in ROWS} == set(SPECS)


# Text.


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("stage", regen_graphs.STAGES)
def test_graph_golden_reads_back_and_keeps_one_cache_a_group(name, stage):
    if stage == CPU and TINY[name]["head_dim"] < MIN_HEAD_DIM:
        assert not (GRAPHS / f"onnx/{name}.{stage}.onnxtxt").exists(), "bundles have none either"
        return
    text = golden(f"onnx/{name}.{stage}.onnxtxt")
    assert pass_examples.normalised(text) == text
    layout = layout_from_config(TINY[name])
    if stage == "canonical":
        check_structure(from_text(text), layout)
    else:
        facts, found, _, _ = read_model(from_text(text), stage)
        assert found == layout
        assert facts.cache_inputs == 2 * layout.num_groups


LITERALS = r"""<ir_version: 10, opset_import: ["" : 23, "com.x" : 2]>
literals (
  float[n,?] x,
  int64 k
) => (
  float[n,?] "a/b"
)
<
  bfloat16[2] bf = {16256, 49024},
  double d = {0.1},
  float[1] f = {1e-06},
  float16 h = {15360},
  int64 k = {2147483647},
  float[3,3] "layer.2" = ["location": "weights"],
  float "layer.10" = ["location": "weights"],
  string s = {"say \"hi\""},
  bool yes = {1}
>
{
  [first] y, z = com.x.Two <a = -1, b = 0.1, c = 1.0> (x, , f)  #: float[], ? {"cla.layer": "0"}
  u = Some <e = [1, 2], f = [0.5], g = ["u"], h: ints = [], s = "text"> ()  #: ?
  v = Constant <value = float[1] {0.5}> ()  #: float[1]
  w = Constant <value = int64 {3}> ()  #: int64
  "a/b" = Add (y, yes)  #: float[n,?]
}
"""


def test_text_keeps_every_kind_of_literal():
    assert to_text(from_text(LITERALS)) == LITERALS


def test_text_refuses_what_it_cannot_show():
    with pytest.raises(GraphError, match="line: 1"):
        from_text("not a graph")
    head = '<ir_version: 10, opset_import: ["" : 23]> g (float x) => (float y) {\n  '
    with pytest.raises(GraphError, match="textual syntax"):
        from_text(head + "y, z = F ()  #: float\n}")  # two outputs, one type
    model = from_text(head + "y = If (x)\n}")
    node = model.graph.node(0)
    node.attributes["then_branch"] = ir.AttrGraph("then_branch", ir.Graph([], [], nodes=[]))
    with pytest.raises(GraphError, match="If node y: attribute then_branch is a subgraph"):
        to_text(model)


# Passes.


def test_every_pass_has_an_example():
    files = {path.stem for path in Path(cla_export.rewrite.__file__).parent.glob("*.py")}
    assert set(pass_examples.PASSES) == files - set(NOT_PASSES)
    assert {example.partition(".")[0] for example in EXAMPLES} == set(pass_examples.PASSES)


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_is_what_the_pass_makes(example):
    before = golden(f"passes/{example}/before.onnxtxt")
    assert pass_examples.normalised(before) == before
    assert pass_examples.after(example, before) == golden(f"passes/{example}/after.onnxtxt")


@pytest.mark.parametrize("run", ["reference", "onnxruntime"])
@pytest.mark.parametrize("example", SAME_NUMBERS)
def test_pass_keeps_the_numbers(example, run):
    before, after = (runnable(f"passes/{example}/{stage}.onnxtxt") for stage in ("before", "after"))
    feeds = random_feeds(before)
    if example == "simplify":
        feeds["target"] = np.array([8, 10], np.int64)
    for old, new in zip(RUNS[run](before, feeds), RUNS[run](after, feeds), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("run", ["reference", "onnxruntime"])
def test_threaded_caches_give_the_stateless_numbers_in_two_calls(run):
    before, after = (runnable(f"passes/thread_caches/{s}.onnxtxt") for s in ("before", "after"))
    ids = np.random.default_rng(0).integers(0, 6, (2, 5))
    positions = np.tile(np.arange(5), (2, 1))
    (expected,) = RUNS[run](windowed(before), {"input_ids": ids, "position_ids": positions})
    caches = {
        v.name: np.zeros((2, 1, 8, 4), np.float32) for v in after.graph.input if "past" in v.name
    }
    seen = []
    for start, stop in ((0, 3), (3, 5)):
        lengths = {"write_indices": np.full(2, start), "kv_lengths": np.full(2, stop)}
        logits, *presents = RUNS[run](after, {"input_ids": ids[:, start:stop], **lengths, **caches})
        caches = dict(zip(caches, presents, strict=True))
        seen.append(logits)
    np.testing.assert_allclose(np.concatenate(seen, axis=1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("run", ["reference", "onnxruntime"])
@pytest.mark.parametrize("example", ["keep_last_logits", "keep_last_logits.no_matmul"])
def test_kept_logits_are_the_last_ones(example, run):
    before, after = (runnable(f"passes/{example}/{stage}.onnxtxt") for stage in ("before", "after"))
    feeds = {
        "input_ids": np.random.default_rng(0).integers(0, 6, (2, 5)),
        "write_indices": np.array([4, 0]),
        "kv_lengths": np.array([9, 3]),  # the second row is padded by 2
    }
    (every,) = RUNS[run](before, feeds)
    (kept,) = RUNS[run](after, {**feeds, "logits_to_keep": np.array(2)})
    expected = np.stack([every[0, 3:5], every[1, 1:3]])
    np.testing.assert_allclose(kept, expected, rtol=1e-5, atol=1e-6)


def runnable(name):
    """A golden as a protobuf, with random numbers for the weights it leaves out."""
    model = from_text(golden(name))
    rng = np.random.default_rng(7)
    for value in sorted(model.graph.initializers.values(), key=lambda value: value.name):
        if value.const_value is None:
            array = rng.standard_normal(value.shape.numpy()).astype(value.dtype.numpy())
            value.const_value = ir.tensor(array, name=value.name)
    return ir.to_proto(model)


def random_feeds(model):
    rng = np.random.default_rng(0)
    feeds = {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        shape = [dim.dim_value or SIZES.get(dim.dim_param, 1) for dim in kind.shape.dim]
        if kind.elem_type == onnx.TensorProto.INT64:
            feeds[value.name] = rng.integers(0, 4, shape)
        else:
            feeds[value.name] = rng.standard_normal(shape).astype(np.float32)
    return feeds


def windowed(model):
    """The stateless graph says its window in metadata only; give layer 2 the mask it stands for."""
    node = next(node for node in model.graph.node if node.name == "layer_2")
    distance = np.arange(5)[:, None] - np.arange(5)
    mask = onnx.numpy_helper.from_array((distance >= 0) & (distance < 3), "window_mask")
    model.graph.initializer.append(mask)
    node.input.append("window_mask")
    node.attribute.remove(next(a for a in node.attribute if a.name == "is_causal"))
    return model


def run_reference(model, feeds):
    return ReferenceEvaluator(model).run(None, feeds)


def run_onnxruntime(model, feeds):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


RUNS = {"reference": run_reference, "onnxruntime": run_onnxruntime}


# The script.


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(GRAPHS, tmp_path / "graphs"))


def regen(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["regen_graphs.py", *map(str, args)])
    return regen_graphs.main()


def test_check_shows_what_changed(copy, monkeypatch, capsys):
    only = ("--graphs", copy, "--only", "passes/s*")
    assert regen(monkeypatch, "--check", *only) == 0
    changed = copy / "passes/strip_repeat_kv/after.onnxtxt"
    changed.write_text(changed.read_text().replace("Attention <is_causal = 1>", "Attention"))
    (copy / "passes/simplify/after.onnxtxt").unlink()
    (copy / "passes/strange").mkdir()
    (copy / "passes/strange/after.onnxtxt").write_text("\n")
    capsys.readouterr()
    assert regen(monkeypatch, "--check", *only) == 1
    shown = capsys.readouterr().out
    assert "differs: passes/strip_repeat_kv/after.onnxtxt" in shown
    assert "-  [layer_0] y0 = Attention (q, k, v)" in shown
    assert "+  [layer_0] y0 = Attention <is_causal = 1> (q, k, v)" in shown
    assert "missing: passes/simplify/after.onnxtxt" in shown
    assert "stale: passes/strange/after.onnxtxt" in shown
    assert "3 of 7 goldens" in shown
    assert regen(monkeypatch, *only) == 0
    assert changed.read_text() == golden("passes/strip_repeat_kv/after.onnxtxt")
    assert not (copy / "passes/strange/after.onnxtxt").exists()
    assert regen(monkeypatch, "--check", *only) == 0


def test_only_that_matches_nothing_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        regen(monkeypatch, "--check", "--only", "nothing/*")
    assert "matches no golden" in capsys.readouterr().err
