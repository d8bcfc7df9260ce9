"""The graph for NVIDIA GPUs: its nodes, and its numbers, on ONNX Runtime's CPU provider."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from models_zoo import Zoo, make_spec, stateless_kv, stateless_logits, tokens_of

from cla_export.bundle import Bundle
from cla_export.engines.cuda_operators import CudaOperators
from cla_export.engines.cuda_session import Bound, CudaSession
from cla_export.engines.onnxruntime import OnnxRuntimeExecutor
from cla_export.errors import BadInput, RunError
from cla_export.graph_reading import read_graph
from cla_export.graph_text import from_text
from cla_export.lower import CUDA, lower
from cla_export.lower.fuse_norms import fuse_norms
from cla_export.lower.fuse_products import fuse_products
from cla_export.lower.fuse_rounded_rotary import fuse_rounded_rotary
from cla_export.models import cla
from cla_export.rewrite import rewrite

CLA2 = {"kv_owner": (0, 0, 2, 2)}
FEATURES: dict[str, dict[str, Any]] = {
    "CLA2": CLA2,
    "non-contiguous MQA": {"kv_owner": (0, 1, 0), "num_key_value_heads": 1},
    "window": {"kv_owner": (0, 0), "sliding_window": 4},
    "qk norm": {"kv_owner": (0, 0), "qk_norm": True},
    "separate kv norm": {"kv_owner": (0, 0), "separate_kv_norm": True},
    "biases, untied": {"kv_owner": (0, 0), "attention_bias": True, "tie_word_embeddings": False},
    "head dim 10": {"kv_owner": (0, 0), "head_dim": 10, "sliding_window": 4},
}
LENGTHS = (1, 9, 6)  # prompts: one of a single token, one past the window
STEPS = 4
CAPACITY = 32
# Of logits of order 5 to 10, in float16: 11 bits, through as many roundings as the network has.
# Measured: under 2e-2. What sees a wrong key or position is off by 0.5 and more.
CLOSE = 5e-2
CLOSE_INT8 = 0.3  # activations are rounded to 127 steps, and not always to the same one
SPLIT_OF_THREE = 3


class Steps:
    """Runs the graph for GPUs with past and present in one buffer, as an executor does."""

    def __init__(self, bundle: Bundle, slots: int = len(LENGTHS)) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            str(bundle.cuda_graph), options, providers=["CPUExecutionProvider"]
        )
        self.pools = {
            f"{group.index}.{part}": np.full(
                (slots, group.kv_heads, CAPACITY, group.head_dim), 50, np.float16
            )  # stale numbers must not matter
            for group in bundle.layout.groups
            for part in ("key", "value")
        }

    def run(
        self, first: int, tokens: list[list[int]], held: list[int], keep: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits, as float32, and tokens of rows that lie side by side."""
        ids, starts = np.array(tokens), np.array(held)
        binding = self._session.io_binding()
        feeds = {"input_ids": ids, "write_indices": starts, "kv_lengths": starts + ids.shape[1]}
        if keep is not None:
            feeds["logits_to_keep"] = np.array(keep)
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(a) for name, a in feeds.items()}
        for name, pool in self.pools.items():
            view = onnxruntime.OrtValue.ortvalue_from_numpy(pool[first : first + len(ids)])
            values[f"past_key_values.{name}"] = view
            binding.bind_ortvalue_output(f"present.{name}", view)
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in ("logits", "tokens"):
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        logits, chosen = (value.numpy() for value in binding.get_outputs()[-2:])
        return logits.astype(np.float32), chosen


def rounded_model(zoo: Zoo, **overrides: Any) -> cla.ClaDecoder:
    """The decoder with the weights that a float16 bundle has, computed in float32."""
    return zoo.model(**overrides).half().float()


def cuda_graph(bundle: Bundle) -> ir.Graph:
    assert bundle.cuda_graph is not None
    return ir.load(bundle.cuda_graph).graph


def count(graph: ir.Graph) -> Counter[str]:
    return Counter(node.op_type for node in graph)


# What it is made of.


