"""The rewriter and the lowerings: what every combination must come out as, and what is refused."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from models_zoo import (
    HEADS,
    PATTERNS,
    Zoo,
    drive,
    make_spec,
    stateless_kv,
    stateless_logits,
    tokens_of,
    without_gc,
    write_graph,
)
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from cla_export import weights
from cla_export.engines.onnxruntime import OnnxRuntimeExecutor
from cla_export.errors import GraphError
from cla_export.layout import KVLayout
from cla_export.lower import Lowered, lower
from cla_export.models import cla
from cla_export.rewrite import Rewritten, rewrite
from cla_export.rewrite.structure import check_structure
from cla_export.rewrite.values import attention_nodes
from cla_export.spec import ModelSpec
from cla_export.trace import trace_module

TARGETS = ("portable", "onnxruntime")
CLOSE = 1e-4  # float32 through other kernels; measured errors stay under 1e-5
PROMPTS = [1, 9, 5]  # ragged, and past the window of 4
STEPS = 4

# Every combination.


@pytest.mark.parametrize("window", [None, 4], ids=["full", "window"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_matrix(zoo: Zoo, tmp_path: Path, pattern: str, heads: str, window: int | None) -> None:
    overrides = {
        "kv_owner": PATTERNS[pattern],
        "num_key_value_heads": HEADS[heads],
        "sliding_window": window,
    }
    spec = make_spec(**overrides)
    rewritten = zoo.canonical(**overrides)
    assert rewritten.layout == spec.layout
    check_canonical(rewritten.model, spec)
    for target in TARGETS:
        lowered = lower(target, rewritten.model, spec.layout)
        if target == "portable":
            check_canonical(lowered.model, spec)
        else:
            check_onnxruntime(lowered, spec)
        check_numerics(zoo, lowered, spec, tmp_path / target, overrides)


def check_canonical(model: ir.Model, spec: ModelSpec) -> None:
    graph, layout = model.graph, spec.layout
    assert model.opset_imports == {"": 24}
    assert model.ir_version <= 13
    scatters = [node for node in graph if node.op_type == "TensorScatter"]
    assert len(scatters) == 2 * layout.num_groups
    names = [v.name for v in graph.inputs]
    assert names[:3] == ["input_ids", "write_indices", "kv_lengths"]
    assert names[3:] == [*cache_names(layout, "past_key_values"), "logits_to_keep"]
    check_caches(graph, layout)
    check_weights(graph, spec)
    nodes = attention_nodes(graph)
    assert len(nodes) == layout.num_layers
    for layer, node in enumerate(nodes):
        group = layout.group_of(layer)
        read = [value.name for value in node.inputs[1:3]]
        assert read == [f"present.{group}.key", f"present.{group}.value"]
        assert (node.inputs[3] is not None) == (layout.window[layer] is not None)
        assert node.attributes.get_int("is_causal", 0) == 1
        assert node.inputs[4] is None
        assert node.inputs[5] is None
        assert node.inputs[6] is not None
        assert str(node.name).startswith(f"layers.{layer}/attn/")
    for value in graph.inputs[3:-1]:
        assert [user.op_type for user in value.consumers()] == ["TensorScatter"]


def check_onnxruntime(lowered: Lowered, spec: ModelSpec) -> None:
    graph, layout = lowered.model.graph, spec.layout
    assert lowered.model.opset_imports == {"": 24, "com.microsoft": 1}
    names = [v.name for v in graph.inputs]
    assert names[:2] == ["input_ids", "attention_mask"]
    assert names[2:] == [*cache_names(layout, "past_key_values"), "logits_to_keep"]
    check_caches(graph, layout)
    check_weights(graph, spec)
    kinds = [node.op_type for node in graph]
    assert "TensorScatter" not in kinds
    assert "Attention" not in kinds
    assert lowered.attention == ("GroupQueryAttention",) * layout.num_groups
    nodes = [node for node in graph if node.op_type == "GroupQueryAttention"]
    assert len(nodes) == layout.num_layers
    for layer, node in enumerate(nodes):
        group, owner = layout.group_of(layer), layout.is_owner(layer)
        pair = [f"{group}.key", f"{group}.value"]
        past = "past_key_values" if owner else "present"
        assert [value.name for value in node.inputs[3:5]] == [f"{past}.{name}" for name in pair]
        assert len(node.outputs) == (3 if owner else 1)
        if owner:
            assert [v.name for v in node.outputs[1:]] == [f"present.{name}" for name in pair]
        new = [value.producer().op_type for value in node.inputs[1:3]]
        assert new != ["Slice", "Slice"] if owner else new == ["Slice", "Slice"]
        assert node.attributes.get_int("num_heads", 0) == spec.q_heads
        assert node.attributes.get_int("kv_num_heads", 0) == layout.kv_heads[layer]
        assert node.attributes.get_int("local_window_size", 0) == (layout.window[layer] or 0)
        assert math.isclose(node.attributes.get_float("scale", 0), 0.25, rel_tol=1e-6)
    for value in graph.inputs[2:-1]:
        assert len(value.consumers()) == 1, "only the owner reads the past"


def cache_names(layout: KVLayout, prefix: str) -> list[str]:
    return [f"{prefix}.{g}.{part}" for g in range(layout.num_groups) for part in ("key", "value")]


def check_caches(graph: ir.Graph, layout: KVLayout) -> None:
    assert [v.name for v in graph.outputs] == ["logits", *cache_names(layout, "present")]
    caches = [v for v in (*graph.inputs, *graph.outputs) if ".key" in v.name or ".value" in v.name]
    assert len(caches) == 4 * layout.num_groups
    for value in caches:
        group = layout.groups[int(value.name.split(".")[1])]
        assert [str(d) for d in value.shape] == [
            "batch",
            str(group.kv_heads),
            "capacity",
            str(group.head_dim),
        ]
        assert value.dtype == ir.DataType.FLOAT


def check_weights(graph: ir.Graph, spec: ModelSpec) -> None:
    """Each weight once, sharers without K and V, nothing else of any size."""
    expected = set(spec.weights()) | set(cla.constants(spec))
    found = {name for name, value in graph.initializers.items() if value.const_value is None}
    assert found == expected
    kv_weights = ("k_proj.weight", "v_proj.weight")
    projections = {name for name in found if name.endswith(kv_weights)}
    assert len(projections) == 2 * spec.layout.num_groups
    for name in set(graph.initializers) - expected:
        assert graph.initializers[name].const_value.size <= 4, f"{name} is no small constant"


def check_numerics(
    zoo: Zoo, lowered: Lowered, spec: ModelSpec, folder: Path, overrides: dict
) -> None:
    weights.attach(lowered.model, zoo.checkpoint(**overrides), cla.constants(spec))
    positions, vocab = spec.max_positions, spec.vocab_size
    bundle = write_graph(folder, lowered, spec.layout, vocab=vocab, positions=positions)
    executor = OnnxRuntimeExecutor(bundle, capacity=16, slots=len(PROMPTS), threads=1)
    for group in range(spec.layout.num_groups):
        for pool in executor.cache(group):
            pool[...] = 50  # stale numbers must not matter
    texts = [tokens_of(prompt + STEPS, seed) for seed, prompt in enumerate(PROMPTS)]
    model = zoo.model(**overrides)
    for row, logits in enumerate(drive(executor, texts, PROMPTS)):
        expected = stateless_logits(model, texts[row])[PROMPTS[row] - 1 :]
        assert np.abs(logits - expected).max() <= CLOSE
        for group, kv in enumerate(stateless_kv(model, texts[row])):
            for pool, cached in zip(executor.cache(group), kv, strict=True):
                assert np.abs(pool[row][:, : len(texts[row])] - cached).max() <= CLOSE


FEATURES = {
    "separate kv norm": {"separate_kv_norm": True},
    "qk norm": {"qk_norm": True},
    "bias": {"attention_bias": True},
    "untied": {"tie_word_embeddings": False},
    "mixed windows": {
        "kv_owner": (0, 1, 1, 0),
        "sliding_window": 4,
        "layer_types": [f"{kind}_attention" for kind in ("full", "sliding", "sliding", "full")],
    },
    "head dim 10": {"head_dim": 10, "sliding_window": 4},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_features(zoo: Zoo, tmp_path: Path, feature: str) -> None:
    overrides = {"kv_owner": (0, 0), **FEATURES[feature]}
    spec = make_spec(**overrides)
    rewritten = zoo.canonical(**overrides)
    assert rewritten.layout == spec.layout
    for target in TARGETS:
        lowered = lower(target, rewritten.model, spec.layout)
        check_weights(lowered.model.graph, spec)
        check_numerics(zoo, lowered, spec, tmp_path / target, overrides)


def test_a_head_dim_that_the_fused_operator_refuses(zoo: Zoo) -> None:
    overrides = {"kv_owner": (0, 0), **FEATURES["head dim 10"]}
    lowered = lower("onnxruntime", zoo.canonical(**overrides).model, make_spec(**overrides).layout)
    assert lowered.attention == ("Attention",)
    assert "multiples of 8, not 10" in lowered.reasons[0]
    kinds = [node.op_type for node in lowered.model.graph]
    assert kinds.count("TensorScatter") == 2
    assert kinds.count("Attention") == 2
    assert "com.microsoft" not in lowered.model.opset_imports


def test_the_same_model_comes_out_the_same(zoo: Zoo) -> None:
    spec = make_spec(kv_owner=(0, 0))
    stateless = zoo.trace(cla, spec, torch.float32)
    before = text_of(stateless)
    first, second = (text_of(rewrite(stateless, spec.layout).model) for _ in range(2))
    assert first == second
    assert text_of(stateless) == before, "rewrite works on a copy"
    names = [line[1] for line in first]
    assert len(set(names)) == len(names)


def text_of(model: ir.Model) -> list[tuple]:
    return [
        (
            node.op_type,
            node.name,
            [value.name if value is not None else None for value in node.inputs],
            [value.name for value in node.outputs],
            sorted((name, _plain(attribute.value)) for name, attribute in node.attributes.items()),
        )
        for node in model.graph
    ]


def _plain(value: object) -> str:
    return str(value.numpy().tolist() if isinstance(value, ir.TensorProtocol) else value)


def test_discovery_needs_no_config(zoo: Zoo) -> None:
    spec = make_spec(kv_owner=(0, 1, 0, 1))
    assert rewrite(zoo.trace(cla, spec, torch.float32)).layout == spec.layout


PROMISES = {
    "owner": ({"kv_owner": (0, 1)}, "layer 1", "the graph says owner 0, the config promises 1"),
    "KV heads": (
        {"kv_owner": (0, 0), "num_key_value_heads": 4},
        "layer 0",
        "the graph says KV heads 2, the config promises 4",
    ),
    "head dim": (
        {"kv_owner": (0, 0), "head_dim": 32},
        "layer 0",
        "the graph says head dim 16, the config promises 32",
    ),
    "window": (
        {"kv_owner": (0, 0), "sliding_window": 7},
        "layer 0",
        "the graph says window None, the config promises 7",
    ),
    "layers": (
        {"kv_owner": (0, 0, 0)},
        "the config promises 3 layers",
        "the graph has 2 attention nodes",
    ),
}


@pytest.mark.parametrize("what", PROMISES)
def test_a_config_that_promises_another_layout(zoo: Zoo, what: str) -> None:
    promise, *parts = PROMISES[what]
    stateless = zoo.trace(cla, make_spec(kv_owner=(0, 0)), torch.float32)
    message = refusal(stateless, make_spec(**promise).layout)
    for part in (*parts, *(() if what == "layers" else ("Attention node", "layers.0.self_attn"))):
        assert part in message.replace("layers.1.", "layers.0."), message


def refusal(stateless: ir.Model, expected: KVLayout | None = None) -> str:
    """The message of a rewrite that is refused, the graph being left as it was."""
    before = text_of(stateless)
    with pytest.raises(GraphError) as caught:
        rewrite(stateless, expected)
    assert text_of(stateless) == before
    return str(caught.value)


def reads_the_past(graph: ir.Graph) -> None:
    node = attention_nodes(graph)[1]
    node.replace_input_with(1, graph.inputs[3])


def writes_twice(graph: ir.Graph) -> None:
    scatter = next(node for node in graph if node.op_type == "TensorScatter")
    again = ir.node("TensorScatter", [scatter.outputs[0], *scatter.inputs[1:]])
    graph.append(again)


def lacks_an_output(graph: ir.Graph) -> None:
    graph.outputs.pop()


def has_another_input(graph: ir.Graph) -> None:
    graph.inputs.append(ir.Value(name="past_key_values.1.key"))


WRONG = {
    "layer 1 reads ['past_key_values.0.key', 'present.0.value']": reads_the_past,
    "3 TensorScatter nodes; expected 2 for each of 1 groups": writes_twice,
    "cache outputs are ['present.0.key']": lacks_an_output,
    "cache inputs are": has_another_input,
}


@pytest.mark.parametrize("message", WRONG)
def test_structure_is_checked(zoo: Zoo, message: str) -> None:
    model = zoo.canonical(kv_owner=(0, 0)).model
    layout = make_spec(kv_owner=(0, 0)).layout
    check_structure(model, layout)
    WRONG[message](model.graph)
    with pytest.raises(GraphError) as caught:
        check_structure(model, layout)
    assert message in str(caught.value)


# Modules of other people: small, written as such code is, traced like --module would.

VOCAB, WIDTH, Q_HEADS, KV_HEADS, DIM, POSITIONS = 23, 16, 4, 2, 8, 32


def causal(length: int) -> Tensor:
    return distance(length) >= 0


def distance(length: int) -> Tensor:
    position = torch.arange(length)
    return position[:, None] - position[None, :]


class Foreign(nn.Module):
    """Layers of attention over learned positions and shared KV; subclasses change one thing."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.positions = nn.Embedding(POSITIONS, WIDTH)
        self.q = nn.ModuleList(nn.Linear(WIDTH, Q_HEADS * DIM) for _ in range(layers))
        self.k = nn.ModuleList(nn.Linear(WIDTH, KV_HEADS * DIM) for _ in range(layers))
        self.v = nn.ModuleList(nn.Linear(WIDTH, KV_HEADS * DIM) for _ in range(layers))
        self.o = nn.ModuleList(nn.Linear(Q_HEADS * DIM, WIDTH) for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.positions(position_ids)
        shared = None
        for layer in range(len(self.q)):
            query = self.split(self.q[layer](x))
            key, value = self.keys_values(layer, x, shared)
            shared = shared or (key, value)
            y = self.attend(layer, query, key, value, self.mask(input_ids.shape[1]))
            x = x + self.o[layer](y.transpose(1, 2).flatten(2))
        return self.head(x)

    def keys_values(
        self, layer: int, x: Tensor, shared: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        return shared or (self.split(self.k[layer](x)), self.split(self.v[layer](x)))

    def attend(
        self, _layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)

    def mask(self, length: int) -> Tensor | None:
        return causal(length)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, DIM).transpose(1, 2)


def with_mask(mask: Callable[[int], Tensor | None], layers: int = 1) -> Foreign:
    module = Foreign(layers)
    module.mask = mask
    return module


def traced(module: nn.Module) -> ir.Model:
    with without_gc():
        return trace_module(module)


def check_foreign(module: nn.Module, folder: Path, expected: KVLayout) -> Rewritten:
    """Rewrite, lower to both targets, run, compare with the module."""
    rewritten = rewrite(traced(module))
    assert rewritten.layout == expected
    texts = [tokens_of(prompt + STEPS, seed, VOCAB) for seed, prompt in enumerate(PROMPTS)]
    with torch.inference_mode():
        references = [
            module(torch.tensor([text]), torch.arange(len(text))[None])[0].numpy() for text in texts
        ]
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for target in TARGETS:
        lowered = lower(target, rewritten.model, expected)
        for name, value in lowered.model.graph.initializers.items():
            if value.const_value is None:
                value.const_value = ir.tensor(state[name].detach().numpy(), name=name)
        bundle = write_graph(folder / target, lowered, expected, vocab=VOCAB, positions=POSITIONS)
        executor = OnnxRuntimeExecutor(bundle, capacity=20, slots=len(PROMPTS), threads=1)
        for row, logits in enumerate(drive(executor, texts, PROMPTS)):
            assert np.abs(logits - references[row][PROMPTS[row] - 1 :]).max() <= CLOSE
    return rewritten


def test_a_causal_mask_written_out(tmp_path: Path) -> None:
    check_foreign(Foreign(), tmp_path, KVLayout.create((0, 0), KV_HEADS, DIM))


def test_an_additive_mask(tmp_path: Path) -> None:
    lowest = torch.finfo(torch.float32).min
    module = with_mask(lambda n: torch.zeros(n, n).masked_fill((distance(n) < 0), lowest))
    check_foreign(module, tmp_path, KVLayout.create((0,), KV_HEADS, DIM))


def test_a_window_as_a_band_of_distances(tmp_path: Path) -> None:
    module = with_mask(lambda n: (distance(n) >= 0) & (distance(n) <= 3))
    check_foreign(module, tmp_path, KVLayout.create((0,), KV_HEADS, DIM, 4))


LARGE_WINDOWS = {
    "at most": lambda n: (distance(n) >= 0) & (distance(n) <= 4095),
    "additive": lambda n: torch.zeros(n, n).masked_fill(
        (distance(n) < 0) | (distance(n) >= 4096), -torch.inf
    ),
}


@pytest.mark.parametrize("spelling", LARGE_WINDOWS)
def test_a_window_too_large_to_evaluate(spelling: str) -> None:
    """4096 squared booleans are too many; a smaller number stands in for it."""
    found = rewrite(traced(with_mask(LARGE_WINDOWS[spelling]))).layout
    assert found == KVLayout.create((0,), KV_HEADS, DIM, 4096)


def test_repeat_kv_written_out(tmp_path: Path) -> None:
    """Heads expanded by hand before attention: the cache still holds the true KV heads."""

    class Repeats(Foreign):
        def attend(self, _layer, query, key, value, mask):
            def repeat(x: Tensor) -> Tensor:
                batch, heads, length, dim = x.shape
                copies = x[:, :, None].expand(batch, heads, Q_HEADS // heads, length, dim)
                return copies.reshape(batch, Q_HEADS, length, dim)

            return F.scaled_dot_product_attention(query, repeat(key), repeat(value), attn_mask=mask)

    rewritten = check_foreign(Repeats(), tmp_path, KVLayout.create((0, 0), KV_HEADS, DIM))
    assert report(rewritten, "strip_repeat_kv").fired == 2


def test_why_nothing_was_stripped() -> None:
    found = report(rewrite(traced(Foreign(1))), "strip_repeat_kv")
    assert found.fired == 0
    assert {skip.reason.split(": ")[0] for skip in found.skips} == {"key", "value"}
    assert all("true KV heads" in skip.reason for skip in found.skips)
    assert all("Attention node" in skip.node for skip in found.skips)


def report(rewritten: Rewritten, name: str):
    (found,) = [report for report in rewritten.reports if report.name == name]
    return found


class OwnNorms(Foreign):
    """As Hunyuan-Large: K and V shared as projected and rotated, each layer norms K for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.query_norm = nn.ModuleList(nn.RMSNorm(DIM, 1e-5) for _ in range(2))
        self.key_norm = nn.ModuleList(nn.RMSNorm(DIM, 1e-5) for _ in range(2))
        with torch.no_grad():
            for norm in (*self.query_norm, *self.key_norm):
                norm.weight.copy_(1 + 0.5 * torch.randn(DIM))
        cos, sin = cla.rope_tables(POSITIONS, DIM, 10000.0)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        rope = [table[position_ids].unsqueeze(1) for table in (self.cos, self.sin)]
        key = cla.rotate(self.split(self.k[0](x)), *rope)
        value = self.split(self.v[0](x))
        for layer in range(2):
            query = self.query_norm[layer](cla.rotate(self.split(self.q[layer](x)), *rope))
            y = F.scaled_dot_product_attention(
                query, self.key_norm[layer](key), value, is_causal=True, enable_gqa=True
            )
            x = x + self.o[layer](y.transpose(1, 2).flatten(2))
        return self.head(x)


def test_key_norms_of_each_layer_move_to_the_queries(tmp_path: Path) -> None:
    rewritten = check_foreign(OwnNorms(), tmp_path, KVLayout.create((0, 0), KV_HEADS, DIM))
    assert report(rewritten, "hoist_key_scale").fired == 2
    assert report(rewritten, "fuse_rotary").fired == 3


def test_a_key_norm_of_one_layer_stays(zoo: Zoo) -> None:
    found = report(zoo.canonical(kv_owner=(0, 0), qk_norm=True), "hoist_key_scale")
    assert found.fired == 0
    assert all("not an RMSNormalization" in skip.reason for skip in found.skips)


def test_a_head_that_is_no_matrix_product(tmp_path: Path) -> None:
    """Logits that mix tokens of the call in other ways are gathered after the head."""

    class Residual(Foreign):
        def forward(self, input_ids, position_ids):
            skip = self.positions(position_ids)[..., :1]
            return super().forward(input_ids, position_ids) + skip

    rewritten = check_foreign(Residual(1), tmp_path, KVLayout.create((0,), KV_HEADS, DIM))
    skips = report(rewritten, "keep_last_logits").skips
    assert len(skips) == 1
    assert "all logits are computed" in skips[0].reason


# What cannot be cached is refused, with the node's name.


def alibi(length: int) -> Tensor:
    return (-0.5 * distance(length)).masked_fill(distance(length) < 0, -torch.inf)


def prefix(length: int) -> Tensor:
    return causal(length) | (torch.arange(length) < 3)


MASKS = {
    "none": (lambda _: None, ["is_causal=0", "sees the future", "must be causal"]),
    "alibi": (alibi, ["its mask cannot be used", "a position bias?"]),
    "prefix": (prefix, ["neither causal nor a sliding window", "xxx"]),
    "strictly causal": (
        lambda n: distance(n) > 0,
        ["neither causal nor a sliding window", "at length 1"],
    ),
    "windows by length": (
        lambda n: (distance(n) >= 0) & ((distance(n) < 3) | (distance(n) > 5)),
        ["neither causal nor a sliding window"],
    ),
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_that_cannot_be_cached(kind: str) -> None:
    mask, parts = MASKS[kind]
    message = refusal(traced(with_mask(mask)))
    for part in ("Attention node", *parts):
        assert part in message, message


def test_a_mask_that_depends_on_weights() -> None:
    class Learned(Foreign):
        def __init__(self) -> None:
            super().__init__(layers=1)
            self.bias = nn.Parameter(torch.zeros(1))

        def mask(self, length):
            return alibi(length) * self.bias

    message = refusal(traced(Learned()))
    assert "Attention node" in message
    assert "depends on weight bias" in message


def test_a_mask_that_depends_on_tokens() -> None:
    class Padded(Foreign):
        def forward(self, input_ids, position_ids):
            self.padding = input_ids != 0
            return super().forward(input_ids, position_ids)

        def mask(self, length):
            return causal(length) & self.padding[:, None, None, :]

    message = refusal(traced(Padded(1)))
    assert "Attention node" in message
    assert "depends on the tokens of input_ids" in message


def test_keys_shared_but_values_not() -> None:
    class HalfShared(Foreign):
        def keys_values(self, layer, x, shared):
            key, value = super().keys_values(layer, x, None)
            return (shared[0] if shared else key), value

    message = refusal(traced(HalfShared()))
    assert "Attention node" in message
    assert "layer 1 reads the keys of layer 0 but the values of layer 1" in message


def test_values_shared_but_keys_not() -> None:
    class HalfShared(Foreign):
        def keys_values(self, layer, x, shared):
            key, value = super().keys_values(layer, x, None)
            return key, (shared[1] if shared else value)

    message = refusal(traced(HalfShared()))
    assert "layer 1 reads the keys of layer 1 but the values of layer 0" in message


def test_no_attention_at_all() -> None:
    class Linear(Foreign):
        def attend(self, _layer, query, key, value, mask):
            key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
            return (query @ key.transpose(2, 3)).masked_fill(~mask, 0.0) @ value

    message = refusal(traced(Linear(1)))
    assert "the graph has no attention: no Attention node, and no softmax" in message
    assert "MatMul" in message


@pytest.fixture(scope="module")
def stateless(zoo: Zoo) -> ir.Model:
    return zoo.trace(cla, make_spec(kv_owner=(0, 0)), torch.float32)


def test_a_graph_that_has_a_cache_already(stateless: ir.Model) -> None:
    model = stateless.clone()
    node = attention_nodes(model.graph)[1]
    node.resize_inputs(6)
    for slot, part in ((4, "key"), (5, "value")):
        past = ir.Value(
            name=f"past_{part}",
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape(["b", 2, "t", 16]),
        )
        model.graph.inputs.append(past)
        node.replace_input_with(slot, past)
    message = refusal(model)
    assert f"Attention node {node.name!r}" in message
    assert "has a cache already" in message


def test_inputs_of_other_names(stateless: ir.Model) -> None:
    model = stateless.clone()
    model.graph.inputs[1].name = "positions"
    message = refusal(model)
    assert "no input 'position_ids' (it has input_ids, positions)" in message


def test_axes_that_are_fixed(stateless: ir.Model) -> None:
    model = stateless.clone()
    model.graph.inputs[0].shape = ir.Shape([1, model.graph.inputs[0].shape[1]])
    assert "expected [B, S] with both axes dynamic" in refusal(model)
