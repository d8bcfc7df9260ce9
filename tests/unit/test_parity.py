"""The parity gate: good bundles pass; a bundle that is wrong in one place fails there."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from xml.etree import ElementTree as ET

import jsonschema
import numpy as np
import onnx_ir as ir
import pytest
from models_zoo import MIXED, Zoo, make_checkpoint

from cla_export.bundle import CPU_GRAPH, Bundle
from cla_export.compare.files import failure, to_junit, write_report
from cla_export.compare.gate import compare_bundle
from cla_export.compare.report import ParityReport
from cla_export.compare.schema import json_schema
from cla_export.errors import BadInput, BundleError, MissingEnvironment
from cla_export.lower.onnxruntime_cpu import MIN_HEAD_DIM
from cla_export.plugin import compile_cpu

Edit = Callable[[ir.Graph], None]
GOOD = {
    "onnxruntime": ("onnxruntime", "fp32", MIXED),
    "onnxruntime fp16": ("onnxruntime", "fp16", MIXED),
    "portable": ("portable", "fp32", MIXED),
    "head dim 10": ("onnxruntime", "fp32", {"kv_owner": (0, 0), "head_dim": 10}),
    "few positions": (
        "portable",
        "fp32",
        {"kv_owner": (0, 0), "max_position_embeddings": 40},
    ),
}


def gate(bundle: Bundle, reference: Path | None = None) -> ParityReport:
    return compare_bundle(bundle, reference, threads=1)


@pytest.mark.parametrize("which", GOOD)
def test_a_good_bundle_passes(zoo: Zoo, which: str) -> None:
    target, dtype, overrides = GOOD[which]
    bundle = zoo.bundle(target, dtype, **overrides)
    report = gate(bundle)
    assert report.passed
    assert report.divergence is None
    cases = {result.case for result in report.tensors}
    graphs = 1 if bundle.cpu_graph is None else 2
    if (target, dtype) == ("onnxruntime", "fp32") and bundle.layout.head_dim[0] >= MIN_HEAD_DIM:
        assert graphs == 2, "both of them are proven"
    assert len(cases) == 10 * graphs
    outputs = {f"cache.{g}.{p}" for g in range(bundle.layout.num_groups) for p in ("key", "value")}
    for case in cases:
        assert {r.output for r in report.tensors if r.case == case} == outputs | {"logits"}
    tight = {"fp32": 1e-3, "fp16": 0.15}[dtype]
    assert all(0 <= r.max_error <= r.tolerance < tight * r.rms for r in report.tensors)
    assert report.greedy_agreement == 1.0
    assert report.perplexity is not None
    assert report.perplexity.tokens > 1000
    assert (report.target, report.dtype) == (bundle.target, bundle.dtype)
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["passed"] is True


# Bundles that are wrong in one place. Layers 0 and 2 read group 0, layer 1 is group 1.


def node_of(graph: ir.Graph, layer: int, op_type: str, scope: str = "attn") -> ir.Node:
    """The first node of a type in a layer."""
    return next(
        node
        for node in graph
        if str(node.name).startswith(f"layers.{layer}/{scope}") and node.op_type == op_type
    )


def fused(graph: ir.Graph, layer: int) -> ir.Node:
    return node_of(graph, layer, "GroupQueryAttention")


def weight(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    def edit(graph: ir.Graph) -> None:
        value = graph.initializers[name]
        assert value.const_value is not None
        array = np.ascontiguousarray(change(value.const_value.numpy().copy()))
        assert array.shape == tuple(value.const_value.shape)
        value.const_value = ir.tensor(array, name=name)

    return edit


def perturbed(array: np.ndarray) -> np.ndarray:
    array.flat[array.size // 2] += 0.05
    return array


def with_nan(array: np.ndarray) -> np.ndarray:
    array.flat[7] = np.nan
    return array


def scale(graph: ir.Graph) -> None:
    node = fused(graph, 1)
    node.attributes["scale"] = ir.AttrFloat32("scale", node.attributes.get_float("scale", 0) * 1.01)


def window(graph: ir.Graph) -> None:
    fused(graph, 2).attributes["local_window_size"] = ir.AttrInt64("local_window_size", 7)


def no_window(graph: ir.Graph) -> None:
    del fused(graph, 1).attributes["local_window_size"]


def other_cache(graph: ir.Graph) -> None:
    sharer, owner = fused(graph, 2), fused(graph, 1)
    for slot, present in ((3, owner.outputs[1]), (4, owner.outputs[2])):
        sharer.replace_input_with(slot, present)


def beyond_the_frontier(graph: ir.Graph) -> None:
    """One position too many is visible, except where the cache ends: stale numbers."""
    node = node_of(graph, 2, "Attention")
    tape = ir.tape.Tape(graph)
    capacity = tape.op("Shape", [node.inputs[1]], {"start": 2, "end": 3})
    beyond = tape.op("Add", [node.inputs[6], graph.initializers["const/one"]])
    node.replace_input_with(6, tape.op("Min", [beyond, capacity]))
    graph.sort()


def unrotated(graph: ir.Graph) -> None:
    rotary = node_of(graph, 2, "RotaryEmbedding")
    rotary.outputs[0].replace_all_uses_with(rotary.inputs[0])


def exchanged_inputs(graph: ir.Graph) -> None:
    node = fused(graph, 1)
    key, value = node.inputs[1:3]
    node.replace_input_with(1, value)
    node.replace_input_with(2, key)


def exchanged_groups(graph: ir.Graph) -> None:
    """Both caches work, under each other's names."""
    for values in (graph.inputs, graph.outputs):
        for part in ("key", "value"):
            first, second = (
                next(v for v in values if v.name.endswith(f".{group}.{part}")) for group in (0, 1)
            )
            first.name, second.name = second.name, first.name


