"""ClaAttention on a GPU against the float32 reference, over the contract's whole grid."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from cla_export.errors import BadInput
from cla_export.plugin.cases import Case, correctness_cases, random_inputs
from cla_export.plugin.contract import Problem
from cla_export.plugin.launch import Launcher, Pointers, torch_attention
from cla_export.plugin.plan import Plan, make_plan
from cla_export.plugin.prompt import PromptPlan, plan_prompt
from cla_export.plugin.reference import torch_reference
from cla_export.plugin.tensorrt import register

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU and a CUDA build of PyTorch", allow_module_level=True)
pytest.importorskip("cuda.core", reason="needs cuda-core, cuda-bindings and NVRTC")

# ||y - reference|| / ||reference||: rounding of the weights and of y to the dtype, with headroom
TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3}
NAN_BITS = 0x7FFF  # of either dtype


@pytest.fixture(scope="module")
def launcher() -> Launcher:
    return Launcher()


def on_gpu(case: Case, seed: int = 0) -> dict[str, torch.Tensor]:
    dtype = getattr(torch, case.problem.dtype)
    inputs = {n: torch.from_numpy(a).cuda() for n, a in random_inputs(case, seed).items()}
    return {n: x if n == "kv_lengths" else x.to(dtype) for n, x in inputs.items()}


def run(
    launcher: Launcher,
    problem: Problem,
    inputs: dict[str, torch.Tensor],
    plan: Plan | PromptPlan,
    *,
    packed: bool = False,
) -> torch.Tensor:
    """One call whose output and workspace hold NaN beforehand."""
    y = torch.full_like(inputs["q"].view(torch.int16), NAN_BITS).view(inputs["q"].dtype)
    workspace = torch.full((max(plan.workspace_bytes, 16),), 255, dtype=torch.uint8, device="cuda")
    pointers = Pointers(*(x.data_ptr() for x in (*inputs.values(), y, workspace)))
    stream = torch.cuda.current_stream().cuda_stream
    launcher.launch(problem, plan, pointers, stream, packed=packed)
    torch.cuda.synchronize()
    return y


def check(launcher: Launcher, case: Case, plan: Plan | PromptPlan) -> None:
    problem, inputs = case.problem, on_gpu(case)
    y = run(launcher, problem, inputs, plan)
    assert torch.isfinite(y).all(), "an element was not written, or garbage got in"
    again = run(launcher, problem, inputs, plan)
    assert torch.equal(y.view(torch.int16), again.view(torch.int16)), "two runs differ"
    attributes = {n: getattr(problem, n) for n in ("scale", "window", "softcap")}
    expected = torch_reference(**inputs, **attributes)
    assert not y[expected == 0].any(), "padding must be zeros"
    if expected.any():
        error = ((y.float() - expected).norm() / expected.norm()).item()
        assert error < TOLERANCE[problem.dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize("case", correctness_cases(), ids=lambda case: case.name)
def test_the_kernel_keeps_the_contract(launcher: Launcher, case: Case) -> None:
    check(launcher, case, launcher.plan(case.problem))


LONG = (4000, 1, 0, 3999, 700, 64, 2049)


@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize(
    ("warps", "cluster", "waves"), product((2, 4, 8), (1, 2, 4, 8), (0, 1.0, 4.0))
)
def test_every_layout_gives_the_answer(
    launcher: Launcher, warps: int, cluster: int, waves: float, queries: int
) -> None:
    if cluster > 1 and not launcher.gpu.has_clusters:
        pytest.skip(f"clusters need compute capability 9.0, this is {launcher.gpu}")
    window = 1500 if queries == 3 else 0
    problem = Problem(7, 16, 4, 64, 4000, queries, 0.125, window)
    plan = make_plan(problem, launcher.gpu, warps=warps, cluster=cluster, waves=waves)
    check(launcher, Case("layout", problem, LONG), plan)


@pytest.mark.parametrize("head_dim", [46, 64, 90, 128])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (100, 0.0), (50, 3.0)])
def test_prompts_share_their_keys_within_a_block(
    launcher: Launcher, head_dim: int, window: int, softcap: float
) -> None:
    scale = head_dim**-0.5
    problem = Problem(4, 16, 4, head_dim, 900, 601, scale, window, softcap, "bfloat16")
    plan = launcher.plan(problem)
    on_warp_groups = launcher.gpu.compute_capability == (9, 0) and head_dim % 64 == 0
    assert isinstance(plan, PromptPlan) == on_warp_groups
    assert isinstance(plan, PromptPlan) or plan.variant.shared_keys
    check(launcher, Case("prompt", problem, (900, 30, 0, 601)), plan)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 1), (16, 4), (12, 12), (6, 2), (40, 1)])
@pytest.mark.parametrize("queries", [17, 200, 650])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (77, 3.0)])
def test_prompts_on_warp_groups(
    launcher: Launcher,
    window: int,
    softcap: float,
    queries: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
) -> None:
    """Both ways of sharing rows and keys among a block's groups, whatever fills it."""
    scale = head_dim**-0.5
    problem = Problem(3, heads, kv_heads, head_dim, 1500, queries, scale, window, softcap, dtype)
    for turns in (False, True):
        plan = plan_prompt(problem, launcher.gpu, turns=turns)
        if plan is None:
            pytest.skip("warp groups are Hopper's")
        check(launcher, Case("prompt", problem, (1500, 641, 0)), plan)


