"""Bundles: what is in them, what is noticed when they change, what an early end leaves."""

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from models_zoo import MIXED, Zoo, make_checkpoint
from onnx import numpy_helper
from safetensors.torch import load_file

from cla_export import __version__
from cla_export.bundle import Bundle, open_bundle
from cla_export.errors import BadInput, BundleError, ClaExportError
from cla_export.exporter import export
from cla_export.layout import KVLayout
from cla_export.models import cla

LAYOUT = KVLayout.create((0, 1, 0), 2, 16, 6)
TARGETS = ("onnxruntime", "portable")
NUMPY = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}


@pytest.fixture
def quick(zoo: Zoo) -> Iterator[None]:
    """Exports in this test trace each configuration once."""
    with patch("cla_export.trace.trace", zoo.trace):
        yield


@pytest.fixture
def copy(zoo: Zoo, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return shutil.copytree(zoo.bundle(**MIXED).folder, tmp_path / "bundle")


def arrays(graph_file: Path) -> dict[str, np.ndarray]:
    """Every initialiser of a graph, external ones too."""
    model = onnx.load(graph_file)
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


# What is in a bundle.


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("target", TARGETS)
def test_contents(zoo: Zoo, target: str, dtype: str) -> None:
    folder = zoo.bundle(target, dtype, **MIXED).folder
    names = {path.name for path in folder.iterdir()}
    expected = {"model.onnx", "model.onnx.data", "config.json", "generation_config.json"}
    expected.add("bundle.json")
    if target == "onnxruntime":
        cuda = {"model.cuda.onnx", "model.cuda.plugin.onnx"}
        expected |= {"genai_config.json"} | ({"model.cpu.onnx"} if dtype == "fp32" else cuda)
    assert names == expected
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    source = zoo.folder(**MIXED)
    for name in ("config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("target", TARGETS)
def test_manifest(zoo: Zoo, target: str) -> None:
    folder = zoo.bundle(target, **MIXED).folder
    manifest = json.loads((folder / "bundle.json").read_text())
    assert manifest["schema"] == 1
    assert manifest["cla_export"] == __version__
    assert (manifest["target"], manifest["dtype"]) == (target, "float32")
    assert manifest["limits"] == {"max_positions": 64, "vocab_size": 61}
    assert KVLayout.from_json(manifest["kv_layout"]) == LAYOUT
    for group, entry in zip(LAYOUT.groups, manifest["groups"], strict=True):
        for field in ("index", "owner", "kv_heads", "head_dim", "window"):
            assert entry[field] == getattr(group, field)
        assert entry["layers"] == list(group.layers)
        fused = target == "onnxruntime"
        assert entry["attention"] == ("GroupQueryAttention" if fused else "Attention")
        assert entry["reason"]
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    assert manifest["inputs"] == [value.name for value in model.graph.input]
    assert manifest["outputs"] == [value.name for value in model.graph.output]
    assert {"torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime"} <= set(manifest["tools"])
    source = zoo.folder(**MIXED)
    assert manifest["source"]["folder"] == str(source)
    for name, digest in manifest["source"]["sha256"].items():
        assert digest == hashlib.sha256((source / name).read_bytes()).hexdigest()
    assert set(manifest["source"]["sha256"]) == {"config.json", "model.safetensors"}


def test_every_file_is_hashed(zoo: Zoo) -> None:
    folder = zoo.bundle(**MIXED).folder
    files = json.loads((folder / "bundle.json").read_text())["files"]
    assert set(files) == {path.name for path in folder.iterdir()} - {"bundle.json"}
    for name, entry in files.items():
        data = (folder / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_opened(zoo: Zoo) -> None:
    bundle = open_bundle(zoo.bundle(**MIXED).folder)
    assert isinstance(bundle, Bundle)
    assert bundle.layout == LAYOUT
    assert (bundle.target, bundle.dtype) == ("onnxruntime", "float32")
    assert (bundle.max_positions, bundle.vocab_size) == (64, 61)
    assert bundle.source == zoo.folder(**MIXED)
    assert bundle.graph.is_file()
    assert bundle.config()["kv_owner"] == [0, 1, 0]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", NUMPY)
def test_weights_are_the_checkpoints(zoo: Zoo, target: str, dtype: str) -> None:
    """Converted, each number once, to the dtype of the file; RoPE tables and indices apart."""
    found = arrays(zoo.bundle(target, dtype, **MIXED).graph)
    tensors = load_file(zoo.folder(**MIXED) / "model.safetensors")
    for name, tensor in tensors.items():
        assert found[name].dtype == NUMPY[dtype]
        assert np.array_equal(found[name], tensor.numpy().astype(NUMPY[dtype]))
    spec = zoo.checkpoint(**MIXED).spec
    for name, table in cla.constants(spec).items():
        assert found[name].dtype == np.float32
        assert np.array_equal(found[name], table.numpy())
    rest = set(found) - set(tensors) - set(cla.constants(spec))
    assert all(found[name].dtype.kind in "ib" for name in rest), "only indices and lengths"


def test_weights_of_a_bfloat16_checkpoint_are_held_exactly(
    zoo: Zoo, quick: None, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "model", dtype=torch.bfloat16, **MIXED)
    bundle = export(source, tmp_path / "bundle", dtype="fp32")
    found = arrays(bundle.graph)
    for name, tensor in load_file(source / "model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        assert np.array_equal(found[name], tensor.float().numpy())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", NUMPY)
def test_the_graph_is_valid_onnx(zoo: Zoo, target: str, dtype: str) -> None:
    bundle = zoo.bundle(target, dtype, **MIXED)
    onnx.checker.check_model(bundle.graph)
    model = onnx.load(bundle.graph, load_external_data=False)
    assert model.ir_version <= 13
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    assert opsets.pop("") == 24
    assert opsets == ({"com.microsoft": 1} if target == "onnxruntime" else {})
    assert model.producer_name == "cla-export"
    element = {"fp32": 1, "fp16": 10, "bf16": 16}[dtype]
    for value in (*model.graph.input, *model.graph.output):
        if value.name == "logits" or value.name.endswith((".key", ".value")):
            assert value.type.tensor_type.elem_type == element
    strings = model.SerializeToString().decode("latin-1")
    assert str(Path.cwd()) not in strings, "no paths of the machine that exported it"
    assert str(zoo.folder(**MIXED)) not in strings


def test_the_standard_graph_infers_its_shapes(zoo: Zoo) -> None:
    model = onnx.load(zoo.bundle("portable", **MIXED).graph)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    for value in inferred.graph.output:
        dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        name = "num_logits" if value.name == "logits" else "capacity"
        assert dims == (["batch", name, 61] if value.name == "logits" else ["batch", 2, name, 16])


def test_the_same_export_twice_is_the_same_bytes(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", kv_owner=(0,))
    bundles = [export(source, tmp_path / name) for name in ("a", "b")]
    for name in ("model.onnx", "model.onnx.data", "bundle.json", "genai_config.json"):
        assert (bundles[0].folder / name).read_bytes() == (bundles[1].folder / name).read_bytes()


TEXTS = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "heldout.txt": "In the beginning",
}


def test_what_belongs_to_the_model_comes_along(zoo: Zoo, quick: None, tmp_path: Path) -> None:
    source = shutil.copytree(zoo.folder(**MIXED), tmp_path / "model")
    for name, text in TEXTS.items():
        (source / name).write_text(text)
    (source / "optimizer.pt").write_text("not needed")
    bundle = export(source, tmp_path / "deep" / "er" / "bundle")
    names = {path.name for path in bundle.folder.iterdir()}
    assert set(TEXTS) <= names
    assert "optimizer.pt" not in names
    assert "model.safetensors" not in names
    assert set(TEXTS) <= set(json.loads((bundle.folder / "bundle.json").read_text())["files"])


def test_progress_is_told_in_order(zoo: Zoo, quick: None, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    export(zoo.folder(**MIXED), tmp_path / "bundle", progress=lambda *args: told.append(args))
    stages = list(dict.fromkeys(what for what, _, _ in told))
    assert stages[:6] == ["read the model folder", "trace", "rewrite", "lower", "write", "weights"]
    assert "sha256 model.onnx.data" in stages
    for what, done, of in told:
        assert 0 <= done <= of, what
    assert told[-1][1] == told[-1][2]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"target": "tflite"}, ["target is 'tflite'", "onnxruntime", "portable"]),
        ({"dtype": "int4"}, ["dtype is 'int4'", "fp32, fp16, bf16"]),
    ],
)
def test_an_option_that_is_not_known(
    zoo: Zoo, tmp_path: Path, options: dict[str, str], parts: list[str]
) -> None:
    with pytest.raises(BadInput) as caught:
        export(zoo.folder(**MIXED), tmp_path / "bundle", **options)
    assert all(part in str(caught.value) for part in parts)
    assert not any(tmp_path.iterdir())


