"""Tencent's Hunyuan with cross-layer attention, dense and with a mixture of experts.

With `use_cla`, layer i owns if `i % cla_share_factor == 0`; the others have a `q_proj` alone. What
is shared is the rotated key: the norm of keys comes after RoPE, and every layer has one of its own
(`key_layernorm`). A key normed without a weight is still the same for the whole group, so that is
what a cache holds, and each layer's weight moves onto its query (`rewrite/hoist_key_scale.py`).

A router's scores are in float32; of `moe_topk` chosen experts, if more than one, the weights are
made to sum to one. No token is ever dropped for an expert's capacity, which belongs to training.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from cla_export.config import ConfigReader
from cla_export.errors import BadInput
from cla_export.layout import KVLayout, layout_from_config
from cla_export.models.cla import RMSNorm, rope_tables, rotate
from cla_export.models.decoder import KV, Decoder, KVCache
from cla_export.models.experts import Experts
from cla_export.models.hunyuan_weights import ways_to_store
from cla_export.spec import ModelSpec

_NOT_USED = ("kv_lora_rank", "q_lora_rank", "v_head_dim")  # without `use_mla`
_ALLOWED: Mapping[str, tuple[object, ...]] = {  # None: absent
    "hidden_act": (None, "silu"),
    "norm_type": (None, "rms", "hf_rms"),
    "use_mla": (None, False),
    "mamba": (None, False),
    "use_rotary_pos_emb": (None, True),
    "position_embedding_xdrope": (None, False),
    "add_classification_head": (None, False),
    "group_limited_greedy": (None, False),
    "routed_scaling_factor": (None, 1.0),
    "sliding_window": (None,),
}


def read_spec(config: Mapping[str, object]) -> ModelSpec:
    """Read a HunYuanConfig, whatever its model_type."""
    config = {key: value for key, value in config.items() if key not in _NOT_USED}
    for key, allowed in _ALLOWED.items():
        if config.get(key) not in allowed:
            expected = " or ".join("absent" if one is None else repr(one) for one in allowed)
            raise BadInput(
                f"config.json: {key} is {config[key]!r}; for a Hunyuan model to be exported, it "
                f"must be {expected}"
            )
    read, layout = ConfigReader(config), layout_from_config(config)
    if layout.head_dim[0] % 2:
        raise BadInput(
            f"config.json: head_dim is {layout.head_dim[0]}; RoPE rotates halves, so it is even"
        )
    spec = ModelSpec(
        model_type=str(config.get("model_type", "hunyuan")),
        layout=layout,
        vocab_size=read.integer("vocab_size"),
        hidden_size=read.integer("hidden_size"),
        q_heads=read.integer("num_attention_heads"),
        max_positions=read.integer("max_position_embeddings"),
        rope_theta=_theta(config, layout.head_dim[0]),
        norm_eps=read.number("rms_norm_eps", 1e-5),
        tie_embeddings=read.boolean("tie_word_embeddings", False),
        qk_norm=read.boolean("use_qk_norm", False),
        attention_bias=read.boolean("attention_bias", False),
        config=config,
    )
    with torch.device("meta"):
        stored = {n: tuple(p.shape) for n, p in HunyuanDecoder(spec).named_parameters()}
    return replace(
        spec,
        stored=stored,
        assembled={
            n: ways for n, shape in stored.items() if (ways := ways_to_store(n, shape, spec))
        },
        routed={
            name: (_Mixture.chosen_in(config, int(name.split(".")[2])), shape[0])
            for name, shape in stored.items()
            if len(shape) == 3
        },
    )


def build(spec: ModelSpec) -> "HunyuanDecoder":
    """The module for a spec, weights uninitialised until a checkpoint is loaded into it."""
    return HunyuanDecoder(spec)


def constants(spec: ModelSpec) -> dict[str, Tensor]:
    """Float32 RoPE tables."""
    cos, sin = rope_tables(spec.max_positions, spec.layout.head_dim[0], spec.rope_theta)
    return {"model.rope_cos": cos, "model.rope_sin": sin}


def _theta(config: Mapping[str, object], dim: int) -> float:
    """RoPE's base. Scaling of type dynamic with an `alpha` changes it, for rows of any length."""
    read = ConfigReader(config)
    scaling = read.mapping("rope_scaling") or read.mapping("rope_parameters") or {}
    within = ConfigReader(scaling, where="config.json: RoPE scaling")
    theta = within.number("rope_theta", read.number("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type")) or "default"
    if kind == "default":
        return theta
    if kind == "dynamic" and scaling.get("alpha"):
        return float(theta * within.number("alpha") ** (dim / (dim - 2)))
    raise BadInput(
        f"config.json: RoPE scaling is {dict(scaling)!r}; a Hunyuan model can be exported with "
        "none, or with type 'dynamic' and an alpha, whose angles depend on the position alone"
    )


