"""Caches: who writes which, who reads which, and what is in it."""

import onnx_ir as ir
from subject import (
    Place,
    Subject,
    drowned,
    fused,
    has_qk_norm,
    in_float32,
    mutant,
    rotates,
    several_groups,
    standard,
)

KEYS, VALUES = 0, 1


def _cache_values(s: Subject, group: int, kind: str) -> list[ir.Value]:
    values = s.graph.inputs if kind == "past_key_values" else s.graph.outputs
    named = {value.name: value for value in values}
    return [named[f"{kind}.{group}.{part}"] for part in ("key", "value")]


def _read(s: Subject, layer: int, caches: list[ir.Value]) -> None:
    for slot, cache in zip(s.reads(layer), caches, strict=True):
        s.attention(layer).replace_input_with(slot, cache)


def _other_group(s: Subject) -> int:
    """The group before the shared one, or after it if it is the first."""
    return s.shared.index - 1 if s.shared.index else 1


@mutant()
def sharer_reads_past(s: Subject) -> Place:
    """A sharer reads the cache as it was before this call, so it never sees the new tokens."""
    _read(s, s.sharer, _cache_values(s, s.shared.index, "past_key_values"))
    return s.at(s.sharer, "attention")


@mutant(several_groups)
def sharer_wired_to_the_neighbouring_group(s: Subject) -> Place:
    """Groups are numbered in another order than layers, and a sharer reads the wrong one."""
    _read(s, s.sharer, _cache_values(s, _other_group(s), "present"))
    return s.at(s.sharer, "attention")


@mutant(several_groups)
def sharers_of_two_groups_swapped(s: Subject) -> Place:
    """Two groups' sharers read each other's caches; both caches themselves are right."""
    pairs = [group for group in s.layout.groups if len(group.layers) > 1][:2]
    if len(pairs) < 2:
        pairs = [s.shared, s.layout.groups[_other_group(s)]]
    first, second = pairs
    touched = []
    for group, other in ((first, second), (second, first)):
        for layer in group.layers[1:]:
            if layer > other.owner:  # its cache exists by then
                _read(s, layer, _cache_values(s, other.index, "present"))
                touched.append(layer)
    return s.at(min(touched), "attention")


@mutant(several_groups)
def two_groups_caches_swapped(s: Subject) -> Place:
    """Two groups' cache inputs and outputs carry each other's names; generation never notices."""
    first, second = s.shared.index, _other_group(s)
    for kind in ("past_key_values", "present"):
        for one, other in zip(
            _cache_values(s, first, kind), _cache_values(s, second, kind), strict=True
        ):
            _swap_names(one, other)
    return Place((first, second))


@mutant(several_groups)
def present_named_after_the_wrong_group(s: Subject) -> Place:
    """A present output is bound to another group's buffer; the past inputs are right."""
    first, second = s.shared.index, _other_group(s)
    for one, other in zip(
        _cache_values(s, first, "present"), _cache_values(s, second, "present"), strict=True
    ):
        _swap_names(one, other)
    return Place((first, second))


def _swap_names(one: ir.Value, other: ir.Value) -> None:
    names = str(one.name), str(other.name)
    one.name, other.name = "swapping", names[0]
    one.name = names[1]


@mutant()
def keys_and_values_swapped_on_write(s: Subject) -> Place:
    """K is cached as V and V as K."""
    (keys, key_slot), (values, value_slot) = s.writes(s.shared)
    key, value = keys.inputs[key_slot], values.inputs[value_slot]
    keys.replace_input_with(key_slot, value)
    values.replace_input_with(value_slot, key)
    return s.at(s.shared.owner)


@mutant()
def keys_and_values_swapped_on_read(s: Subject) -> Place:
    """A sharer takes its owner's values for keys and its keys for values."""
    key, value = s.reads(s.sharer)
    node = s.attention(s.sharer)
    _read(s, s.sharer, [node.inputs[value], node.inputs[key]])
    return s.at(s.sharer, "attention")


