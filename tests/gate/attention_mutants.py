"""What attention computes: who sees whom, scale, heads, and RoPE."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
from subject import (
    ANYWHERE,
    Place,
    Subject,
    fused,
    has_qk_norm,
    has_window,
    in_float32,
    mutant,
    rotates,
    standard,
)

INT64, INT32 = ir.DataType.INT64, ir.DataType.INT32
_WINDOW = "local_window_size"


def _sliding(s: Subject) -> list[int]:
    return [layer for layer, window in enumerate(s.layout.window) if window is not None]


def _several_heads(s: Subject) -> bool:
    return 1 < s.shared.kv_heads < s.spec.q_heads


def _mixed_windows(s: Subject) -> bool:
    return has_window(s) and None in s.layout.window


def _odd_scale(s: Subject) -> bool:
    scale = s.shared.head_dim**-0.5
    return in_float32(s) and float(ml_dtypes.bfloat16(scale)) != scale


# Who sees whom


@mutant(standard)
def causal_from_the_upper_left(s: Subject) -> Place:
    """`is_causal` without lengths: query i sees keys 0..i, so after a first prompt only the oldest.

    It is how TensorRT reads the attribute, and right for a whole prompt in one call.
    """
    s.attention(s.sharer).replace_input_with(6, None)
    return s.at(s.sharer, "attention")


@mutant(standard)
def not_causal(s: Subject) -> Place:
    """One layer's `is_causal` was lost: queries see later tokens of their own call."""
    s.attention(s.sharer).attributes["is_causal"] = ir.AttrInt64("is_causal", 0)
    return s.at(s.sharer, "attention")


def _length_slot(s: Subject, layer: int) -> int:
    return 5 if s.is_fused(layer) else 6


@mutant()
def length_one_short(s: Subject) -> Place:
    """A sharer does not see the newest token: its length is the one before the write."""
    node, slot = s.attention(s.sharer), _length_slot(s, s.sharer)
    one = s.constant(1, "int32" if slot == 5 else "int64")
    zero = s.constant(0, "int32" if slot == 5 else "int64")
    kind = node.inputs[slot].dtype
    less = s.op("Sub", [node.inputs[slot], one], dtype=kind)
    node.replace_input_with(slot, s.op("Max", [less, zero], dtype=kind))
    return s.at(s.sharer, "attention")


@mutant(standard)
def length_one_long(s: Subject) -> Place:
    """A sharer's queries see one key past their own position: a later token, or a stale one."""
    node = s.attention(s.sharer)
    room = s.op("Shape", [node.inputs[1]], {"start": 2, "end": 3}, dtype=INT64)
    s.wrap(node, 6, "Add", s.constant(1))
    s.wrap(node, 6, "Min", room)  # past the end the operator itself refuses
    return s.at(s.sharer, "attention")


@mutant(fused)
def short_rows_see_one_stale_key(s: Subject) -> Place:
    """GroupQueryAttention is given a length where it expects the length minus one.

    Clamped to the call's longest row, past which the operator itself refuses.
    """
    node = s.attention(s.sharer)
    last = s.op("Sub", [node.inputs[6], s.constant(1, "int32")], dtype=INT32)
    s.wrap(node, 5, "Add", s.constant(1, "int32"))
    s.wrap(node, 5, "Min", last)
    return s.at(s.sharer, "attention")


@mutant(has_window)
def window_one_wider(s: Subject) -> Place:
    """`<=` for `<` in the window's mask."""
    return _resize_windows(s, 1)


@mutant(has_window)
def window_one_narrower(s: Subject) -> Place:
    """The query's own position is not counted."""
    return _resize_windows(s, -1)


def _resize_windows(s: Subject, by: int) -> Place:
    for layer in _sliding(s):
        _set_window(s, layer, s.layout.window[layer] + by)
    return s.at(_sliding(s)[0], "attention")