def _of_layer(config: Mapping[str, object], key: str, layer: int, default: object) -> int:
    """A whole number that a config gives for all layers, or in a list for each."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, list):
        count = config["num_hidden_layers"]
        if len(value) != count:
            raise BadInput(
                f"config.json: {key} has {len(value)} entries; expected one for each of the "
                f"{count} layers"
            )
        value = value[layer]
    return ConfigReader({key: value}).integer(key)


class _Attention(nn.Module):
    """One layer's attention. Only an owner has k_proj and v_proj; each has norms of its own."""

    def __init__(self, config: Mapping[str, object], layout: KVLayout, layer: int) -> None:
        super().__init__()
        read = ConfigReader(config)
        hidden, self.dim = read.integer("hidden_size"), layout.head_dim[layer]
        self.kv_heads = layout.kv_heads[layer]
        bias, eps = read.boolean("attention_bias", False), read.number("rms_norm_eps", 1e-5)
        q_width, kv_width = (
            heads * self.dim for heads in (read.integer("num_attention_heads"), self.kv_heads)
        )
        self.q_proj = nn.Linear(hidden, q_width, bias=bias)
        if layout.is_owner(layer):
            self.k_proj = nn.Linear(hidden, kv_width, bias=bias)
            self.v_proj = nn.Linear(hidden, kv_width, bias=bias)
        self.o_proj = nn.Linear(q_width, hidden, bias=bias)
        if read.boolean("use_qk_norm", False):
            self.query_layernorm, self.key_layernorm = (
                RMSNorm(self.dim, eps),
                RMSNorm(self.dim, eps),
            )
        self.normed, self.eps = read.boolean("use_qk_norm", False), eps

    def project_kv(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> KV:
        """K, rotated but not normed, and V of an owner, [B, Hkv, S, D]."""
        return rotate(self._heads(self.k_proj(x)), *rope), self._heads(self.v_proj(x))

    def for_cache(self, key: Tensor, shared: bool) -> Tensor:
        """A key's norm, without the layer's weight where other layers read it too."""
        if not self.normed:
            return key
        return F.rms_norm(key, (self.dim,), eps=self.eps) if shared else self.key_layernorm(key)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        kv: KV,
        mask: Tensor | None,
        held: bool | None,
    ) -> Tensor:
        """`held` is None for a key that is not normed, else whether its norm lacks the weight."""
        query, (key, value) = rotate(self._heads(self.q_proj(x)), *rope), kv
        if self.normed:
            query = self.query_layernorm(query)
            key = self.key_layernorm(key) if held is None else key
            query = query * self.key_layernorm.weight if held else query
        y = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.kv_heads < query.shape[1],
        )
        merged: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return merged

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, H * D] as [B, H, S, D]."""
        return x.view(*x.shape[:-1], -1, self.dim).transpose(1, 2)


class _MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Mapping[str, object], width: int) -> None:
        super().__init__()
        read = ConfigReader(config)
        hidden, bias = read.integer("hidden_size"), read.boolean("mlp_bias", False)
        self.gate_proj = nn.Linear(hidden, width, bias=bias)
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class _Scores(nn.Module):
    """A router's scores of each expert, in float32 whatever the weights are in."""

    def __init__(self, hidden: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), self.weight.to(wide))