@mutant(rotates)
def keys_cached_before_rope(s: Subject) -> Place:
    """The cache point is in front of RoPE, and nobody rotates what is read."""
    node, slot = s.writes(s.shared)[KEYS]
    node.replace_input_with(slot, s.rotation(node, slot).inputs[0])
    return s.at(s.shared.owner, "k")


@mutant(rotates)
def rope_on_values_too(s: Subject) -> Place:
    """A fused QKV kernel rotates V as well."""
    keys, key_slot = s.writes(s.shared)[KEYS]
    rotary = s.rotation(keys, key_slot)
    node, slot = s.writes(s.shared)[VALUES]
    s.wrap(node, slot, "RotaryEmbedding", *rotary.inputs[1:], **_plain(rotary))
    return s.at(s.shared.owner, "v")


def _plain(node: ir.Node) -> dict[str, object]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


@mutant(has_qk_norm)
def keys_cached_before_their_norm(s: Subject) -> Place:
    """The cache holds K without k_norm, as if every reader normed it itself."""
    node = s.norms(f"layers.{s.shared.owner}/attn/k_norm")[0]
    node.outputs[0].replace_all_uses_with(node.inputs[0])
    return s.at(s.shared.owner, "k")


@mutant(in_float32)
def keys_cached_in_half_precision(s: Subject) -> Place:
    """The cache is allocated in float16 by default although the model is float32."""
    s.through(*s.writes(s.shared)[KEYS], ir.DataType.FLOAT16)
    return s.at(s.shared.owner, "k")


@mutant(invisible=drowned)
def values_cached_in_bfloat16(s: Subject) -> Place:
    """The cache's dtype is taken from the training config."""
    s.through(*s.writes(s.shared)[VALUES], ir.DataType.BFLOAT16)
    return s.at(s.shared.owner, "v")


@mutant()
def key_heads_cached_in_another_order(s: Subject) -> Place:
    """K's channels are written rolled by one: a packing that pairs with nothing."""
    node, slot = s.writes(s.shared)[KEYS]
    old = node.inputs[slot]
    width = s.shared.head_dim if len(old.shape) == 4 else s.shared.head_dim * s.shared.kv_heads
    order = s.constant([*range(1, width), 0])
    node.replace_input_with(slot, s.op("Gather", [old, order], {"axis": -1}, like=old))
    return s.at(s.shared.owner, "k")


@mutant(rotates)
def sharer_projects_its_own_keys(s: Subject) -> Place:
    """A sharer is exported like an owner: new keys come from its own input, old ones are shared."""
    owner, layer = s.shared.owner, s.sharer
    node, slot = s.writes(s.shared)[KEYS]
    stream = s.residuals(owner)[0].inputs[0]
    mine = _recomputed(s, node.inputs[slot], stream, s.residuals(layer)[0].inputs[0], owner)
    if mine.shape is None or len(mine.shape) == 3:
        heads, dim = s.shared.kv_heads, s.shared.head_dim
        split = s.op("Reshape", [mine, s.constant([0, 0, heads, dim])], like=mine)
        mine = s.op("Transpose", [split], {"perm": [0, 2, 1, 3]}, like=mine)
    cache = _cache_values(s, s.shared.index, "present")[KEYS]
    starts = next(
        value
        for value in (*s.graph.inputs, *(out for node in s.graph for out in node.outputs))
        if value.name in ("write_indices", "lengths/write_indices")
    )
    own = s.op("TensorScatter", [cache, mine, starts], {"axis": 2}, like=cache)
    s.attention(layer).replace_input_with(s.reads(layer)[KEYS], own)
    return s.at(layer)


