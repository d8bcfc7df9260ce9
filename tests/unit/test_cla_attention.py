"""ClaAttention without a GPU: the contract, the references, the plan, and compilation."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from cla_export.errors import BadInput
from cla_export.plugin.cases import Case, correctness_cases, random_inputs, speed_cases
from cla_export.plugin.compile import AnyVariant, Variant, compile_kernel, resources
from cla_export.plugin.contract import CLA_ATTENTION, Problem, check, to_json
from cla_export.plugin.gpu import Gpu
from cla_export.plugin.plan import MAX_SPLIT_ITEMS, make_plan, workspace_bound
from cla_export.plugin.prompt import PromptPlan
from cla_export.plugin.reference import numpy_reference, torch_reference

CONTRACT = Path(__file__).parents[2] / "graphs/ops/cla_attention.json"
A100 = Gpu((8, 0), 108, 166912, 167936)
ADA = Gpu((8, 9), 128, 101376, 102400)
HOPPER = Gpu((9, 0), 132, 232448, 233472)
BLACKWELL = Gpu((12, 0), 170, 101376, 102400)
GPUS = (A100, ADA, HOPPER, BLACKWELL)
CASES = list(correctness_cases(80, dtypes=("float16",)))


def test_the_committed_contract_is_the_code_s() -> None:
    assert CONTRACT.read_text(encoding="utf-8") == to_json(), (
        "graphs/ops/cla_attention.json is stale; regenerate it with: "
        "python -m cla_export.plugin.contract graphs/ops/cla_attention.json"
    )


def test_the_contract_names_only_axes_it_declares() -> None:
    axes = {axis.name for axis in CLA_ATTENTION.axes}
    for tensor in (*CLA_ATTENTION.inputs, *CLA_ATTENTION.outputs):
        assert set(tensor.shape) <= axes, tensor.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_heads": 6, "kv_heads": 4}, "6 query heads do not divide among 4 kv heads"),
        ({"head_dim": 45}, "head_dim is 45, expected an even number up to 512"),
        ({"head_dim": 514}, "head_dim is 514"),
        ({"batch": 0}, "batch is 0, expected 1 or more"),
        ({"dtype": "float32"}, "dtype is float32, expected float16 or bfloat16"),
        ({"scale": 0.0}, "scale is 0.0, expected more than 0"),
        ({"window": -1}, "window is -1"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"softcap": float("nan")}, "softcap is nan"),
    ],
)
def test_calls_that_break_the_contract_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        check(replace(Problem(1, 8, 2, 64, 100), **change))


def test_case_names_are_unique_and_every_case_keeps_the_contract() -> None:
    for cases in (list(correctness_cases()), list(speed_cases())):
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            check(case.problem)
            assert len(case.lengths) == case.problem.batch
            assert all(0 <= length <= case.problem.capacity for length in case.lengths)


def both(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The two references' answers to one case."""
    inputs, problem = random_inputs(case), case.problem
    attributes = {n: getattr(problem, n) for n in ("scale", "window", "softcap")}
    exact = numpy_reference(**inputs, **attributes)
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    return exact, torch_reference(**tensors, **attributes).numpy()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_references_agree_and_ignore_garbage(case: Case) -> None:
    exact, single = both(case)
    assert np.isfinite(exact).all() and np.isfinite(single).all()
    np.testing.assert_allclose(single, exact, rtol=2e-4, atol=2e-5)  # float32 sums


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_references_agree_on_random_calls(data: st.DataObject) -> None:
    draw, number = data.draw, st.integers
    kv_heads, group, queries = draw(number(1, 3)), draw(number(1, 4)), draw(number(1, 6))
    lengths = tuple(draw(st.lists(number(0, 24), min_size=1, max_size=3)))
    window, softcap = draw(number(0, 30)), draw(st.sampled_from((0.0, 1.5)))
    problem = Problem(
        len(lengths), kv_heads * group, kv_heads, 8, 24, queries, 0.5, window, softcap
    )
    exact, single = both(Case("random", problem, lengths))
    np.testing.assert_allclose(single, exact, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    "case", [case for case in CASES if not case.problem.softcap], ids=lambda case: case.name
)
def test_the_reference_is_torch_s_own_attention(case: Case) -> None:
    inputs = {name: torch.from_numpy(value) for name, value in random_inputs(case).items()}
    problem, queries = case.problem, case.problem.queries
    attributes = {"scale": problem.scale, "window": problem.window}
    got = torch_reference(**inputs, **attributes)
    for row, length in enumerate(case.lengths):
        padding = max(queries - length, 0)
        assert not got[row, :, :padding].any()
        if padding == queries:
            continue
        position = torch.arange(length - queries + padding, length)[:, None]
        age = position - torch.arange(length)
        mask = (age >= 0) & (age < (problem.window or length + 1))
        expected = scaled_dot_product_attention(
            inputs["q"][row : row + 1, :, padding:],
            inputs["key_cache"][row : row + 1, :, :length],
            inputs["value_cache"][row : row + 1, :, :length],
            attn_mask=mask,
            scale=problem.scale,
            enable_gqa=True,
        )
        torch.testing.assert_close(got[row, :, padding:], expected[0], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: str(gpu.compute_capability))
