"""`--module` with attention written by hand: exported, run, and compared over whole rows."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx_ir as ir
import pytest
import spelt_decoder
import torch
from models_zoo import Zoo
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from cla_export import load
from cla_export.bundle import Bundle
from cla_export.compare.files import divergence_sentence, write_report
from cla_export.compare.gate import compare_bundle
from cla_export.compare.reference import Reference
from cla_export.compare.report import ParityReport
from cla_export.errors import BadInput
from cla_export.exporter import export
from cla_export.models.checkpoint import load_model, open_checkpoint
from cla_export.views.parity import render

MODULE = "spelt_decoder:make"
CONFIG = {"vocab_size": 61, "max_position_embeddings": 96, "eos_token_id": 2}
SPELT = "the module spells its attention out, where PyTorch has no keys and values to show"


def save(folder: Path, **config: object) -> Path:
    folder.mkdir()
    torch.manual_seed(0)
    module = spelt_decoder.make({**CONFIG, **config})
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    save_file(module.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


@pytest.fixture(scope="module")
def quick(zoo: Zoo) -> Iterator[None]:
    with patch("cla_export.trace.trace", zoo.trace):
        yield


@pytest.fixture(scope="module")
def bundle(quick: None, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("spelt")
    return export(save(folder / "model"), folder / "bundle", module=MODULE)


@pytest.fixture(scope="module")
def report(bundle: Bundle) -> ParityReport:
    return compare_bundle(bundle, module=MODULE, threads=1)


def test_sharing_is_found(bundle: Bundle) -> None:
    layout = bundle.layout
    assert (layout.kv_owner, layout.kv_heads) == ((0, 0, 2), (1, 1, 4))
    decoder = json.loads((bundle.folder / "genai_config.json").read_text())["model"]["decoder"]
    assert (decoder["num_attention_heads"], decoder["head_size"]) == (4, 8)


def test_parity_is_of_logits_over_whole_rows(report: ParityReport) -> None:
    assert report.passed, (report.faults, report.divergence)
    assert {result.output for result in report.tensors} == {"logits"}
    cases = {case.name for case in report.cases}
    assert {"decode", "ragged-decode", "slot-reuse", "prefix-reuse"} < cases
    assert not any(start for case in report.cases for start in case.starts), "no made-up caches"
    assert max(tokens for case in report.cases for tokens in case.tokens) == 96, "the whole context"
    assert any(note.startswith(f"{SPELT}: ") for note in report.notes)
    assert report.inside is None and report.layer_map is None


def test_its_report_reads_without_caches(report: ParityReport, tmp_path: Path) -> None:
    text = (write_report(report, tmp_path)[2]).read_text()
    assert SPELT in text and "cache.0" not in text
    with Console(width=100, file=(tmp_path / "shown").open("w")) as console:
        render(report, console)
    assert "PASSED" in (tmp_path / "shown").read_text()


def test_a_wrong_graph_fails(bundle: Bundle, tmp_path: Path) -> None:
    """Sharers that ask a little too sharply, and nothing else."""
    copy = shutil.copytree(bundle.folder, tmp_path / "copy")
    for path in copy.glob("*.onnx"):
        graph = ir.load(path)
        (wrong,) = (node for node in graph.graph if node.metadata_props.get("cla.layer") == "1")
        scale = wrong.attributes.get_float("scale")
        assert scale is not None
        wrong.attributes["scale"] = ir.AttrFloat32("scale", scale * 1.001)
        ir.save(graph, path)
    found = compare_bundle(Bundle(copy, bundle.manifest, bundle.layout), module=MODULE, threads=1)
    assert not found.passed
    assert str(divergence_sentence(found)).endswith("no layer was looked into")


def test_what_is_exact_is_float64_throughout(bundle: Bundle) -> None:
    """Its softmax asks for float32, as code for 16-bit weights does."""
    model = load_model(open_checkpoint(bundle.source, MODULE, bundle.layout))
    tokens = np.arange(3, 40)
    wanted = spelt_decoder.make(CONFIG)
    wanted.load_state_dict(load_file(bundle.source / "model.safetensors"))
    wide = {"dtype": torch.float64}
    with patch.object(torch.Tensor, "softmax", lambda x, dim, **_: torch.softmax(x, dim, **wide)):
        expected = wanted.double()(torch.tensor(tokens)[None], torch.arange(len(tokens))[None])
    got, groups = Reference.of(model, None, None).exact.forward(tokens)
    assert np.abs(got - expected[0].detach().numpy()).max() < 1e-12 and groups == []


def test_what_needs_caches_in_pytorch_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="spells its attention out"):
        list(load(bundle, backend="torch", module=MODULE).generate_ids([5, 9], 3))
    with pytest.raises(BadInput, match=f"--debug-dir: {SPELT}"):
        compare_bundle(bundle, module=MODULE, debug_dir=tmp_path / "debug")


def test_generation_is_the_modules(bundle: Bundle) -> None:
    module = spelt_decoder.make(CONFIG).eval()
    module.load_state_dict(load_file(bundle.source / "model.safetensors"))
    tokens = [5, 9, 30]
    with torch.inference_mode():
        for _ in range(12):
            place = torch.arange(len(tokens))[None]
            tokens.append(int(module(torch.tensor([tokens]), place)[0, -1].argmax()))
    made = list(load(bundle).generate_ids([5, 9, 30], 12))
    assert made == tokens[3 : 3 + len(made)]
    assert len(made) == 12 or tokens[3 + len(made)] == 2


def test_one_layer_that_does_call_it(bundle: Bundle, tmp_path: Path) -> None:
    """Beside others that do not, it shows nothing of theirs."""
    checkpoint = open_checkpoint(save(tmp_path / "model", mixed=True), MODULE, bundle.layout)
    assert checkpoint.spec.spelt_attention
    ids = torch.arange(9)[None]
    logits, groups = load_model(checkpoint).forward_with_kv(ids, ids)
    assert logits.shape == (1, 9, 61) and groups == []