def _set_window(s: Subject, layer: int, width: int | None) -> None:
    node = s.attention(layer)
    if s.is_fused(layer):
        node.attributes[_WINDOW] = ir.AttrInt64(_WINDOW, -1 if width is None else width)
    elif width is None:
        node.replace_input_with(3, None)
    else:
        node.replace_input_with(3, _window_mask(s, layer, width))


def _window_mask(s: Subject, layer: int, width: int) -> ir.Value:
    """Bool [B, 1, S, C], as thread_caches makes it."""
    positions = next(node.inputs[1] for node in s.rope_gathers())
    queries = s.op("Unsqueeze", [positions, s.constant([1, 3])], dtype=INT64)
    cache = s.attention(layer).inputs[1]
    room = s.op("Shape", [cache], {"start": 2, "end": 3}, dtype=INT64)
    count = s.op("Squeeze", [room], dtype=INT64)
    keys = s.op("Range", [s.constant(0), count, s.constant(1)], dtype=INT64)
    oldest = s.op("Sub", [queries, s.constant(width)], dtype=INT64)
    return s.op("Greater", [keys, oldest], dtype=ir.DataType.BOOL)


@mutant(has_window)
def window_dropped(s: Subject) -> Place:
    """A sliding layer attends to everything; no difference until the window is passed."""
    layer = _sliding(s)[-1]
    _set_window(s, layer, None)
    return s.at(layer, "attention")


@mutant(_mixed_windows)
def windows_on_the_other_layers(s: Subject) -> Place:
    """Sliding and full layers are taken for each other."""
    width = next(window for window in s.layout.window if window is not None)
    for layer, window in enumerate(s.layout.window):
        _set_window(s, layer, width if window is None else None)
    return s.at(0, "attention")


@mutant(_mixed_windows)
def window_on_a_full_layer(s: Subject) -> Place:
    """One full layer slides too."""
    width = next(window for window in s.layout.window if window is not None)
    layer = max(layer for layer, window in enumerate(s.layout.window) if window is None)
    _set_window(s, layer, width)
    return s.at(layer, "attention")


# Scores


def _set_scale(s: Subject, layer: int, scale: float) -> Place:
    s.attention(layer).attributes["scale"] = ir.AttrFloat32("scale", scale)
    return s.at(layer, "attention")


@mutant()
def scale_missing(s: Subject) -> Place:
    """Scores are not divided by the root of head_dim."""
    return _set_scale(s, s.sharer, 1.0)


@mutant()
def scale_applied_twice(s: Subject) -> Place:
    """Q was scaled already, and the operator scales again."""
    return _set_scale(s, s.sharer, 1.0 / s.shared.head_dim)


@mutant(_odd_scale)
def scale_rounded_to_bfloat16(s: Subject) -> Place:
    """The scale is multiplied in the model's low precision before it is widened."""
    return _set_scale(s, s.sharer, float(ml_dtypes.bfloat16(s.shared.head_dim**-0.5)))


@mutant(in_float32)
def scale_of_the_padded_head_dim(s: Subject) -> Place:
    """A kernel pads head_dim to a multiple of 16 and scales by the padded width."""
    return _set_scale(s, s.sharer, float(s.shared.head_dim + 1) ** -0.5)


@mutant()
def attention_scores_softcapped(s: Subject) -> Place:
    """Gemma 2's softcap is left on for a model that has none."""
    s.attention(s.sharer).attributes["softcap"] = ir.AttrFloat32("softcap", 5.0)
    return s.at(s.sharer, "attention")


@mutant(fused)
def attention_sink_added(s: Subject) -> Place:
    """`smooth_softmax` adds one to the denominator."""
    s.attention(s.sharer).attributes["smooth_softmax"] = ir.AttrInt64("smooth_softmax", 1)
    return s.at(s.sharer, "attention")


# Heads


@mutant()
def query_heads_packed_in_another_order(s: Subject) -> Place:
    """A fused QKV weight was split by the wrong grouping: two query heads change places."""
    node = s.attention(s.sharer)
    order = [0, 2, 1, *range(3, s.spec.q_heads)]
    node.replace_input_with(0, s.permute_heads(node.inputs[0], s.spec.q_heads, order))
    return s.at(s.sharer, "q")


