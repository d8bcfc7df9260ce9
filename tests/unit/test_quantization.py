"""int4 and int8 weights: packing, the graph, what is refused."""

import shutil

import numpy as np
import onnx_ir as ir
import pytest
from models_zoo import MIXED, Zoo, make_spec, random_model

from cla_export.bundle import Bundle
from cla_export.compare.gate import compare_bundle
from cla_export.compare.reading import read_bundle
from cla_export.errors import BadInput
from cla_export.exporter import export
from cla_export.quantization import PACKED, SCALES, Quantization


def linear_weights(overrides) -> list[str]:
    parameters = random_model(make_spec(**overrides)).named_parameters()
    return [name for name, value in parameters if value.ndim == 2 and "embed" not in name]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(5, 32), (7, 96), (3, 40), (1, 20)])
def test_a_weight_comes_back_within_a_step(bits, shape):
    how = Quantization(bits)
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    packed, scales = how.pack(weight)
    assert (packed.shape, scales.shape) == how.shapes(*shape)
    error = np.abs(how.unpack(packed, scales, shape[1]) - weight)
    assert (error <= 1.001 * how.largest_error(weight)).all()
    typical = how.largest_error(weight)[:, :1]
    assert error.mean() > 0.1 * typical.mean(), "rounded, not copied"


def test_packing_leaves_the_root_logger_alone(caplog):
    import logging

    before = logging.getLogger().level, list(logging.getLogger().handlers)
    Quantization(4).pack(np.ones((2, 32), np.float32))
    assert (logging.getLogger().level, list(logging.getLogger().handlers)) == before


@pytest.mark.parametrize("quantize", ["int4", "int8"])
def test_every_linear_weight_is_quantised_and_the_bundle_passes(zoo: Zoo, quantize):
    bundle = zoo.bundle("onnxruntime", "fp32", quantize, **MIXED)
    graph = ir.load(bundle.graph).graph
    weights = linear_weights(MIXED)
    assert {name + part for name in weights for part in (PACKED, SCALES)} <= set(graph.initializers)
    assert not set(weights) & set(graph.initializers)
    products = [node for node in graph if node.op_type == "MatMulNBits"]
    assert len(products) == len(weights)
    bits = {node.name: node.attributes.get_int("bits") for node in products}
    assert bits.pop("lm_head/MatMulNBits") == 8
    assert set(bits.values()) == {int(quantize[3:])}
    report = compare_bundle(bundle, threads=1)
    assert report.passed
    assert report.arithmetic == f"{quantize} weights"
    assert report.perplexity.unquantized != report.perplexity.reference


def test_a_tied_head_is_quantised_beside_the_embedding(zoo: Zoo):
    bundle = zoo.bundle("onnxruntime", "fp16", "int4", kv_owner=(0, 0))
    names = set(ir.load(bundle.graph).graph.initializers)
    assert {"model.embed_tokens.weight", f"lm_head.weight{PACKED}"} <= names
    assert compare_bundle(bundle, threads=1).passed


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("quantize", ["int4", "int8"])
def test_weights_are_read_whatever_their_scales_dtype(zoo: Zoo, tmp_path, dtype, quantize):
    """Weights of 16 bits and their scales are rounded; a scale that is off by more is a fault."""
    bundle = zoo.bundle("onnxruntime", dtype, quantize, **MIXED)
    model = zoo.model(**MIXED)
    reading = read_bundle(bundle, model)
    assert reading.faults == []
    assert reading.quantized.keys() == set(linear_weights(MIXED))
    copy = shutil.copytree(bundle.folder, tmp_path / "copy")
    graph = ir.load(copy / "model.onnx")
    scales = graph.graph.initializers["model.layers.0.mlp.up_proj.weight" + SCALES]
    wrong = scales.const_value.numpy().copy()
    wrong[0, 0] *= wrong.dtype.type(1.25)
    scales.const_value = ir.tensor(wrong)
    ir.save(graph, copy / "model.onnx")
    faults = read_bundle(Bundle(copy, bundle.manifest, bundle.layout), model).faults
    assert any("layers.0.mlp.up_proj.weight" in fault and quantize in fault for fault in faults)


def test_refusals(zoo: Zoo, tmp_path):
    source = zoo.folder(**MIXED)
    with pytest.raises(BadInput, match="expected one of int4, int8"):
        export(source, tmp_path / "a", quantize="int3")
    with pytest.raises(BadInput, match="only `onnxruntime`"):
        export(source, tmp_path / "b", target="portable", quantize="int4")
    assert list(tmp_path.iterdir()) == []
