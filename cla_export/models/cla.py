"""The reference CLA decoder: the architecture of the Cross-Layer Attention paper in PyTorch.

Pre-norm, RMSNorm, RoPE on rotated halves, SwiGLU, and any KV layout (Brandon et al. 2024, section
3.1): an owner projects K and V from its own input, a sharer only projects Q and attends to what its
owner produced. K and V travel from owner to sharer as arguments of `forward`, never as module
state, so that tracing leaves the module as it was.
"""

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from cla_export.config import ConfigReader
from cla_export.errors import BadInput
from cla_export.layout import KVLayout, layout_from_config
from cla_export.models.decoder import KV, Decoder, KVCache
from cla_export.spec import ModelSpec


def read_spec(config: Mapping[str, object]) -> ModelSpec:
    """Read `config.json` (model_type "cla", otherwise the keys of a Hugging Face Llama)."""
    read = ConfigReader(config)
    layout = layout_from_config(config)
    if any(dim % 2 for dim in layout.head_dim):
        raise BadInput(
            f"config.json: head_dim is {layout.head_dim[0]}; RoPE rotates halves, so it is even"
        )
    for layer, dim in enumerate(layout.head_dim):
        if dim != layout.head_dim[0]:
            raise BadInput(
                f"config.json: head_dim differs by layer (layer {layer} has {dim}, layer 0 has "
                f"{layout.head_dim[0]}); a model of type 'cla' has one RoPE table, so one head_dim"
            )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise BadInput(
            f"config.json: hidden_act is {config['hidden_act']!r}; a model of type 'cla' uses "
            "SwiGLU, so it must be 'silu' or absent"
        )
    return ModelSpec(
        model_type="cla",
        layout=layout,
        vocab_size=read.integer("vocab_size"),
        hidden_size=read.integer("hidden_size"),
        intermediate_size=read.integer("intermediate_size"),
        q_heads=read.integer("num_attention_heads"),
        max_positions=read.integer("max_position_embeddings"),
        rope_theta=_rope_theta(read),
        norm_eps=read.number("rms_norm_eps", 1e-6),
        tie_embeddings=read.boolean("tie_word_embeddings", False),
        separate_kv_norm=_kv_norms(read, config, layout),
        qk_norm=read.boolean("qk_norm", False),
        attention_bias=read.boolean("attention_bias", False),
    )


def _kv_norms(
    read: ConfigReader, config: Mapping[str, object], layout: KVLayout
) -> bool | tuple[int, ...]:
    """Which owners have a kv_layernorm: all, none, or those of a list (YOCO: one)."""
    value = config.get("separate_kv_norm")
    if not isinstance(value, list):
        return read.boolean("separate_kv_norm", False)
    owners = [layer for layer in range(layout.num_layers) if layout.is_owner(layer)]
    for layer in value:
        if type(layer) is not int or layer not in owners:
            raise BadInput(
                f"config.json: separate_kv_norm lists {layer!r}; expected true, false, or some of "
                f"the layers that own a cache ({', '.join(map(str, owners))})"
            )
    return tuple(value)


def _rope_theta(read: ConfigReader) -> float:
    scaling = read.mapping("rope_scaling") or read.mapping("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise BadInput(
            f"config.json: RoPE scaling of type {kind!r} is not supported for model_type 'cla'; "
            "expected plain RoPE, that is rope_theta alone"
        )
    theta = scaling.get("rope_theta")
    if theta is not None:
        return ConfigReader(scaling, where="config.json: rope_parameters").number("rope_theta")
    return read.number("rope_theta", 10000.0)


def build(spec: ModelSpec) -> "ClaDecoder":
    """The module for a spec, weights uninitialised until a checkpoint is loaded into it."""
    return ClaDecoder(spec)


def constants(spec: ModelSpec) -> dict[str, Tensor]:
    """The buffers that a checkpoint does not hold: float32 RoPE tables."""
    cos, sin = rope_tables(spec.max_positions, spec.layout.head_dim[0], spec.rope_theta)
    return {"model.rope_cos": cos, "model.rope_sin": sin}