def test_nodes_of_a_cla2_model(zoo: Zoo) -> None:
    graph = cuda_graph(zoo.bundle("onnxruntime", "fp16", **CLA2))
    layers, groups = 4, 2
    found = count(graph)
    assert found["GroupQueryAttention"] == layers
    # An owner has one product for q, k and v, a sharer q's; then o, gate with up, and down.
    assert found["MatMul"] == 4 * layers + 1
    assert found["Split"] == groups + layers
    assert found["SkipSimplifiedLayerNormalization"] == 2 * layers
    assert found["RMSNormalization"] == 1, "the first one, of the embedding"
    assert found["RotaryEmbedding"] == layers + groups
    assert found["Sub"] == 2, "lengths and the head; none of RoPE's is left"
    assert found["Mul"] == 2 * layers, "SwiGLU's"
    assert found["ArgMax"] == 1
    assert "GatherND" not in found
    names = {value.name for node in graph for value in node.outputs}
    for layer in range(layers):
        scopes = [f"layers.{layer}/attn/o_proj/MatMul", f"layers.{layer}/mlp/down_proj/MatMul"]
        sums = [f"layers.{layer}/Add", f"layers.{layer}/Add_1"]
        norm = f"layers.{layer}/post_attention_layernorm/RMSNormalization"
        assert {*scopes, *sums, norm, f"layers.{layer}/attn/q_proj/MatMul"} <= names


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("feature", FEATURES)
def test_inputs_outputs_and_sharing(zoo: Zoo, feature: str, dtype: str) -> None:
    bundle = zoo.bundle("onnxruntime", dtype, **FEATURES[feature])
    assert bundle.cuda_graph is not None
    onnx.checker.check_model(bundle.cuda_graph)
    facts, layout, cached, notes = read_graph(bundle.cuda_graph)
    assert layout == bundle.layout
    assert (facts.cache_inputs, notes) == (2 * layout.num_groups, [])
    assert cached == {"fp16": "float16", "bf16": "bfloat16"}[dtype]
    graph = cuda_graph(bundle)
    caches = [f"{g}.{part}" for g in range(layout.num_groups) for part in ("key", "value")]
    assert [value.name for value in graph.inputs] == [
        *("input_ids", "write_indices", "kv_lengths"),
        *(f"past_key_values.{name}" for name in caches),
        "logits_to_keep",
    ]
    assert [value.name for value in graph.outputs] == [
        "logits",
        *(f"present.{name}" for name in caches),
        "tokens",
    ]
    standard = feature == "head dim 10"
    operator = "Attention" if standard else "GroupQueryAttention"
    assert facts.attention == {operator: layout.num_layers}
    for group in bundle.manifest["groups"]:
        assert group["cuda_attention"] == operator
    if not standard:
        (total,) = {node.inputs[6].name for node in graph if node.op_type == "GroupQueryAttention"}
        assert total == "lengths/capacity_int32", "read off the caches' shape, by all"


@pytest.mark.parametrize("feature", FEATURES)
def test_weights_are_those_of_the_bundles_own_graph(zoo: Zoo, feature: str) -> None:
    bundle = zoo.bundle("onnxruntime", "fp16", **FEATURES[feature])
    own = ir.load(bundle.graph).graph.initializers
    for name, value in cuda_graph(bundle).initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            assert isinstance(own[name].const_value, ir.ExternalTensor)
            where = (own[name].const_value.location, own[name].const_value.offset)
            assert (tensor.location, tensor.offset) == where
        else:
            assert tensor.nbytes <= 1024, name


@pytest.mark.parametrize("feature", FEATURES)
def test_nothing_is_copied_between_host_and_device(zoo: Zoo, feature: str) -> None:
    """What shapes say stays on the host, but for inputs that the CUDA kernels take from there.

    Such a copy would keep ONNX Runtime from capturing the session as a CUDA graph.
    """
    graph = cuda_graph(zoo.bundle("onnxruntime", "fp16", **FEATURES[feature]))
    from_host = {"Range": (0, 1, 2), "Slice": (1, 2, 3), "GroupQueryAttention": (6,), "Split": (1,)}
    host = {value for value in graph.inputs if value.name == "logits_to_keep"}
    for node in graph:
        taken = from_host.get(node.op_type, ())
        computed = [v for v in node.inputs if v in host or (v and not v.is_initializer())]
        on_host = [value in host for value in computed]
        if node.op_type == "Shape" or (on_host and all(on_host) and not taken):
            host.update(node.outputs)
        for slot, value in enumerate(node.inputs):
            if value in host and node.outputs[0] not in host:
                assert slot in taken, f"{node.name} takes {value.name} from the host"
    assert any(node.op_type == "Shape" for node in graph)


