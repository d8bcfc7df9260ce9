"""int8 caches: scales that belong to something else, or that do not hold what there is."""

import numpy as np
from subject import ANYWHERE, Place, Subject, mutant, several_groups

from cla_export.kv_scales import PARTS, scale_name

_KEY, _VALUE = 12, 13  # where GroupQueryAttention has its scales


def _narrow(s: Subject) -> bool:
    return s.bundle.cache_dtype == "int8"


@mutant(_narrow)
def cache_scales_of_keys_and_values_swapped(s: Subject) -> Place:
    """A sharer reads keys with the scales of values, and the other way round."""
    node = s.attention(s.sharer)
    keys, values = node.inputs[_KEY], node.inputs[_VALUE]
    node.replace_input_with(_KEY, values)
    node.replace_input_with(_VALUE, keys)
    return s.at(s.sharer, "attention")


@mutant(lambda s: _narrow(s) and several_groups(s))
def cache_scales_of_another_group(s: Subject) -> Place:
    """A sharer reads values with another group's scales."""
    own = s.group_of(s.sharer).index
    other = (own + 1) % s.layout.num_groups
    scales = s.graph.initializers[scale_name(other, "value")]
    s.attention(s.sharer).replace_input_with(_VALUE, scales)
    return s.at(s.sharer, "attention")


@mutant(_narrow)
def cache_scales_rolled_by_a_channel(s: Subject) -> Place:
    """An owner rounds keys, and reads them, with scales that are one channel off."""
    group = s.group_of(s.sharer)
    scales = np.roll(s.part(scale_name(group.index, "key")), 1, -1)
    s.attention(group.owner).replace_input_with(_KEY, s.constant(scales, np.float32))
    return s.at(group.owner, "key_cache")


@mutant(_narrow)
def cache_scale_of_one_channel_lost(s: Subject) -> Place:
    """A sharer takes one channel's scale of keys for 1."""
    group = s.group_of(s.sharer)
    scales = s.part(scale_name(group.index, "key"))
    scales[0, -1, 0, 3] = 1
    s.attention(s.sharer).replace_input_with(_KEY, s.constant(scales, np.float32))
    return s.at(s.sharer, "attention")


@mutant(_narrow)
def cache_scales_that_saturate(s: Subject) -> Place:
    """One channel's scale is a quarter of what its values need, for everybody."""
    name = scale_name(s.group_of(s.sharer).index, "value")
    scales = s.part(name)
    scales[0, 0, 0, 0] /= 4
    s.set_part(name, scales)
    return ANYWHERE


@mutant(_narrow)
def cache_scales_for_unsigned_numbers(s: Subject) -> Place:
    """The range was divided by 2^4 - 1: sixteen steps are what is left of 256."""
    for group in s.layout.groups:
        for part in PARTS:
            name = scale_name(group.index, part)
            s.set_part(name, s.part(name) * (127 / 15 * 1.25))
    return ANYWHERE
