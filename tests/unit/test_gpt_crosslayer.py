"""The CLA authors' architecture, in both of its layouts, against its formulas written out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cla_export.compare.gate import compare_bundle
from cla_export.errors import BadInput
from cla_export.exporter import export
from cla_export.models import family_of
from cla_export.models.checkpoint import load_model, open_checkpoint

BASE: dict[str, Any] = {  # as 2024's code saves it
    "model_type": "gpt_crosslayer",
    "vocab_size": 61,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_inner": 40,
    "n_positions": 64,
    "num_key_value_heads": 2,
    "attention_head_type": "gqa",
    "sharing_pattern": [0, 0, 2, 2],
    "activation_function": "swiglu",
    "normalization_function": "rmsnorm",
    "position_embedding_type": "rope",
    "add_bias": False,
    "tie_word_embeddings": True,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "rope, swiglu, rmsnorm": {},
    "biases, layernorm, gelu, learned positions": {
        "add_bias": True,
        "normalization_function": "layernorm",
        "activation_function": "gelu_pytorch_tanh",
        "position_embedding_type": "learned_absolute",
        "tie_word_embeddings": False,
    },
    "one owner, MQA, multipliers, joint residual": {
        "sharing_pattern": [0, 0, 0, 0],
        "num_key_value_heads": 1,
        "m_emb": 3.0,
        "m_residual": 0.5,
        "m_width": 2.0,
        "attention_multiplier": 0.2,
        "joint_residual_stream": True,
        "activation_function": "geglu",
    },
    "no positions, scores not scaled": {
        "position_embedding_type": "nope",
        "scale_attn_weights": False,
        "sharing_pattern": [0, 1, 1, 3],
    },
}


def grouped_weights(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights by 2024's names: a group has kv_proj and layers."""
    generator = torch.Generator().manual_seed(0)
    hidden, dim = config["n_embd"], config["n_embd"] // config["n_head"]
    made: dict[str, Tensor] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        made[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) * columns**-0.5
        if config["add_bias"]:
            made[f"{name}.bias"] = torch.randn(rows, generator=generator) * 0.1

    def norm(name: str) -> None:
        made[f"{name}.weight"] = 1 + 0.2 * torch.randn(hidden, generator=generator)
        if config["normalization_function"] == "layernorm":
            made[f"{name}.bias"] = torch.randn(hidden, generator=generator) * 0.1

    made["transformer.wte.weight"] = torch.randn(61, hidden, generator=generator) * 0.3
    if config["position_embedding_type"] == "learned_absolute":
        made["transformer.wpe.weight"] = torch.randn(64, hidden, generator=generator) * 0.3
    pattern = config["sharing_pattern"]
    gated = config["activation_function"].endswith("glu")
    for group, owner in enumerate(sorted(set(pattern))):
        at = f"transformer.h.{group}"
        norm(f"{at}.kv_proj.ln")
        linear(f"{at}.kv_proj.kv_attn", 2 * config["num_key_value_heads"] * dim, hidden)
        for place in range(pattern.count(owner)):
            layer = f"{at}.layers.{place}"
            norm(f"{layer}.ln_1")
            norm(f"{layer}.ln_2")
            linear(f"{layer}.attn.q_attn", hidden, hidden)
            linear(f"{layer}.attn.c_proj", hidden, hidden)
            linear(f"{layer}.mlp.c_fc", config["n_inner"] * (2 if gated else 1), hidden)
            linear(f"{layer}.mlp.c_proj", hidden, config["n_inner"])
    norm("transformer.ln_f")
    if not config["tie_word_embeddings"]:
        made["lm_head.weight"] = torch.randn(61, hidden, generator=generator) * hidden**-0.5
    return made