@pytest.mark.parametrize("feature", FEATURES)
def test_split_needs_nothing_from_the_host(zoo: Zoo, feature: str) -> None:
    graph = cuda_graph(zoo.bundle("onnxruntime", "fp16", **FEATURES[feature]))
    for node in graph:
        if node.op_type == "Split":
            widths = {value.shape[-1] for value in node.outputs}
            assert len(node.outputs) == SPLIT_OF_THREE or len(widths) == 1, node.name


def test_bundles_that_have_none(zoo: Zoo) -> None:
    for target, dtype in (("onnxruntime", "fp32"), ("portable", "fp16")):
        bundle = zoo.bundle(target, dtype, kv_owner=(0, 0))
        assert bundle.cuda_graph is None
        assert all("cuda_attention" not in group for group in bundle.manifest["groups"])


def test_groups_without_a_kernel_say_why(zoo: Zoo) -> None:
    for dtype, overrides, why in (
        (torch.float16, {"head_dim": 10}, "multiples of 8, up to 256 on a GPU, not 10"),
        (torch.float16, {"head_dim": 264}, "multiples of 8, up to 256 on a GPU, not 264"),
        (torch.float32, {}, "computes float16 and bfloat16 on a GPU"),
    ):
        spec = make_spec(kv_owner=(0, 0), **overrides)
        canonical = rewrite(zoo.trace(cla, spec, dtype), spec.layout).model
        lowered = lower(CUDA, canonical, spec.layout)
        assert lowered.attention == ("Attention",)
        assert why in lowered.reasons[0]


# What it computes.


@pytest.mark.parametrize("feature", FEATURES)
def test_prompts_chunks_and_ragged_decode(zoo: Zoo, feature: str) -> None:
    """Beside PyTorch, and beside the bundle's own graph, which decodes from the same caches."""
    overrides = FEATURES[feature]
    bundle = zoo.bundle("onnxruntime", "fp16", **overrides)
    model = rounded_model(zoo, **overrides)
    steps = Steps(bundle)
    texts = [tokens_of(length + STEPS, seed) for seed, length in enumerate(LENGTHS)]
    expected = [stateless_logits(model, text) for text in texts]
    for row, length in enumerate(LENGTHS):
        chunk = (length + 1) // 2
        for start in range(0, length, chunk):
            end = min(start + chunk, length)
            logits, tokens = steps.run(row, [texts[row][start:end]], [start])
            assert np.abs(logits[0] - expected[row][start:end]).max() <= CLOSE
            assert np.array_equal(tokens, logits.argmax(-1))
    own = OnnxRuntimeExecutor(bundle, capacity=CAPACITY, slots=len(LENGTHS), threads=1)
    for group in range(bundle.layout.num_groups):
        for pool, part in zip(own.cache(group), ("key", "value"), strict=True):
            pool[...] = steps.pools[f"{group}.{part}"]
    for step in range(STEPS):
        held = [length + step for length in LENGTHS]
        new = [text[n] for text, n in zip(texts, held, strict=True)]
        logits, tokens = steps.run(0, [[token] for token in new], held, keep=1)
        other = own.decode(range(len(LENGTHS)), new, held)
        for row, n in enumerate(held):
            assert np.abs(logits[row, 0] - expected[row][n]).max() <= CLOSE
            assert np.abs(logits[row, 0] - other[row]).max() <= CLOSE
        assert np.array_equal(tokens, logits.argmax(-1))
    for row, text in enumerate(texts):
        for group, kv in enumerate(stateless_kv(model, text)):
            for part, cached in zip(("key", "value"), kv, strict=True):
                pool = steps.pools[f"{group}.{part}"][row]
                assert np.abs(pool[:, : len(text)] - cached).max() <= CLOSE
                assert np.all(pool[:, len(text) :] == 50)