@mutant(_several_heads)
def key_heads_tiled_instead_of_repeated(s: Subject) -> Place:
    """Query head h reads kv head h mod Hkv; grouped-query attention means h div (Hq / Hkv)."""
    heads, kv_heads = s.spec.q_heads, s.shared.kv_heads
    order = [head for kv in range(kv_heads) for head in range(kv, heads, kv_heads)]
    back = [order.index(head) for head in range(heads)]
    node = s.attention(s.sharer)
    node.replace_input_with(0, s.permute_heads(node.inputs[0], heads, order))
    output = node.outputs[0]
    readers = list(output.uses())
    restored = s.permute_heads(output, heads, back)
    for reader, slot in readers:
        reader.replace_input_with(slot, restored)
    return s.at(s.sharer)


@mutant()
def attention_output_heads_swapped(s: Subject) -> Place:
    """The heads of attention's output reach o_proj in another order."""
    output = s.attention(s.sharer).outputs[0]
    readers = list(output.uses())
    order = [1, 0, *range(2, s.spec.q_heads)]
    swapped = s.permute_heads(output, s.spec.q_heads, order)
    for reader, slot in readers:
        reader.replace_input_with(slot, swapped)
    return s.at(s.sharer, "attention_branch")


@mutant()
def attention_output_merged_dims_first(s: Subject) -> Place:
    """[B, S, D, H] is merged instead of [B, S, H, D]: a transpose was forgotten."""
    node = s.product(f"layers.{s.sharer}/attn/o_proj")
    merged, heads = node.inputs[0], s.spec.q_heads
    split = s.op("Reshape", [merged, s.constant([0, 0, heads, -1])], like=merged)
    turned = s.op("Transpose", [split], {"perm": [0, 1, 3, 2]}, like=merged)
    node.replace_input_with(0, s.op("Reshape", [turned, s.constant([0, 0, -1])], like=merged))
    return s.at(s.sharer, "attention_branch")


# RoPE


def _positions(s: Subject, make) -> None:
    """Let the gathers of RoPE's tables read other positions [B, S]."""
    gathers = s.rope_gathers()
    changed = make(gathers[0].inputs[1])
    for node in gathers:
        node.replace_input_with(1, changed)


@mutant()
def rope_restarts_after_prefill(s: Subject) -> Place:
    """Positions count from 0 in every call."""

    def from_zero(positions: ir.Value) -> ir.Value:
        first = s.op("Slice", [positions, *map(s.constant, ([0], [1], [1]))], dtype=INT64)
        return s.op("Sub", [positions, first], dtype=INT64)

    _positions(s, from_zero)
    return ANYWHERE


@mutant()
def rope_one_late_in_decode(s: Subject) -> Place:
    """Single tokens get the position after the write."""

    def late(positions: ir.Value) -> ir.Value:
        length = s.op("Shape", [positions], {"start": 1, "end": 2}, dtype=INT64)
        single = s.op("Equal", [length, s.constant([1])], dtype=ir.DataType.BOOL)
        more = s.op("Cast", [single], {"to": int(INT64)}, dtype=INT64)
        return s.op("Add", [positions, more], dtype=INT64)

    _positions(s, late)
    return ANYWHERE


@mutant()
def rope_one_early(s: Subject) -> Place:
    """Every position is one less: scores keep their distances, only the cache can tell."""

    def early(positions: ir.Value) -> ir.Value:
        less = s.op("Sub", [positions, s.constant(1)], dtype=INT64)
        return s.op("Max", [less, s.constant(0)], dtype=INT64)

    _positions(s, early)
    return ANYWHERE


@mutant()
def rope_clamped_at_an_old_limit(s: Subject) -> Place:
    """A RoPE table made for a shorter context repeats its last row."""
    _positions(s, lambda p: s.op("Min", [p, s.constant(100)], dtype=INT64))
    return ANYWHERE


