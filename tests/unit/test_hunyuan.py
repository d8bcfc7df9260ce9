"""Hunyuan with cross-layer attention against its formulas written out, dense and with experts."""

import json
import math
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from tipped_router import tip
from torch import Tensor

from cla_export.bundle import Bundle
from cla_export.compare import gate
from cla_export.compare.gate import compare_bundle
from cla_export.compare.reading import read_bundle
from cla_export.compare.reference import Reference
from cla_export.engines.onnxruntime import OnnxRuntimeExecutor
from cla_export.engines.torch import TorchExecutor
from cla_export.errors import BadInput, LayoutError
from cla_export.exporter import export
from cla_export.models import family_of
from cla_export.models.checkpoint import load_model, open_checkpoint
from cla_export.rewrite import rewrite
from cla_export.trace import trace

VOCAB, POSITIONS = 61, 64
DENSE: dict[str, Any] = {
    "model_type": "hunyuan",
    "vocab_size": VOCAB,
    "hidden_size": 40,  # neither heads * head_dim nor a multiple of the heads
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "attention_head_dim": 16,
    "max_position_embeddings": POSITIONS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    "use_cla": True,
    "cla_share_factor": 2,
    "use_qk_norm": True,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXTURE: dict[str, Any] = {
    **DENSE,
    "num_experts": 5,
    "moe_topk": 2,
    "moe_intermediate_size": 20,
    "use_mixed_mlp_moe": True,
    "num_shared_expert": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense, factor 2": DENSE,
    "dense, factor 3, biases, no norms, tied": {
        **DENSE,
        "num_hidden_layers": 4,
        "cla_share_factor": 3,
        "use_qk_norm": False,
        "rope_scaling": None,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
    },
    "experts, factor 2, lists by layer": {
        **MIXTURE,
        "num_experts": [5, 4, 6],
        "moe_topk": [1, 3, 1],
        "moe_intermediate_size": [20, 24, 16],
        "num_shared_expert": [1, 2, 1],
        "moe_layer_num_skipped": 1,
    },
    "experts, factor 3, no shared one": {
        **MIXTURE,
        "cla_share_factor": 3,
        "use_mixed_mlp_moe": False,
        "moe_intermediate_size": None,
        "num_attention_heads": 3,
    },
    "a factor without use_cla": {**DENSE, "use_cla": False, "kv_lora_rank": 512},
}


def of_layer(config: dict[str, Any], key: str, layer: int, default: int = 1) -> int:
    value = config.get(key)
    value = default if value is None else value
    return int(value[layer] if isinstance(value, list) else value)


def is_owner(config: dict[str, Any], layer: int) -> bool:
    return not config["use_cla"] or layer % config["cla_share_factor"] == 0


def has_experts(config: dict[str, Any], layer: int) -> bool:
    return "num_experts" in config and layer >= config.get("moe_layer_num_skipped", 0)


def random_weights(config: dict[str, Any]) -> dict[str, Tensor]:
    """Weights by the names that Tencent's own code gives them, one by one."""
    generator = torch.Generator().manual_seed(0)
    hidden, dim = config["hidden_size"], config["attention_head_dim"]
    q_width, kv_width = (
        config[key] * dim for key in ("num_attention_heads", "num_key_value_heads")
    )
    made: dict[str, Tensor] = {}

    def linear(name: str, rows: int, columns: int, gain: float = 1.0, bias: str = "") -> None:
        noise = torch.randn(rows, columns, generator=generator)
        made[f"{name}.weight"] = gain * noise * columns**-0.5
        if config.get(bias):
            made[f"{name}.bias"] = torch.randn(rows, generator=generator) * 0.1

    def norm(name: str, width: int) -> None:
        made[f"{name}.weight"] = 1 + 0.3 * torch.randn(width, generator=generator)

    def mlp(name: str, width: int) -> None:
        linear(f"{name}.gate_proj", width, hidden, bias="mlp_bias")
        linear(f"{name}.up_proj", width, hidden, bias="mlp_bias")
        linear(f"{name}.down_proj", hidden, width, bias="mlp_bias")

    made["model.embed_tokens.weight"] = torch.randn(VOCAB, hidden, generator=generator) * 0.4
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        norm(f"{at}.input_layernorm", hidden)
        norm(f"{at}.post_attention_layernorm", hidden)
        linear(f"{at}.self_attn.q_proj", q_width, hidden, 1.5, "attention_bias")
        if is_owner(config, layer):
            linear(f"{at}.self_attn.k_proj", kv_width, hidden, 1.5, "attention_bias")
            linear(f"{at}.self_attn.v_proj", kv_width, hidden, 1.0, "attention_bias")
        linear(f"{at}.self_attn.o_proj", hidden, q_width, 1.0, "attention_bias")
        if config["use_qk_norm"]:
            norm(f"{at}.self_attn.query_layernorm", dim)
            norm(f"{at}.self_attn.key_layernorm", dim)
        if not has_experts(config, layer):
            mlp(f"{at}.mlp", config["intermediate_size"])
            continue
        count = of_layer(config, "num_experts", layer)
        width = of_layer(config, "moe_intermediate_size", layer, config["intermediate_size"])
        linear(f"{at}.mlp.gate.wg", count, hidden)
        for expert in range(count):
            mlp(f"{at}.mlp.experts.{expert}", width)
        if config["use_mixed_mlp_moe"]:
            mlp(f"{at}.mlp.shared_mlp", width * of_layer(config, "num_shared_expert", layer))
    norm("model.norm", hidden)
    if not config["tie_word_embeddings"]:
        linear("lm_head", VOCAB, hidden)
    return made


def fused(config: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with `qkv_proj` and `gate_and_up_proj`, the family's other layout."""
    kv_heads, dim = config["num_key_value_heads"], config["attention_head_dim"]
    made = dict(weights)
    for name in weights:
        path, _, kind = name.rpartition(".")
        if path.endswith(".gate_proj"):
            at = path.removesuffix(".gate_proj")
            gate, up = (made.pop(f"{at}.{part}_proj.{kind}") for part in ("gate", "up"))
            made[f"{at}.gate_and_up_proj.{kind}"] = torch.cat((up, gate))
        if path.endswith(".k_proj"):
            at = path.removesuffix(".k_proj")
            heads = []
            q, k, v = (made.pop(f"{at}.{part}_proj.{kind}") for part in "qkv")
            for kv_head in range(kv_heads):
                queries = len(q) // kv_heads
                heads += [q[kv_head * queries : (kv_head + 1) * queries]]
                heads += [t[kv_head * dim : (kv_head + 1) * dim] for t in (k, v)]
            made[f"{at}.qkv_proj.{kind}"] = torch.cat(heads)
    return made


def save(folder: Path, config: dict[str, Any], *, one_by_one: bool = True) -> Path:
    folder.mkdir(parents=True)
    weights = random_weights(config)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights if one_by_one else fused(config, weights), folder / "model.safetensors")
    return folder


def by_the_book(config: dict[str, Any], w: dict[str, Tensor], ids: Tensor) -> np.ndarray:
    """Logits [S, V] of one row, token by token through each expert, in float64."""
    w = {name: weight.double() for name, weight in w.items()}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim, length = config["attention_head_dim"], len(ids)

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(1))

    def norm(name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]

    def mlp(name: str, x: Tensor) -> Tensor:
        gate = linear(f"{name}.gate_proj", x)
        return linear(f"{name}.down_proj", gate * gate.sigmoid() * linear(f"{name}.up_proj", x))

    def mixture(name: str, layer: int, token: Tensor) -> Tensor:
        odds = linear(f"{name}.gate.wg", token).softmax(-1)
        chosen = odds.argsort(descending=True)[: of_layer(config, "moe_topk", layer)].tolist()
        total = sum(odds[e] for e in chosen) if len(chosen) > 1 else 1.0
        made = sum(odds[e] / total * mlp(f"{name}.experts.{e}", token) for e in chosen)
        assert isinstance(made, Tensor)
        return made + mlp(f"{name}.shared_mlp", token) if config["use_mixed_mlp_moe"] else made

    alpha = (config["rope_scaling"] or {}).get("alpha", 1.0)
    base = config["rope_theta"] * alpha ** (dim / (dim - 2))
    angles = torch.arange(length)[:, None] / base ** (torch.arange(0, dim, 2).double() / dim)
    angles = torch.cat((angles, angles), -1)

    def turn(x: Tensor) -> Tensor:  # [H, S, D]
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()

    def split(x: Tensor, count: int) -> Tensor:  # [S, H * D] -> [H, S, D]
        return x.view(length, count, dim).transpose(0, 1)

    x = w["model.embed_tokens.weight"][ids]
    later = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
    raw = value = x
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}.self_attn"
        normed = norm(f"model.layers.{layer}.input_layernorm", x)
        if is_owner(config, layer):
            raw = turn(split(linear(f"{at}.k_proj", normed), kv_heads))
            value = split(linear(f"{at}.v_proj", normed), kv_heads)
        query, key = turn(split(linear(f"{at}.q_proj", normed), heads)), raw
        if config["use_qk_norm"]:
            query, key = norm(f"{at}.query_layernorm", query), norm(f"{at}.key_layernorm", key)
        k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (key, value))
        y = (query @ k.mT * dim**-0.5 + later).softmax(-1) @ v
        x = x + linear(f"{at}.o_proj", y.transpose(0, 1).flatten(1))
        name = f"model.layers.{layer}.mlp"
        normed = norm(f"model.layers.{layer}.post_attention_layernorm", x)
        if has_experts(config, layer):
            x = x + torch.stack([mixture(name, layer, token) for token in normed])
        else:
            x = x + mlp(name, normed)
    return (
        norm("model.norm", x) @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T
    ).numpy()


