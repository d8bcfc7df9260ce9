"""Our operators in graphs for GPUs: what is rewritten, what is left, and that the sources compile.

What they compute is checked on a GPU, in tests/gpu.
"""

from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from models_zoo import Zoo, make_spec

from cla_export.compare.reading import read_bundle
from cla_export.engines.cuda_operators import own_nodes
from cla_export.graph_reading import read_graph
from cla_export.lower import CUDA_PLUGIN, lower
from cla_export.lower.quantize_weights import quantize_weights
from cla_export.models import cla
from cla_export.plugin import compile_cpu
from cla_export.plugin.compile import compile_operators, compile_product
from cla_export.plugin.gpu import Gpu
from cla_export.plugin.product import MOST_TOKENS, plan_product
from cla_export.quantization import PACKED, SCALES, Quantization
from cla_export.rewrite import rewrite

H200 = Gpu((9, 0), 132, 227 * 1024, 228 * 1024)
GEFORCE = Gpu((12, 0), 170, 99 * 1024, 100 * 1024)
A100 = Gpu((8, 0), 108, 163 * 1024, 164 * 1024)
PLAIN = {"kv_owner": (0, 0, 2, 2), "num_key_value_heads": 1}
STRICT = ("-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared")


def graph_of(
    zoo: Zoo, dtype: str = "fp16", quantize: str | None = None, **model: object
) -> ir.Graph:
    path = zoo.bundle("onnxruntime", dtype, quantize, **model).cuda_plugin_graph
    assert path is not None
    return ir.load(path).graph


def ours(graph: ir.Graph) -> Counter[str]:
    return Counter(node.op_type for node in graph if node.domain.startswith("cla."))


@pytest.mark.parametrize(("dtype", "domain"), [("fp16", "cla.float16"), ("bf16", "cla.bfloat16")])
def test_a_plain_model(zoo: Zoo, dtype: str, domain: str) -> None:
    graph = graph_of(zoo, dtype, **PLAIN)
    assert ours(graph) == {
        "ClaLinear": 4 * 4 + 1,  # qkv or q, o, gate and up, down; the head
        "ClaRotateAppend": 2,
        "ClaRotate": 2,
        "ClaAttention": 4,
    }
    left = Counter(node.op_type for node in graph)
    for gone in ("RMSNormalization", "MatMul", "RotaryEmbedding", "TensorScatter", "Sigmoid"):
        assert gone not in left
    assert {node.domain for node in graph if node.domain} == {domain}
    linears = [node for node in graph if node.op_type == "ClaLinear"]
    assert sum(node.attributes.get_int("gated") for node in linears) == 4
    assert sum(any(node.inputs[2:3]) for node in linears) == 4 + 4 + 1, (
        "norms: two a layer, one last"
    )
    assert sum(any(node.inputs[3:4]) for node in linears) == 8, "residuals: two a layer"