# Where it may be written.


def test_a_destination_that_exists(zoo: Zoo, quick: None, tmp_path: Path) -> None:
    dest = tmp_path / "bundle"
    dest.mkdir()
    with pytest.raises(BundleError, match="exists already") as caught:
        export(zoo.folder(**MIXED), dest)
    assert str(dest) in str(caught.value)
    assert "--force" in str(caught.value)
    assert list(tmp_path.iterdir()) == [dest]
    export(zoo.folder(**MIXED), dest, force=True)  # an empty folder may be taken
    assert open_bundle(dest).target == "onnxruntime"


def test_force_replaces_a_bundle(zoo: Zoo, quick: None, copy: Path, tmp_path: Path) -> None:
    (copy / "model.onnx").write_bytes(b"an old one")
    (copy / "engines").mkdir()
    with pytest.raises(BundleError, match="exists already"):
        export(zoo.folder(**MIXED), copy)
    assert (copy / "model.onnx").read_bytes() == b"an old one"
    export(zoo.folder(**MIXED), copy, target="portable", force=True)
    assert open_bundle(copy).target == "portable"
    assert not (copy / "engines").exists()
    assert list(tmp_path.iterdir()) == [copy]


@pytest.mark.parametrize("content", ["folder", "file"])
def test_force_replaces_nothing_else(zoo: Zoo, tmp_path: Path, content: str) -> None:
    dest = tmp_path / "precious"
    kept = dest
    if content == "folder":
        dest.mkdir()
        kept = dest / "thesis.tex"
    kept.write_text("years of work")
    with pytest.raises(BundleError, match="is not a bundle") as caught:
        export(zoo.folder(**MIXED), dest, force=True)
    assert str(dest) in str(caught.value)
    assert kept.read_text() == "years of work"
    assert list(tmp_path.iterdir()) == [dest]


