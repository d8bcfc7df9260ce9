"""Quantised weights: scales, zero points and packing that belong to something else."""

import numpy as np
from subject import OUTSIDE, Place, Subject, mutant, plain, quantized

from cla_export.quantization import PACKED, SCALES

_ONE = ".mlp.up_proj.weight"


def _int4(s: Subject) -> bool:
    return quantized(s) and s.bundle.quantization.bits == 4


def _scales(s: Subject, layer: int) -> str:
    return f"model.layers.{layer}{_ONE}{SCALES}"


def _packed(s: Subject, layer: int) -> str:
    return f"model.layers.{layer}{_ONE}{PACKED}"


@mutant(quantized)
def scales_of_the_wrong_axis(s: Subject) -> Place:
    """A weight's scales [out, blocks] were written [blocks, out]."""
    name = _scales(s, s.middle)
    scales = s.part(name)
    if scales.shape[1] == 1:  # one block of inputs: a scale for each output is one for each input
        turned = np.broadcast_to(scales.mean(), scales.shape)
    else:
        turned = scales.T.reshape(scales.shape)
    s.set_part(name, turned)
    return s.at(s.middle, "mlp")


@mutant(quantized)
def scales_of_another_layer(s: Subject) -> Place:
    """Two layers' scales changed places; their integers did not."""
    first, second = _scales(s, s.middle), _scales(s, s.middle + 1)
    one, other = s.part(first), s.part(second)
    s.set_part(first, other)
    s.set_part(second, one)
    return s.at(s.middle, "mlp")


@mutant(quantized)
def scales_doubled(s: Subject) -> Place:
    """The step is taken for the whole range over 2^bits, once too often."""
    name = _scales(s, s.middle)
    s.set_part(name, 2 * s.part(name))
    return s.at(s.middle, "mlp")


@mutant(quantized)
def scale_lost_for_one_output(s: Subject) -> Place:
    """One output channel's scale is zero."""
    name = _scales(s, s.middle)
    scales = s.part(name)
    scales[1] = 0
    s.set_part(name, scales)
    return s.at(s.middle, "mlp")


@mutant(quantized)
def zero_point_one_off(s: Subject) -> Place:
    """Integers are taken as if their zero were one step higher."""
    bits = s.bundle.quantization.bits
    scales, zero = s.part(_scales(s, s.middle)), 2 ** (bits - 1) + 1
    value = zero if bits == 8 else zero | zero << 4
    columns = scales.shape[1] if bits == 8 else -(-scales.shape[1] // 2)
    zeros = s.constant(np.full((len(scales), columns), value), np.uint8)
    node = s.product(f"layers.{s.middle}/mlp/up_proj")
    node.resize_inputs(4)
    node.replace_input_with(3, zeros)
    return s.at(s.middle, "mlp")


@mutant(quantized)
def signed_integers_read_as_unsigned(s: Subject) -> Place:
    """Packed in two's complement for an operator that expects an offset."""
    name = _packed(s, s.middle)
    s.set_part(name, s.part(name) ^ (0x80 if s.bundle.quantization.bits == 8 else 0x88))
    return s.at(s.middle, "mlp")


@mutant(_int4)
def nibbles_in_the_other_order(s: Subject) -> Place:
    """The first of two int4 values is in the upper half of its byte."""
    name = _packed(s, s.middle)
    packed = s.part(name)
    s.set_part(name, packed << 4 | packed >> 4)
    return s.at(s.middle, "mlp")


@mutant(quantized)
def heads_scales_rolled(s: Subject) -> Place:
    """The head's scales are one token off."""
    name = f"lm_head.weight{SCALES}"
    s.set_part(name, np.roll(s.part(name), 1, 0))
    return OUTSIDE


@mutant(plain)
def weight_dequantised_per_tensor(s: Subject) -> Place:
    """A checkpoint was quantised with a scale for the whole tensor, and widened again."""
    name = f"{s.middle}{_ONE}"
    weight = s.weight(name).astype(np.float32)
    step = np.abs(weight).max() / 7
    s.set_weight(name, np.round(weight / step) * step)
    return s.at(s.middle, "mlp")
