"""YOCO's and Hymba's ways to share, said by configs, against their formulas in float64.

YOCO (Sun et al. 2024, "You Only Cache Once", section 2): a self-decoder with sliding-window
attention; then K = LN(X) W_K and V = LN(X) W_V once, which all layers of a cross-decoder read.

    Y = Attention(LN(X)) + X        X' = SwiGLU(LN(Y)) + Y

Hymba (Dong et al. 2024, section 2.3): pairs of neighbours, and one triple, share K and V; a few
layers attend globally and share nothing, all others see a window. Its attention part: no
state-space heads and no meta tokens.
"""

import numpy as np
import pytest
from models_zoo import Zoo, make_config, tokens_of
from numpy.typing import NDArray
from safetensors.numpy import load_file

from cla_export.compare.gate import compare_bundle
from cla_export.engines.onnxruntime import OnnxRuntimeExecutor
from cla_export.errors import BadInput
from cla_export.layout import layout_from_config
from cla_export.models import cla

CLOSE = 1e-4  # float32 through other kernels; logits are of order 1 to 5
TOKENS, PROMPT = 20, 12
WINDOWS = (4, 40)  # below a prompt's length, and above a whole row's
HYMBA_GROUPS = [[1, 2], [3, 4, 5]]
Array = NDArray[np.float64]
Weights = dict[str, Array]


def yoco(window: int) -> dict:
    """Two layers of self-decoder, three of cross-decoder."""
    return {
        "kv_owner": (0, 1, 2, 2, 2),
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 3,
        "sliding_window": window,
        "separate_kv_norm": [2],
    }


def hymba(window: int) -> dict:
    return {
        "num_hidden_layers": 7,
        "kv_reuse_group": HYMBA_GROUPS,
        "global_attn_idx": [0, 6],
        "sliding_window": window,
        "num_key_value_heads": 1,
    }


# Their formulas.