def rope_tables(positions: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [positions, head_dim // 2], as the runtime will read them.

    Stored rather than recomputed in the graph: an inverse frequency one ulp off moves the angle
    by 5e-4 at position 8192.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    inverse_frequency = 1.0 / (theta**exponent)
    angles = torch.arange(positions, device="cpu").float()[:, None] * inverse_frequency
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on halves. x [B, H, S, D]; cos, sin [B, 1, S, D/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, statistics in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """One layer's attention. Only an owner has k_proj, v_proj and k_norm."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.head_dim = spec.layout.head_dim[layer]
        self.is_owner = spec.layout.is_owner(layer)
        self.q_heads, self.kv_heads = spec.q_heads, spec.layout.kv_heads[layer]
        q_width = spec.q_heads * self.head_dim
        kv_width = self.kv_heads * self.head_dim
        bias = spec.attention_bias
        self.q_proj = nn.Linear(spec.hidden_size, q_width, bias=bias)
        self.o_proj = nn.Linear(q_width, spec.hidden_size, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, spec.norm_eps) if spec.qk_norm else None
        if self.is_owner:
            self.k_proj = nn.Linear(spec.hidden_size, kv_width, bias=bias)
            self.v_proj = nn.Linear(spec.hidden_size, kv_width, bias=bias)
            self.k_norm = RMSNorm(self.head_dim, spec.norm_eps) if spec.qk_norm else None

    def project_kv(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> KV:
        """K (normed, then rotated) and V of an owner, [B, Hkv, S, D]: what the cache holds."""
        key = self._split(self.k_proj(x), self.kv_heads)
        value = self._split(self.v_proj(x), self.kv_heads)
        if self.k_norm is not None:
            key = self.k_norm(key)
        return rotate(key.transpose(1, 2), *rope), value.transpose(1, 2)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], kv: KV, mask: Tensor | None
    ) -> Tensor:
        query = self._split(self.q_proj(x), self.q_heads)  # [B, S, Hq, D]
        if self.q_norm is not None:
            query = self.q_norm(query)
        query = rotate(query.transpose(1, 2), *rope)
        y = F.scaled_dot_product_attention(
            query,
            *kv,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.kv_heads < self.q_heads,
        )
        merged: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return merged

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:-1], heads, self.head_dim)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.up_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Layer(nn.Module):
    """Attention and MLP, each behind its own norm and inside its own residual."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        norm = (spec.hidden_size, spec.norm_eps)
        self.group = spec.layout.group_of(layer)
        self.window = spec.layout.window[layer]
        self.self_attn = Attention(spec, layer)
        self.mlp = MLP(spec)
        self.input_layernorm = RMSNorm(*norm)
        self.post_attention_layernorm = RMSNorm(*norm)
        if spec.has_kv_norm(layer):
            self.kv_layernorm = RMSNorm(*norm)

    def project_kv(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> KV:
        norm = self.kv_layernorm if hasattr(self, "kv_layernorm") else self.input_layernorm
        return self.self_attn.project_kv(norm(x), rope)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], kv: KV, mask: Tensor | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, kv, mask)
        y: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y


class ClaModel(nn.Module):
    """Embedding, layers, final norm."""

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Layer(spec, i) for i in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps)
        cos, sin = rope_tables(spec.max_positions, spec.layout.head_dim[0], spec.rope_theta)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, cache: KVCache | None
    ) -> tuple[Tensor, list[KV]]:
        x = self.embed_tokens(input_ids)
        rope = (  # [B, 1, S, D/2]
            self.rope_cos[position_ids].unsqueeze(1).to(x.dtype),
            self.rope_sin[position_ids].unsqueeze(1).to(x.dtype),
        )
        shared: list[KV] = []  # by group
        masks: dict[int | None, Tensor | None] = {}
        for layer in cast("Iterable[Layer]", self.layers):
            if layer.self_attn.is_owner:
                kv = layer.project_kv(x, rope)
                shared.append(kv if cache is None else cache.update(layer.group, *kv))
            if layer.window not in masks:
                masks[layer.window] = (
                    stateless_mask(input_ids.shape[1], layer.window, x.device)
                    if cache is None
                    else cache.mask(position_ids, layer.window)
                )
            x = layer(x, rope, shared[layer.group], masks[layer.window])
        return self.norm(x), shared


def stateless_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Bool [S, S] of a sliding window, the query's own position counted; None for plain causal."""
    if window is None:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


class ClaDecoder(Decoder):
    """The reference decoder: a KVCache is an argument of it."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.model = ClaModel(spec)
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        if spec.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, cache: KVCache | None = None
    ) -> Tensor:
        logits: Tensor = self.lm_head(self.model(input_ids, position_ids, cache)[0])
        return logits

    def forward_with_kv(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, list[KV]]:
        """Stateless logits [B, S, V] and each group's K and V [B, Hkv, S, D]."""
        hidden, shared = self.model(input_ids, position_ids, None)
        return self.lm_head(hidden), shared
