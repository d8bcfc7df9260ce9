"""The network around attention: embedding, norms, residuals, MLP, head."""

import numpy as np
import onnx_ir as ir
from subject import ANYWHERE, OUTSIDE, Place, Subject, in_float32, mutant

FLOAT16 = ir.DataType.FLOAT16


@mutant()
def embedding_scaled(s: Subject) -> Place:
    """Gemma's factor on the embedding, for a model without."""
    table = s.node("embed_tokens/Gather").outputs[0]
    factor = s.constant(s.spec.hidden_size**0.5, table.dtype.numpy())
    s.follow(table, "Mul", factor)
    return ANYWHERE


@mutant()
def attention_residual_dropped(s: Subject) -> Place:
    """x = attention(x) instead of x + attention(x), in one layer."""
    add = s.residuals(s.middle)[0]
    add.outputs[0].replace_all_uses_with(add.inputs[1])
    return s.at(s.middle, "mlp")


@mutant()
def mlp_residual_dropped(s: Subject) -> Place:
    """x = mlp(x) instead of x + mlp(x), in one layer."""
    add = s.residuals(s.middle)[1]
    zero = s.constant(0, add.inputs[0].dtype.numpy())
    s.wrap(add, 0, "Mul", zero)
    return s.at(s.middle, "output")


@mutant()
def mlp_reads_the_stream_before_attention(s: Subject) -> Place:
    """Attention and MLP side by side (GPT-J, Falcon) in a model where they follow each other."""
    norm = s.node(f"layers.{s.middle}/post_attention_layernorm/RMSNormalization")
    norm.replace_input_with(0, s.residuals(s.middle)[0].inputs[0])
    return s.at(s.middle, "mlp")


@mutant()
def sharers_attention_branch_dropped(s: Subject) -> Place:
    """A sharer has no K and V, so its attention is optimised away."""
    add = s.residuals(s.sharer)[0]
    add.outputs[0].replace_all_uses_with(add.inputs[0])
    return s.at(s.sharer, "mlp")


@mutant()
def a_layer_skipped(s: Subject) -> Place:
    """A sharer is left out of the chain; the next layer is where values first differ."""
    layer = next(group.layers[1] for group in s.layout.groups if len(group.layers) > 1)
    start, end = s.residuals(layer)[0].inputs[0], s.residuals(layer)[1].outputs[0]
    end.replace_all_uses_with(start)
    return s.at(layer + 1)


@mutant()
def a_layer_run_twice(s: Subject) -> Place:
    """The MLP of a layer is applied twice: a loop counter off by one."""
    add = s.residuals(s.middle)[1]
    s.follow(add.outputs[0], "Add", add.inputs[1])
    return s.at(s.middle + 1)


@mutant()
def gelu_for_silu(s: Subject) -> Place:
    """hidden_act of another family."""
    gate = s.node(f"layers.{s.middle}/mlp/Sigmoid").inputs[0]
    mul = s.node(f"layers.{s.middle}/mlp/Mul")
    mul.outputs[0].replace_all_uses_with(s.op("Gelu", [gate], like=gate))
    return s.at(s.middle, "mlp")


@mutant()
def quick_gelu_for_silu(s: Subject) -> Place:
    """x * sigmoid(1.702 x)."""
    node = s.node(f"layers.{s.middle}/mlp/Sigmoid")
    s.wrap(node, 0, "Mul", s.constant(1.702, node.inputs[0].dtype.numpy()))
    return s.at(s.middle, "mlp")


def _set_epsilon(s: Subject, part: str, epsilon: float) -> None:
    for node in s.norms(part):
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon)


@mutant(in_float32)
def norm_epsilon_1e_3(s: Subject) -> Place:
    """BatchNorm's default epsilon for the model's 1e-5."""
    _set_epsilon(s, "norm", 1e-3)
    return ANYWHERE


@mutant(in_float32)
def norm_epsilon_1e_6(s: Subject) -> Place:
    """The usual default epsilon, 1e-6, for the model's 1e-5."""
    _set_epsilon(s, "norm", 1e-6)
    return ANYWHERE


@mutant()
def norm_subtracts_the_mean(s: Subject) -> Place:
    """LayerNorm without bias for RMSNorm."""
    norm = s.node(f"layers.{s.middle}/post_attention_layernorm/RMSNormalization")
    normed = s.op(
        "LayerNormalization", list(norm.inputs), {"axis": -1, "epsilon": 1e-5}, like=norm.inputs[0]
    )
    norm.outputs[0].replace_all_uses_with(normed)
    return s.at(s.middle, "mlp")