def flat_weights(config: dict[str, Any], grouped: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same by 2025's names: a layer has a number of its own."""
    owners = sorted(set(config["sharing_pattern"]))
    made = {}
    for name, weight in grouped.items():
        parts = name.split(".")
        if parts[1] == "h":
            layer = owners[int(parts[2])]
            if parts[3] == "layers":
                layer += int(parts.pop(4))
                del parts[3]
            parts[2] = str(layer)
            kinds = {"attn": "sequence_mixer", "mlp": "mlp_block"}
            parts[3] = kinds.get(parts[3], parts[3])
        made[".".join(parts)] = weight
    return made


def flat_config(config: dict[str, Any]) -> dict[str, Any]:
    moved = {
        "n_embd",
        "n_layer",
        "n_head",
        "n_inner",
        "n_positions",
        "num_key_value_heads",
        "add_bias",
        "activation_function",
        "attention_head_type",
        "attention_multiplier",
    }
    made = {key: value for key, value in config.items() if key not in moved}
    layers = config["n_layer"]
    mixer = {
        "num_attention_heads": config["n_head"],
        "num_key_value_heads": config["num_key_value_heads"],
        "add_bias": config["add_bias"],
        "attention_multiplier": config.get("attention_multiplier"),
    }
    mlp = {
        "intermediate_size": config["n_inner"],
        "activation_function": config["activation_function"],
        "add_bias": config["add_bias"],
    }
    return made | {
        "hidden_size": config["n_embd"], "num_layers": layers,
        "max_position_embeddings": config["n_positions"],
        "sequence_mixer_blocks": [mixer] * layers, "mlp_blocks": [mlp] * layers,
    }  # fmt: skip


def save(folder: Path, config: dict[str, Any], *, flat: bool = False) -> Path:
    folder.mkdir(parents=True)
    weights = grouped_weights(config)
    if flat:
        config, weights = flat_config(config), flat_weights(config, weights)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


def by_the_book(config: dict[str, Any], w: dict[str, Tensor], ids: Tensor) -> np.ndarray:
    """Logits [S, V] of one row, from the grouped weights, group by group, in float64."""
    heads, kv_heads = config["n_head"], config["num_key_value_heads"]
    dim, length = config["n_embd"] // heads, len(ids)
    w = {name: weight.double() for name, weight in w.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(1))

    def norm(name: str, x: Tensor) -> Tensor:
        if config["normalization_function"] == "layernorm":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w.get(f"{name}.bias", torch.zeros(1))

    angles = torch.arange(length)[:, None] / 10000.0 ** (torch.arange(0, dim, 2) / dim)
    angles = torch.cat((angles, angles), -1).double()

    def turn(x: Tensor) -> Tensor:  # [H, S, D]
        if config["position_embedding_type"] != "rope":
            return x
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()

    def activate(x: Tensor) -> Tensor:
        name = config["activation_function"]
        if name == "gelu_pytorch_tanh":
            return torch.nn.functional.gelu(x, approximate="tanh")
        up, gate = x.chunk(2, -1)
        return up * (gate.sigmoid() * gate if name == "swiglu" else torch.nn.functional.gelu(gate))

    scale = config.get("attention_multiplier", dim**-0.5)
    scale = scale if config.get("scale_attn_weights", True) else 1.0
    factor = config.get("m_residual", 1.0)
    x = w["transformer.wte.weight"][ids]
    if "transformer.wpe.weight" in w:
        x = x + w["transformer.wpe.weight"][:length]
    x = x * config.get("m_emb", 1.0)
    hidden = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
    for group, owner in enumerate(sorted(set(config["sharing_pattern"]))):
        at, entered = f"transformer.h.{group}", x
        both = linear(f"{at}.kv_proj.kv_attn", norm(f"{at}.kv_proj.ln", x))
        both = both.view(length, kv_heads, 2 * dim).transpose(0, 1)
        key, value = turn(both[..., :dim]), both[..., dim:]
        key, value = (t.repeat_interleave(heads // kv_heads, 0) for t in (key, value))
        for place in range(config["sharing_pattern"].count(owner)):
            layer = f"{at}.layers.{place}"
            query = linear(f"{layer}.attn.q_attn", norm(f"{layer}.ln_1", x))
            query = turn(query.view(length, heads, dim).transpose(0, 1))
            y = (query @ key.mT * scale + hidden).softmax(-1) @ value
            x = x + factor * linear(f"{layer}.attn.c_proj", y.transpose(0, 1).flatten(1))
            x = x + entered if config.get("joint_residual_stream") else x
            inner = activate(linear(f"{layer}.mlp.c_fc", norm(f"{layer}.ln_2", x)))
            x = x + factor * linear(f"{layer}.mlp.c_proj", inner)
    head = w.get("lm_head.weight", w["transformer.wte.weight"])
    return (norm("transformer.ln_f", x) @ head.T / config.get("m_width", 1.0)).numpy()


@pytest.mark.parametrize("flat", [False, True], ids=["grouped", "flat"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_module(tmp_path: Path, variant: str, flat: bool) -> None:
    config = BASE | VARIANTS[variant]
    model = load_model(open_checkpoint(save(tmp_path / "m", config, flat=flat)))
    assert list(model.spec.layout.kv_owner) == config["sharing_pattern"]
    ids = torch.arange(17) * 7 % 61
    with torch.inference_mode():
        logits = model(ids[None], torch.arange(17)[None])[0].numpy()
    expected = by_the_book(config, grouped_weights(config), ids)
    assert np.abs(logits - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("variant", list(VARIANTS)[1:3])
def test_parity(tmp_path: Path, variant: str) -> None:
    config = BASE | VARIANTS[variant]
    bundle = export(save(tmp_path / "m", config), tmp_path / "bundle")
    assert bundle.layout.num_groups == len(set(config["sharing_pattern"]))
    report = compare_bundle(bundle)
    assert report.passed, (report.faults, report.divergence)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'"),
        ({"activation_function": "mish"}, "activation_function is 'mish'"),
        ({"sharing_pattern": [0, 0, 1, 1]}, "kv_owner"),
        ({"mlp_blocks": [{"add_bias": True}, {"add_bias": False}]}, "layers that are alike"),
    ],
    ids=["alibi", "mish", "an owner that shares", "unlike layers"],
)
def test_configs_that_are_refused(change: dict[str, Any], message: str) -> None:
    config = BASE | change
    with pytest.raises(BadInput, match=message):
        family_of(config).read_spec(config)


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", BASE, flat=True)
    weights = flat_weights(BASE, grouped_weights(BASE))
    del weights["transformer.h.3.mlp_block.c_fc.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(BadInput, match=r"transformer\.h\.3\.mlp_block\.c_fc\.weight is missing"):
        open_checkpoint(folder)
