"""Other people's tools open what is written: onnx, polygraphy, tokenizers, transformers."""

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from models_zoo import MIXED, Zoo
from tokenizers import Tokenizer

from cla_export import demo_checkpoint
from cla_export.bundle import Bundle
from cla_export.exporter import export

GRAPHS = [
    ("onnxruntime", "model.onnx"),
    ("onnxruntime", "model.cpu.onnx"),
    ("portable", "model.onnx"),
]


@pytest.fixture(params=GRAPHS, ids="/".join)
def graph(zoo: Zoo, request: pytest.FixtureRequest) -> Path:
    target, name = request.param
    return zoo.bundle(target, **MIXED).folder / name


def test_onnx_checks_it_in_full(graph: Path) -> None:
    """Types and shapes of all values too; weights lie beside the graph."""
    held = onnx.load(graph, load_external_data=False).graph.initializer
    assert any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in held)
    onnx.checker.check_model(str(graph), full_check=True)


def test_polygraphy_inspects_it(graph: Path) -> None:
    polygraphy = Path(sys.executable).with_name("polygraphy")
    command = [str(polygraphy), "inspect", "model", str(graph), "--show", "layers"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("past_key_values.0.key", "present.1.value", "logits"):
        assert f"{name} [dtype=float32" in done.stdout
    assert "past_key_values.2" not in done.stdout


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(demo_checkpoint(), tmp_path_factory.mktemp("demo") / "bundle", target="portable")


def test_tokenizers_read_from_the_bundle(bundle: Bundle) -> None:
    text = "In the beginning"
    expected = Tokenizer.from_file(str(demo_checkpoint() / "tokenizer.json")).encode(text).ids
    assert Tokenizer.from_file(str(bundle.folder / "tokenizer.json")).encode(text).ids == expected
    transformers = pytest.importorskip("transformers")
    read = transformers.AutoTokenizer.from_pretrained(bundle.folder)
    assert read(text).input_ids == expected
    assert read.decode(expected) == text