@mutant()
def post_norm_for_pre_norm(s: Subject) -> Place:
    """A layer norms what its MLP returns instead of what it reads."""
    norm = s.node(f"layers.{s.middle}/post_attention_layernorm/RMSNormalization")
    norm.outputs[0].replace_all_uses_with(norm.inputs[0])
    add = s.residuals(s.middle)[1]
    normed = s.op(
        "RMSNormalization", [add.inputs[1], norm.inputs[1]], {"epsilon": 1e-5}, like=add.inputs[1]
    )
    add.replace_input_with(1, normed)
    return s.at(s.middle, "mlp")


@mutant()
def final_norm_dropped(s: Subject) -> Place:
    """The head reads the last layer as it is."""
    norm = s.node("norm/RMSNormalization")
    norm.outputs[0].replace_all_uses_with(norm.inputs[0])
    return OUTSIDE


@mutant(in_float32)
def stream_rounded_between_layers(s: Subject) -> Place:
    """Activations pass through float16 at a layer's end."""
    add = s.residuals(s.middle)[1]
    readers = list(add.outputs[0].uses())
    small = s.op("Cast", [add.outputs[0]], {"to": int(FLOAT16)}, dtype=FLOAT16)
    back = s.op("Cast", [small], {"to": int(ir.DataType.FLOAT)}, like=add.outputs[0])
    for node, slot in readers:
        node.replace_input_with(slot, back)
    return s.at(s.middle + 1)


def _head(s: Subject) -> ir.Node:
    return s.product("lm_head")


def _new_logits(s: Subject, made: ir.Value, old: ir.Value) -> Place:
    old.name, made.name = "logits/right", "logits"
    made.shape = old.shape
    s.graph.outputs[s.graph.outputs.index(old)] = made
    return OUTSIDE


@mutant()
def logits_softcapped(s: Subject) -> Place:
    """Gemma 2's final softcap of 30, for a model without."""
    logits = _head(s).outputs[0]
    cap = s.constant(30, logits.dtype.numpy())
    small = s.op("Tanh", [s.op("Div", [logits, cap], like=logits)], like=logits)
    return _new_logits(s, s.op("Mul", [small, cap], like=logits), logits)


@mutant()
def logits_scaled(s: Subject) -> Place:
    """Cohere's logit_scale of 1/16, for a model without; no choice of token changes."""
    logits = _head(s).outputs[0]
    factor = s.constant(0.0625, logits.dtype.numpy())
    return _new_logits(s, s.op("Mul", [logits, factor], like=logits), logits)


@mutant(in_float32)
def logits_in_half_precision(s: Subject) -> Place:
    """The head is cast to float16 and its logits back."""
    head = _head(s)
    s.through(head, 0, FLOAT16)
    s.through(head, 1, FLOAT16)
    return OUTSIDE


@mutant()
def logits_of_the_position_before(s: Subject) -> Place:
    """The gather in front of the head is one off."""
    gather = s.node("head/GatherND")
    less = s.op("Sub", [gather.inputs[1], s.constant(1)], dtype=ir.DataType.INT64)
    gather.replace_input_with(1, s.op("Max", [less, s.constant(0)], dtype=ir.DataType.INT64))
    return OUTSIDE


@mutant()
def logits_of_the_padded_end(s: Subject) -> Place:
    """The last logits of the padded call are returned, not those of each row's last token."""
    valid = s.node("head/Sub").outputs[0]  # [B]
    none = s.op("Mul", [valid, s.constant(0)], like=valid)
    whole = s.op("Add", [none, s.node("lengths/Shape").outputs[0]], like=valid)
    s.node("head/Sub_1").replace_input_with(0, whole)
    return OUTSIDE


@mutant()
def logits_kept_from_the_front(s: Subject) -> Place:
    """Asked for some of a call's logits, the graph returns those of its first tokens."""
    keep = s.node("head/Min").outputs[0]  # []
    single = s.op("Equal", [keep, s.constant(1)], dtype=ir.DataType.BOOL)
    last, zero = s.node("head/Max").outputs[0], s.constant(0)
    start = s.op("Where", [single, last, zero], like=last)
    s.node("head/Unsqueeze").replace_input_with(0, start)
    return OUTSIDE


@mutant()
def two_vocabulary_columns_swapped(s: Subject) -> Place:
    """Two added tokens have each other's rows in the head."""
    logits = _head(s).outputs[0]
    order = np.arange(s.spec.vocab_size)
    order[[7, 11]] = order[[11, 7]]
    swapped = s.op("Gather", [logits, s.constant(order)], {"axis": -1}, like=logits)
    return _new_logits(s, swapped, logits)


@mutant()
def last_vocabulary_column_lost(s: Subject) -> Place:
    """Padding of the vocabulary to a multiple of a tile masks one real token."""
    logits = _head(s).outputs[0]
    mask = np.zeros(s.spec.vocab_size)
    mask[-1] = -1e4
    return _new_logits(
        s, s.op("Add", [logits, s.constant(mask, logits.dtype.numpy())], like=logits), logits
    )