class _Mixture(nn.Module):
    """Experts that a router chooses, and with `use_mixed_mlp_moe` an MLP for every token."""

    def __init__(self, config: Mapping[str, object], layer: int) -> None:
        super().__init__()
        read = ConfigReader(config)
        if read.boolean("mlp_bias", False):
            raise BadInput("config.json: mlp_bias is true; experts have no biases, so it is false")
        hidden, experts = read.integer("hidden_size"), _of_layer(config, "num_experts", layer, 1)
        default = config.get("intermediate_size")
        width = _of_layer(config, "moe_intermediate_size", layer, default)
        self.chosen = self.chosen_in(config, layer)
        if self.chosen > experts:
            raise BadInput(
                f"config.json: moe_topk is {self.chosen} in layer {layer}, which has {experts} "
                "experts"
            )
        self.gate = nn.Module()
        self.gate.wg = _Scores(hidden, experts)
        self.experts = Experts(experts, hidden, width)
        self.shared_mlp = None
        if read.boolean("use_mixed_mlp_moe", False):
            self.shared_mlp = _MLP(config, width * _of_layer(config, "num_shared_expert", layer, 1))

    @staticmethod
    def chosen_in(config: Mapping[str, object], layer: int) -> int:
        """How many experts a token goes through in a layer."""
        return _of_layer(config, "moe_topk", layer, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, x.shape[-1])  # [T, H]
        scores: Tensor = self.gate.wg(tokens)  # type: ignore[operator]
        weights, chosen = scores.softmax(-1).topk(self.chosen)
        if self.chosen > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        y: Tensor = self.experts(tokens, chosen, weights).view(x.shape)
        return y if self.shared_mlp is None else y + self.shared_mlp(x)


class _Layer(nn.Module):
    """Attention and MLP, each behind its own norm and inside its own residual."""

    def __init__(self, config: Mapping[str, object], layout: KVLayout, layer: int) -> None:
        super().__init__()
        read = ConfigReader(config)
        norm = read.integer("hidden_size"), read.number("rms_norm_eps", 1e-5)
        experts, skipped = config.get("num_experts") or 1, config.get("moe_layer_num_skipped") or 0
        most = max(experts) if isinstance(experts, list) else experts
        if type(skipped) is not int or type(most) is not int:
            raise BadInput(
                f"config.json: num_experts is {experts!r} and moe_layer_num_skipped {skipped!r}; "
                "expected whole numbers"
            )
        self.group, self.is_owner = layout.group_of(layer), layout.is_owner(layer)
        self.shared = len(layout.groups[self.group].layers) > 1
        self.self_attn = _Attention(config, layout, layer)
        self.mlp: nn.Module
        if most > 1 and layer >= skipped:
            self.mlp = _Mixture(config, layer)
        else:
            self.mlp = _MLP(config, _of_layer(config, "intermediate_size", layer, None))
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(*norm), RMSNorm(*norm)


class HunyuanDecoder(Decoder):
    """Embedding, layers, final norm, head."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.config is not None
        self.spec, layout = spec, spec.layout
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.model.layers = nn.ModuleList(
            _Layer(spec.config, layout, layer) for layer in range(layout.num_layers)
        )
        self.model.norm = RMSNorm(spec.hidden_size, spec.norm_eps)
        tables = rope_tables(spec.max_positions, layout.head_dim[0], spec.rope_theta)
        for name, table in zip(("rope_cos", "rope_sin"), tables, strict=True):
            self.model.register_buffer(name, table, persistent=False)
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        if spec.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, cache: KVCache | None = None
    ) -> Tensor:
        """Logits; without a cache, every layer norms the shared key itself."""
        return self._run(input_ids, position_ids, cache, in_caches=cache is not None)[0]

    def forward_with_kv(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, list[KV]]:
        """Stateless logits, and what caches would hold, which attention reads here as well."""
        return self._run(input_ids, position_ids, None, in_caches=True)

    def _run(
        self, input_ids: Tensor, position_ids: Tensor, cache: KVCache | None, *, in_caches: bool
    ) -> tuple[Tensor, list[KV]]:
        x: Tensor = self.model.embed_tokens(input_ids)  # type: ignore[operator]
        rope = (  # [B, 1, S, D/2]
            self.model.get_buffer("rope_cos")[position_ids].unsqueeze(1).to(x.dtype),
            self.model.get_buffer("rope_sin")[position_ids].unsqueeze(1).to(x.dtype),
        )
        mask = None if cache is None else cache.mask(position_ids, None)
        groups: list[KV] = []
        for layer in cast("Iterable[_Layer]", self.model.layers):
            attention, normed = layer.self_attn, layer.input_layernorm(x)
            if layer.is_owner:
                key, value = attention.project_kv(normed, rope)
                if in_caches:
                    key = attention.for_cache(key, layer.shared)
                kv = key, value
                groups.append(kv if cache is None else cache.update(layer.group, *kv))
            held = layer.shared if in_caches else None
            x = x + attention(normed, rope, groups[layer.group], mask, held)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        logits: Tensor = self.lm_head(self.model.norm(x))  # type: ignore[operator]
        return logits, groups
