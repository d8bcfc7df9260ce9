"""How a product of a few tokens is laid out on a GPU with clusters: see decode_product.cu."""

from dataclasses import dataclass

from cla_export.plugin.gpu import Gpu

MOST_TOKENS = 64
BLOCK = 32  # columns that packed weights have a scale for
_TILES = (8, 16, 32, 64)  # tokens
_STAGES = {  # of a block's ring, by bits and by tokens of a tile; fewer where memory is short
    16: {8: 8, 16: 8, 32: 6, 64: 4},
    8: {8: 5, 16: 5, 32: 4, 64: 3},
    4: {8: 4, 16: 4, 32: 3, 64: 2},
}
_ROW_BYTES = 128  # of a weight, in a stage
_MOST_BLOCKS = 8  # of a cluster
# Blocks to aim for, a multiprocessor: measured on an H200. With wide tiles three fit, and their
# sums take long to add up; the others are better off with room for the next kernel's first stages.
_BLOCKS, _WIDE_BLOCKS = 1.2, 2.0


@dataclass(frozen=True, slots=True)
class ProductPlan:
    """A kernel's tile and a launch: `clusters` of `blocks`, each with `shared_bytes`."""

    bits: int  # of the weight
    rows: int
    tokens: int
    warp_groups: bool  # that multiply, rather than warps
    stages: int
    clusters: int
    blocks: int

    @property
    def shared_bytes(self) -> int:
        """The ring of a block."""
        return self.stages * _stage_bytes(self.bits, self.rows, self.tokens)

    @property
    def threads(self) -> int:
        """Of a block: a warp for 16 rows, or two where they share columns."""
        alone = self.bits < 16 or self.warp_groups
        return self.rows * (2 if alone else 4)

    def macros(self, bf16: bool) -> list[tuple[str, str]]:
        """As the kernel's sources expect them."""
        numbers = {
            "BF16": int(bf16),
            "BITS": self.bits,
            "ROWS": self.rows,
            "TOKENS": self.tokens,
            "STAGES": self.stages,
            "GROUPS": int(self.warp_groups),
        }
        return [(name, str(number)) for name, number in numbers.items()]


def plan_product(
    tokens: int, n: int, k: int, gpu: Gpu, *, gated: bool, bits: int = 16
) -> ProductPlan | None:
    """The plan for y [tokens, n] from x [tokens, k]; None: the kernel does not take it.

    Warp groups are Hopper's alone. Up to 32 tokens, what a token gets does not depend on how many
    there are: neither the blocks nor the order of their sums do.
    """
    columns = 8 if bits == 16 else BLOCK
    if not gpu.has_clusters or tokens > MOST_TOKENS or k % columns or n % 4:
        return None
    tile = next(size for size in _TILES if tokens <= size)
    rows = 64 if bits == 16 else 128
    warp_groups = tile == MOST_TOKENS
    if warp_groups and gpu.compute_capability != (9, 0):
        if bits == 16:
            return None
        warp_groups = False
    stages = min(_STAGES[bits][tile], gpu.shared_per_block // _stage_bytes(bits, rows, tile))
    if stages < 2:
        return None
    clusters = -(-n // (rows // 2 if gated else rows))
    wide = bits == 16 and tile == MOST_TOKENS
    aim = gpu.multiprocessors * (_WIDE_BLOCKS if wide else _BLOCKS)
    chunks = -(-k // _chunk(bits))
    blocks = max(1, min(_MOST_BLOCKS, chunks, round(aim / clusters)))
    return ProductPlan(bits, rows, tile, warp_groups, stages, clusters, blocks)


def _chunk(bits: int) -> int:
    """Columns of a stage."""
    return _ROW_BYTES * 8 // bits


def _stage_bytes(bits: int, rows: int, tokens: int) -> int:
    scales = 0 if bits == 16 else (_chunk(bits) // BLOCK // 2 + 1) * 4
    used = rows * (_ROW_BYTES + scales) + tokens * _chunk(bits) * 2
    return -(-used // 1024) * 1024