@mutant()
def rope_of_the_first_row_for_all(s: Subject) -> Place:
    """Positions are computed for batch row 0 and broadcast."""

    def first_row(positions: ir.Value) -> ir.Value:
        row = s.op("Slice", [positions, *map(s.constant, ([0], [1], [0]))], dtype=INT64)
        shape = s.op("Shape", [positions], dtype=INT64)
        return s.op("Expand", [row, shape], dtype=INT64)

    _positions(s, first_row)
    return ANYWHERE


@mutant(rotates)
def query_positions_one_off(s: Subject) -> Place:
    """One layer's queries are rotated for the position before."""
    rotary = s.rotation(s.attention(s.sharer), 0)
    for slot in (1, 2):
        gather = rotary.inputs[slot].producer()
        while gather.op_type != "Gather":
            gather = gather.inputs[0].producer()
        less = s.op("Sub", [gather.inputs[1], s.constant(1)], dtype=INT64)
        earlier = s.op("Max", [less, s.constant(0)], dtype=INT64)
        table = gather.inputs[0]
        rows = s.op("Gather", [table, earlier], {"axis": 0}, like=table)
        kind = rotary.inputs[slot].dtype
        if table.dtype != kind:
            rows = s.op("Cast", [rows], {"to": int(kind)}, dtype=kind)
        rotary.replace_input_with(slot, rows)
    return s.at(s.sharer, "q")


def _tables(s: Subject, theta: float) -> tuple[np.ndarray, np.ndarray]:
    dim = s.layout.head_dim[0]
    frequency = theta ** -(np.arange(0, dim, 2) / dim)
    angles = np.arange(s.spec.max_positions)[:, None] * frequency
    return np.cos(angles), np.sin(angles)


def _set_tables(s: Subject, cos: np.ndarray, sin: np.ndarray) -> Place:
    s.set_weight("model.rope_cos", cos)
    s.set_weight("model.rope_sin", sin)
    return ANYWHERE


@mutant()
def theta_of_another_model(s: Subject) -> Place:
    """rope_theta 500000 is assumed where the config says 10000."""
    return _set_tables(s, *_tables(s, 5e5))


@mutant()
def theta_slightly_off(s: Subject) -> Place:
    """rope_theta went through a lossy format: 10016 for 10000."""
    return _set_tables(s, *_tables(s, 10016.0))


@mutant(in_float32)
def rope_tables_in_half_precision(s: Subject) -> Place:
    """The tables are stored in float16 although they are added up in float32."""
    tables = (s.weight(f"model.rope_{part}").astype(np.float16) for part in ("cos", "sin"))
    return _set_tables(s, *tables)


@mutant()
def rope_angles_in_half_precision(s: Subject) -> Place:
    """Positions times frequencies are multiplied in float16: off by whole steps far out."""
    dim = s.layout.head_dim[0]
    frequency = (10000.0 ** -(np.arange(0, dim, 2) / dim)).astype(np.float16)
    angles = np.arange(s.spec.max_positions, dtype=np.float16)[:, None] * frequency
    return _set_tables(s, np.cos(angles.astype(float)), np.sin(angles.astype(float)))


@mutant()
def rope_tables_scaled(s: Subject) -> Place:
    """YaRN's attention factor is applied to a model without."""
    return _set_tables(s, *(1.1 * s.weight(f"model.rope_{part}") for part in ("cos", "sin")))


@mutant()
def rope_turned_the_other_way(s: Subject) -> Place:
    """The sine has the other sign."""
    return _set_tables(s, s.weight("model.rope_cos"), -s.weight("model.rope_sin"))


def _every_rotation(s: Subject) -> list[ir.Node]:
    return [node for node in s.graph if node.op_type == "RotaryEmbedding"]


@mutant(rotates)
def rope_interleaved(s: Subject) -> Place:
    """Neighbouring channels are rotated together instead of halves (GPT-J against GPT-NeoX)."""
    for node in _every_rotation(s):
        node.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)
    return ANYWHERE


