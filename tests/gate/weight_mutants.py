"""Weights: of another layer, rounded, misplaced, lost."""

import ml_dtypes
import numpy as np
from subject import (
    ANYWHERE,
    OUTSIDE,
    Place,
    Subject,
    drowned,
    has_bias,
    in_float32,
    mutant,
    plain,
)


def _square_q(s: Subject) -> bool:
    return s.spec.q_heads * s.shared.head_dim == s.spec.hidden_size


def _has_kv_norm(s: Subject) -> bool:
    return s.spec.separate_kv_norm


def _tied(s: Subject) -> bool:
    return s.spec.tie_embeddings and plain(s)


def _untied(s: Subject) -> bool:
    return not s.spec.tie_embeddings and plain(s)


def _swap(s: Subject, first: str, second: str) -> None:
    one, other = s.weight(first), s.weight(second)
    s.set_weight(first, other)
    s.set_weight(second, one)


@mutant(_square_q)
def square_weight_transposed(s: Subject) -> Place:
    """A square Linear is stored [in, out]; no shape check can notice."""
    name = f"{s.sharer}.self_attn.q_proj.weight"
    s.set_weight(name, s.weight(name).T)
    return s.at(s.sharer, "q")


@mutant(in_float32)
def one_weight_rounded_to_bfloat16(s: Subject) -> Place:
    """One tensor went through bfloat16 on its way."""
    name = f"{s.middle}.mlp.down_proj.weight"
    s.set_weight(name, s.weight(name).astype(ml_dtypes.bfloat16))
    return s.at(s.middle, "mlp")


@mutant(in_float32)
def one_weight_rounded_to_float16(s: Subject) -> Place:
    """One tensor went through float16 on its way."""
    name = f"{s.middle}.mlp.down_proj.weight"
    s.set_weight(name, s.weight(name).astype(np.float16))
    return s.at(s.middle, "mlp")


@mutant(invisible=drowned)
def one_weight_rounded_to_int8(s: Subject) -> Place:
    """One tensor was left quantised, a scale for each row."""
    name = f"{s.middle}.mlp.up_proj.weight"
    weight = s.weight(name).astype(np.float32)
    step = np.abs(weight).max(1, keepdims=True) / 127
    s.set_weight(name, np.round(weight / step) * step)
    return s.at(s.middle, "mlp")


@mutant()
def one_row_of_a_weight_zeroed(s: Subject) -> Place:
    """A shard boundary lost a row of a projection."""
    name = f"{s.middle}.mlp.gate_proj.weight"
    weight = s.weight(name)
    weight[-1] = 0
    s.set_weight(name, weight)
    return s.at(s.middle, "mlp")


@mutant(invisible=drowned)
def one_element_of_a_weight_zeroed(s: Subject) -> Place:
    """A single damaged number."""
    name = f"{s.middle}.mlp.down_proj.weight"
    weight = s.weight(name)
    weight[3, 5] = 0
    s.set_weight(name, weight)
    return s.at(s.middle, "mlp")


@mutant()
def nan_in_one_weight(s: Subject) -> Place:
    """An overflow while converting."""
    name = f"{s.middle}.mlp.down_proj.weight"
    weight = s.weight(name)
    weight[0, 0] = np.nan
    s.set_weight(name, weight)
    return s.at(s.middle, "mlp")


@mutant()
def infinity_in_the_key_projection(s: Subject) -> Place:
    """An overflow in a weight that only one group's cache sees."""
    name = f"{s.shared.owner}.self_attn.k_proj.weight"
    weight = s.weight(name)
    weight[0, 0] = np.inf
    s.set_weight(name, weight)
    return s.at(s.shared.owner, "k")


@mutant()
def embedding_row_zeroed(s: Subject) -> Place:
    """One token's embedding was never loaded."""
    table = s.weight("model.embed_tokens.weight")
    table[2] = 0
    s.set_weight("model.embed_tokens.weight", table)
    return ANYWHERE


@mutant()
def embeddings_shifted_by_one_token(s: Subject) -> Place:
    """A special token was added in front of the vocabulary."""
    table = s.weight("model.embed_tokens.weight")
    s.set_weight("model.embed_tokens.weight", np.roll(table, 1, 0))
    return ANYWHERE


@mutant(_tied)
def tied_head_drifted_from_the_embedding(s: Subject) -> Place:
    """A tied head was stored on its own and differs a little."""
    head = s.node("lm_head/Transpose")
    table = s.weight("model.embed_tokens.weight")
    noise = np.random.default_rng(0).standard_normal(table.shape)
    drifted = table.astype(np.float64) * (1 + 3e-2 * noise)
    own = s.constant(drifted, table.dtype)
    head.replace_input_with(0, own)
    return OUTSIDE


