"""The reference decoder against independent ones, and what its definition promises."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_zoo import (
    BASE,
    PATTERNS,
    Zoo,
    make_config,
    make_spec,
    random_model,
    rows,
    stateless_logits,
    tokens_of,
)
from torch.nn import functional as F  # noqa: N812

from cla_export.engines.torch import TorchExecutor
from cla_export.errors import BadInput
from cla_export.layout import identity
from cla_export.models import cla
from cla_export.models.cla import ClaDecoder

CLOSE = 2e-5  # float32, same operators over differently sized blocks
EXACT = 2e-6  # float64 inside, rounded to float32 logits of up to 16 on the way out


def dense_llama(weights: dict[str, torch.Tensor], config: dict, ids: torch.Tensor) -> torch.Tensor:
    """A plain Llama-style decoder, every layer its own K and V, written without cla_export."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim, eps = config["head_dim"], config["rms_norm_eps"]
    length = ids.shape[1]
    exponent = torch.arange(0, dim, 2).float() / dim
    angles = torch.arange(length).float()[:, None] * (1.0 / (10000.0**exponent))
    cos, sin = angles.cos(), angles.sin()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], weights[name], eps)

    def split(x: torch.Tensor, count: int) -> torch.Tensor:
        return x.view(*x.shape[:-1], count, dim).transpose(1, 2)

    def rope(x: torch.Tensor) -> torch.Tensor:
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        y = norm(x, at + "input_layernorm.weight")
        q = rope(split(F.linear(y, weights[at + "self_attn.q_proj.weight"]), heads))
        k = rope(split(F.linear(y, weights[at + "self_attn.k_proj.weight"]), kv_heads))
        v = split(F.linear(y, weights[at + "self_attn.v_proj.weight"]), kv_heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        y = y.transpose(1, 2).flatten(2)
        x = x + F.linear(y, weights[at + "self_attn.o_proj.weight"])
        y = norm(x, at + "post_attention_layernorm.weight")
        gate = F.silu(F.linear(y, weights[at + "mlp.gate_proj.weight"]))
        y = gate * F.linear(y, weights[at + "mlp.up_proj.weight"])
        x = x + F.linear(y, weights[at + "mlp.down_proj.weight"])
    return F.linear(norm(x, "model.norm.weight"), weights["model.embed_tokens.weight"])


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_identity_map_is_a_dense_llama_bitwise(kv_heads: int) -> None:
    config = make_config(kv_owner=identity(3), num_key_value_heads=kv_heads)
    model = random_model(cla.read_spec(config))
    ids, positions = rows(2, 17)
    with torch.inference_mode():
        ours = model(ids, positions)
        theirs = dense_llama(dict(model.named_parameters()), config, ids)
    assert 1.0 < float(ours.std()) < 6.0, "the comparison needs logits that mean something"
    assert torch.equal(ours, theirs)


def test_absent_owner_map_is_the_identity_bitwise() -> None:
    absent, identical = make_spec(), make_spec(kv_owner=identity(4))
    assert absent == identical
    ids, positions = rows(2, 9)
    with torch.inference_mode():
        logits = [random_model(spec)(ids, positions) for spec in (absent, identical)]
    assert torch.equal(*logits)


def test_identity_map_is_transformers_llama(zoo: Zoo, tmp_path) -> None:
    """The same folder with another model_type, read by the library everybody uses."""
    from transformers import LlamaConfig, LlamaForCausalLM

    overrides = {"kv_owner": identity(3), "tie_word_embeddings": False}
    checkpoint = zoo.checkpoint(**overrides)
    keys = make_config(**overrides)
    del keys["model_type"], keys["kv_owner"]
    LlamaConfig(**keys, rope_theta=10000.0, attn_implementation="eager").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").symlink_to(checkpoint.folder / "model.safetensors")
    llama = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids, positions = rows(2, 21)
    with torch.inference_mode():
        theirs = llama(input_ids=ids).logits
        ours = zoo.model(**overrides)(ids, positions)
    assert float((ours - theirs).abs().max()) < 1e-5


FEATURES = {
    "plain": {},
    "separate kv norm": {"separate_kv_norm": True},
    "qk norm": {"qk_norm": True},
    "bias": {"attention_bias": True},
    "untied": {"tie_word_embeddings": False},
    "sliding window": {"sliding_window": 5},
    "all": {
        "separate_kv_norm": True,
        "qk_norm": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "sliding_window": 5,
    },
}


@pytest.mark.parametrize("pattern", ["dense", "CLA2", "non-contiguous"])
@pytest.mark.parametrize("feature", FEATURES)
def test_parameters_are_those_the_spec_lists(feature: str, pattern: str) -> None:
    spec = make_spec(kv_owner=PATTERNS[pattern], **FEATURES[feature])
    model = cla.build(spec)
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert found == spec.weights()
    assert sum(math.prod(shape) for shape in found.values()) == spec.parameters()
    for layer, owner in enumerate(spec.layout.kv_owner):
        own = {n for n in found if n.startswith(f"model.layers.{layer}.")}
        parts = ("k_proj", "v_proj", "k_norm", "kv_layernorm")
        kv = {name for name in own if any(part in name for part in parts)}
        assert bool(kv) == (owner == layer), f"layer {layer} has {sorted(kv)}"
    assert ("lm_head.weight" in found) == (not spec.tie_embeddings)


@pytest.mark.parametrize("feature", [name for name in FEATURES if name != "plain"])
def test_each_feature_changes_the_logits(feature: str) -> None:
    """An option that is read and then ignored would export the wrong model."""
    ids, positions = rows(1, 12)
    plain = random_model(make_spec(kv_owner=(0, 0)))
    other = random_model(make_spec(kv_owner=(0, 0), **FEATURES[feature]))
    shared = dict(plain.named_parameters())
    with torch.inference_mode():
        for name, parameter in other.named_parameters():
            if name in shared:
                parameter.copy_(shared[name])
        assert not torch.allclose(plain(ids, positions), other(ids, positions), atol=1e-3)


@st.composite
def owner_maps(draw: st.DrawFn) -> tuple[int, ...]:
    owners: list[int] = []
    for layer in range(draw(st.integers(1, 5))):
        owners.append(draw(st.sampled_from([*sorted(set(owners)), layer])))
    return tuple(owners)


@settings(max_examples=25, deadline=None)
@given(
    owners=owner_maps(),
    kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([2, 6, 16, 32, 46, 90]),
    window=st.sampled_from([None, 1, 3, 8]),
    separate=st.booleans(),
    qk_norm=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_stateful_equals_stateless(
    owners: tuple[int, ...],
    kv_heads: int,
    head_dim: int,
    window: int | None,
    separate: bool,
    qk_norm: bool,
    seed: int,
) -> None:
    """Ragged first prompts, chunks and single tokens give the logits of the whole text at once."""
    spec = make_spec(
        kv_owner=owners,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        separate_kv_norm=separate,
        qk_norm=qk_norm,
        sliding_window=window,
    )
    model = random_model(spec, seed).double()
    texts = [tokens_of(19, seed), tokens_of(19, seed + 1)]
    expected = [stateless_logits(model, text) for text in texts]
    executor = TorchExecutor(model, capacity=24, slots=3)
    held = [3, 9]
    first = executor.prefill_rows(1, [text[:n] for text, n in zip(texts, held, strict=True)])
    for row in (0, 1):
        assert np.abs(first[row] - expected[row][held[row] - 1]).max() < EXACT
    chunk = executor.prefill(1, texts[0][3:9], 3, keep=6)
    assert np.abs(chunk - expected[0][3:9]).max() < EXACT
    held = [9, 9]
    for step in range(9, 19):
        logits = executor.decode([1, 2], [texts[0][step], texts[1][step]], [step, step])
        for row in (0, 1):
            assert np.abs(logits[row] - expected[row][step]).max() < EXACT


@pytest.mark.parametrize("head_dim", [32, 46, 90, 512])
def test_any_head_dim_that_need_not_divide_the_hidden_size(head_dim: int) -> None:
    spec = make_spec(kv_owner=(0, 0), head_dim=head_dim)
    assert spec.q_heads * head_dim != spec.hidden_size
    model, text = random_model(spec), tokens_of(12)
    expected = stateless_logits(model, text)
    executor = TorchExecutor(model, capacity=16)
    executor.prefill(0, text[:5], 0)
    for step in range(5, 12):
        logits = executor.decode([0], [text[step]], [step])
        assert np.abs(logits[0] - expected[step]).max() < CLOSE
    for pool in executor.cache(0):
        assert pool.shape == (1, 2, 16, head_dim)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("pattern", ["dense", "CLA2", "non-contiguous", "one-owner"])
def test_a_token_changes_no_earlier_logits(pattern: str, window: int | None) -> None:
    model = random_model(make_spec(kv_owner=PATTERNS[pattern], sliding_window=window))
    text = tokens_of(16)
    before = stateless_logits(model, text)
    for changed in (1, 7, 15):
        other = [*text[:changed], (text[changed] + 1) % 61, *text[changed + 1 :]]
        after = stateless_logits(model, other)
        assert np.array_equal(before[:changed], after[:changed])
        assert not np.allclose(before[changed], after[changed], atol=1e-3)


@pytest.mark.parametrize("owners", [(0,), (0, 0), (0, 1, 0)])
def test_a_token_beyond_every_window_has_no_influence(owners: tuple[int, ...]) -> None:
    window = 3
    model = random_model(make_spec(kv_owner=owners, sliding_window=window))
    text = tokens_of(20)
    changed = [(text[0] + 1) % 61, *text[1:]]
    before, after = stateless_logits(model, text), stateless_logits(model, changed)
    entering: list[int] = []  # the last position that token 0 has reached, before each layer
    reach = 0
    for owner in owners:
        entering.append(reach)
        reach = max(reach, entering[owner] + window - 1)
    assert np.array_equal(before[reach + 1 :], after[reach + 1 :])
    assert not np.allclose(before[reach], after[reach], atol=1e-6)


def test_the_window_counts_the_query_itself() -> None:
    """One layer with an explicit mask, written out."""
    window, length = 4, 10
    spec = make_spec(kv_owner=(0,), sliding_window=window)
    model = random_model(spec)
    layer = model.model.layers[0]
    ids, positions = rows(1, length)
    with torch.inference_mode():
        x = model.model.embed_tokens(ids)
        rope = tuple(
            table[positions].unsqueeze(1) for table in (model.model.rope_cos, model.model.rope_sin)
        )
        key, value = layer.project_kv(x, rope)
        y = layer.input_layernorm(x)
        query = layer.self_attn.q_proj(y).view(1, length, 4, 16).transpose(1, 2)
        query = cla.rotate(query, *rope)
        expected = torch.zeros(1, 4, length, 16)
        for i in range(length):
            for head in range(4):
                seen = slice(max(0, i - window + 1), i + 1)
                scores = key[0, head // 2, seen] @ query[0, head, i] / 16**0.5
                expected[0, head, i] = scores.softmax(-1) @ value[0, head // 2, seen]
        mask = cla.stateless_mask(length, window, torch.device("cpu"))
        got = layer.self_attn(y, rope, (key, value), mask)
        expected = layer.self_attn.o_proj(expected.transpose(1, 2).flatten(2))
    assert float((got - expected).abs().max()) < CLOSE


def attention_outputs(model: ClaDecoder, ids: torch.Tensor, positions: torch.Tensor) -> list:
    """What enters each layer's o_proj."""
    found: list[torch.Tensor] = []

    def catch(_module: object, arguments: tuple[torch.Tensor]) -> None:
        found.append(arguments[0].clone())

    projections = [layer.self_attn.o_proj for layer in model.model.layers]
    handles = [projection.register_forward_pre_hook(catch) for projection in projections]
    with torch.inference_mode():
        model(ids, positions)
    for handle in handles:
        handle.remove()
    return found


def test_sharers_attend_to_what_their_owner_projects() -> None:
    """With V of one owner zeroed, exactly its group's attention outputs are zero."""
    spec = make_spec(kv_owner=(0, 1, 0, 1, 4))
    ids, positions = rows(1, 8)
    for owner in (0, 1, 4):
        model = random_model(spec)
        with torch.no_grad():
            model.model.layers[owner].self_attn.v_proj.weight.zero_()
        zero = [not output.any() for output in attention_outputs(model, ids, positions)]
        assert zero == [o == owner for o in spec.layout.kv_owner]


def test_zeroing_an_owners_keys_changes_its_sharers() -> None:
    """Without keys every visible position weighs the same: attention is a running mean of V."""
    spec = make_spec(kv_owner=(0, 1, 0, 1))
    ids, positions = rows(1, 8)
    model = random_model(spec)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.zero_()
        outputs = attention_outputs(model, ids, positions)
        _, groups = model.forward_with_kv(ids, positions)
    for layer, owner in enumerate(spec.layout.kv_owner):
        value = groups[spec.layout.group_of(layer)][1]
        mean = value.cumsum(2) / torch.arange(1, 9)[:, None]
        mean = mean.repeat_interleave(2, dim=1).transpose(1, 2).flatten(2)
        assert torch.allclose(outputs[layer], mean, atol=1e-5) == (owner == 1)


def test_forward_leaves_no_state_behind() -> None:
    model = random_model(make_spec(kv_owner=(0, 0, 2)))
    ids, positions = rows(2, 7)
    with torch.inference_mode():
        first = model(ids, positions)
        model(*rows(1, 12, seed=5))
        assert torch.equal(model(ids, positions), first)
        assert torch.equal(model.forward_with_kv(ids, positions)[0], first)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"head_dim": 15}, ["head_dim is 15", "RoPE rotates halves"]),
        ({"hidden_act": "gelu"}, ["hidden_act is 'gelu'", "'silu'"]),
        ({"vocab_size": None}, ["'vocab_size' is missing"]),
        ({"vocab_size": 61.0}, ["vocab_size is 61.0", "positive integer"]),
        ({"intermediate_size": -4}, ["intermediate_size is -4", "positive integer"]),
        ({"intermediate_size": True}, ["intermediate_size is True", "positive integer"]),
        ({"rms_norm_eps": "tiny"}, ["rms_norm_eps is 'tiny'", "positive number"]),
        ({"qk_norm": 1}, ["qk_norm is 1", "true or false"]),
        ({"rope_scaling": {"rope_type": "yarn"}}, ["'yarn'", "plain RoPE"]),
        ({"rope_scaling": "yarn"}, ["rope_scaling is 'yarn'", "an object"]),
        (
            {"kv_owner": (0, 1), "per_layer_config": {"1": {"head_dim": 32}}},
            ["head_dim", "layer 1 has 32", "layer 0 has 16"],
        ),
    ],
)
def test_a_config_that_is_wrong_names_its_key(overrides: dict, parts: list[str]) -> None:
    with pytest.raises(BadInput) as caught:
        make_spec(**overrides)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rope_theta_in_either_place(key: str) -> None:
    nested = make_spec(**{key: {"rope_type": "default", "rope_theta": 5000.0}})
    assert nested.rope_theta == make_spec(rope_theta=5000.0).rope_theta == 5000.0
    assert make_spec().rope_theta == 10000.0
    assert BASE.get("rope_theta") is None