def test_packed_queries_give_the_same_bits(launcher: Launcher) -> None:
    problem = Problem(2, 8, 2, 128, 700, 300, 0.1)
    plan = plan_prompt(problem, launcher.gpu, turns=False)
    if plan is None:
        pytest.skip("warp groups are Hopper's")
    inputs = on_gpu(Case("packed", problem, (700, 321)))
    apart = run(launcher, problem, inputs, plan)
    q = inputs["q"].transpose(1, 2).contiguous()
    packed = run(launcher, problem, {**inputs, "q": q}, plan, packed=True)
    assert torch.equal(packed.transpose(1, 2), apart)


@pytest.mark.parametrize("head_dim", [46, 128, 256, 512])
def test_long_rows_are_split_and_merged(launcher: Launcher, head_dim: int) -> None:
    problem = Problem(2, 16, 1, head_dim, 9000, scale=head_dim**-0.5, dtype="bfloat16")
    plan = make_plan(problem, launcher.gpu, waves=1)
    assert plan.merges
    check(launcher, Case("long", problem, (9000, 5)), plan)


@pytest.mark.parametrize("window", [0, 130])
@pytest.mark.parametrize(("batch", "capacity", "waves"), [(301, 400, 0), (40, 3000, 3.0)])
def test_many_ragged_rows(
    launcher: Launcher, batch: int, capacity: int, waves: float, window: int
) -> None:
    """More rows than run at a time, longest first; and more than a warp has lanes, split."""
    problem = Problem(batch, 8, 4, 64, capacity, 1, 0.125, window)
    plan = make_plan(problem, launcher.gpu, waves=waves)
    assert plan.ordered if waves == 0 else plan.extra
    lengths = tuple(i * 7919 % (capacity + 1) for i in range(batch))
    check(launcher, Case("rows", problem, lengths), plan)


def test_a_captured_graph_follows_the_lengths(launcher: Launcher) -> None:
    problem = Problem(3, 8, 1, 128, 2048, scale=0.1)
    inputs = on_gpu(Case("graph", problem, (2048, 2048, 2048)))
    call: Callable[[], torch.Tensor] = lambda: torch_attention(launcher, **inputs, scale=0.1)  # noqa: E731
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    for lengths in ((5, 2048, 0), (2000, 1, 1024), (1, 1, 1)):
        inputs["kv_lengths"].copy_(torch.tensor(lengths))
        graph.replay()
        torch.cuda.synchronize()
        error = (y.float() - torch_reference(**inputs, scale=0.1)).norm()
        assert error / torch_reference(**inputs, scale=0.1).norm() < TOLERANCE["float16"]


