"""`--module`: a module of the user's own goes the whole way, and what is wrong with it is said."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx_ir as ir
import own_decoder
import pytest
import torch
from models_zoo import OWN, OWN_MODULE, OWN_STATED, Zoo, save_own
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cla_export import cli, inspect, load
from cla_export.bundle import Bundle, open_bundle
from cla_export.compare import reference
from cla_export.compare.gate import compare_bundle
from cla_export.compare.reading import read_bundle
from cla_export.compare.reference import Reference
from cla_export.errors import BadInput, BundleError, ClaExportError, GraphError
from cla_export.exporter import export
from cla_export.layout import KVLayout
from cla_export.models.checkpoint import load_model, open_checkpoint

LAYOUT = KVLayout.create([0, 1, 1, 0], 1, 16, [None, 6, 6, None])
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_own(tmp_path / "model", OWN_STATED)


@pytest.fixture(scope="module")
def quick(zoo: Zoo) -> Iterator[None]:
    with patch("cla_export.trace.trace", zoo.trace):
        yield


@pytest.fixture(scope="module")
def bundle(quick: None, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of a config that states no layout."""
    folder = tmp_path_factory.mktemp("own")
    return export(save_own(folder / "model", OWN), folder / "bundle", module=OWN_MODULE)


def message(error: pytest.ExceptionInfo[ClaExportError]) -> str:
    return str(error.value)


# The whole way.


def test_sharing_is_discovered_and_remembered(bundle: Bundle) -> None:
    assert bundle.layout == LAYOUT
    assert bundle.module == open_bundle(bundle.folder).module == OWN_MODULE
    genai = json.loads((bundle.folder / "genai_config.json").read_text())["model"]
    assert genai["vocab_size"] == 61 and genai["context_length"] == 64
    decoder = genai["decoder"]
    assert (decoder["hidden_size"], decoder["num_attention_heads"]) == (32, 4)
    assert (decoder["head_size"], decoder["num_hidden_layers"]) == (16, 2)
    held = {v.name for v in ir.load(bundle.graph).graph.initializers.values()}
    assert {"gain", "cos", "sin", "asks.3.weight", "norms.0"} <= held


def test_parity(bundle: Bundle) -> None:
    report = compare_bundle(bundle, module=OWN_MODULE)
    failed = [(r.case, r.output, r.max_error, r.tolerance) for r in report.tensors if not r.passed]
    assert report.passed, (report.faults, failed, report.divergence)


def test_both_backends_generate_what_the_module_does(bundle: Bundle) -> None:
    module = own_decoder.make(OWN).eval()
    weights = load_file(bundle.source / WEIGHTS)
    module.load_state_dict({**weights, "head.weight": weights["words.weight"]})
    tokens = [5, 9, 30]
    with torch.inference_mode():
        for _ in range(12):
            place = torch.arange(len(tokens))[None]
            tokens.append(int(module(torch.tensor([tokens]), place)[0, -1].argmax()))
    for options in ({}, {"backend": "torch", "module": OWN_MODULE}):
        model = load(bundle, **options)
        made = list(model.generate_ids([5, 9, 30], 12))
        assert made == tokens[3 : 3 + len(made)]
        assert len(made) == 12 or tokens[3 + len(made)] == 2