@mutant(rotates)
def rope_on_part_of_the_width(s: Subject) -> Place:
    """partial_rotary_factor of another family: the later channels are not rotated."""
    dim = s.layout.head_dim[0] // 4 * 2
    for part in ("cos", "sin"):
        s.set_weight(f"model.rope_{part}", s.weight(f"model.rope_{part}")[:, : dim // 2])
    for node in _every_rotation(s):
        node.attributes["rotary_embedding_dim"] = ir.AttrInt64("rotary_embedding_dim", dim)
    for node in s.graph:
        for value in node.outputs:  # shapes recorded for the full tables
            if node.op_type in ("Gather", "Cast") and node in s.rope_gathers():
                value.shape = None
    return ANYWHERE


@mutant(rotates)
def rope_applied_twice(s: Subject) -> Place:
    """The graph rotates Q and the fused operator's do_rotary rotates it again."""
    node = s.attention(s.sharer)
    rotary = s.rotation(node, 0)
    attributes = {name: item.value for name, item in rotary.attributes.items()}
    s.wrap(node, 0, "RotaryEmbedding", *rotary.inputs[1:], **attributes)
    return s.at(s.sharer, "q")


@mutant(rotates)
def rope_skipped_for_a_sharer(s: Subject) -> Place:
    """A sharer's queries are not rotated: RoPE was attached to the projection of K."""
    node = s.attention(s.sharer)
    node.replace_input_with(0, s.rotation(node, 0).inputs[0])
    return s.at(s.sharer, "q")


# Query and key norms


@mutant(has_qk_norm)
def query_norm_ignored_in_decode(s: Subject) -> Place:
    """The decode path of a sharer was written before q_norm was."""
    norm = s.norms(f"layers.{s.sharer}/attn/q_norm")[0]
    before, after = norm.inputs[0], norm.outputs[0]
    readers = list(after.uses())
    length = s.op("Shape", [before], {"start": 1, "end": 2}, dtype=INT64)
    single = s.op("Equal", [length, s.constant([1])], dtype=ir.DataType.BOOL)
    either = s.op("Where", [single, before, after], like=after)
    for reader, slot in readers:
        reader.replace_input_with(slot, either)
    return s.at(s.sharer, "q")


@mutant(has_qk_norm)
def query_norm_of_another_layer(s: Subject) -> Place:
    """A sharer takes its owner's q_norm weight along with its cache."""
    source = s.weight(f"{s.shared.owner}.self_attn.q_norm.weight")
    s.set_weight(f"{s.sharer}.self_attn.q_norm.weight", source)
    return s.at(s.sharer, "q")


@mutant(has_qk_norm)
def key_norm_of_another_layer(s: Subject) -> Place:
    """Two owners' k_norm weights change places."""
    owners = [group.owner for group in s.layout.groups][:2]
    names = [f"{owner}.self_attn.k_norm.weight" for owner in owners]
    first, second = (s.weight(name) for name in names)
    s.set_weight(names[0], second)
    s.set_weight(names[1], first)
    return s.at(owners[0], "k")


@mutant(has_qk_norm)
def query_norm_over_all_heads(s: Subject) -> Place:
    """q_norm takes one root mean square over all heads of a token (OLMo 2), not one a head."""
    norm = s.norms(f"layers.{s.sharer}/attn/q_norm")[0]
    x = norm.inputs[0]  # [B, S, Hq, D]
    squares = s.op("Mul", [x, x], like=x)
    axes = s.constant([2, 3])
    mean = s.op("ReduceMean", [squares, axes], {"keepdims": 1}, like=x)
    root = s.op("Sqrt", [mean], like=x)
    normed = s.op("Mul", [s.op("Div", [x, root], like=x), norm.inputs[1]], like=x)
    for reader, slot in list(norm.outputs[0].uses()):
        reader.replace_input_with(slot, normed)
    return s.at(s.sharer, "q")