def test_several_rows_with_several_tokens_are_refused(zoo: Zoo) -> None:
    steps = Steps(zoo.bundle("onnxruntime", "fp16", **CLA2))
    with pytest.raises(Exception, match="batch_size must be 1"):
        steps.run(0, [[1, 2], [3, 4]], [0, 0])


@pytest.mark.parametrize(("keep", "rows"), [(None, 5), (2, 2), (5, 5), (9, 5)])
def test_logits_to_keep(zoo: Zoo, keep: int | None, rows: int) -> None:
    steps = Steps(zoo.bundle("onnxruntime", "fp16", **CLA2))
    every, _ = steps.run(0, [tokens_of(5)], [0])
    logits, tokens = steps.run(0, [tokens_of(5)], [0], keep)
    assert np.array_equal(logits, every[:, 5 - rows :])
    assert tokens.shape == (1, rows)


def test_quantised_weights_keep_their_products(zoo: Zoo) -> None:
    bundle = zoo.bundle("onnxruntime", "fp16", "int8", **CLA2)
    found = count(cuda_graph(bundle))
    assert (found["MatMul"], found["Split"]) == (0, 0)
    assert found["MatMulNBits"] == 2 * 7 + 2 * 5 + 1
    steps = Steps(bundle)
    own = OnnxRuntimeExecutor(bundle, capacity=CAPACITY, slots=1, threads=1)
    text = tokens_of(7)
    logits, _ = steps.run(0, [text], [0], keep=1)
    assert np.abs(logits[0] - own.prefill(0, text, 0)).max() <= CLOSE_INT8


# Each module alone.

ROTARY = """<ir_version: 10, opset_import: ["" : 23]>
rotary (
  float16[batch,2,sequence,4] x,
  int64[batch,sequence] positions
) => (
  float16[batch,2,sequence,4] "attn/Concat"
)
<
  float[8,2] cos_table = ["location": "weights"],
  float[8,2] sin_table = ["location": "weights"],
  int64[1] axis_1 = {1}
>
{
  cos_rows = Gather <axis = 0> (cos_table, positions)  #: float[batch,sequence,2]
  cos_column = Unsqueeze (cos_rows, axis_1)  #: float[batch,1,sequence,2]
  cos = Cast <to = 10> (cos_column)  #: float16[batch,1,sequence,2]
  sin_rows = Gather <axis = 0> (sin_table, positions)  #: float[batch,sequence,2]
  sin_column = Unsqueeze (sin_rows, axis_1)  #: float[batch,1,sequence,2]
  sin = Cast <to = 10> (sin_column)  #: float16[batch,1,sequence,2]
  HALVES
  left_1 = Mul (first, cos)  #: float16[batch,2,sequence,2]
  left_2 = Mul (second, sin)  #: float16[batch,2,sequence,2]
  left = Sub (left_1, left_2)  #: float16[batch,2,sequence,2]
  right_1 = Mul (second, cos)  #: float16[batch,2,sequence,2]
  right_2 = Mul (first, sin)  #: float16[batch,2,sequence,2]
  right = Add (right_1, right_2)  #: float16[batch,2,sequence,2]
  "attn/Concat" = Concat <axis = -1> (left, right)  #: float16[batch,2,sequence,4]
}
""".replace(
    "HALVES",
    "first, second = Split <axis = -1, num_outputs = 2> (x)"
    "  #: float16[batch,2,sequence,2], float16[batch,2,sequence,2]",
)


def with_weights(text: str) -> ir.Model:
    model = from_text(text)
    generator = np.random.default_rng(5)
    for value in model.graph.initializers.values():
        if value.const_value is None:
            array = generator.standard_normal(value.shape.numpy()).astype(value.dtype.numpy())
            value.const_value = ir.tensor(array, name=value.name)
    return model