def test_a_destination_under_a_file(zoo: Zoo, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot be written"):
        export(zoo.folder(**MIXED), tmp_path / "file" / "bundle")


def test_a_disk_that_cannot_hold_it(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1234))
    with pytest.raises(BundleError, match=r"needs [0-9,]+ bytes.* 1,234") as caught:
        export(zoo.folder(**MIXED), tmp_path / "bundle")
    assert caught.value.exit_code == 2
    assert not any(tmp_path.iterdir())


# What changed after export is noticed.


@pytest.mark.parametrize(
    "name", ["model.onnx", "model.onnx.data", "config.json", "genai_config.json"]
)
def test_a_changed_file(copy: Path, name: str) -> None:
    path = copy / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert open_bundle(copy, verify=False)  # one bit shows in the hash alone
    with pytest.raises(BundleError, match="changed after export") as caught:
        open_bundle(copy)
    assert str(path) in str(caught.value)
    path.write_bytes(data[:-3])
    with pytest.raises(BundleError, match="changed or truncated") as caught:
        open_bundle(copy, verify=False)
    assert str(path) in str(caught.value)
    path.unlink()
    with pytest.raises(BundleError, match="missing from the bundle") as caught:
        open_bundle(copy, verify=False)
    assert str(path) in str(caught.value)


def test_a_changed_tokenizer(zoo: Zoo, quick: None, tmp_path: Path) -> None:
    source = shutil.copytree(zoo.folder(**MIXED), tmp_path / "model")
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    bundle = export(source, tmp_path / "bundle")
    (bundle.folder / "tokenizer.json").write_text('{"version": "1.1"}')
    with pytest.raises(BundleError, match=r"tokenizer\.json: changed after export"):
        open_bundle(bundle.folder)


def without(*keys: str):
    def edit(manifest: dict) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        del manifest[keys[-1]]

    return edit


DAMAGES = {
    "no schema": without("schema"),
    "no layout": without("kv_layout"),
    "layout lacks a field": without("kv_layout", "window"),
    "layout is illegal": lambda m: m["kv_layout"].update(kv_owner=[0, 1, 9]),
    "no files": without("files"),
    "files is a list": lambda m: m.update(files=["model.onnx"]),
    "a file without a hash": without("files", "model.onnx", "sha256"),
    "a file without a size": without("files", "model.onnx", "bytes"),
    "the graph is not listed": without("files", "model.onnx"),
    "no target": without("target"),
    "no dtype": without("dtype"),
    "no limits": without("limits"),
    "no vocabulary": without("limits", "vocab_size"),
    "no source": without("source"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest(copy: Path, damage: str) -> None:
    path = copy / "bundle.json"
    manifest = json.loads(path.read_text())
    DAMAGES[damage](manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="damaged") as caught:
        open_bundle(copy)
    assert str(path) in str(caught.value)
    assert "export again" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '"bundle"'])