def test_onnxruntime_genai_opens_it(bundle: Bundle) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    model = og.Model(str(bundle.folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=15)
    generator = og.Generator(model, parameters)
    generator.append_tokens([5, 9, 30])
    while not generator.is_done():
        generator.generate_next_token()
    expected = list(load(bundle).generate_ids([5, 9, 30], 12))
    assert generator.get_sequence(0).tolist()[3:] == expected


def test_a_large_module_is_widened_as_it_runs(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its norms are a list of parameters, which no module of their own reads."""
    model = load_model(open_checkpoint(bundle.source, OWN_MODULE, LAYOUT))
    tokens = np.arange(3, 20)
    whole = Reference.of(model, None, None).exact.forward(tokens)
    monkeypatch.setattr(reference, "_SMALL", 0)
    logits, groups = Reference.of(model, None, None).exact.forward(tokens)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert np.abs(logits - whole[0]).max() < 1e-12
    for pair, other in zip(groups, whole[1], strict=True):
        assert all(np.abs(a - b).max() < 1e-12 for a, b in zip(pair, other, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"target": "portable", "dtype": "fp16"},
        {"target": "tensorrt", "dtype": "fp16"},
        {"target": "tensorrt-rtx", "dtype": "fp16", "attention": "plugin"},
        {"dtype": "fp16"},
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_every_target(quick: None, tmp_path: Path, options: dict[str, str]) -> None:
    """With tables too large for the graph's own file, as all are somewhere below 2 GB."""
    folder = save_own(tmp_path / "model", {**OWN_STATED, "max_position_embeddings": 20_000})
    made = export(folder, tmp_path / "bundle", module=OWN_MODULE, **options)
    graphs = list(made.folder.glob("*.onnx"))
    assert len(graphs) == (3 if "target" not in options else 1)
    assert all(graph.stat().st_size < 50_000 for graph in graphs)
    assert (made.folder / "model.onnx.data").stat().st_size > 2 * 20_000 * 8 * 4
    assert made.layout == LAYOUT, "stated, and found in the graph"
    assert inspect(made.folder).ok
    caches = [i.name for i in ir.load(made.graph).graph.inputs if "past" in str(i.name)]
    assert len(caches) == 4


def test_a_quantised_head_that_is_tied(quick: None, folder: Path, tmp_path: Path) -> None:
    """The embedding stays as it is, so its packed form has the head's name."""
    made = export(folder, tmp_path / "bundle", module=OWN_MODULE, quantize="int4")
    held = ir.load(made.graph).graph.initializers
    assert {"words.weight", "head.weight.packed"} <= set(held)
    reading = read_bundle(made, load_model(open_checkpoint(folder, OWN_MODULE)))
    assert reading.faults == []
    linears = {f"{n}.{i}.weight" for n in ("asks", "outs") for i in range(4)}
    assert set(reading.quantized) == {*linears, "tells.0.weight", "tells.1.weight", "head.weight"}


def test_a_norm_with_another_epsilon_is_noticed(bundle: Bundle, tmp_path: Path) -> None:
    model = load_model(open_checkpoint(bundle.source, OWN_MODULE, LAYOUT))
    assert read_bundle(bundle, model).faults == []
    copy = shutil.copytree(bundle.folder, tmp_path / "copy")
    graph = ir.load(copy / "model.onnx")
    norm = next(node for node in graph.graph if node.op_type == "RMSNormalization")
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-5)
    ir.save(graph, copy / "model.onnx")
    faults = read_bundle(Bundle(copy, bundle.manifest, bundle.layout), model).faults
    assert faults == [f"{norm.name}: epsilon is 1e-05; expected 3e-06"]


def test_inspect(bundle: Bundle, folder: Path) -> None:
    found = inspect(bundle.folder)
    assert found.ok and found.layout == LAYOUT
    assert f"pass --module {OWN_MODULE}" in found.notes[0]
    known = inspect(bundle.folder, module=OWN_MODULE)
    assert known.ok and known.own.parameters == sum(
        tensor.numel() for tensor in load_file(bundle.source / WEIGHTS).values()
    )
    assert inspect(folder, module=OWN_MODULE).layout == LAYOUT


def test_the_commands(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """Code in the current folder is found, behind all that is installed."""
    shutil.copy(own_decoder.__file__, tmp_path / "code_of_mine.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*arguments: object) -> str:
        done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, (done.output, done.exception)
        return done.output

    weights = load_file(folder / WEIGHTS)
    mixed = {n: w if n.startswith("norms") else w.bfloat16() for n, w in weights.items()}
    save_file({**mixed, "rotary_emb.inv_freq": torch.ones(8)}, folder / WEIGHTS)
    named = ("--module", "code_of_mine:make")
    told = run("export", folder, "out", *named)
    assert "4 layers in 2 groups" in told
    assert "ignored, since no weights of this model: rotary_emb.inv_freq" in told
    assert "stored as BF16 (18 tensors) and F32 (4 tensors)" in told
    assert sys.path[-1] == str(tmp_path)
    assert "PASSED" in run("parity", "out", *named)
    few = ("--batch", 1, "--context", 8, "--steps", 1, "--phase", "decode")
    assert "decode" in run("bench", "out", "--backend", "torch", *few, *named)
    assert "parameters" in run("inspect", folder, *named)


# What the user names is imported, and nothing else is.


def test_parity_says_what_to_pass(bundle: Bundle) -> None:
    with pytest.raises(BundleError) as caught:
        compare_bundle(bundle)
    assert message(caught) == (
        f"{bundle.folder}: exported with --module {OWN_MODULE}, code that is imported only where "
        f"you name it: pass --module {OWN_MODULE} here too"
    )
    with pytest.raises(BundleError, match=f"pass --module {OWN_MODULE} here too"):
        load(bundle, backend="torch")


def test_a_bundle_that_no_module_made(zoo: Zoo) -> None:
    plain = zoo.bundle(kv_owner=(0, 0))
    with pytest.raises(BundleError) as caught:
        compare_bundle(plain, module=OWN_MODULE)
    assert message(caught) == (
        f"{plain.folder}: exported without --module, so {OWN_MODULE} did not make its model; leave "
        "it out"
    )


def test_nothing_of_the_model_folder_is_imported(folder: Path, tmp_path: Path) -> None:
    config = {**OWN_STATED, "model_type": "own", "auto_map": {"AutoModel": "modeling_own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    trap = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    for name in ("modeling_own.py", "own_decoder.py", "torch.py", "__init__.py", "setup.py"):
        (folder / name).write_text(trap)
    checkpoint = open_checkpoint(folder, OWN_MODULE)
    load_model(checkpoint)
    assert checkpoint.spec.model_type == "own"
    assert not (tmp_path / "ran").exists()
    with pytest.raises(BadInput) as caught:
        open_checkpoint(folder)
    assert "its auto_map names code of the checkpoint, which is never run" in message(caught)
    assert "--module package.module:factory names a function of yours" in message(caught)
    assert not (tmp_path / "ran").exists()


# What can be wrong with it.

TRIED = "input_ids and position_ids [2, 5]"
WRONG = {
    "own_decoder": "--module is 'own_decoder'; expected package.module:factory, such as "
    "my_code.model:make",
    "../own_decoder:make": "--module is '../own_decoder:make'; expected package.module:factory, "
    "such as my_code.model:make",
    "nowhere.to_be:found": "--module nowhere.to_be:found: nowhere.to_be cannot be imported "
    "(ModuleNotFoundError: No module named 'nowhere'); it has to be installed, in the current "
    "folder, or on PYTHONPATH",
    "own_decoder:mak": "--module own_decoder:mak: mak is not there in own_decoder; expected a "
    "function factory(config: dict) -> torch.nn.Module",
    "own_decoder:not_a_function": "--module own_decoder:not_a_function: not_a_function is no "
    "function in own_decoder; expected a function factory(config: dict) -> torch.nn.Module",
    "own_decoder:fails": "--module own_decoder:fails: the factory failed on config.json "
    "(KeyError: 'depth')",
    "own_decoder:no_module": "--module own_decoder:no_module: the factory returned a dict; "
    "expected a torch.nn.Module",
    "own_decoder:other_arguments": "--module own_decoder:other_arguments: forward of Tokens takes "
    "(tokens); expected forward(input_ids, position_ids) -> logits, by these names",
    "own_decoder:last_logits": "--module own_decoder:last_logits: forward of Short returned (2, "
    "61) for input_ids [2, 5]; expected logits [2, 5, 61], vocab_size of config.json last",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_module_that_does_not_fit(folder: Path, name: str) -> None:
    with pytest.raises(BadInput) as caught:
        open_checkpoint(folder, name)
    assert message(caught) == WRONG[name]


def test_a_module_without_attention(folder: Path) -> None:
    with pytest.raises(GraphError, match="the graph has no attention"):
        open_checkpoint(folder, "own_decoder:no_attention")


def test_a_forward_that_depends_on_values(folder: Path) -> None:
    with pytest.raises(BadInput) as caught:
        open_checkpoint(folder, "own_decoder:by_values")
    assert message(caught).startswith(
        f"--module own_decoder:by_values: forward of Loud failed on {TRIED} (DataDependentOutput"
    )
    assert message(caught).endswith("may depend on shapes, and not on values, as for torch.export")


def test_a_module_that_cannot_be_imported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_written.py").write_text("def make(config:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BadInput, match=r"half_written cannot be imported \(SyntaxError: "):
        open_checkpoint(folder, "half_written:make")


def test_a_key_that_it_needs(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"vocab_size": 61}))
    with pytest.raises(BadInput, match="key 'max_position_embeddings' is missing"):
        open_checkpoint(folder, OWN_MODULE)


def test_names_that_are_not_the_checkpoints(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    renamed = {re.sub(r"^asks\.(\d)", r"q.\1", name): w for name, w in weights.items()}
    save_file({**renamed, "rotary_emb.inv_freq": torch.ones(8)}, folder / WEIGHTS)
    with pytest.raises(BadInput) as caught:
        open_checkpoint(folder, OWN_MODULE)
    parts = [f"{i}.{part}" for i in range(4) for part in ("weight", "bias")]
    lines = message(caught).splitlines()
    assert lines[0] == f"{folder}: 16 of its tensors are not what config.json describes"
    assert lines[1:9] == [f"  weight asks.{part} is missing" for part in parts]
    assert lines[9:] == [
        "  and 8 more like these",
        "    the module's parameters and persistent buffers, and the checkpoint's tensors, must "
        "have the same names",
        "  ignored, since no weights of this model: rotary_emb.inv_freq",
    ]


def test_a_tied_head_under_either_name_or_both(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    words = weights.pop("words.weight")
    expected = load_model(open_checkpoint(folder, OWN_MODULE, LAYOUT)).words.weight
    for stored in ({"head.weight": words}, {"head.weight": words, "words.weight": words.clone()}):
        save_file({**weights, **stored}, folder / WEIGHTS)
        model = load_model(open_checkpoint(folder, OWN_MODULE, LAYOUT))
        assert model.head.weight is model.words.weight
        assert torch.equal(model.words.weight, expected)
    save_file({**weights, "head.weight": words, "words.weight": words + 1}, folder / WEIGHTS)
    with pytest.raises(BadInput) as caught:
        open_checkpoint(folder, OWN_MODULE, LAYOUT)
    assert message(caught) == (
        f"{folder}: tied weight head.weight differs from words.weight; remove head.weight, or make "
        "the model untie it"
    )
    assert len(open_checkpoint(folder, "own_decoder:untied", LAYOUT).tensors) == 23


def test_a_layout_that_the_graph_contradicts(quick: None, folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**OWN_STATED, "kv_owner": [0, 1, 1, 1]}))
    with pytest.raises(BadInput, match="layer 3: kv_owner is 1, but their window differ"):
        export(folder, tmp_path / "bundle", module=OWN_MODULE)
    (folder / "config.json").write_text(json.dumps({**OWN_STATED, "kv_owner": [0, 1, 2, 0]}))
    with pytest.raises(
        GraphError, match=r"layer 2, .*: the graph says owner 1, the config promises 2"
    ):
        export(folder, tmp_path / "bundle", module=OWN_MODULE)
    assert not (tmp_path / "bundle").exists()


def test_a_module_that_is_not_as_it_was(folder: Path) -> None:
    """A bundle's layout is given to the module; a run over caches would believe it."""
    other = KVLayout.create([0, 1, 1, 3], 1, 16, [None, 6, 6, None])
    wrong = KVLayout.create([0, 0, 0, 0], 1, 16)
    ids = torch.arange(7)[None]
    model = load_model(open_checkpoint(folder, OWN_MODULE, wrong))
    with pytest.raises(
        GraphError, match="layer 1: it attends to keys that are not those of layer 0"
    ):
        model.forward_with_kv(ids, ids)
    model = load_model(open_checkpoint(folder, OWN_MODULE, KVLayout.create([0, 0, 0], 1, 16)))
    with pytest.raises(GraphError, match="attention 4 times; its KV layout has 3 layers"):
        model.forward_with_kv(ids, ids)
    model = load_model(open_checkpoint(folder, OWN_MODULE, other))
    logits = model.forward_with_kv(ids, ids)[0]
    right = load_model(open_checkpoint(folder, OWN_MODULE))
    assert np.array_equal(logits.detach(), right(ids, ids).detach()), "sharing less is no error"


def test_a_tensor_that_is_no_buffer(quick: None, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"register_buffer\(name, tensor, persistent=False\)"):
        export(folder, tmp_path / "bundle", module="own_decoder:loose")
