"""`gpt_crosslayer`, the CLA authors' own architecture: dolomite-engine's models.

Both of its layouts: weights of 2024 are grouped (`transformer.h.{group}.layers.{j}`, the group's
`kv_proj` beside them), those of 2025 are flat (`transformer.h.{layer}`, `kv_proj` where a layer
owns). Each owner has a norm of its own in front of its K and V, and rows of `kv_attn` hold a head's
key, then its value. With `joint_residual_stream` every layer adds what entered its group.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from cla_export.config import ConfigReader
from cla_export.errors import BadInput
from cla_export.layout import KVLayout, layout_from_config
from cla_export.models.cla import RMSNorm, rope_tables, rotate
from cla_export.models.decoder import StatelessDecoder
from cla_export.spec import ModelSpec

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}
_GATED = {"swiglu": "silu", "geglu": "gelu"}
_BLOCKS = {  # of 2025's configs: what is the same in every layer
    "sequence_mixer_blocks": (
        "num_attention_heads", "num_key_value_heads", "add_bias", "attention_multiplier",
    ),
    "mlp_blocks": ("intermediate_size", "activation_function", "add_bias"),
}  # fmt: skip
_NAMES = {  # flat -> grouped, within a layer
    "sequence_mixer.": "attn.",
    "mlp_block.": "mlp.",
}


def read_spec(config: Mapping[str, object]) -> ModelSpec:
    """Read the config of either year."""
    plain = _plain(config)
    read, layout = ConfigReader(plain), layout_from_config(plain)
    _check(plain)
    with torch.device("meta"):
        stored = {n: tuple(p.shape) for n, p in GptCrossLayer(plain, layout).named_parameters()}
    return ModelSpec(
        model_type="gpt_crosslayer",
        layout=layout,
        vocab_size=read.integer("vocab_size"),
        hidden_size=read.integer("hidden_size"),
        q_heads=read.integer("num_attention_heads"),
        max_positions=read.integer("max_position_embeddings"),
        norm_eps=read.number("layer_norm_epsilon", 1e-5),
        tie_embeddings=read.boolean("tie_word_embeddings", True),
        stored=stored,
        config=dict(config),
        renamed={name: _grouped(name, layout) for name in stored},
    )


def build(spec: ModelSpec) -> StatelessDecoder:
    """The module for a spec, weights uninitialised until a checkpoint is loaded into it."""
    assert spec.config is not None
    return StatelessDecoder(GptCrossLayer(_plain(spec.config), spec.layout), spec)


def constants(spec: ModelSpec) -> dict[str, Tensor]:
    """Float32 RoPE tables, where the model rotates."""
    assert spec.config is not None
    plain = _plain(spec.config)
    if plain.get("position_embedding_type") != "rope":
        return {}
    cos, sin = _tables(plain, spec.layout)
    return {"transformer.cos": cos, "transformer.sin": sin}


class Block(nn.Module):
    """One layer; an owner also makes its group's keys and values."""

    def __init__(self, config: Mapping[str, object], layout: KVLayout, layer: int) -> None:
        super().__init__()
        read = ConfigReader(config)
        hidden, self.dim = read.integer("hidden_size"), layout.head_dim[layer]
        inner = read.integer("n_inner", 4 * hidden)
        bias, name = read.boolean("add_bias", True), str(config["activation_function"])
        self.is_owner, self.kv_heads = layout.is_owner(layer), layout.kv_heads[layer]
        self.scale = _scale(config)
        self.residual = read.number("m_residual", 1.0)
        self.gated = name in _GATED
        self.activation = _ACTIVATIONS[_GATED.get(name, name)]
        if self.is_owner:
            self.kv_proj = nn.Module()
            self.kv_proj.ln = _norm(config)
            self.kv_proj.kv_attn = nn.Linear(hidden, 2 * self.kv_heads * self.dim, bias=bias)
        self.ln_1, self.ln_2 = _norm(config), _norm(config)
        self.sequence_mixer, self.mlp_block = nn.Module(), nn.Module()
        self.sequence_mixer.q_attn = nn.Linear(hidden, hidden, bias=bias)
        self.sequence_mixer.c_proj = nn.Linear(hidden, hidden, bias=bias)
        self.mlp_block.c_fc = nn.Linear(hidden, inner * (2 if self.gated else 1), bias=bias)
        self.mlp_block.c_proj = nn.Linear(inner, hidden, bias=bias)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """K, not yet rotated, and V of an owner, [B, Hkv, S, D]."""
        both = self.kv_proj.kv_attn(self.kv_proj.ln(x))  # type: ignore[operator]
        key, value = self._heads(both, 2 * self.dim).chunk(2, -1)
        return key, value

    def attend(
        self, x: Tensor, kv: tuple[Tensor, Tensor], turn: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """What attention adds to the residual stream."""
        query = turn(self._heads(self.sequence_mixer.q_attn(self.ln_1(x)), self.dim))  # type: ignore[operator]
        y = F.scaled_dot_product_attention(
            query,
            *kv,
            is_causal=True,
            scale=self.scale,
            enable_gqa=self.kv_heads < query.shape[1],
        )
        made: Tensor = self.sequence_mixer.c_proj(y.transpose(1, 2).flatten(2))  # type: ignore[operator]
        return made * self.residual if self.residual != 1.0 else made

    def feed_forward(self, x: Tensor) -> Tensor:
        """What the MLP adds to it."""
        h = self.mlp_block.c_fc(self.ln_2(x))  # type: ignore[operator]
        if self.gated:
            up, gate = h.chunk(2, -1)
            h = up * self.activation(gate)
        else:
            h = self.activation(h)
        made: Tensor = self.mlp_block.c_proj(h)  # type: ignore[operator]
        return made * self.residual if self.residual != 1.0 else made

    def _heads(self, x: Tensor, width: int) -> Tensor:
        """[B, S, H * width] as [B, H, S, width]."""
        return x.view(*x.shape[:-1], -1, width).transpose(1, 2)


class GptCrossLayer(nn.Module):
    """Stateless: `(input_ids [B, S], position_ids [B, S]) -> logits [B, S, V]`."""

    def __init__(self, config: Mapping[str, object], layout: KVLayout) -> None:
        super().__init__()
        read = ConfigReader(config)
        hidden, positions = read.integer("hidden_size"), str(config["position_embedding_type"])
        vocab = read.integer("vocab_size")
        self.joint = read.boolean("joint_residual_stream", False)
        self.embedding_scale, self.width = read.number("m_emb", 1.0), read.number("m_width", 1.0)
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(vocab, hidden)
        self.learned, self.rotates = positions == "learned_absolute", positions == "rope"
        if self.learned:
            self.transformer.wpe = nn.Embedding(read.integer("max_position_embeddings"), hidden)
        self.transformer.h = nn.ModuleList(
            Block(config, layout, i) for i in range(layout.num_layers)
        )
        self.transformer.ln_f = _norm(config)
        if self.rotates:
            for name, table in zip(("cos", "sin"), _tables(config, layout), strict=True):
                self.transformer.register_buffer(name, table, persistent=False)
        self.lm_head = None
        if not read.boolean("tie_word_embeddings", True):
            self.lm_head = nn.Linear(hidden, vocab, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        model = self.transformer
        x: Tensor = model.wte(input_ids)  # type: ignore[operator]
        if self.learned:
            x = x + model.wpe(position_ids)  # type: ignore[operator]
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale

        def turn(heads: Tensor) -> Tensor:
            if not self.rotates:
                return heads
            rows = (
                model.get_buffer(name)[position_ids].unsqueeze(1).to(x.dtype)
                for name in ("cos", "sin")
            )
            return rotate(heads, *rows)

        entered = x
        for block in model.h:  # type: ignore[union-attr]
            if block.is_owner:
                entered = x
                key, value = block.keys_and_values(x)
                kv = turn(key), value
            x = x + block.attend(x, kv, turn)
            x = x + entered if self.joint else x
            x = x + block.feed_forward(x)
        x = model.ln_f(x)  # type: ignore[operator]
        weight = model.wte.weight if self.lm_head is None else self.lm_head.weight  # type: ignore[union-attr]
        logits = F.linear(x, weight)  # type: ignore[arg-type]
        return logits / self.width if self.width != 1.0 else logits


def _plain(config: Mapping[str, object]) -> dict[str, object]:
    """A config of either year with one key for each thing: those of 2024, Llama's where it has one.

    In 2025 every layer has an entry of its own, and all must be alike.
    """
    spelt = {
        "n_layer": "num_hidden_layers", "num_layers": "num_hidden_layers", "n_embd": "hidden_size",
        "n_head": "num_attention_heads", "n_positions": "max_position_embeddings",
    }  # fmt: skip
    plain = {spelt.get(key, key): value for key, value in config.items()}
    for key, names in _BLOCKS.items():
        blocks = plain.pop(key, None)
        if not isinstance(blocks, list):
            continue
        for name in names:
            found = [block.get(name) for block in blocks if isinstance(block, dict)]
            if any(value != found[0] for value in found):
                raise BadInput(
                    f"config.json: {key} differ in {name} ({found}); a model of type "
                    "'gpt_crosslayer' has layers that are alike"
                )
            if found and found[0] is not None:
                plain["n_inner" if name == "intermediate_size" else name] = found[0]
    plain.setdefault("position_embedding_type", "learned_absolute")
    plain.setdefault("activation_function", "gelu_pytorch_tanh")
    plain.setdefault("normalization_function", "layernorm")
    return plain


def _check(config: Mapping[str, object]) -> None:
    for key, allowed in (
        ("position_embedding_type", ("rope", "learned_absolute", "nope")),
        ("activation_function", (*_ACTIVATIONS, *_GATED)),
        ("normalization_function", ("layernorm", "rmsnorm")),
        ("rope_scaling", (None,)),
    ):
        if config.get(key) not in allowed:
            raise BadInput(
                f"config.json: {key} is {config.get(key)!r}; a model of type 'gpt_crosslayer' can "
                f"be exported with {', '.join(map(repr, allowed))}"
            )


def _norm(config: Mapping[str, object]) -> nn.Module:
    read = ConfigReader(config)
    width, eps = read.integer("hidden_size"), read.number("layer_norm_epsilon", 1e-5)
    if config["normalization_function"] == "rmsnorm":
        return RMSNorm(width, eps)
    return nn.LayerNorm(width, eps)


def _scale(config: Mapping[str, object]) -> float | None:
    """Of attention's scores; None is 1 / sqrt(D)."""
    read = ConfigReader(config)
    if not read.boolean("scale_attn_weights", True):
        return 1.0
    return read.number("attention_multiplier") if config.get("attention_multiplier") else None


def _tables(config: Mapping[str, object], layout: KVLayout) -> tuple[Tensor, Tensor]:
    read = ConfigReader(config)
    positions, theta = read.integer("max_position_embeddings"), read.number("rope_theta", 10000.0)
    return rope_tables(positions, layout.head_dim[0], theta)


def _grouped(name: str, layout: KVLayout) -> str:
    """What a checkpoint of 2024 calls a parameter."""
    parts = name.split(".")
    if parts[:2] != ["transformer", "h"]:
        return name
    layer, rest = int(parts[2]), ".".join(parts[3:])
    group = layout.group_of(layer)
    if parts[3] == "kv_proj":
        return f"transformer.h.{group}.{rest}"
    for flat, grouped in _NAMES.items():
        rest = rest.replace(flat, grouped, 1) if rest.startswith(flat) else rest
    place = layout.groups[group].layers.index(layer)
    return f"transformer.h.{group}.layers.{place}.{rest}"
