"""Bundles that read the checkpoint's own files: what is linked, what is not, who opens them."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from models_zoo import MIXED, Zoo, make_checkpoint, tokens_of
from safetensors.torch import load_file, save_file

import cla_export
from cla_export import linked_weights
from cla_export.bundle import Bundle, open_bundle
from cla_export.engines.onnxruntime import OnnxRuntimeExecutor
from cla_export.errors import BadInput, BundleError
from cla_export.exporter import export

STORED = "model.safetensors"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def quick(zoo: Zoo) -> Iterator[None]:
    with patch("cla_export.trace.trace", zoo.trace):
        yield


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A folder on another file system."""
    folder = Path("/dev/shm") / f"cla-export-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def weights_of(bundle: Bundle, name: str = "model.onnx") -> dict[str, np.ndarray]:
    model = linked_weights.read_in_place(ir.load(bundle.folder / name), bundle.folder)
    values = model.graph.initializers.items()
    return {name: value.const_value.numpy() for name, value in values if value.const_value}


def written(bundle: Bundle) -> int:
    """Bytes of weights that the bundle has for itself."""
    return (bundle.folder / "model.onnx.data").stat().st_size


@pytest.mark.parametrize(
    ("target", "dtype"),
    [("onnxruntime", "fp32"), ("onnxruntime", "bf16"), ("portable", "fp16"), ("tensorrt", "fp16")],
)
def test_a_bundle_of_the_same_dtype_writes_no_weights(
    tmp_path: Path, target: str, dtype: str
) -> None:
    source = make_checkpoint(tmp_path / "model", dtype=DTYPES[dtype], **MIXED)
    options = {"target": target, "dtype": dtype}
    linked = export(source, tmp_path / "linked", weights="link", **options)
    copied = export(source, tmp_path / "copied", weights="copy", **options)
    assert (linked.linked, copied.linked) == ([STORED], [])
    assert (linked.folder / STORED).read_bytes() == (source / STORED).read_bytes()
    tables = sum(a.nbytes for name, a in weights_of(copied).items() if "rope" in name)
    assert written(linked) == tables  # what the checkpoint does not hold
    for graph in linked.folder.glob("*.onnx"):
        ours, theirs = weights_of(linked, graph.name), weights_of(copied, graph.name)
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            assert array.dtype == theirs[name].dtype
            assert array.tobytes() == theirs[name].tobytes(), name