@mutant(_untied)
def untied_head_replaced_by_the_embedding(s: Subject) -> Place:
    """tie_word_embeddings was assumed."""
    s.node("lm_head/Transpose").replace_input_with(
        0, s.graph.initializers["model.embed_tokens.weight"]
    )
    return OUTSIDE


@mutant(has_bias)
def query_bias_dropped(s: Subject) -> Place:
    """A sharer's projection was rebuilt without its bias."""
    name = f"{s.sharer}.self_attn.q_proj.bias"
    s.set_weight(name, 0 * s.weight(name))
    return s.at(s.sharer, "q")


@mutant(has_bias)
def output_bias_dropped(s: Subject) -> Place:
    """o_proj lost its bias, as in families that have it on Q, K and V only."""
    name = f"{s.sharer}.self_attn.o_proj.bias"
    s.set_weight(name, 0 * s.weight(name))
    return s.at(s.sharer, "attention_branch")


@mutant(has_bias)
def key_and_value_biases_swapped(s: Subject) -> Place:
    """The parts of a fused QKV bias are split in another order than the weight's."""
    owner = s.shared.owner
    _swap(s, f"{owner}.self_attn.k_proj.bias", f"{owner}.self_attn.v_proj.bias")
    return s.at(owner, "k")


@mutant()
def key_and_value_projections_swapped(s: Subject) -> Place:
    """A fused QKV weight was split in the order Q, V, K."""
    owner = s.shared.owner
    _swap(s, f"{owner}.self_attn.k_proj.weight", f"{owner}.self_attn.v_proj.weight")
    return s.at(owner, "k")


@mutant(lambda s: s.shared.kv_heads > 1)
def key_heads_of_a_weight_swapped(s: Subject) -> Place:
    """Tensor-parallel shards were joined in another order: kv heads of k_proj only."""
    name = f"{s.shared.owner}.self_attn.k_proj.weight"
    weight = s.weight(name)
    s.set_weight(name, np.roll(weight, s.shared.head_dim, 0))
    return s.at(s.shared.owner, "k")


@mutant()
def gate_and_up_swapped(s: Subject) -> Place:
    """A fused gate_up weight was split in the other order."""
    _swap(s, f"{s.middle}.mlp.gate_proj.weight", f"{s.middle}.mlp.up_proj.weight")
    return s.at(s.middle, "mlp")


@mutant()
def two_layers_mlps_swapped(s: Subject) -> Place:
    """Layers were sorted as text, so that 10 came before 2."""
    for part in ("gate_proj", "up_proj", "down_proj"):
        _swap(s, f"{s.middle}.mlp.{part}.weight", f"{s.middle + 1}.mlp.{part}.weight")
    return s.at(s.middle, "mlp")


@mutant()
def sharers_query_projection_of_its_owner(s: Subject) -> Place:
    """Sharing is taken to mean all of attention's weights."""
    for part in ("weight", "bias") if s.spec.attention_bias else ("weight",):
        source = s.weight(f"{s.shared.owner}.self_attn.q_proj.{part}")
        s.set_weight(f"{s.sharer}.self_attn.q_proj.{part}", source)
    return s.at(s.sharer, "q")


@mutant()
def two_owners_value_projections_swapped(s: Subject) -> Place:
    """Groups were numbered by their last layer when weights were collected."""
    owners = [group.owner for group in s.layout.groups][:2]
    _swap(s, *(f"{owner}.self_attn.v_proj.weight" for owner in owners))
    return s.at(owners[0], "v")


@mutant(_has_kv_norm)
def kv_norm_replaced_by_the_input_norm(s: Subject) -> Place:
    """The paper's separate norm in front of K and V was taken for the usual one."""
    owner = s.shared.owner
    s.set_weight(f"{owner}.kv_layernorm.weight", s.weight(f"{owner}.input_layernorm.weight"))
    return s.at(owner, "k")


@mutant()
def a_layers_two_norms_swapped(s: Subject) -> Place:
    """input_layernorm and post_attention_layernorm change places."""
    layer = s.sharer
    _swap(s, f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight")
    return s.at(layer, "q")


@mutant()
def norm_weight_counted_from_zero(s: Subject) -> Place:
    """Gemma stores w for a norm that multiplies by 1 + w."""
    name = f"{s.sharer}.post_attention_layernorm.weight"
    s.set_weight(name, s.weight(name).astype(np.float32) + 1)
    return s.at(s.sharer, "mlp")