def _recomputed(s: Subject, value: ir.Value, old: ir.Value, new: ir.Value, layer: int) -> ir.Value:
    """What a value of a layer would be with `new` where `old` came in."""
    if value is old:
        return new
    node = value.producer()
    if node is None or not str(node.name).startswith(f"layers.{layer}/"):
        return value
    inputs = [_recomputed(s, item, old, new, layer) for item in node.inputs]
    if all(a is b for a, b in zip(inputs, node.inputs, strict=True)):
        return value
    copy = s.op(node.op_type, inputs, dict(_plain(node)), like=value)
    copy.shape = value.shape
    return copy


@mutant()
def rows_read_the_first_rows_cache(s: Subject) -> Place:
    """A sharer's cache is taken from batch row 0 and broadcast."""
    zero, one = s.constant([0]), s.constant([1])
    for slot in s.reads(s.sharer):
        cache = s.attention(s.sharer).inputs[slot]
        first = s.op("Slice", [cache, zero, one, zero], like=cache)
        shape = s.op("Shape", [cache], dtype=ir.DataType.INT64)
        all_rows = s.op("Expand", [first, shape], like=cache)
        s.attention(s.sharer).replace_input_with(slot, all_rows)
    return s.at(s.sharer, "attention")


@mutant()
def first_place_read_from_the_last(s: Subject) -> Place:
    """A ring buffer wraps one place early: position 0 is read from the cache's last row."""
    zero, one, far = s.constant([0]), s.constant([1]), s.constant([2**31])
    axis, minus = s.constant([2]), s.constant([-1])
    for slot in s.reads(s.sharer):
        cache = s.attention(s.sharer).inputs[slot]
        last = s.op("Slice", [cache, minus, far, axis], like=cache)
        rest = s.op("Slice", [cache, one, far, axis], like=cache)
        wrapped = s.op("Concat", [last, rest], {"axis": 2}, like=cache)
        s.attention(s.sharer).replace_input_with(slot, wrapped)
    del zero
    return s.at(s.sharer, "attention")


@mutant(standard)
def cache_written_one_place_late(s: Subject) -> Place:
    """The scatter of one group counts from 1."""
    for node, _ in s.writes(s.shared):
        cache, new = node.inputs[:2]
        room = s.op("Shape", [cache], {"start": 2, "end": 3}, dtype=ir.DataType.INT64)
        count = s.op("Shape", [new], {"start": 2, "end": 3}, dtype=ir.DataType.INT64)
        most = s.op("Sub", [room, count], dtype=ir.DataType.INT64)
        later = s.op("Add", [node.inputs[2], s.constant(1)], dtype=ir.DataType.INT64)
        node.replace_input_with(2, s.op("Min", [later, most], dtype=ir.DataType.INT64))
    return s.at(s.shared.owner, "key_cache")


@mutant(standard)
def cache_not_written_in_decode(s: Subject) -> Place:
    """Single tokens attend through a side path and never reach the cache of one group."""
    for node, slot in s.writes(s.shared):
        del slot
        count = s.op("Shape", [node.inputs[1]], {"start": 2, "end": 3}, dtype=ir.DataType.INT64)
        many = s.op("Greater", [count, s.constant(1)], dtype=ir.DataType.BOOL)
        present = node.outputs[0]
        name = str(present.name)
        users = list(present.uses())
        kept = s.op("Where", [many, present, node.inputs[0]], like=present)
        kept.shape = present.shape
        present.name, kept.name = f"{name}/written", name
        for user, at in users:
            user.replace_input_with(at, kept)
        s.graph.outputs[s.graph.outputs.index(present)] = kept
    return s.at(s.shared.owner, "key_cache")


@mutant(fused)
def owner_writes_after_its_sharer(s: Subject) -> Place:
    """The sharer runs on the owner's cache with this call's length, but one token less of it."""
    node = s.attention(s.sharer)
    less = s.op("Sub", [node.inputs[5], s.constant(1, "int32")], dtype=ir.DataType.INT32)
    node.replace_input_with(5, s.op("Max", [less, s.constant(0, "int32")], dtype=less.dtype))
    return s.at(s.sharer, "attention")