def run(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def test_rounded_rotary_is_one_operator() -> None:
    model = with_weights(ROTARY)
    feeds = {
        "x": np.random.default_rng(0).standard_normal((2, 2, 5, 4)).astype(np.float16),
        "positions": np.array([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]]),
    }
    (before,) = run(model, **feeds)
    assert fuse_rounded_rotary(model) == 1
    assert count(model.graph) == {"Cast": 2, "Gather": 2, "RotaryEmbedding": 1}
    (rotary,) = (node for node in model.graph if node.op_type == "RotaryEmbedding")
    assert rotary.name == "attn/RotaryEmbedding"
    assert [value.dtype for value in rotary.inputs] == [ir.DataType.FLOAT16] * 3
    (after,) = run(model, **feeds)
    np.testing.assert_allclose(after, before, atol=4e-3)  # one rounding in place of three


def test_rows_that_somebody_reads_in_float32_are_left_alone() -> None:
    text = ROTARY.replace('"attn/Concat"\n)', '"attn/Concat",\n  float[batch,sequence,2] twice\n)')
    text = text.replace("  cos_column =", "  twice = Add (cos_rows, cos_rows)\n  cos_column =")
    model = with_weights(text)
    assert fuse_rounded_rotary(model) == 0
    assert count(model.graph)["Mul"] == 4
    run(model, x=np.zeros((1, 2, 1, 4), np.float16), positions=np.zeros((1, 1), np.int64))


@pytest.mark.parametrize("target", ["tensorrt", "portable"])
def test_other_targets_keep_what_the_model_spells_out(zoo: Zoo, target: str) -> None:
    spec = make_spec(kv_owner=(0, 0))
    canonical = rewrite(zoo.trace(cla, spec, torch.float16), spec.layout).model
    assert "RotaryEmbedding" not in count(canonical.graph)
    assert "RotaryEmbedding" not in count(lower(target, canonical, spec.layout).model.graph)
    fused = count(lower("onnxruntime", canonical, spec.layout).model.graph)
    assert (fused["RotaryEmbedding"], fused["Concat"]) == (3, 0)


PRODUCTS = """<ir_version: 10, opset_import: ["" : 23]>
products (
  float[batch,sequence,4] x
) => (
  float[batch,sequence,6] "attn/q/MatMul",
  float[batch,sequence,2] "attn/k/MatMul",
  float[batch,sequence,THIRD] y,
  float[batch,sequence,6] "mlp/gate/MatMul"
)
<
  float[6,4] q = ["location": "weights"],
  float[2,4] k = ["location": "weights"],
  float[THIRD,4] v = ["location": "weights"],
  float[THIRD] bias = ["location": "weights"],
  float[6,4] gate = ["location": "weights"]
>
{
  qt = Transpose <perm = [1, 0]> (q)  #: float[4,6]
  "attn/q/MatMul" = MatMul (x, qt)  #: float[batch,sequence,6]
  kt = Transpose <perm = [1, 0]> (k)  #: float[4,2]
  "attn/k/MatMul" = MatMul (x, kt)  #: float[batch,sequence,2]
  vt = Transpose <perm = [1, 0]> (v)  #: float[4,THIRD]
  "attn/v/MatMul" = MatMul (SOURCE, vt)  #: float[batch,sequence,THIRD]
  y = Add ("attn/v/MatMul", bias)  #: float[batch,sequence,THIRD]
  gt = Transpose <perm = [1, 0]> (gate)  #: float[4,6]
  "mlp/gate/MatMul" = MatMul (x, gt)  #: float[batch,sequence,6]
}
"""
SQUARED = '  squared = Mul (x, x)  #: float[batch,sequence,4]\n  "attn/v/MatMul"'


@pytest.mark.parametrize(
    ("third", "source", "fused", "left"),
    [
        (2, "x", 3, 2),  # three, of any widths; the other module's product is left
        (5, "x", 3, 2),
        (2, "squared", 0, 4),  # two of one input, not of one width
    ],
)
def test_products_of_one_input_in_one_module(
    third: int, source: str, fused: int, left: int
) -> None:
    text = PRODUCTS.replace("THIRD", str(third)).replace("SOURCE", source)
    model = with_weights(text.replace('  "attn/v/MatMul" =', f"{SQUARED} ="))
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    before = run(model, x=x)
    assert fuse_products(model) == fused
    found = count(model.graph)
    assert (found["MatMul"], found["Split"]) == (left, int(fused > 0))
    for old, new in zip(before, run(model, x=x), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-6)
    if fused:
        names = {node.name for node in model.graph}
        assert {"attn/q+k+v/MatMul", "attn/q+k+v/Split", "mlp/gate/MatMul"} <= names


