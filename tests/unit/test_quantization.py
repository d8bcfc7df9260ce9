"""int4 and int8 weights: packing, the graph, what is refused."""

import numpy as np
import onnx_ir as ir
import pytest
from models_zoo import MIXED, Zoo, make_spec, random_model

from cla_export.compare.gate import compare_bundle
from cla_export.errors import BadInput
from cla_export.exporter import export
from cla_export.quantization import PACKED, SCALES, Quantization


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
    weights = [name for name, value in random_model(make_spec(**MIXED)).named_parameters()
               if value.ndim == 2 and "embed" not in name]  # fmt: skip
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


def test_refusals(zoo: Zoo, tmp_path):
    source = zoo.folder(**MIXED)
    with pytest.raises(BadInput, match="expected one of int4, int8"):
        export(source, tmp_path / "a", quantize="int3")
    with pytest.raises(BadInput, match="only `onnxruntime`"):
        export(source, tmp_path / "b", target="portable", quantize="int4")
    assert list(tmp_path.iterdir()) == []