def test_a_manifest_that_is_none(copy: Path, text: str) -> None:
    (copy / "bundle.json").write_text(text)
    with pytest.raises(BundleError, match="damaged"):
        open_bundle(copy)


def test_a_manifest_of_a_later_version(copy: Path) -> None:
    path = copy / "bundle.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({"schema": 2, "something": "else"}))
    with pytest.raises(BundleError, match="schema 2; this version of cla-export reads 1"):
        open_bundle(copy)
    assert manifest["schema"] == 1


def test_a_folder_that_is_no_bundle(zoo: Zoo, tmp_path: Path) -> None:
    for folder, kind in (
        (zoo.folder(**MIXED), "a model folder"),
        (tmp_path, "not a bundle"),
        (tmp_path / "gone", "not a folder"),
    ):
        with pytest.raises(BundleError, match=f"{folder}: {kind}; expected"):
            open_bundle(folder)


# A run that ends early leaves nothing behind.

STAGES = (
    "read the model folder",
    "trace",
    "rewrite",
    "lower",
    "write",
    "weights",
    "sha256 config.json",
    "sha256 model.onnx.data",
)


class Stopped(KeyboardInterrupt):
    """Ctrl-C, at a moment of our choosing."""


@pytest.mark.parametrize("existing", [False, True], ids=["new", "force"])
@pytest.mark.parametrize("stage", STAGES)
def test_interrupted(zoo: Zoo, quick: None, tmp_path: Path, stage: str, existing: bool) -> None:
    dest = tmp_path / "bundle"
    if existing:
        shutil.copytree(zoo.bundle(**MIXED).folder, dest)

    def progress(what: str, done: int, of: int) -> None:
        if what == stage and (done or of <= len(STAGES)):
            raise Stopped

    with pytest.raises(Stopped):
        export(zoo.folder(**MIXED), dest, target="portable", force=existing, progress=progress)
    if existing:
        assert list(tmp_path.iterdir()) == [dest]
        assert open_bundle(dest).target == "onnxruntime", "the old bundle, whole"
    else:
        assert not any(tmp_path.iterdir())


def test_interrupted_between_the_two_renames(
    zoo: Zoo, quick: None, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old bundle is out of the way, the new one not yet in place: the old one comes back."""
    rename = Path.rename

    def stop(self: Path, target: Path) -> Path:
        if ".partial-" in self.name and Path(target) == copy:
            raise Stopped
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(Stopped):
        export(zoo.folder(**MIXED), copy, target="portable", force=True)
    assert list(tmp_path.iterdir()) == [copy]
    assert open_bundle(copy).target == "onnxruntime"


def test_an_error_of_the_graph_leaves_nothing(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cla_export.trace.trace", lambda *_: (_ for _ in ()).throw(ClaExportError("no"))
    )
    with pytest.raises(ClaExportError, match="no"):
        export(zoo.folder(**MIXED), tmp_path / "bundle")
    assert not any(tmp_path.iterdir())


def test_a_full_disk(
    zoo: Zoo, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("cla_export.exporter.write_manifest", full)
    with pytest.raises(
        BundleError, match=r"the disk is full \(No space left on device\)"
    ) as caught:
        export(zoo.folder(**MIXED), tmp_path / "bundle")
    assert caught.value.exit_code == 2
    assert "nothing was left behind" in str(caught.value)
    assert not any(tmp_path.iterdir())


def command(source: Path, dest: Path) -> list[str]:
    program = "import sys; from cla_export.cli import main; sys.exit(main())"
    return [sys.executable, "-c", program, "export", str(source), str(dest)]


def test_a_file_size_limit(zoo: Zoo, tmp_path: Path) -> None:
    """A process of its own that may write no file over 8 KiB; the weights take more."""
    source = zoo.folder(kv_owner=(0,))
    done = subprocess.run(
        command(source, tmp_path / "bundle"),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)),
    )
    assert done.returncode == 2, done.stderr
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_told_to_stop(zoo: Zoo, tmp_path: Path, number: int) -> None:
    source = zoo.folder(kv_owner=(0,))
    with subprocess.Popen(
        command(source, tmp_path / "bundle"),
        stderr=subprocess.PIPE,
        text=True,
        # a background shell ignores SIGINT, and so would the child
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    ) as child:
        for _ in range(600):
            if any(tmp_path.glob(".bundle.partial-*")):
                break
            time.sleep(0.1)
        child.send_signal(number)
        _, errors = child.communicate(timeout=60)
    assert child.returncode not in (0, None), errors
    assert "Traceback" not in errors
    assert not any(tmp_path.iterdir())
