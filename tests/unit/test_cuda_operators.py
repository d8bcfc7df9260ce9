"""Our operators in graphs for GPUs: what is rewritten, what is left, and that the sources compile.

What they compute is checked on a GPU, in tests/gpu.
"""

from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest
from models_zoo import Zoo

from cla_export.compare.reading import read_bundle
from cla_export.engines.cuda_operators import own_nodes
from cla_export.graph_reading import read_graph
from cla_export.plugin import compile_cpu
from cla_export.plugin.compile import compile_operators, compile_product
from cla_export.plugin.gpu import Gpu
from cla_export.plugin.product import MOST_TOKENS, plan_product

H200 = Gpu((9, 0), 132, 227 * 1024, 228 * 1024)
GEFORCE = Gpu((12, 0), 170, 99 * 1024, 100 * 1024)
A100 = Gpu((8, 0), 108, 163 * 1024, 164 * 1024)
PLAIN = {"kv_owner": (0, 0, 2, 2), "num_key_value_heads": 1}
STRICT = ("-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared")


def graph_of(zoo: Zoo, dtype: str = "fp16", **model: object) -> ir.Graph:
    path = zoo.bundle("onnxruntime", dtype, **model).cuda_plugin_graph
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
@pytest.mark.parametrize("bf16", [False, True])
def test_products_compile_and_fit(gpu: Gpu, bf16: bool) -> None:
    seen = set()
    for tokens in range(1, MOST_TOKENS + 1):
        plan = plan_product(tokens, 2048, 2048, gpu, gated=False)
        if plan is None:
            assert tokens > 32 and gpu is GEFORCE
            continue
        assert plan.tokens >= tokens and plan.shared_bytes < gpu.shared_per_block
        if plan.tokens not in seen:
            assert compile_product(
                bf16, plan.tokens, plan.stages, gpu.compute_capability, None
            ).code
        seen.add(plan.tokens)


@pytest.mark.parametrize("gated", [False, True])
def test_a_product_is_cut_alike_for_any_few_tokens(gated: bool) -> None:
    """So what a row of a batch gets does not depend on how many rows there are."""
    for n, k in ((2304, 2048), (5472, 2048), (2048, 5472), (50304, 2048), (64, 8)):
        plans = [plan_product(tokens, n, k, H200, gated=gated) for tokens in (1, 8, 9, 17, 32)]
        assert len({(plan.clusters, plan.blocks) for plan in plans if plan is not None}) == 1
        assert all(plan is not None and plan.blocks <= -(-k // 64) for plan in plans)


def test_products_that_the_kernel_does_not_take() -> None:
    for tokens, n, k, gpu in (
        (65, 64, 64, H200),
        (1, 64, 12, H200),
        (1, 62, 64, H200),
        (1, 64, 64, A100),
    ):
        assert plan_product(tokens, n, k, gpu, gated=False) is None


@pytest.mark.parametrize(
    "source", [compile_cpu.ATTENTION, compile_cpu.HOST_OPERATORS, compile_cpu.READER]
)
def test_sources_compile_without_a_warning(tmp_path: Path, source: Path) -> None:
    compiler = compile_cpu.compiler()
    assert compile_cpu.build(compiler, tmp_path, STRICT, source).is_file()
