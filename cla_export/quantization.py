"""Weight-only quantisation: int4 or int8 weights with a scale for each block of input channels.

A Linear weight [N, K] is stored as ONNX Runtime's MatMulNBits reads it, without zero points:

    packed   uint8 [N, K / block, block * bits / 8]   two int4 a byte, the earlier in the low half
    scales   float [N, K / block]                     w = (q - 2 ** (bits - 1)) * scale

Packing and rounding are ONNX Runtime's own. The operator rounds activations to int8 as well, block
by block, so that it can multiply integers (accuracy_level 4): on a CPU that is what makes it faster
than float32. Source: com.microsoft.MatMulNBits, version 1, as of ONNX Runtime 1.31.
"""

import logging
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, cast

from cla_export.errors import BadInput, MissingEnvironment

if TYPE_CHECKING:  # loaded where weights are packed: commands that only read bundles stay quick
    import numpy as np
    from numpy.typing import NDArray

NAMES = ("int4", "int8")
PACKED, SCALES = ".packed", ".scales"  # appended to the weight's name
WEIGHT = "cla.weight"  # metadata of both: the name of the checkpoint's weight
HEAD_BITS = 8  # of the head's weight: every logit depends on it, and it is a small part of a model


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a bundle's weights are quantised."""

    bits: int
    block: int = 32

    @classmethod
    def named(cls, name: str) -> "Quantization":
        if name not in NAMES:
            raise BadInput(f"quantize is {name!r}; expected one of {', '.join(NAMES)}")
        return cls(int(name.removeprefix("int")))

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def of_weight(self, name: str) -> "Quantization":
        """How the weight of that name is quantised: the head in 8 bits whatever the others are."""
        return Quantization(HEAD_BITS, self.block) if name == "lm_head.weight" else self

    def shapes(self, rows: int, columns: int) -> tuple[tuple[int, int, int], tuple[int, int]]:
        """Shapes of packed and scales for a weight [rows, columns]."""
        blocks = -(-columns // self.block)
        return (rows, blocks, self.block * self.bits // 8), (rows, blocks)

    def pack(
        self, weight: "NDArray[np.floating]"
    ) -> "tuple[NDArray[np.uint8], NDArray[np.floating]]":
        """Quantise a float32 or float16 weight [N, K]: packed and scales, those in its dtype."""
        import numpy as np

        nbits = _quantizer()
        config = nbits.DefaultWeightOnlyQuantConfig(
            block_size=self.block, is_symmetric=True, bits=self.bits
        )
        quantizer = nbits.DefaultWeightOnlyQuantizer(config)
        packed, scales, _ = quantizer.qbits_block_quant(np.ascontiguousarray(weight.T))
        return packed, scales

    def shapes_of_experts(
        self, experts: int, rows: int, columns: int
    ) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Shapes of packed and scales for a weight [experts, rows, columns], in whole blocks."""
        packed = experts, rows, columns * self.bits // 8
        return packed, (experts, rows, columns // self.block)

    def pack_experts(
        self, weight: "NDArray[np.floating]"
    ) -> "tuple[NDArray[np.uint8], NDArray[np.floating]]":
        """Quantise a weight [E, N, K] of experts: packed and scales, in float32."""
        import numpy as np

        pairs = [self.pack(expert.astype(np.float32)) for expert in weight]
        shapes = self.shapes_of_experts(*weight.shape)
        packed = np.stack([part for part, _ in pairs]).reshape(shapes[0])
        return packed, np.stack([scales for _, scales in pairs]).reshape(shapes[1])

    def unpack_experts(
        self, packed: "NDArray[np.uint8]", scales: "NDArray[np.floating]"
    ) -> "NDArray[np.float32]":
        """The weight [E, N, K] that packed and scales stand for."""
        experts, rows, blocks = scales.shape
        flat = packed.reshape(experts * rows, blocks, -1)
        weight = self.unpack(flat, scales.reshape(experts * rows, blocks), blocks * self.block)
        return weight.reshape(experts, rows, -1)

    def unpack(
        self, packed: "NDArray[np.uint8]", scales: "NDArray[np.floating]", columns: int
    ) -> "NDArray[np.float32]":
        """The weight [N, columns] that packed and scales stand for."""
        import numpy as np

        whole = packed.astype(np.int16)
        if self.bits == 4:
            whole = np.stack((whole & 15, whole >> 4), -1).reshape(*whole.shape[:2], -1)
        steps = (whole - 2 ** (self.bits - 1)).astype(np.float32)
        weight: NDArray[np.float32] = steps * scales.astype(np.float32).reshape(*steps.shape[:2], 1)
        return weight.reshape(len(weight), -1)[:, :columns]

    def largest_error(self, weight: "NDArray[np.floating]") -> "NDArray[np.float32]":
        """How far off each element of a weight [N, K] may be: half a step of its block's scale.

        At the end of the range it is a whole step: the scale is laid so that the largest element
        fits on the side that has one step more, and its like on the other side does not.
        """
        import numpy as np

        rows, columns = weight.shape
        sizes = np.abs(weight.astype(np.float32))
        padded = np.pad(sizes, ((0, 0), (0, -columns % self.block)))
        blocks = padded.reshape(rows, -1, self.block)
        largest = blocks.max(-1, keepdims=True)
        steps = largest / np.float32(2 ** (self.bits - 1))
        allowed: NDArray[np.float32] = np.where(blocks > largest - steps, steps, steps / 2)
        return allowed.reshape(rows, -1)[:, :columns]


def _quantizer() -> ModuleType:
    """ONNX Runtime's module, which sets up the root logger for everybody when it is imported."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        from onnxruntime.quantization import matmul_nbits_quantizer
    except ImportError as error:
        raise MissingEnvironment(
            f"onnxruntime's quantiser packs the weights, and cannot be imported: {error}; "
            "pip install 'cla-export[cpu]'"
        ) from error
    root.handlers[:] = handlers
    root.setLevel(level)
    return cast("ModuleType", matmul_nbits_quantizer)