def exchanged_parts(graph: ir.Graph) -> None:
    """The cache of keys is called value, and the other way round."""
    for values in (graph.inputs, graph.outputs):
        key, value = (
            next(v for v in values if v.name.endswith(f".1.{p}")) for p in ("key", "value")
        )
        key.name, value.name = value.name, key.name


def other_position(graph: ir.Graph) -> None:
    """The logits of the token before the one asked for."""
    gather = next(node for node in graph if node.op_type == "GatherND")
    tape = ir.tape.Tape(graph)
    one, zero = graph.initializers["const/one"], graph.initializers["const/zero"]
    before = tape.op("Max", [tape.op("Sub", [gather.inputs[1], one]), zero])
    gather.replace_input_with(1, before)
    graph.sort()


L1, L2 = "model.layers.1.", "model.layers.2."
SHARER, OWNER = (2, 0), (1, 1)  # layer, group
MUTANTS: dict[str, tuple[str, Edit, tuple[int, int] | None, str | None]] = {
    # target, edit, (layer, group) of the first divergence, role
    "scale of one layer": ("onnxruntime", scale, OWNER, "attention"),
    "window one too long": ("onnxruntime", window, SHARER, "attention"),
    "no window": ("onnxruntime", no_window, OWNER, "attention"),
    "sharer reads another group": ("onnxruntime", other_cache, SHARER, "attention"),
    "sharer sees one too many": ("portable", beyond_the_frontier, SHARER, "attention"),
    "query not rotated": ("onnxruntime", unrotated, SHARER, "q"),
    "key and value exchanged": ("onnxruntime", exchanged_inputs, OWNER, "k"),
    "groups exchanged": ("onnxruntime", exchanged_groups, (0, 0), "key_cache"),
    "cache parts exchanged": ("onnxruntime", exchanged_parts, OWNER, "key_cache"),
    "angles one position off": (
        "portable",
        weight("model.rope_cos", lambda x: np.roll(x, 1, axis=0)),
        (0, 0),
        "q",
    ),
    "one number of a projection": (
        "onnxruntime",
        weight(f"{L1}self_attn.k_proj.weight", perturbed),
        OWNER,
        "k",
    ),
    "rows of a weight reversed": (
        "portable",
        weight(f"{L2}mlp.up_proj.weight", lambda x: x[::-1]),
        SHARER,
        "mlp",
    ),
    "NaN in a weight": (
        "onnxruntime",
        weight(f"{L2}self_attn.q_proj.weight", with_nan),
        SHARER,
        "q",
    ),
    "bias dropped": (
        "onnxruntime",
        weight(f"{L1}self_attn.v_proj.bias", np.zeros_like),
        OWNER,
        "v",
    ),
    "norm of another width": (
        "onnxruntime",
        weight(f"{L2}input_layernorm.weight", lambda x: x * 1.001),
        SHARER,
        "q",
    ),
    "one number of the head": ("onnxruntime", weight("lm_head.weight", perturbed), None, None),
    "logits of another position": ("onnxruntime", other_position, None, None),
}


def mutant(zoo: Zoo, folder: Path, target: str, edit: Edit, graph: str = "model.onnx") -> Bundle:
    """A bundle with an edited graph; the one for CPUs is left out where another is edited."""
    bundle = zoo.bundle(target, **MIXED)
    shutil.copytree(bundle.folder, folder)
    model = ir.load(folder / graph)
    edit(model.graph)
    ir.save(model, folder / graph)
    if graph != CPU_GRAPH:
        (folder / CPU_GRAPH).unlink(missing_ok=True)
    return replace(bundle, folder=folder)