def norm(x: Array, weight: Array) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def rope(x: Array) -> Array:
    """x [S, H, D], rotated by halves."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * 10000.0 ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
    )


def keys_and_values(x: Array, w: Weights, layer: int) -> tuple[Array, Array]:
    """Of normed x [S, hidden]: [S, Hkv, 16] each."""
    part = f"model.layers.{layer}.self_attn"
    k, v = ((x @ w[f"{part}.{n}_proj.weight"].T).reshape(len(x), -1, 16) for n in "kv")
    return rope(k), v


def attention(
    x: Array, kv: tuple[Array, Array], w: Weights, layer: int, window: int | None
) -> Array:
    """Of normed x [S, hidden], each query head with its share of the kv heads."""
    part = f"model.layers.{layer}.self_attn"
    q = rope((x @ w[f"{part}.q_proj.weight"].T).reshape(len(x), 4, 16))
    k, v = (np.repeat(t, 4 // t.shape[1], axis=1) for t in kv)
    scores = np.einsum("ihd,jhd->hij", q, k) / 4.0
    far = np.arange(len(x))[:, None] - np.arange(len(x))
    seen = (far >= 0) & (far < (window or len(x)))
    scores = np.where(seen, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    y = np.einsum("hij,jhd->ihd", p / p.sum(-1, keepdims=True), v)
    return y.reshape(len(x), -1) @ w[f"{part}.o_proj.weight"].T


def swiglu(x: Array, w: Weights, layer: int) -> Array:
    gate, up, down = (
        w[f"model.layers.{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down")
    )
    g = x @ gate.T
    return (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T


def logits_of(x: Array, w: Weights) -> Array:
    return norm(x, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T


def norms(w: Weights, layer: int) -> tuple[Array, Array]:
    part = f"model.layers.{layer}"
    return w[f"{part}.input_layernorm.weight"], w[f"{part}.post_attention_layernorm.weight"]


def yoco_logits(tokens: list[int], w: Weights, window: int) -> Array:
    x = w["model.embed_tokens.weight"][tokens]
    for layer in (0, 1):  # self-decoder
        before, after = norms(w, layer)
        h = norm(x, before)
        x = x + attention(h, keys_and_values(h, w, layer), w, layer, window)
        x = x + swiglu(norm(x, after), w, layer)
    kv = keys_and_values(norm(x, w["model.layers.2.kv_layernorm.weight"]), w, 2)  # once
    for layer in (2, 3, 4):  # cross-decoder
        before, after = norms(w, layer)
        x = x + attention(norm(x, before), kv, w, layer, None)
        x = x + swiglu(norm(x, after), w, layer)
    return logits_of(x, w)


def hymba_logits(tokens: list[int], w: Weights, window: int) -> Array:
    consumers = {layer: group[0] for group in HYMBA_GROUPS for layer in group[1:]}
    x = w["model.embed_tokens.weight"][tokens]
    made = {}
    for layer in range(7):
        before, after = norms(w, layer)
        h = norm(x, before)
        if layer not in consumers:
            made[layer] = keys_and_values(h, w, layer)
        kv = made[consumers.get(layer, layer)]
        x = x + attention(h, kv, w, layer, None if layer in (0, 6) else window)
        x = x + swiglu(norm(x, after), w, layer)
    return logits_of(x, w)


MODELS = {"yoco": (yoco, yoco_logits), "hymba": (hymba, hymba_logits)}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", MODELS)
def test_the_formulas(zoo: Zoo, name: str, window: int) -> None:
    """A prompt in one call, then single steps over caches, beside the formulas on whole rows."""
    config_of, formula = MODELS[name]
    bundle = zoo.bundle(**config_of(window))
    stored = load_file(bundle.source / "model.safetensors")
    weights = {key: value.astype(np.float64) for key, value in stored.items()}
    tokens = tokens_of(TOKENS)
    expected = formula(tokens, weights, window)
    for stock in (True, False):  # both graphs
        executor = OnnxRuntimeExecutor(bundle, capacity=32, slots=2, threads=1, stock=stock)
        made = [executor.prefill(1, tokens[:PROMPT], 0, keep=PROMPT)]
        made += [executor.decode([1], [tokens[at]], [at]) for at in range(PROMPT, TOKENS)]
        assert np.abs(np.concatenate(made) - expected).max() < CLOSE
    other = formula(tokens, weights, WINDOWS[window == WINDOWS[0]])
    assert np.abs(other - expected).max() > 100 * CLOSE, "the window is felt"


@pytest.mark.parametrize("name", MODELS)
def test_parity(zoo: Zoo, name: str) -> None:
    report = compare_bundle(zoo.bundle("portable", **MODELS[name][0](WINDOWS[0])))
    assert report.passed, (report.faults, report.divergence)


def test_one_cache_for_all_of_the_cross_decoder(zoo: Zoo) -> None:
    bundle = zoo.bundle(**yoco(4))
    assert [group["layers"] for group in bundle.manifest["groups"]] == [[0], [1], [2, 3, 4]]
    assert [group["window"] for group in bundle.manifest["groups"]] == [4, 4, None]
    held = [n for n in load_file(bundle.source / "model.safetensors") if "kv_layernorm" in n]
    assert held == ["model.layers.2.kv_layernorm.weight"]


def test_pairs_and_a_triple(zoo: Zoo) -> None:
    groups = zoo.bundle(**hymba(4)).manifest["groups"]
    assert [group["layers"] for group in groups] == [[0], [1, 2], [3, 4, 5], [6]]
    assert [group["window"] for group in groups] == [None, 4, 4, None]


def test_hymbas_own_config() -> None:
    """32 layers: 15 groups of local layers, of which [16, 17, 18] is the triple."""
    groups = [[i, i + 1] for i in range(1, 14, 2)] + [[16, 17, 18]]
    groups += [[i, i + 1] for i in range(19, 30, 2)]
    layout = layout_from_config(
        make_config(
            num_hidden_layers=32, kv_reuse_group=groups, global_attn_idx=[0, 15, 31],
            sliding_window=1024,
        )
    )  # fmt: skip
    assert layout.num_groups == len(groups) + 3
    assert [i for i, window in enumerate(layout.window) if window is None] == [0, 15, 31]


@pytest.mark.parametrize("listed", [[3], [2, "1"], [2, True], [9]])
def test_a_norm_of_a_layer_that_owns_nothing(listed: list) -> None:
    with pytest.raises(BadInput) as caught:
        cla.read_spec(make_config(**{**yoco(4), "separate_kv_norm": listed}))
    wrong = next(layer for layer in listed if layer is True or layer not in (0, 1, 2))
    assert str(caught.value) == (
        f"config.json: separate_kv_norm lists {wrong!r}; expected true, false, or some of the "
        "layers that own a cache (0, 1, 2)"
    )
