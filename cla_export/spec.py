"""ModelSpec: what a decoder is, in numbers. Frozen, read from a config, needs no framework."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cla_export.layout import KVLayout


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a tensor that a checkpoint stores, all of them unless `start` and `stop` say."""

    name: str
    shape: tuple[int, ...]  # of the tensor as it is stored
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The dimensions of a decoder-only transformer whose layers may share KV.

    `weights` maps each parameter's name to its shape; everything that is counted (parameters,
    FLOPs, what a checkpoint must hold) is read off it, so the counts cannot drift from the model.

    A family whose names are not a Llama's gives them as `stored`; the fields that only shape a
    Llama are then left out, and `config` is what its module is built from. `renamed` says what a
    checkpoint may call a parameter in place of its own name; `part`, where it holds other models'
    weights as well, how those of this one begin; `tied`, further names of a parameter. `assembled`
    says of a parameter that a checkpoint has in pieces which rows make it up, end to end, in each
    of the ways that there are. `routed` says of the weights of experts how many of how many a token
    goes through.

    Of a module of the user's own, `hidden_size` is the width of its embedding (0: not known), and
    `epsilons` are what its norms add, in place of `norm_eps`. With `spelt_attention` it writes some
    attention out, in place of calling PyTorch's: what a layer caches is seen in the traced graph
    alone, and not in PyTorch. `q_heads` is 0 where that graph was not looked at.
    """

    model_type: str
    layout: KVLayout
    vocab_size: int
    hidden_size: int
    q_heads: int
    max_positions: int
    norm_eps: float
    intermediate_size: int = 0
    rope_theta: float = 0.0
    tie_embeddings: bool = True
    separate_kv_norm: bool | tuple[int, ...] = False  # of all owners, or of those
    qk_norm: bool = False
    attention_bias: bool = False
    stored: Mapping[str, tuple[int, ...]] | None = field(default=None, hash=False, repr=False)
    config: Mapping[str, object] | None = field(default=None, hash=False, repr=False)
    renamed: Mapping[str, str] | None = field(default=None, hash=False, repr=False)
    part: str = ""
    tied: Mapping[str, str] | None = field(default=None, hash=False, repr=False)
    epsilons: tuple[float, ...] = ()
    assembled: Mapping[str, tuple[tuple[Rows, ...], ...]] | None = field(
        default=None, hash=False, repr=False
    )
    routed: Mapping[str, tuple[int, int]] | None = field(default=None, hash=False, repr=False)
    spelt_attention: bool = False

    @property
    def num_layers(self) -> int:
        return self.layout.num_layers

    def has_kv_norm(self, layer: int) -> bool:
        """Whether the layer's K and V are projected behind a norm of their own."""
        which = self.separate_kv_norm
        return self.layout.is_owner(layer) and (
            which if isinstance(which, bool) else layer in which
        )

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each parameter of a checkpoint; Linear weights are [out, in].

        Names are a Hugging Face Llama's. A sharer has no k_proj, v_proj or k_norm; an owner with
        `separate_kv_norm` has `kv_layernorm` beside `input_layernorm` (CLA paper, section 3.1).
        """
        if self.stored is not None:
            return dict(self.stored)
        hidden, ffn = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden)
        }
        for i in range(self.num_layers):
            dim = self.layout.head_dim[i]
            q_width, kv_width = self.q_heads * dim, self.layout.kv_heads[i] * dim
            owner = self.layout.is_owner(i)
            layer = f"model.layers.{i}."
            projections = {"q_proj": (q_width, hidden), "o_proj": (hidden, q_width)}
            if owner:
                projections |= {"k_proj": (kv_width, hidden), "v_proj": (kv_width, hidden)}
            for name, shape in projections.items():
                shapes[f"{layer}self_attn.{name}.weight"] = shape
                if self.attention_bias:
                    shapes[f"{layer}self_attn.{name}.bias"] = shape[:1]
            if self.qk_norm:
                shapes[f"{layer}self_attn.q_norm.weight"] = (dim,)
                if owner:
                    shapes[f"{layer}self_attn.k_norm.weight"] = (dim,)
            shapes[f"{layer}input_layernorm.weight"] = (hidden,)
            if self.has_kv_norm(i):
                shapes[f"{layer}kv_layernorm.weight"] = (hidden,)
            shapes[f"{layer}post_attention_layernorm.weight"] = (hidden,)
            shapes[f"{layer}mlp.gate_proj.weight"] = (ffn, hidden)
            shapes[f"{layer}mlp.up_proj.weight"] = (ffn, hidden)
            shapes[f"{layer}mlp.down_proj.weight"] = (hidden, ffn)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def parameters(self, *, matrices_only: bool = False) -> int:
        """Number of parameters; `matrices_only` leaves out norms and biases, as the paper does."""
        shapes = self.weights().values()
        return sum(math.prod(s) for s in shapes if len(s) > 1 or not matrices_only)

    def flops_per_token(self, context: int) -> int:
        """Forward FLOPs for one token that attends to `context` tokens (a multiply-add is two).

        Matrix products and the attention core; norms, RoPE and softmax are left out. The core's
        share does not change with CLA: every sharer reads the whole cache (paper, section 2.3).
        """
        lookups = sum(math.prod(s) for name, s in self.weights().items() if "embed" in name)
        products = self.parameters(matrices_only=True) - lookups  # a lookup is no product ...
        products += self.vocab_size * self.hidden_size if self.tie_embeddings else 0  # but a head
        for name, (chosen, count) in (self.routed or {}).items():
            products -= math.prod(self.weights()[name]) // count * (count - chosen)
        core = 0
        for dim, window in zip(self.layout.head_dim, self.layout.window, strict=True):
            core += 2 * self.q_heads * dim * (context if window is None else min(context, window))
        return 2 * (products + core)

    def dense_twin(self) -> "ModelSpec":
        """The same model where every layer projects and caches its own K and V."""
        layout, stored = self.layout, self.stored
        if stored is not None:
            widths = zip(layout.kv_heads, layout.head_dim, strict=True)
            stored = {
                **stored,
                **{
                    f"layers.{i}: its own keys and values": (2 * heads * dim, self.hidden_size)
                    for i, (heads, dim) in enumerate(widths)
                    if not layout.is_owner(i)
                },
            }
        return replace(self, layout=layout.dense_twin(), stored=stored)