def test_two_products_of_one_width() -> None:
    model = with_weights(
        PRODUCTS.replace("THIRD", "2").replace("SOURCE", "x").replace('"attn/q', '"other/q')
    )
    assert fuse_products(model) == 2
    assert "attn/k+v/MatMul" in {node.name for node in model.graph}


NORMS = """<ir_version: 10, opset_import: ["" : 23]>
norms (
  KIND[batch,sequence,4] a,
  KIND[SIDE] b
) => (
  KIND[batch,sequence,4] z,
  KIND[batch,sequence,4] "two/RMSNormalization"
)
<
  KIND[4] weight = ["location": "weights"],
  KIND[4] other = ["location": "weights"]
>
{
  "one/Add" = Add (a, b)  #: KIND[batch,sequence,4]
  "one/RMSNormalization" = RMSNormalization <HOW> ("one/Add", weight)  #: KIND[batch,sequence,4]
  "two/RMSNormalization" = RMSNormalization <HOW> ("one/Add", other)  #: KIND[batch,sequence,4]
  z = Add ("one/Add", "one/RMSNormalization")  #: KIND[batch,sequence,4]
}
"""


def norms(
    kind: str = "float", side: str = "batch,sequence,4", axis: str = "-1", stash: str = "1"
) -> ir.Model:
    how = f"axis = {axis}, epsilon = 0.01, stash_type = {stash}"
    return with_weights(NORMS.replace("KIND", kind).replace("SIDE", side).replace("HOW", how))


@pytest.mark.parametrize("size", [1, 300], ids=["plain", "squares beyond float16"])
@pytest.mark.parametrize("kind", ["float", "float16"])
def test_a_sum_and_its_norm(kind: str, size: int) -> None:
    model = norms(kind)
    generator = np.random.default_rng(0)
    dtype = np.float32 if kind == "float" else np.float16
    feeds = {
        side: (size * generator.standard_normal((2, 3, 4))).astype(dtype) for side in ("a", "b")
    }
    before = run(model, **feeds)
    assert fuse_norms(model) == 1, "the second norm reads the sum that the first returns"
    found = count(model.graph)
    assert found == {"SkipSimplifiedLayerNormalization": 1, "RMSNormalization": 1, "Add": 1}
    fused = model.graph.node(0)
    assert fused.name == "one/SkipSimplifiedLayerNormalization"
    assert [value.name for value in fused.outputs] == ["one/RMSNormalization", "", "", "one/Add"]
    assert model.opset_imports["com.microsoft"] == 1
    close = 1e-6 if kind == "float" else 2e-3  # two roundings to 11 bits
    for old, new in zip(before, run(model, **feeds), strict=True):
        assert np.isfinite(old).all()
        np.testing.assert_allclose(new, old, rtol=close, atol=close)


@pytest.mark.parametrize(
    "changes",
    [{"side": "4"}, {"axis": "1"}, {"stash": "10"}],
    ids=["a side is stretched", "over other axes", "statistics in float16"],
)
def test_norms_that_are_something_else(changes: dict[str, str]) -> None:
    model = norms(**changes)
    assert fuse_norms(model) == 0
    assert count(model.graph)["RMSNormalization"] == 2
    assert "com.microsoft" not in model.opset_imports


class _Refused:
    """A session whose every run fails, as ONNX Runtime's do."""

    def run_with_iobinding(self, binding: object, options: object) -> None:
        raise RuntimeError("the kernel could not be launched")


def test_what_a_launch_raised_is_not_blamed_for_the_next_failure() -> None:
    operators = CudaOperators.__new__(CudaOperators)
    operators.error = BadInput("head dim 7")
    session = CudaSession.__new__(CudaSession)
    session._operators, session._session = operators, _Refused()
    session._ort, session._graph = onnxruntime, Path("model.onnx")
    call = Bound(None, None)
    with pytest.raises(BadInput, match="head dim 7"):
        session.run(call)
    with pytest.raises(RunError, match="could not be launched"):
        session.run(call)
