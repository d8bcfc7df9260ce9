"""Engines built ahead of time with TensorRT-RTX, each in a process of its own; none is run here."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from graphs_to_refuse import WRONG
from models_zoo import HEADS, MIXED, PATTERNS, Zoo, make_checkpoint

import cla_export
from cla_export.engines import tensorrt_build
from cla_export.engines.tensorrt_build import ENGINE, RECORD, build, open_engine
from cla_export.errors import BadInput, BundleError, CheckFailed, GraphError, MissingEnvironment

pytest.importorskip("tensorrt_rtx", reason="pip install 'cla-export[rtx]'")
SMALL = {"capacity": 64, "slots": 4, "chunk": 16}
ADA = ("8.9",)


def copied(bundle, folder: Path):
    """A bundle to build in; the zoo's own are shared."""
    shutil.copytree(bundle.folder, folder)
    return replace(bundle, folder=folder)


@pytest.mark.parametrize("attention", ["native", "plugin"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_layout_builds(zoo: Zoo, tmp_path, pattern, dtype, attention):
    heads = list(HEADS.values())[list(PATTERNS).index(pattern) % len(HEADS)]
    shape = {"kv_owner": PATTERNS[pattern], "num_key_value_heads": heads}
    bundle = zoo.bundle("tensorrt-rtx", dtype, attention=attention, **shape)
    operator = "TRT_Attention" if attention == "native" else "ClaAttention"
    assert {group["attention"] for group in bundle.manifest["groups"]} == {operator}
    built = build(copied(bundle, tmp_path / "b"), compute_capabilities=ADA, **SMALL)
    assert built.folder.name == f"sm89-tensorrt-rtx-{bundle.dtype}"
    assert (built.folder / ENGINE).stat().st_size == built.record["engine"]["bytes"] > 10_000
    assert built.record["versions"]["tensorrt_rtx"]
    decode, prefill = built.record["profiles"]["decode"], built.record["profiles"]["prefill"]
    assert decode["input_ids"] == [[1, 1], [2, 1], [4, 1]]
    assert prefill["input_ids"] == [[1, 1], [1, 8], [1, 16]]
    caches = [name for name in decode if name.startswith("past_key_values.")]
    assert len(caches) == 2 * bundle.layout.num_groups
    assert all(decode[name][2] == [4, heads, 64, 16] for name in caches)


@pytest.mark.parametrize("attention", ["native", "plugin"])
def test_one_engine_for_several_gpus_and_options(zoo: Zoo, tmp_path, attention):
    """With windows and biases, and weights that may stream; progress as TensorRT reports it."""
    made = zoo.bundle("tensorrt-rtx", "fp16", attention=attention, **MIXED)
    bundle = copied(made, tmp_path / "b")
    seen = []
    built = build(
        bundle,
        compute_capabilities=("8.6", "8.9", "12.0"),
        weight_streaming=True,
        progress=lambda what, done, of: seen.append((what, done, of)),
        **SMALL,
    )
    assert built.folder.name == "sm86+sm89+sm120-tensorrt-rtx-float16"
    assert any(what.startswith("build: ") and done == of for what, done, of in seen)
    assert open_engine(bundle, built.folder).record == built.record


def test_a_timing_cache_is_written_and_read(zoo: Zoo, tmp_path):
    bundle = copied(zoo.bundle("tensorrt-rtx", "fp16", kv_owner=(0, 0)), tmp_path / "b")
    cache = tmp_path / "timing.cache"
    for _ in range(2):
        build(bundle, compute_capabilities=ADA, timing_cache=str(cache), force=True, **SMALL)
        assert cache.stat().st_size > 0


def test_weights_that_lie_in_the_checkpoint(zoo: Zoo, tmp_path):
    """The builder reads them where they are, like ONNX Runtime; the onnx package would not."""
    source = make_checkpoint(tmp_path / "model", dtype=torch.float16, **MIXED)
    options = {"target": "tensorrt-rtx", "dtype": "fp16", "weights": "link"}
    with patch("cla_export.trace.trace", zoo.trace):
        bundle = cla_export.export(source, tmp_path / "linked", **options)
    assert bundle.linked == ["model.safetensors"]
    built = build(bundle, compute_capabilities=ADA, **SMALL)
    assert built.record["engine"]["bytes"] > 10_000


def test_float32_is_decomposed(zoo: Zoo, tmp_path):
    bundle = copied(zoo.bundle("tensorrt-rtx", "fp32", **MIXED), tmp_path / "b")
    assert {group["attention"] for group in bundle.manifest["groups"]} == {
        "TRT_Attention, decomposed"
    }
    assert build(bundle, compute_capabilities=ADA, **SMALL).record["dtype"] == "float32"


def test_a_crash_of_the_builder_is_an_error_message(zoo: Zoo, tmp_path):
    """A graph that kills the builder, past the lint: the process that dies is not this one."""
    bundle = copied(zoo.bundle("tensorrt-rtx", "fp16", **MIXED), tmp_path / "b")
    graph = WRONG["scaled_twice"][0].model()
    sizes = {"B": (1, 1, 2), "S": (1, 1, 4)}
    shapes = {
        value.name: [
            [sizes[d.dim_param][i] if d.dim_param else d.dim_value
             for d in value.type.tensor_type.shape.dim] for i in range(3)
        ]
        for value in graph.graph.input
    }  # fmt: skip
    with (
        patch.object(tensorrt_build, "fixed_graph", lambda *_: graph.SerializeToString()),
        patch.object(tensorrt_build, "profiles", lambda *_: {"only": shapes}),
        pytest.raises(CheckFailed, match=r"crashed \(SIGSEGV\).*last node parsed was attention\.1"),
    ):
        build(bundle, compute_capabilities=ADA, **SMALL)
    assert not (bundle.folder / "engines").exists() or not any(
        (bundle.folder / "engines").iterdir()
    )


def test_a_graph_that_the_parser_refuses_names_the_node(zoo: Zoo, tmp_path):
    bundle = copied(zoo.bundle("tensorrt-rtx", "fp16", **MIXED), tmp_path / "b")
    graph = WRONG["softcap"][0].model()
    with (
        patch.object(tensorrt_build, "fixed_graph", lambda *_: graph.SerializeToString()),
        pytest.raises(CheckFailed, match=r"parser refuses the graph.*softcap"),
    ):
        build(bundle, compute_capabilities=ADA, **SMALL)


def test_what_does_not_fit_is_refused(zoo: Zoo, tmp_path):
    bundle = copied(zoo.bundle("tensorrt-rtx", "fp16", **MIXED), tmp_path / "b")
    for options, word in (
        ({"compute_capabilities": ("9.0",)}, "Hopper and data-centre Blackwell"),
        ({"capacity": 65}, "the model has 64 positions"),
        ({"capacity": 8, "chunk": 9}, "a slot holds 8 tokens"),
        ({"slots": 0}, "slots is 0"),
        ({"strip": True, "compute_capabilities": ("8.6", "8.9")}, "one compute capability"),
        ({"version_compatible": True}, "lean runtime"),
        ({"precision": "bf16"}, "Export again with --dtype bf16"),
        ({"flavour": "tensorrt", "compute_capabilities": ADA}, "are of tensorrt-rtx"),
    ):
        with pytest.raises(BadInput, match=word):
            build(bundle, **options)
    with pytest.raises(MissingEnvironment, match="on a GPU, and there is none"):
        build(bundle, refit=True, compute_capabilities=ADA)
    other = zoo.bundle("onnxruntime", "fp16", **MIXED)
    with pytest.raises(BadInput, match="--target tensorrt-rtx"):
        build(other, flavour="tensorrt-rtx")
    with pytest.raises(MissingEnvironment, match=r"cla-export\[tensorrt\]"):
        build(bundle, flavour="tensorrt")
    with pytest.raises(GraphError, match="lengths_ignored"):
        build(replace(zoo.bundle("portable", "fp16", **MIXED), manifest=bundle.manifest), **SMALL)


def test_an_engine_of_another_graph_or_a_damaged_one_is_refused(zoo: Zoo, tmp_path):
    bundle = copied(zoo.bundle("tensorrt-rtx", "fp16", kv_owner=(0, 0)), tmp_path / "b")
    folder = build(bundle, compute_capabilities=ADA, **SMALL).folder
    with pytest.raises(BundleError, match="exists already"):
        build(bundle, compute_capabilities=ADA, **SMALL)
    other = zoo.bundle("tensorrt-rtx", "fp16", **MIXED)
    with pytest.raises(BundleError, match=r"built from another graph.*rebuild: cla-export build"):
        open_engine(other, folder)
    record = json.loads((folder / RECORD).read_text())
    (folder / ENGINE).write_bytes(b"no engine")
    with pytest.raises(BundleError, match="changed after it was built") as caught:
        open_engine(bundle, folder)
    assert '--capacity 64 --slots 4 --chunk 16 --compute-capability "8.9" --force' in str(
        caught.value
    )
    (folder / RECORD).write_text(json.dumps({**record, "options": {}}))
    with pytest.raises(BundleError, match="not an engine folder"):
        open_engine(bundle, folder)


def test_polygraphy_reads_the_same_graph(zoo: Zoo, tmp_path):
    """NVIDIA's own tool finds every node supported, and converts the graph."""
    bundle = zoo.bundle("tensorrt-rtx", "fp16", kv_owner=(0, 0))
    graph = tensorrt_build.fixed_graph(bundle, 64)
    (tmp_path / "model.onnx").write_bytes(graph)
    shutil.copy(bundle.folder / "model.onnx.data", tmp_path)
    bin_folder = Path(sys.executable).parent
    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"}

    def polygraphy(*arguments: str) -> str:
        command = [str(bin_folder / "polygraphy"), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    assert "fully supported" in polygraphy("inspect", "capability", "model.onnx")
    inputs = ["--trt-min-shapes", "--trt-opt-shapes", "--trt-max-shapes"]
    shapes = ["input_ids:[1,1]", "write_indices:[1]", "kv_lengths:[1]"]
    shapes += [f"past_key_values.0.{part}:[1,2,64,16]" for part in ("key", "value")]
    shapes += ["logits_to_keep:[1]"]
    options = [item for flag in inputs for item in (flag, *shapes)]
    polygraphy("convert", "model.onnx", "--convert-to", "trt", "-o", "model.engine",
               "--compute-capabilities", "8.9", *options)  # fmt: skip
    assert (tmp_path / "model.engine").stat().st_size > 10_000


def test_the_demo_from_the_command_line(tmp_path):
    bundle = tmp_path / "bundle"
    base = [sys.executable, "-m", "cla_export.cli"]
    source = str(cla_export.demo_checkpoint())
    export = ["export", source, str(bundle), "--target", "tensorrt-rtx", "--dtype", "bf16"]
    done = subprocess.run([*base, *export], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    command = ["build", str(bundle), "--compute-capability", "8.9 12.0", "--capacity", "256"]
    done = subprocess.run([*base, *command, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["folder"].endswith("sm89+sm120-tensorrt-rtx-bfloat16")
    assert record["options"]["compute_capabilities"] == ["8.9", "12.0"]


def test_inspect_names_the_engines_and_says_what_carries_attention(zoo: Zoo, tmp_path):
    made = zoo.bundle("tensorrt-rtx", "fp16", kv_owner=(0, 0), head_dim=46)
    bundle = copied(made, tmp_path / "b")
    folder = build(bundle, compute_capabilities=ADA, **SMALL).folder
    found = cla_export.inspect(bundle.folder)
    assert "ClaAttention" in found.attention[0] and "not 46" in found.attention[0]
    assert found.engines[0].startswith(
        "sm89-tensorrt-rtx-float16: 4 slots of 64 tokens, prompts in"
    )
    (folder / RECORD).write_text("{}")
    assert "is damaged" in cla_export.inspect(bundle.folder).engines[0]