@pytest.mark.parametrize("which", MUTANTS)
def test_a_wrong_bundle_fails_where_it_is_wrong(zoo: Zoo, tmp_path: Path, which: str) -> None:
    target, edit, place, role = MUTANTS[which]
    report = gate(mutant(zoo, tmp_path / "bundle", target, edit))
    assert not report.passed
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["passed"] is False
    failed = [result for result in report.tensors if not result.passed]
    assert failed, "the cases notice it, not only the text that comes out"
    if place is None:
        assert report.divergence is None, "every layer is right"
    else:
        assert report.divergence is not None
        found = report.divergence
        assert ((found.layer, found.group), found.role) == (place, role)
        assert not found.error <= found.tolerance
        assert found.case == failed[0].case


def cpu_attention(graph: ir.Graph, layer: int) -> ir.Node:
    return node_of(graph, layer, "ClaAttention")


def no_window(graph: ir.Graph) -> None:
    node = next(n for n in graph if n.attributes.get_int("window", 0))
    node.attributes["window"] = ir.AttrInt64("window", 0)


def another_scale(graph: ir.Graph) -> None:
    node = cpu_attention(graph, 1)
    node.attributes["scale"] = ir.AttrFloat32("scale", node.attributes.get_float("scale") * 1.01)


def swapped_caches(graph: ir.Graph) -> None:
    node = cpu_attention(graph, 2)
    key, value = node.inputs[1:3]
    node.replace_input_with(1, value)
    node.replace_input_with(2, key)


def values_for_keys(graph: ir.Graph) -> None:
    node = next(n for n in graph if n.op_type == "ClaAppend")
    node.replace_input_with(3, node.inputs[2])


@pytest.mark.parametrize(
    ("edit", "layer", "role"),
    [
        (no_window, None, "attention"),
        (another_scale, 1, "attention"),
        (swapped_caches, 2, "attention"),
        (values_for_keys, 0, "value_cache"),
    ],
)
def test_a_wrong_graph_for_cpus_fails_where_it_is_wrong(
    zoo: Zoo, tmp_path: Path, edit: Edit, layer: int | None, role: str
) -> None:
    report = gate(mutant(zoo, tmp_path / "bundle", "onnxruntime", edit, CPU_GRAPH))
    failed = {result.case for result in report.tensors if not result.passed}
    assert failed
    assert all(case.endswith("(cpu)") for case in failed), "the other graph is right"
    assert report.divergence is not None
    assert report.divergence.case.endswith("(cpu)")
    assert layer is None or report.divergence.layer == layer
    assert report.divergence.role in (role, "v" if role == "value_cache" else role)