def test_it_runs_and_is_proven_as_any_other(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", **MIXED)
    bundles = [export(source, tmp_path / how, weights=how) for how in ("link", "copy")]
    prompt = tokens_of(9)
    for stock in (False, True):
        logits = [
            OnnxRuntimeExecutor(bundle, capacity=16, stock=stock).prefill(0, prompt, 0, 9)
            for bundle in bundles
        ]
        assert np.array_equal(*logits)
    assert cla_export.parity(tmp_path / "link").passed


def test_parity_sees_a_changed_weight_of_a_linked_file(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", **MIXED)
    export(source, tmp_path / "bundle", weights="link")
    tensors = load_file(source / STORED)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] += 0.5
    save_file(tensors, source / "other.safetensors")
    reference = shutil.copytree(source, tmp_path / "other")
    (reference / STORED).unlink()
    (reference / "other.safetensors").rename(reference / STORED)
    assert not cla_export.parity(tmp_path / "bundle", reference).passed


def test_shards_and_links_to_them(tmp_path: Path) -> None:
    whole = make_checkpoint(tmp_path / "whole", **MIXED)
    source = shutil.copytree(whole, tmp_path / "model")
    tensors = load_file(source / STORED)
    (source / STORED).unlink()
    (tmp_path / "blobs").mkdir()
    names = sorted(tensors)
    weight_map = {}
    for number in (1, 2):
        shard = f"model-{number:05}-of-00002.safetensors"
        part = {name: tensors[name] for name in names[number - 1 :: 2]}
        save_file(part, tmp_path / "blobs" / f"blob{number}")  # as a cache of downloads has it
        (source / shard).symlink_to(f"../blobs/blob{number}")
        weight_map |= dict.fromkeys(part, shard)
    (source / f"{STORED}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    bundle = export(source, tmp_path / "bundle", weights="link")
    assert bundle.linked == sorted(set(weight_map.values()))
    assert not any(path.is_symlink() for path in bundle.folder.iterdir())
    ours = weights_of(bundle)
    for name, array in weights_of(export(whole, tmp_path / "copy")).items():
        assert np.array_equal(ours[name], array)
    onnxruntime.InferenceSession(bundle.graph)


def test_what_has_another_dtype_is_converted(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", dtype=torch.bfloat16, **MIXED)
    tensors = load_file(source / STORED)
    norm = "model.norm.weight"
    large = "model.layers.0.self_attn.k_proj.weight"
    save_file(tensors | {n: tensors[n].float() for n in (norm, large)}, source / STORED)
    bundle = export(source, tmp_path / "bundle", dtype="bf16", weights="link")
    assert bundle.linked == [STORED]
    found = weights_of(bundle)
    for name in (norm, large):
        assert np.array_equal(found[name].astype(np.float32), tensors[name].float().numpy())
    with pytest.raises(BadInput, match=r"bfloat16 for the most part .* would be float32"):
        export(source, tmp_path / "wide", weights="link")
    assert export(source, tmp_path / "wide", weights="auto").linked == []


def test_auto_links_large_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_checkpoint(tmp_path / "model", **MIXED)
    size = (source / STORED).stat().st_size
    monkeypatch.setattr(linked_weights, "SMALL_FILE", size + 1)
    assert export(source, tmp_path / "small").linked == []
    monkeypatch.setattr(linked_weights, "SMALL_FILE", size)
    assert export(source, tmp_path / "large").linked == [STORED]
    assert export(source, tmp_path / "other", dtype="fp16").linked == []
    assert export(source, tmp_path / "int8", quantize="int8").linked == []


def test_another_file_system(
    tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint(tmp_path / "model", **MIXED)
    with pytest.raises(BadInput, match=r"cannot be linked into .*cross-device") as caught:
        export(source, elsewhere / "linked", weights="link")
    assert str(source / STORED) in str(caught.value)
    assert not any(elsewhere.iterdir())
    monkeypatch.setattr(linked_weights, "SMALL_FILE", 0)
    bundle = export(source, elsewhere / "copied")
    assert bundle.linked == []
    assert written(bundle) > (source / STORED).stat().st_size // 2
    needs = pytest.raises(BundleError, match=r"needs [0-9,]+ bytes, 7 are free")
    with patch("cla_export.bundle.shutil.disk_usage") as usage, needs:
        usage.return_value.free = 7
        export(source, elsewhere / "full")


def test_a_checkpoint_that_changes_afterwards(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", **MIXED)
    bundle = export(source, tmp_path / "bundle", weights="link")
    tensors = load_file(source / STORED)
    replaced = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(replaced, source / "new")
    (source / "new").replace(source / STORED)  # as downloads are: the bundle keeps what it has
    assert open_bundle(bundle.folder)
    data = bytearray((bundle.folder / STORED).read_bytes())
    data[-1] ^= 1
    (bundle.folder / STORED).write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.safetensors: changed after export"):
        open_bundle(bundle.folder)


def test_no_file_outside_of_the_bundle_is_read(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", **MIXED)
    bundle = export(source, tmp_path / "bundle", weights="link")
    model = ir.load(bundle.graph)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            old = value.const_value
            value.const_value = ir.ExternalTensor(
                "../model/model.safetensors", old.offset, old.length, old.dtype,
                shape=old.shape, name=old.name,
            )  # fmt: skip
    with pytest.raises(BundleError, match=r"kept in '\.\./model/model\.safetensors'"):
        linked_weights.read_in_place(model, bundle.folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "hardlink"}, "weights is 'hardlink'; expected one of auto, link, copy"),
        ({"weights": "link", "quantize": "int4"}, "such weights are packed anew"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options: dict[str, str], message: str) -> None:
    source = make_checkpoint(tmp_path / "model", **MIXED)
    with pytest.raises(BadInput, match=message):
        export(source, tmp_path / "bundle", **options)
    assert not (tmp_path / "bundle").exists()
