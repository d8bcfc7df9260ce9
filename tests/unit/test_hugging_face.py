"""Models of transformers, by their own code: small random ones, saved by it, exported, compared."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from cla_export.bundle import Bundle
from cla_export.compare.gate import compare_bundle
from cla_export.compare.reading import read_bundle
from cla_export.engines.onnxruntime import OnnxRuntimeExecutor
from cla_export.engines.torch import TorchExecutor
from cla_export.errors import BadInput
from cla_export.exporter import export
from cla_export.models import family_of
from cla_export.models.checkpoint import load_model, open_checkpoint

transformers = pytest.importorskip("transformers")
hugging_face_weights = pytest.importorskip("cla_export.models.hugging_face_weights")

VOCAB = 61
PLAIN: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TYPES = ["sliding_attention", "full_attention"]
GEMMA = {
    **PLAIN,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": TYPES * 2,
    "sliding_window": 6,
    "head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**PLAIN, "head_dim": 16, "tie_word_embeddings": True},
    "qwen3": {**PLAIN, "head_dim": 16, "num_key_value_heads": 1, "use_sliding_window": True,
              "sliding_window": 6, "max_window_layers": 0},
    "phi": {**PLAIN, "num_key_value_heads": 4},  # part of a head rotated, LayerNorm, biases
    "gpt_neox": {**PLAIN, "num_key_value_heads": 4},  # one product of q, k and v; other names
    "gpt2": {
        "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "bos_token_id": 1, "eos_token_id": 2,
    },  # learned positions
    "gemma3n_text": {
        **GEMMA, "intermediate_size": [40] * 4, "laurel_rank": 4, "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {**GEMMA, "global_head_dim": 32},
    "gemma2": {**PLAIN, "head_dim": 16, "layer_types": TYPES, "sliding_window": 6,
               "query_pre_attn_scalar": 4, "attn_logit_softcapping": 1.5},
    "mixtral": {**PLAIN, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**PLAIN, "head_dim": 16, "num_experts": 5, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 24, "norm_topk_prob": True, "mlp_only_layers": [0]},
    "olmoe": {**PLAIN, "num_experts": 6, "num_experts_per_tok": 3},  # shares of less than one
}  # fmt: skip
MIXTURES = {"mixtral": 2, "qwen3_moe": 1, "olmoe": 2}  # layers of them that have experts
SHARED = {"gemma3n_text": (0, 1, 0, 1), "gemma4_text": (0, 1, 0, 1)}


def save(folder: Path, kind: str, **changes: Any) -> Path:
    """A random model, written by transformers."""
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(kind, **{**MODELS[kind], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                gain = 1.5 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
                parameter.normal_(0.0, gain * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bundle(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp(kind)
    return export(save(folder / "model", kind), folder / "bundle")


def test_parity(bundle: Bundle) -> None:
    report = compare_bundle(bundle)
    failed = [(r.case, r.output, r.max_error, r.tolerance) for r in report.tensors if not r.passed]
    assert report.passed, (report.faults, failed, report.divergence)


def test_layers_share_as_the_config_says(bundle: Bundle, kind: str) -> None:
    owners = SHARED.get(kind, (0, 1))
    assert bundle.layout.kv_owner == owners
    assert len(bundle.manifest["groups"]) == 2
    windows = {"qwen3": (6, 6), "gemma2": (6, None), **dict.fromkeys(SHARED, (6, None, 6, None))}
    assert bundle.layout.window == windows.get(kind, (None, None))


def test_logits_are_those_of_the_familys_own_code(bundle: Bundle) -> None:
    """Its eager attention on whole rows, beyond a window, beside prompts and single steps here."""
    own = transformers.AutoModelForCausalLM.from_pretrained(
        bundle.source, attn_implementation="eager"
    ).eval()
    tokens = np.random.default_rng(0).integers(3, VOCAB, 20).tolist()
    with torch.inference_mode():
        expected = own(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    model = load_model(open_checkpoint(bundle.source))
    for executor in (
        OnnxRuntimeExecutor(bundle, capacity=32, slots=2, threads=1),
        TorchExecutor(model, capacity=32, slots=2),
    ):
        made = [executor.prefill(1, tokens[:12], 0, keep=12)]
        made += [executor.decode([1], [t], [i]) for i, t in enumerate(tokens[12:], 12)]
        assert np.abs(np.concatenate(made) - expected).max() < 1e-4


def test_onnxruntime_genai_opens_it(bundle: Bundle) -> None:
    """Its own tokens, one by one, are the model's own."""
    og = pytest.importorskip("onnxruntime_genai")
    own = transformers.AutoModelForCausalLM.from_pretrained(bundle.source).eval()
    prompt = np.random.default_rng(1).integers(3, VOCAB, 9).tolist()
    with torch.inference_mode():
        kept = own.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, use_cache=False
        )[0].tolist()
    model = og.Model(str(bundle.folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + 12)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    made = generator.get_sequence(0).tolist()
    assert made == (kept[:-1] if kept[-1] == 2 else kept)  # genai leaves out the end of a text


def test_transformers_reads_the_bundles_config(bundle: Bundle) -> None:
    made, own = (
        transformers.AutoConfig.from_pretrained(folder).to_dict()
        for folder in (bundle.folder, bundle.source)
    )
    assert made.pop("_name_or_path") != own.pop("_name_or_path")
    assert made == own


def test_experts_are_one_operator(bundle: Bundle, kind: str) -> None:
    """It computes those that the router chose; the others' weights are not read."""
    for graph in filter(None, (bundle.graph, bundle.cpu_graph)):
        found = operators(graph)
        assert found["MoE"] == found["TopK"] == MIXTURES.get(kind, 0)
    assert [c.split()[1] for c in bundle.expert_choices()] == ["MoE"] * (kind in MIXTURES)


def test_quantised_experts(tmp_path: Path) -> None:
    """In 8 bits, where the kernel rounds what it multiplies; a value that is off is seen."""
    folder = save(tmp_path / "model", "mixtral", hidden_size=64, intermediate_size=32)
    made = export(folder, tmp_path / "bundle", quantize="int8")
    assert made.expert_choices() == ["experts: QMoE (computes the chosen ones alone)"]
    for graph in filter(None, (made.graph, made.cpu_graph)):
        assert (operators(graph)["QMoE"], operators(graph)["MoE"]) == (2, 0)
    report = compare_bundle(made, threads=1)
    assert report.passed, (report.faults, report.divergence)
    graph = ir.load(made.graph)
    name = "model.layers.1.mlp.experts.gate_up_proj.interleaved.packed"
    packed = graph.graph.initializers[name].const_value
    assert packed is not None
    values = packed.numpy().copy()
    values[2, 3, 5] ^= 16
    graph.graph.initializers[name].const_value = ir.tensor(values, name=name)
    ir.save(graph, made.graph)
    faults = read_bundle(made, load_model(open_checkpoint(folder))).faults
    assert len(faults) == 1 and "gate_up_proj: 1 of" in faults[0]


def operators(graph: Path | None) -> Counter[str]:
    assert graph is not None
    return Counter(node.op_type for node in ir.load(graph).graph)


def test_16_bits(tmp_path: Path) -> None:
    """Casts that a module writes for 16-bit weights are its own arithmetic on both sides."""
    made = export(save(tmp_path / "model", "llama"), tmp_path / "bundle", dtype="fp16")
    report = compare_bundle(made)
    assert report.passed, (report.faults, report.divergence)
    found = operators(made.cuda_plugin_graph)
    assert found["ClaLinear"] == 2 * 4 + 1
    assert found["ClaRotateAppend"] == found["ClaAttention"] == 2
    assert not found["RMSNormalization"] + found["MatMul"] + found["RotaryEmbedding"]


def test_norms_and_rotations_are_one_operator_each(bundle: Bundle, kind: str) -> None:
    if kind in ("llama", "qwen3"):
        found = operators(bundle.graph)
        of_heads = 4 if kind == "qwen3" else 0  # norms of queries and keys
        norms = found["RMSNormalization"] + found["SimplifiedLayerNormalization"]
        norms += found["SkipSimplifiedLayerNormalization"]
        assert norms == 2 * 2 + 1 + of_heads
        assert found["RotaryEmbedding"] == 2 * 2
        assert not found["Pow"] + found["Neg"] + found["ReduceMean"]
    if kind == "gemma4_text":  # of queries and keys, rotated before heads come first; no weight
        found = operators(bundle.graph)
        assert found["RotaryEmbedding"] == 4 + 2
        assert not found["Pow"] + found["Neg"] + found["ReduceMean"]


def test_a_model_that_is_not_what_its_config_says(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(BadInput, match=r"weight model\.layers\.2\.\S+ is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": "no such thing"}, "causal language models of transformers"),
        ({"model_type": "gpt_oss", **PLAIN}, "scaled_dot_product_attention"),
        (
            {
                "model_type": "llama",
                **PLAIN,
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            },
            "depends on how long a row is",
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_models_that_cannot_be_exported(config: dict[str, Any], message: str) -> None:
    def build() -> None:
        family = family_of(config)
        family.build(family.read_spec(config))

    with pytest.raises(BadInput, match=message):
        build()


def test_the_language_model_of_one_that_sees(tmp_path: Path) -> None:
    """Its config is a part of the other's, and so are its weights."""
    folder = save(tmp_path / "text", "gemma3n_text")
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "config.json").write_text(
        json.dumps({"model_type": "gemma3n", "text_config": config, "vision_config": {}})
    )
    part = {f"model.language_model.{n.removeprefix('model.')}": w for n, w in weights.items()}
    save_file({**part, "model.vision_tower.weight": torch.zeros(3)}, whole / "model.safetensors")
    text, seeing = open_checkpoint(folder), open_checkpoint(whole)
    assert seeing.spec.layout == text.spec.layout
    ids = torch.arange(7)[None] + 3
    with torch.inference_mode():
        both = [load_model(c)(ids, torch.arange(7)[None]) for c in (text, seeing)]
    assert torch.equal(*both)
    del part["model.language_model.layers.0.mlp.up_proj.weight"]
    save_file({**part, "model.vision_tower.weight": torch.zeros(3)}, whole / "model.safetensors")
    with pytest.raises(BadInput, match=r"up_proj\.weight is missing"):
        open_checkpoint(whole)


def test_a_tied_head_that_is_stored_twice(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "gpt2")
    weights = load_file(folder / "model.safetensors")
    head = weights["transformer.wte.weight"].clone()
    save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors")
    assert "lm_head.weight" not in open_checkpoint(folder).tensors
    save_file({**weights, "lm_head.weight": head + 1}, folder / "model.safetensors")
    with pytest.raises(BadInput, match=r"differs from transformer\.wte\.weight"):
        open_checkpoint(folder)


def test_no_code_of_a_checkpoint_runs(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    trap = "raise SystemExit('executed')\n"
    (folder / "modeling.py").write_text(trap)
    auto_map = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    assert open_checkpoint(folder).spec.model_type == "llama"


def test_experts_are_read_one_by_one(tmp_path: Path) -> None:
    """Each is a tensor of its own in the file, and what is wrong is said of that."""
    folder = save(tmp_path / "model", "mixtral")
    checkpoint = open_checkpoint(folder)
    spec, name = checkpoint.spec, "model.layers.1.mlp.experts.gate_up_proj"
    own = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert [part.name.rpartition("experts.")[2] for part in checkpoint.tensors[name].parts] == [
        f"{expert}.{part}.weight" for expert in range(4) for part in ("w1", "w3")
    ]
    for key, value in load_model(checkpoint).state_dict().items():
        assert torch.equal(value, own[key])
    assert spec.parameters() == sum(value.numel() for value in own.values())
    all_experts = sum(own[key].numel() for key in spec.routed or {})
    dense = 2 * (spec.parameters(matrices_only=True) - own["model.embed_tokens.weight"].numel())
    core = 2 * 2 * 2 * spec.q_heads * spec.layout.head_dim[0]  # two layers, one token
    assert spec.flops_per_token(1) == dense + core - all_experts  # two times half of them
    weights = load_file(folder / "model.safetensors")
    expert = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    save_file({**weights, expert: weights[expert][1:].clone()}, folder / "model.safetensors")
    with pytest.raises(BadInput, match=r"experts\.2\.w3\.weight has shape \[39, 32\]"):
        open_checkpoint(folder)
    save_file({**weights, expert: weights[expert].half()}, folder / "model.safetensors")
    with pytest.raises(BadInput, match="save them in one dtype"):
        open_checkpoint(folder)
    del weights[expert]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(BadInput, match=r"weight \S+experts\.2\.w3\.weight is missing"):
        open_checkpoint(folder)


def test_weights_that_are_no_rows_of_a_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion that mixes values cannot be undone by reading."""

    def mixed(_model: Any, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = "model.layers.0.mlp.experts.down_proj"
        return {**own, name: own[name].transpose(1, 2)}

    monkeypatch.setattr(hugging_face_weights, "revert_weight_conversion", mixed)
    config = {"model_type": "mixtral", **MODELS["mixtral"]}
    with pytest.raises(BadInput, match=r"store \S+down_proj, which is no parameter of their code"):
        family_of(config).read_spec(config)