def test_tensors_that_break_the_contract_are_refused(launcher: Launcher) -> None:
    case = Case("bad", Problem(1, 4, 2, 64, 32), (7,))
    inputs = on_gpu(case)
    with pytest.raises(BadInput, match=r"kv_lengths is .* int64, expected .* int32"):
        torch_attention(
            launcher, **(inputs | {"kv_lengths": inputs["kv_lengths"].long()}), scale=1.0
        )
    swapped = inputs["key_cache"].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(BadInput, match="key_cache is not contiguous"):
        torch_attention(launcher, **(inputs | {"key_cache": swapped}), scale=1.0)
    with pytest.raises(BadInput, match="expected an even number"):
        launcher.plan(replace(case.problem, head_dim=63))


class FakeRegistry:
    """TensorRT's, as far as the plugin uses it."""

    def __init__(self) -> None:
        self.creator = None

    def get_creator(self, name: str, version: str, namespace: str) -> object:
        return self.creator

    def register_creator(self, creator: object, namespace: str) -> bool:
        self.creator = creator
        return True


def fake_tensorrt() -> SimpleNamespace:
    """What the plugin needs of TensorRT's module, to call it as TensorRT would."""
    bases = ("IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuild", "IPluginV3OneRuntime")
    registry = FakeRegistry()
    return SimpleNamespace(
        **{name: type(name, (), {}) for name in (*bases, "IPluginCreatorV3One")},
        __name__="fake",
        get_plugin_registry=lambda: registry,
        PluginFieldType=SimpleNamespace(INT32=0, FLOAT32=1),
        PluginField=lambda name, data, kind: SimpleNamespace(name=name, data=data, type=kind),
        PluginFieldCollection=list,
        bfloat16="bfloat16",
        float16="float16",
        int32="int32",
    )


@pytest.mark.parametrize("tactic", [None, 1, 2, 3, 4, 5])
def test_the_tensorrt_plugin_enqueues_the_kernel(tactic: int | None) -> None:
    """TensorRT itself is not run: its calls are made by hand, in its order."""
    case = Case("plugin", Problem(2, 16, 4, 128, 5000, 1, 0.1, 3000, 5.0, "bfloat16"), (5000, 70))
    trt = fake_tensorrt()
    creator = register(trt)
    assert register(trt) is creator
    values = {"scale": [0.1], "window": [3000], "softcap": [5.0]}
    plugin = creator.create_plugin("node", [trt.PluginField(*v, 0) for v in values.items()], None)
    fields = plugin.clone().get_fields_to_serialize()
    plugin = creator.create_plugin("node", fields, None)
    inputs = on_gpu(case)
    descriptions = [
        SimpleNamespace(dims=tuple(x.shape), type=str(x.dtype).removeprefix("torch."))
        for x in inputs.values()
    ]
    limits = [SimpleNamespace(desc=d, max=d.dims) for d in descriptions]
    plugin.configure_plugin(limits, None)
    workspace = torch.full((plugin.get_workspace_size(limits, None),), 255, dtype=torch.uint8)
    workspace = workspace.cuda()
    attached = plugin.attach_to_context(None)
    if tactic:
        attached.set_tactic(tactic)
    attached.on_shape_change(descriptions, None)
    y = torch.full_like(inputs["q"], torch.nan)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    pointers = [x.data_ptr() for x in inputs.values()]
    attached.enqueue(
        descriptions, None, pointers, [y.data_ptr()], workspace.data_ptr(), stream.cuda_stream
    )
    stream.synchronize()
    expected = torch_reference(**inputs, scale=0.1, window=3000, softcap=5.0)
    assert (y.float() - expected).norm() / expected.norm() < TOLERANCE["bfloat16"]