@pytest.mark.parametrize(("quantize", "width"), [("int8", 32), ("int4", 16)])
def test_quantised_weights(zoo: Zoo, quantize: str, width: int) -> None:
    """Packed rows of several weights one after another, and their scales; nothing else differs."""
    graph = graph_of(zoo, "fp16", quantize, **PLAIN)
    plain = graph_of(zoo, "fp16", **PLAIN)
    linears = {node.name: node for node in graph if node.op_type == "ClaLinear"}
    as_before = {node.name: node for node in plain if node.op_type == "ClaLinear"}
    assert linears.keys() == as_before.keys()
    assert ours(graph) == ours(plain)
    assert {node.domain for node in graph} == {node.domain for node in plain}
    for name, node in linears.items():
        packed, scales, whole = node.inputs[1], node.inputs[4], as_before[name].inputs[1]
        assert packed is not None and scales is not None and whole is not None
        rows, columns = whole.shape.numpy()
        blocks = -(-columns // 32)
        eight = name == "lm_head/ClaLinear"
        assert list(packed.shape.numpy()) == [rows, blocks, 32 if eight else width]
        assert list(scales.shape.numpy()) == [rows, blocks]
        assert (packed.dtype, scales.dtype) == (ir.DataType.UINT8, ir.DataType.FLOAT16)
        for i in (0, 2, 3):
            before = as_before[name].inputs[i] if i < len(as_before[name].inputs) else None
            assert (node.inputs[i] and node.inputs[i].name) == (before and before.name)
        for part, suffix in ((packed, PACKED), (scales, SCALES)):
            sources = [part] if part.producer() is None else part.producer().inputs
            plain_sources = [whole] if whole.producer() is None else whole.producer().inputs
            for source, of in zip(sources, plain_sources, strict=True):
                held = "lm_head.weight" if eight else of.name
                assert source.name == held + suffix
    bundle = zoo.bundle("onnxruntime", "fp16", quantize, **PLAIN)
    assert read_bundle(bundle, zoo.model(**PLAIN)).faults == []
    own = ir.load(bundle.graph).graph.initializers
    for name, value in graph.initializers.items():
        if name.endswith((PACKED, SCALES)) and isinstance(value.const_value, ir.ExternalTensor):
            assert value.const_value.offset == own[name].const_value.offset, "no second copy"


def test_weights_that_are_quantised_are_counted(zoo: Zoo) -> None:
    spec = make_spec(**PLAIN)
    canonical = rewrite(zoo.trace(cla, spec, torch.float16), spec.layout).model
    lowered = lower(CUDA_PLUGIN, canonical, spec.layout).model
    assert quantize_weights(lowered, Quantization(8), spec.tied) == 2 * 7 + 2 * 5 + 1


def test_sharing_weights_and_norms_are_read_from_it(zoo: Zoo) -> None:
    bundle = zoo.bundle("onnxruntime", "fp16", **PLAIN)
    assert bundle.cuda_plugin_graph is not None
    _, layout, _, _ = read_graph(bundle.cuda_plugin_graph)
    assert layout == bundle.layout
    assert read_bundle(bundle, zoo.model(**PLAIN)).faults == []
    assert any("model.cuda.plugin.onnx" in line for line in bundle.attention_choices())


def test_every_node_has_a_number_of_its_own(zoo: Zoo) -> None:
    bundle = zoo.bundle("onnxruntime", "fp16", **PLAIN)
    assert bundle.cuda_plugin_graph is not None
    nodes = own_nodes(bundle.cuda_plugin_graph)
    assert sorted(nodes) == list(range(25))
    scales = {node["scale"] for node in nodes.values() if "scale" in node}
    assert scales == {0.25}


@pytest.mark.parametrize(
    "model",
    [
        {"kv_owner": (0, 0), "attention_bias": True},
        {"kv_owner": (0, 0), "qk_norm": True},
        {"kv_owner": (0, 0), "separate_kv_norm": True},
        {"kv_owner": (0, 0), "head_dim": 10},
    ],
    ids=["biases", "norms of q and k", "a norm for k and v", "head dim 10"],
)
def test_attention_of_another_kind_is_left(zoo: Zoo, model: dict[str, object]) -> None:
    graph = graph_of(zoo, **model)
    found = ours(graph)
    assert "ClaAttention" not in found
    assert found["ClaLinear"] >= 2 * 2, "gate and up, down"
    bundle = zoo.bundle("onnxruntime", "fp16", **model)
    assert {group["cuda_plugin_attention"] for group in bundle.manifest["groups"]} != {
        "ClaAttention"
    }


def test_a_bias_is_no_residual(zoo: Zoo) -> None:
    for node in graph_of(zoo, kv_owner=(0, 0), attention_bias=True):
        for residual in node.inputs[3:4] if node.op_type == "ClaLinear" else []:
            assert residual is None or not residual.is_initializer()


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
@pytest.mark.parametrize("bf16", [False, True])
def test_kernels_compile(capability: tuple[int, int], bf16: bool) -> None:
    assert compile_operators(bf16, capability, None).code


@pytest.mark.parametrize("gpu", [H200, GEFORCE], ids=["H200", "GeForce"])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("bf16", [False, True])
def test_products_compile_and_fit(gpu: Gpu, bits: int, bf16: bool) -> None:
    seen = set()
    for tokens in range(1, MOST_TOKENS + 1):
        plan = plan_product(tokens, 2048, 2048, gpu, gated=False, bits=bits)
        if plan is None:
            assert tokens > 32 and gpu is GEFORCE
            continue
        assert plan.tokens >= tokens and plan.shared_bytes <= gpu.shared_per_block
        assert plan.stages >= 2
        if plan.tokens not in seen:
            capability = gpu.compute_capability
            assert compile_product(bf16, plan, capability, None).code
        seen.add(plan.tokens)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_a_product_is_cut_alike_for_any_few_tokens(gated: bool, bits: int) -> None:
    """So what a row of a batch gets does not depend on how many rows there are."""
    for n, k in ((2304, 2048), (5472, 2048), (2048, 5472), (50304, 2048), (64, 32)):
        plans = [
            plan_product(tokens, n, k, H200, gated=gated, bits=bits) for tokens in (1, 8, 9, 17, 32)
        ]
        assert len({(plan.clusters, plan.blocks) for plan in plans if plan is not None}) == 1
        assert all(plan is not None and plan.blocks <= -(-k * bits // 1024) for plan in plans)


def test_products_that_the_kernel_does_not_take() -> None:
    for tokens, n, k, gpu, bits in (
        (65, 64, 64, H200, 16),
        (1, 64, 12, H200, 16),
        (1, 62, 64, H200, 16),
        (1, 64, 64, A100, 16),
        (1, 64, 40, H200, 8),
        (64, 64, 64, GEFORCE, 4),  # two stages of its ring are more than a block has
    ):
        assert plan_product(tokens, n, k, gpu, gated=False, bits=bits) is None


@pytest.mark.parametrize(
    "source", [compile_cpu.ATTENTION, compile_cpu.HOST_OPERATORS, compile_cpu.READER]
)
def test_sources_compile_without_a_warning(tmp_path: Path, source: Path) -> None:
    compiler = compile_cpu.compiler()
    assert compile_cpu.build(compiler, tmp_path, STRICT, source).is_file()
