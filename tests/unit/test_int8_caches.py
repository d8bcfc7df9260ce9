"""int8 caches: scales, the graphs, running them, what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime_genai as og
import pytest
import torch
from models_zoo import MIXED, Zoo, make_spec, random_model, tokens_of

from cla_export.benchmark.cells import Cell
from cla_export.benchmark.timing import time_cell
from cla_export.calibration import calibrate
from cla_export.compare.gate import compare_bundle
from cla_export.compare.int8_caches import find_scales
from cla_export.engines.onnxruntime import OnnxRuntimeExecutor
from cla_export.errors import BadInput, BundleError
from cla_export.exporter import export
from cla_export.inspection import inspect
from cla_export.kv_scales import MOST, from_int8, read_scales, scale_name, to_int8
from cla_export.serve.server import Options, open_model
from cla_export.tokenizer import token_stream

BYTES = 2 * 2 * 2 * 16  # of a token of MIXED: keys and values of 2 groups of 2 heads of 16


def test_rounding_is_to_the_nearest_and_saturates() -> None:
    random = np.random.default_rng(0)
    scale = random.uniform(0.01, 2, (3, 1, 8)).astype(np.float32)
    values = random.uniform(-150, 150, (3, 50, 8)) * scale
    held = from_int8(to_int8(values, scale), scale)
    inside = np.clip(values, -128 * scale, MOST * scale)
    assert (np.abs(held - inside) <= 0.5001 * scale).all()
    assert (held != values).any()
    assert (np.abs(values) > 128 * scale).any()


# Calibration.


def test_scales_leave_room_all_over_the_context() -> None:
    """A slow channel of RoPE has another range at the end of a context than at its beginning."""
    positions = {"max_position_embeddings": 2048, "rope_theta": 2000.0}
    model = random_model(make_spec(kv_owner=(0, 0), attention_bias=True, **positions))
    text = tokens_of(2048)
    with torch.no_grad():  # one half of the pair that turns once in 4,800 tokens
        model.get_parameter("model.layers.0.self_attn.k_proj.bias")[7] = 30.0
    scales = calibrate(model, text)

    def largest(start: int) -> np.ndarray:
        ids, positions = torch.tensor(text[:256])[None], torch.arange(256)[None] + start
        return model.forward_with_kv(ids, positions)[1][0][0][0].abs().amax(1).numpy()

    with torch.inference_mode():
        seen = np.stack([largest(start) for start in range(0, 1793, 128)])
    assert (seen.max(0) > 1.5 * seen[0]).any(), "the beginning does not show it"
    assert (seen.max(0) <= MOST * scales[0][0][:, 0]).all()
    assert (seen.max(0) >= MOST / 3 * scales[0][0][:, 0]).all(), "and not much room"


def test_scales_are_positive_where_a_channel_is_always_zero() -> None:
    model = random_model(make_spec(kv_owner=(0, 0)))
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.v_proj.weight")[3] = 0
    ((keys, values),) = calibrate(model, tokens_of(100))
    assert keys.shape == values.shape == (2, 1, 16)
    assert (keys > 0).all()
    assert 0 < values[0, 0, 3] < 1e-3 * values.max()


def test_a_broken_model_has_no_scales() -> None:
    model = random_model(make_spec(kv_owner=(0, 0)))
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.k_proj.weight")[0] = torch.inf
    with pytest.raises(BadInput, match="group 0: keys or values of the text are infinite"):
        calibrate(model, tokens_of(100))


# A bundle.


def test_all_caches_of_both_graphs_are_int8(zoo: Zoo) -> None:
    bundle = zoo.bundle(kv_cache="int8", **MIXED)
    assert (bundle.dtype, bundle.cache_dtype) == ("float32", "int8")
    assert bundle.arithmetic == "float32, int8 cache"
    assert bundle.calibration == {"dtype": "int8", "calibrated_on": "random ids, seed 20240521"}
    assert bundle.cpu_graph is not None
    for path in (bundle.graph, bundle.cpu_graph):
        graph = ir.load(path).graph
        caches = [v for v in (*graph.inputs, *graph.outputs) if ".key" in v.name or ".v" in v.name]
        assert len(caches) == 8
        assert {value.dtype for value in caches} == {ir.DataType.INT8}
    first, second = (read_scales(path, bundle.layout) for path in (bundle.graph, bundle.cpu_graph))
    assert np.array_equal(np.array(first), np.array(second))


def test_inspect_says_what_it_holds_and_in_what(zoo: Zoo) -> None:
    plain, narrow = (
        inspect(zoo.bundle(kv_cache=kv_cache, **MIXED).folder) for kv_cache in (None, "int8")
    )
    assert (narrow.dtype, narrow.cache_dtype) == ("float32", "int8")
    assert narrow.ok
    assert narrow.own.cache_bytes_per_token == BYTES == plain.own.cache_bytes_per_token // 4
    assert narrow.own.kv_activation_bytes_per_token == plain.own.kv_activation_bytes_per_token
    assert plain.weight_bytes is not None
    assert narrow.weight_bytes == {"float32": plain.weight_bytes["float32"] + 4 * BYTES}


def test_inspect_tells_of_a_manifest_that_says_so_alone(zoo: Zoo, tmp_path: Path) -> None:
    folder = shutil.copytree(zoo.bundle(**MIXED).folder, tmp_path / "bundle")
    manifest = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps({**manifest, "kv_cache": {"dtype": "int8"}}))
    (failed,) = [check for check in inspect(folder).checks if not check.ok]
    assert (failed.name, failed.detail) == (
        "the graph's caches are in int8, as bundle.json says",
        "float32",
    )


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_the_gate_passes_it(zoo: Zoo, quantize: str | None) -> None:
    bundle = zoo.bundle("onnxruntime", "fp32", quantize, kv_cache="int8", **MIXED)
    report = compare_bundle(bundle, threads=1)
    assert report.passed
    assert report.arithmetic == ("int8 cache" if quantize is None else "int4 weights, int8 cache")
    assert any(case.case.endswith("(cpu)") for case in report.tensors)
    assert report.perplexity is not None
    assert 0 < report.perplexity.difference < report.perplexity.tolerance == 1e-2


def test_scales_of_one_graph_alone_are_a_fault(zoo: Zoo, tmp_path: Path) -> None:
    bundle = zoo.bundle(kv_cache="int8", **MIXED)
    folder = shutil.copytree(bundle.folder, tmp_path / "bundle")
    model = ir.load(folder / "model.cpu.onnx")
    value = model.graph.initializers[scale_name(1, "key")]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * 1.5, name=value.name)
    ir.save(model, folder / "model.cpu.onnx")
    spoilt = dataclasses.replace(bundle, folder=folder)
    stream, _ = token_stream(folder, bundle.vocab_size, None)
    assert find_scales(bundle, zoo.model(**MIXED), stream)[1] == []
    faults = ["model.cpu.onnx: its scales are not model.onnx's"]
    assert find_scales(spoilt, zoo.model(**MIXED), stream)[1] == faults


def test_a_bundle_without_its_scales_is_damaged(zoo: Zoo) -> None:
    bundle = zoo.bundle(**MIXED)
    manifest = {**bundle.manifest, "kv_cache": {"dtype": "int8"}}
    with pytest.raises(
        BundleError, match=r"no cache\.0\.key_scale of shape \[1, 2, 1, 16\]; export again"
    ):
        OnnxRuntimeExecutor(dataclasses.replace(bundle, manifest=manifest))


# Running it.


@pytest.mark.parametrize("stock", [True, False])
def test_a_prefix_that_is_copied_is_the_same_to_the_last_bit(zoo: Zoo, stock: bool) -> None:
    bundle, tokens = zoo.bundle(kv_cache="int8", **MIXED), tokens_of(30)
    executor = OnnxRuntimeExecutor(bundle, slots=3, threads=1, stock=stock)
    whole = executor.prefill(0, tokens, 0)
    executor.copy(0, 2, 20)
    assert np.array_equal(executor.read(0, 2)[0][:, :20], executor.read(0, 0)[0][:, :20])
    assert executor.cache(0)[0].dtype == np.int8
    reused = executor.prefill(2, tokens[20:], 20)
    assert np.abs(reused - whole).max() < 1e-4, "as without a cache in between"
    assert np.array_equal(executor.cache(1)[1][0, :, :30], executor.cache(1)[1][2, :, :30])


def test_what_is_written_is_read_as_it_is_held(zoo: Zoo) -> None:
    bundle = zoo.bundle(kv_cache="int8", **MIXED)
    executor = OnnxRuntimeExecutor(bundle, slots=2, threads=1)
    scale = read_scales(bundle.graph, bundle.layout)[1][0]
    keys = np.random.default_rng(0).uniform(-100, 100, (2, 5, 16)) * scale
    executor.write(1, 1, keys, keys)
    held = executor.read(1, 1)[0]
    assert held.dtype == np.float32
    assert (np.abs(held[:, :5] - keys) <= 0.5001 * scale).all()
    assert not held[:, 5:].any()


def test_genai_generates_the_same(zoo: Zoo) -> None:
    bundle, prompt = zoo.bundle(kv_cache="int8", **MIXED), tokens_of(9, seed=3)
    parameters = og.GeneratorParams(model := og.Model(str(bundle.folder)))
    parameters.set_search_options(max_length=20, min_length=20)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt)
    got = []
    while not generator.is_done() and len(got) < 8:
        generator.generate_next_token()
        got.append(int(generator.get_next_tokens()[0]))
    executor = OnnxRuntimeExecutor(bundle, threads=1, stock=True)
    logits = executor.prefill(0, prompt, 0)[-1]
    for at, token in enumerate(got, len(prompt)):
        assert logits.max() - logits[token] < 1e-4
        logits = executor.decode([0], [token], [at])[0]


def test_pools_and_benchmarks_count_its_bytes(zoo: Zoo) -> None:
    bundle = zoo.bundle(kv_cache="int8", **MIXED)
    opened = open_model(bundle, Options(kv_memory=3 * 64 * BYTES))
    assert (opened.pool.slots, opened.pool.bytes_per_token) == (3, BYTES)
    cell = Cell("decode", 2, 5, 1)
    window = bundle.layout.window  # of 6 tokens in group 1, which sees no more
    assert time_cell(bundle, cell, None, None, 1).kv_bytes == 2 * BYTES * 5, window
    assert time_cell(bundle, cell, "torch", None, 1).kv_bytes == 8 * BYTES * 5


# Options.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_cache": "int4"}, "kv_cache is 'int4'; expected int8"),
        ({"kv_cache": "int8", "dtype": "fp16"}, "in fp16; only `onnxruntime` in fp32"),
        ({"kv_cache": "int8", "target": "portable"}, "target 'portable' in fp32; only"),
        ({"kv_cache": "int8", "target": "tensorrt"}, "target 'tensorrt' in fp32; only"),
        ({"calibration": Path("text.txt")}, "calibration is 'text.txt' and kv_cache is not set"),
        ({"kv_cache": "int8", "calibration": Path("none.txt")}, "none.txt: no such file"),
        ({"kv_cache": "int8", "calibration": Path(__file__)}, "has no tokenizer.json"),
    ],
)
def test_refusals(zoo: Zoo, tmp_path: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        export(zoo.folder(**MIXED), tmp_path / "bundle", **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_head_dims_that_onnx_runtime_does_not_take(zoo: Zoo, tmp_path: Path) -> None:
    folder = zoo.folder(kv_owner=(0, 0), head_dim=10)
    with pytest.raises(BadInput, match=r"head dim of layer 0 is 10; .* multiples of 8"):
        export(folder, tmp_path / "bundle", kv_cache="int8")
    assert not list(tmp_path.iterdir())


def test_a_module_whose_keys_and_values_cannot_be_seen(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = zoo.checkpoint(**MIXED)
    spelt = dataclasses.replace(checkpoint.spec, spelt_attention=True)
    found = dataclasses.replace(checkpoint, spec=spelt, module="mine:make")
    monkeypatch.setattr("cla_export.exporter.open_checkpoint", lambda *_: found)
    with pytest.raises(BadInput, match="mine:make writes its attention out"):
        export(checkpoint.folder, tmp_path / "bundle", kv_cache="int8")


def test_small_head_dims_run_the_stock_graph(zoo: Zoo) -> None:
    bundle = zoo.bundle(kv_cache="int8", kv_owner=(0, 0), head_dim=8)
    assert bundle.cpu_graph is None
    assert np.isfinite(OnnxRuntimeExecutor(bundle).prefill(0, tokens_of(9), 0)).all()