def test_without_a_compiler_the_report_says_what_did_not_run(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Path:
        raise MissingEnvironment("no C compiler")

    monkeypatch.setattr(compile_cpu, "library", missing)
    report = gate(zoo.bundle("onnxruntime", **MIXED))
    assert report.passed
    assert not any(result.case.endswith("(cpu)") for result in report.tensors)
    assert any(note.startswith(f"{CPU_GRAPH} was not run") for note in report.notes)


def test_an_edit_that_changes_nothing_passes(zoo: Zoo, tmp_path: Path) -> None:
    """The mutants above fail for what is wrong with them, not for having been saved again."""
    assert gate(mutant(zoo, tmp_path / "bundle", "onnxruntime", lambda _: None)).passed


def test_caches_alone_can_fail(zoo: Zoo, tmp_path: Path) -> None:
    """Exchanged groups give the right text; the cache's own comparison shows it."""
    report = gate(mutant(zoo, tmp_path / "bundle", "onnxruntime", exchanged_groups))
    tensors = [result for result in report.tensors if result.case != "far-positions"]
    logits = [result for result in tensors if result.output == "logits"]
    assert all(result.passed for result in logits), "but behind what another group held"
    caches = [result for result in tensors if result.output != "logits"]
    assert not any(result.passed for result in caches)
    assert {result.group for result in caches} == {0, 1}
    assert report.greedy_agreement == 1.0


def test_numbers_that_are_not_finite_are_never_close(zoo: Zoo, tmp_path: Path) -> None:
    edit = weight("lm_head.weight", with_nan)
    report = gate(mutant(zoo, tmp_path / "bundle", "onnxruntime", edit))
    logits = [result for result in report.tensors if result.output == "logits"]
    assert not any(result.passed for result in logits)
    assert all(result.max_error == np.inf for result in logits)
    assert not any(result.passed for result in report.greedy)
    assert report.perplexity is not None
    assert not report.perplexity.passed


def test_a_graph_that_fails_to_run(zoo: Zoo, tmp_path: Path) -> None:
    """What the runtime refuses in the middle of a case is a finding, with its reason."""

    def out_of_range(graph: ir.Graph) -> None:
        node = node_of(graph, 2, "Attention")
        tape = ir.tape.Tape(graph)
        many = tape.op("Constant", [], {"value_int": 1000})
        node.replace_input_with(6, tape.op("Add", [node.inputs[6], many]))
        graph.sort()

    report = gate(mutant(zoo, tmp_path / "bundle", "portable", out_of_range))
    assert not report.passed
    fault = report.faults[0]
    assert "failed to run it" in fault
    assert "layers.2/attn/Attention" in fault
    assert fault in failure(report)
    write_report(report, tmp_path / "report")
    junit = ET.parse(tmp_path / "report" / "parity.xml").getroot()
    assert int(junit.attrib["failures"]) == 1


def test_a_graph_that_cannot_be_opened(zoo: Zoo, tmp_path: Path) -> None:
    def unknown_operator(graph: ir.Graph) -> None:
        node_of(graph, 2, "Attention").op_type = "Attending"

    report = gate(mutant(zoo, tmp_path / "bundle", "portable", unknown_operator))
    assert not report.passed
    assert any("cannot open it" in fault for fault in report.faults)
    write_report(report, tmp_path / "report")
    assert "Attending" in (tmp_path / "report" / "parity.md").read_text()


# What it is asked to compare.


def test_a_path_is_verified_first(zoo: Zoo, tmp_path: Path) -> None:
    folder = shutil.copytree(zoo.bundle(**MIXED).folder, tmp_path / "bundle")
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[5] ^= 1
    (folder / "model.onnx.data").write_bytes(data)
    with pytest.raises(BundleError, match="changed after export"):
        compare_bundle(folder)


def test_the_model_has_moved(zoo: Zoo, tmp_path: Path) -> None:
    source = shutil.copytree(zoo.folder(**MIXED), tmp_path / "moved")
    manifest = {**zoo.bundle(**MIXED).manifest, "source": {"folder": str(tmp_path / "gone")}}
    bundle = replace(zoo.bundle(**MIXED), manifest=manifest)
    with pytest.raises(BundleError, match="--reference") as caught:
        gate(bundle)
    assert str(tmp_path / "gone") in str(caught.value)
    assert gate(bundle, source).passed


def test_another_model(zoo: Zoo, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", kv_owner=(0, 0, 2))
    with pytest.raises(BundleError, match="it is another model"):
        gate(zoo.bundle(**MIXED), other)
    weights = make_checkpoint(tmp_path / "weights", seed=1, **MIXED)
    assert not gate(zoo.bundle(**MIXED), weights).passed


def test_text_that_cannot_be_read(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        compare_bundle(zoo.bundle(**MIXED), text=tmp_path / "gone.txt")
    (tmp_path / "some.txt").write_text("In the beginning")
    with pytest.raises(BadInput, match=r"has no tokenizer\.json"):
        compare_bundle(zoo.bundle(**MIXED), text=tmp_path / "some.txt")


# What it writes.


def test_json_follows_its_schema(zoo: Zoo, tmp_path: Path) -> None:
    schema = json.loads((resources.files("cla_export") / "data/parity.schema.json").read_text())
    assert schema == json_schema(), "python -m cla_export.compare.schema > that file"
    for report in (
        gate(zoo.bundle(**MIXED)),
        gate(mutant(zoo, tmp_path / "bundle", "onnxruntime", weight("lm_head.weight", with_nan))),
    ):
        jsonschema.validate(json.loads(json.dumps(report.to_json(), allow_nan=False)), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**report.to_json(), "seed": "x"}, schema)


def test_junit_has_a_case_for_each_phase_and_group(zoo: Zoo, tmp_path: Path) -> None:
    bad = gate(mutant(zoo, tmp_path / "bundle", "onnxruntime", scale))
    for report in (gate(zoo.bundle(**MIXED)), bad):
        suite = ET.fromstring(to_junit(report))
        cases = {(c.attrib["classname"], c.attrib["name"]): c for c in suite}
        assert len(cases) == len(suite) == int(suite.attrib["tests"])
        for case in {result.case for result in report.tensors}:
            for name in ("group 0 (layers 0, 2)", "group 1 (layers 1)", "logits"):
                assert (f"parity.{case}", name) in cases
        failed = [key for key, case in cases.items() if case.find("failure") is not None]
        assert len(failed) == int(suite.attrib["failures"])
        assert bool(failed) is not report.passed
    assert ("parity.prefill", "logits") in failed
    assert ("parity.layers", "case prefill, step by step") in failed
    assert ("parity.prefill", "group 1 (layers 1)") not in failed, "its cache was written before"
    text = cases["parity.prefill", "logits"].find("failure").text
    assert "layer 1, group 1, attention output" in text