@pytest.mark.parametrize("one_by_one", [True, False], ids=["one by one", "fused"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_module(tmp_path: Path, variant: str, one_by_one: bool) -> None:
    """Whole rows, and prompts and single steps over caches that hold what a group shares."""
    config = VARIANTS[variant]
    model = load_model(open_checkpoint(save(tmp_path / "m", config, one_by_one=one_by_one)))
    layers = range(config["num_hidden_layers"])
    owners = [layer for layer in layers if is_owner(config, layer)]
    assert sorted(set(model.spec.layout.kv_owner)) == owners
    ids = torch.arange(17) * 7 % VOCAB
    with torch.inference_mode():
        logits = model(ids[None], torch.arange(17)[None])[0].numpy()
    expected = by_the_book(config, random_weights(config), ids)
    limit = 2e-5 * np.abs(expected).max()
    assert np.abs(logits - expected).max() < limit
    executor, tokens = TorchExecutor(model, capacity=32, slots=2), ids.tolist()
    made = [executor.prefill(1, tokens[:9], 0, keep=9)]
    made += [executor.decode([1], [t], [i]) for i, t in enumerate(tokens[9:], 9)]
    assert np.abs(np.concatenate(made) - expected).max() < limit


@pytest.mark.parametrize("variant", list(VARIANTS)[:4])
def test_parity(tmp_path: Path, variant: str) -> None:
    bundle = export(save(tmp_path / "m", VARIANTS[variant]), tmp_path / "bundle")
    assert bundle.layout == open_checkpoint(bundle.source).spec.layout
    report = compare_bundle(bundle)
    failed = [(r.case, r.output, r.max_error, r.tolerance) for r in report.tensors if not r.passed]
    assert report.passed, (report.faults, failed, report.divergence)
    if "experts" in variant:
        check_that_a_wrong_expert_is_seen(bundle)


def check_that_a_wrong_expert_is_seen(bundle: Bundle) -> None:
    """One value of one expert: no text need go through it."""
    model = load_model(open_checkpoint(bundle.source))
    assert not read_bundle(bundle, model).faults
    graph = ir.load(bundle.graph)
    name = "model.layers.2.mlp.experts.gate_up_proj.interleaved"
    held = graph.graph.initializers[name]
    assert held.const_value is not None
    values = held.const_value.numpy().copy()
    values[3, 1, 0] += 0.01
    held.const_value = ir.tensor(values, name=name)
    ir.save(graph, bundle.graph)
    assert f"{name}: 1 of {values.size} values are not the model's" in (
        read_bundle(bundle, model).faults
    )


def test_16_bits(tmp_path: Path) -> None:
    made = export(save(tmp_path / "m", VARIANTS["dense, factor 2"]), tmp_path / "b", dtype="fp16")
    report = compare_bundle(made)
    assert report.passed, (report.faults, report.divergence)


@pytest.mark.parametrize("normed", [True, False])
def test_one_cache_a_group_whatever_the_norms_of_keys(normed: bool) -> None:
    """Each layer's weight moves onto its query; a layer that is alone keeps its own norm."""
    config = {**DENSE, "use_qk_norm": normed}
    family = family_of(config)
    spec = family.read_spec(config)
    made = rewrite(trace(family, spec, torch.float32), spec.layout)
    (report,) = (report for report in made.reports if report.name == "hoist_key_scale")
    assert report.fired == (2 if normed else 0)
    assert made.layout.kv_owner == (0, 0, 2)
    scatters = [node for node in made.model.graph if node.op_type == "TensorScatter"]
    assert len(scatters) == 2 * 2


def test_experts_where_no_operator_takes_them(tmp_path: Path) -> None:
    """All are computed in the portable graph and in 16 bits, and the bundle says so."""
    config = VARIANTS["experts, factor 3, no shared one"]
    folder = save(tmp_path / "m", config)
    plain = export(folder, tmp_path / "plain", target="portable")
    assert "MoE" not in {node.op_type for node in ir.load(plain.graph).graph}
    assert plain.expert_choices() == [
        "experts: MatMul (computes all 5 and weighs them, where a token goes through 2: portable "
        "has no operator for less)"
    ]
    tokens = np.random.default_rng(0).integers(0, VOCAB, 20).tolist()
    expected = by_the_book(config, random_weights(config), torch.tensor(tokens))
    executor = OnnxRuntimeExecutor(plain, capacity=32, slots=2, threads=1)
    made = [executor.prefill(1, tokens[:12], 0, keep=12)]
    made += [executor.decode([1], [t], [i]) for i, t in enumerate(tokens[12:], 12)]
    assert np.abs(np.concatenate(made) - expected).max() < 2e-5 * np.abs(expected).max()
    halved = export(folder, tmp_path / "halved", dtype="fp16")
    assert "MoE takes SwiGLU in float32" in halved.expert_choices()[0]
    size = 4 * sum(math.prod(s) for n, s in open_checkpoint(folder).spec.weights().items()
                   if ".experts." in n)  # fmt: skip
    quantized = export(folder, tmp_path / "quantized", quantize="int4")
    assert quantized.expert_choices() == [
        f"experts: MoE (computes the chosen ones alone; {size:,} bytes of them are not quantised, "
        "which QMoE takes in float32 and rows of whole blocks of 32)"
    ]
    check_that_routers_may_tip_at_ties_alone(halved, tmp_path)


def check_that_routers_may_tip_at_ties_alone(bundle: Bundle, folder: Path) -> None:
    """Where an expert is nearly as good, PyTorch follows; where it is not, the choice is wrong."""
    assert compare_bundle(bundle, threads=1).passed
    tipped = tip(bundle, folder / "tipped", 1e-3)
    report = compare_bundle(tipped, threads=1)
    assert report.passed, report.divergence
    assert report.inside is not None and report.inside > 0.1, "of what a choice may be off"
    with patch.object(gate, "routed", lambda engine, _: engine):
        alone = compare_bundle(tipped, threads=1)
    assert not all(result.passed for result in alone.tensors), "PyTorch went its own way"
    report = compare_bundle(tip(bundle, folder / "wrong", 0.1), threads=1)
    assert report.divergence is not None and report.divergence.role == "router"


@pytest.mark.parametrize("kind", ["hunyuan_v1_dense", "hunyuan_v1_moe"])
def test_types_that_transformers_has_too(tmp_path: Path, kind: str) -> None:
    """With `use_cla` they are of this family, which a factor of one shows; else transformers'."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind,
        **{k: v for k, v in DENSE.items() if k not in ("model_type", "rope_scaling", "use_cla")},
        head_dim=16,
        rope_parameters={"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 1e4},
        use_cla=False,
        use_mixed_mlp_moe=True,
        **({"num_experts": 4, "moe_topk": 2} if kind.endswith("moe") else {}),
    )
    own = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in own.parameters():
            noise = torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5
            parameter.copy_(noise if parameter.ndim > 1 else 1 + noise)
        ids, positions = torch.arange(17)[None] * 7 % VOCAB, torch.arange(17)[None]
        expected = own(ids, use_cache=False).logits
    own.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for use_cla, module in ((False, "HuggingFaceDecoder"), (True, "HunyuanDecoder")):
        changed = {**saved, "use_cla": use_cla, "cla_share_factor": 1 if use_cla else 2}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        model = load_model(open_checkpoint(tmp_path))
        assert type(model).__name__ == module
        assert model.spec.layout.num_groups == 3
        with torch.inference_mode():
            assert (model(ids, positions) - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"norm_type": "fused"}, "must be absent or 'rms' or 'hf_rms'"),
        ({"use_mla": True}, "use_mla is True"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type 'dynamic' and an alpha"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "angles depend on the position"),
        ({"moe_topk": [1, 2]}, "moe_topk has 2 entries; expected one for each of the 3 layers"),
        ({"moe_topk": 6}, "moe_topk is 6 in layer 0, which has 5 experts"),
        ({"num_experts": "5"}, "expected whole numbers"),
        ({"mlp_bias": True}, "experts have no biases"),
        ({"attention_head_dim": 15}, "head_dim is 15"),
        ({"cla_share_factor": None}, "no cla_share_factor"),
        ({"num_key_value_heads": 4}, "6 query heads cannot share 4 kv heads"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_configs_that_are_refused(change: dict[str, Any], message: str) -> None:
    config = {**MIXTURE, **change}
    with pytest.raises((BadInput, LayoutError), match=message):
        family_of(config).read_spec(config)


@pytest.mark.parametrize(
    ("one_by_one", "missing", "said"),
    [
        (True, "layers.1.mlp.experts.3.up_proj", "layers.1.mlp.experts.3.up_proj"),
        (True, "layers.2.self_attn.key_layernorm", "layers.2.self_attn.key_layernorm"),
        (True, "layers.2.self_attn.v_proj", "layers.2.self_attn.v_proj"),
        (False, "layers.0.self_attn.qkv_proj", "layers.0.self_attn.q_proj"),
        (False, "layers.2.mlp.experts.0.gate_and_up_proj", "experts.0.gate_and_up_proj"),
    ],
)
def test_a_missing_weight_is_named(
    tmp_path: Path, one_by_one: bool, missing: str, said: str
) -> None:
    folder = save(tmp_path / "m", MIXTURE, one_by_one=one_by_one)
    weights = load_file(folder / "model.safetensors")
    del weights[f"model.{missing}.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(BadInput, match=rf"{re.escape(said)}\.weight is missing"):
        open_checkpoint(folder)


def test_a_large_model_in_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widened one module at a time, experts and the router among them, it is as exact."""
    config = VARIANTS["experts, factor 2, lists by layer"]
    model = load_model(open_checkpoint(save(tmp_path / "m", config)))
    expected = by_the_book(config, random_weights(config), torch.arange(17))
    monkeypatch.setattr("cla_export.compare.reference._SMALL", 0)
    made = Reference.of(model, None, None).exact.logits(np.arange(17))
    assert np.abs(made - expected).max() < 1e-6 * np.abs(expected).max()  # angles are float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_weights_that_a_bundle_points_into(tmp_path: Path) -> None:
    """Rows of a fused tensor are read where they lie, or joined; experts are joined, so copied."""
    folder = save(tmp_path / "m", DENSE, one_by_one=False)
    bundle = export(folder, tmp_path / "b", weights="link")
    held = ir.load(bundle.graph).graph.initializers
    lies = {
        part: getattr(held[f"model.layers.0.{part}.weight"].const_value, "location", None)
        for part in ("mlp.gate_proj", "mlp.up_proj", "self_attn.q_proj", "self_attn.o_proj")
    }
    linked, own = "model.safetensors", "model.onnx.data"
    assert list(lies.values()) == [linked, linked, own, linked]
    tokens = np.random.default_rng(0).integers(0, VOCAB, 20).tolist()
    expected = by_the_book(DENSE, random_weights(DENSE), torch.tensor(tokens))
    made = OnnxRuntimeExecutor(bundle, capacity=32, slots=1, threads=1).prefill(
        0, tokens, 0, keep=20
    )
    assert np.abs(made - expected).max() < 2e-5 * np.abs(expected).max()
    with pytest.raises(BadInput, match="in pieces that a bundle has in one tensor, such as exp"):
        export(save(tmp_path / "e", MIXTURE | {"num_experts": 40}), tmp_path / "c", weights="link")