def test_every_plan_fits_its_gpu_and_the_workspace_that_is_declared(gpu: Gpu) -> None:
    for case in (*correctness_cases(), *correctness_cases(3000), *speed_cases()):
        plan = make_plan(case.problem, gpu)
        variant = plan.variant
        assert variant.shared_bytes + variant.static_shared_bytes <= gpu.shared_per_block
        assert plan.workspace_bytes <= workspace_bound(case.problem)
        if isinstance(plan, PromptPlan):
            continue
        assert variant.cluster == 1 or gpu.has_clusters
        assert plan.extra == 0 or plan.items <= MAX_SPLIT_ITEMS


def variants(gpu: Gpu) -> set[AnyVariant]:
    """The kernels that the head dims and masks of the contract ask for on one GPU."""
    found: set[AnyVariant] = set()
    for dim in (46, 64, 90, 128, 256, 512):
        problem = Problem(4, 16, 4, dim, 4096)
        found.add(make_plan(problem, gpu).variant)
        for queries in (8, 140, 512):
            chunk = replace(problem, queries=queries, softcap=30.0, dtype="bfloat16")
            found.add(make_plan(chunk, gpu).variant)
    return found


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: str(gpu.compute_capability))
def test_kernels_compile_without_a_gpu_and_spill_no_register(gpu: Gpu) -> None:
    pytest.importorskip("cuda.core", reason="NVRTC comes with cuda-core; it is not installed")
    for variant in variants(gpu):
        for name, used in resources(variant, gpu.compute_capability).items():
            assert used.spill_bytes == 0, f"{name} of {variant} spills {used.spill_bytes} bytes"
            assert used.stack_bytes == 0, f"{name} of {variant} keeps arrays in local memory"


def test_the_disk_cache_gives_the_same_code(tmp_path: Path) -> None:
    pytest.importorskip("cuda.core", reason="NVRTC comes with cuda-core; it is not installed")
    variant = Variant(64, False, False, False, 4, 3, 1)
    first = compile_kernel(variant, (8, 0), tmp_path)
    entries = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert entries
    assert bytes(compile_kernel(variant, (8, 0), tmp_path).code) == bytes(first.code)


RTX_BUILD = """
import onnx.helper as h, sys
import tensorrt_rtx as trt
from onnx import TensorProto
from cla_export.plugin.tensorrt import register

register(trt)
register(trt)  # the second time finds the first
kind, value = getattr(TensorProto, sys.argv[1]), h.make_tensor_value_info
cache, new, queries = ["B", 2, 1024, 90], ["B", 2, "S", 90], ["B", 8, "S", 90]
nodes = [
    h.make_node("TensorScatter", [f"past_{x}", x, "at"], [f"cache_{x}"], axis=2, mode="linear")
    for x in "kv"
] + [
    h.make_node(
        "ClaAttention", [f"q{i}", "cache_k", "cache_v", "n"], [f"y{i}"], domain="cla",
        scale=0.1, window=128 * i, softcap=30.0 * i, plugin_namespace="cla", plugin_version="1",
    )
    for i in range(2)
]
inputs = {"past_k": cache, "past_v": cache, "k": new, "v": new, "q0": queries, "q1": queries}
lengths = [value(name, TensorProto.INT32, ["B"]) for name in ("at", "n")]
outputs = {"cache_k": cache, "cache_v": cache, "y0": queries, "y1": queries}
graph = h.make_graph(
    nodes, "g", [*(value(n, kind, s) for n, s in inputs.items()), *lengths],
    [value(n, kind, s) for n, s in outputs.items()],
)
opsets = [h.make_opsetid("", 24), h.make_opsetid("cla", 1)]
model = h.make_model(graph, opset_imports=opsets, ir_version=10)
logger = trt.Logger(trt.Logger.WARNING)
builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
assert parser.parse(model.SerializeToString()), parser.get_error(0).desc()
config, profile = builder.create_builder_config(), builder.create_optimization_profile()
for name, shape in {**inputs, "at": ["B"], "n": ["B"]}.items():
    sizes = ({"B": b, "S": s} for b, s in ((1, 1), (2, 1), (4, 16)))
    profile.set_shape(name, *([size.get(d, d) for d in shape] for size in sizes))
config.add_optimization_profile(profile)
config.num_compute_capabilities = 2
for i, capability in enumerate((trt.ComputeCapability.SM89, trt.ComputeCapability.SM120)):
    config.set_compute_capability(capability, i)
engine = bytes(builder.build_serialized_network(network, config))
print([network.get_layer(i).type.name for i in range(network.num_layers)].count("PLUGIN_V3"))
print([name for name in ("ClaAttention", "scale", "window", "softcap") if name.encode() in engine])
"""


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed"
)
@pytest.mark.parametrize("dtype", ["FLOAT16", "BFLOAT16"])
def test_tensorrt_rtx_builds_graphs_with_the_plugin(dtype: str, tmp_path: Path) -> None:
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    assert spec is not None and spec.submodule_search_locations is not None
    (library,) = Path(next(iter(spec.submodule_search_locations))).glob("libtensorrt_rtx.so.*")
    # Its parser looks for the library under a name that the wheel lacks.
    (tmp_path / "libtensorrt_rtx.so").symlink_to(library)
    done = subprocess.run(
        [sys.executable, "-c", RTX_BUILD, dtype],
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "2\n['ClaAttention', 'scale', 'window', 'softcap']\n", done.stderr
