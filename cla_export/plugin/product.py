"""How a product of a few tokens is laid out on a GPU with clusters: see decode_product.cu."""

from dataclasses import dataclass

from cla_export.plugin.gpu import Gpu

MOST_TOKENS = 64
BLOCK = 32  # columns that packed weights have a scale for
_TILES = (8, 16, 32, 64)  # tokens
_STAGES = {  # of a block's ring, by bits and by tokens of a tile; fewer where memory is short
    16: {8: 8, 16: 8, 32: 6, 64: 4},
    8: {8: 6, 16: 5, 32: 3, 64: 3},
    4: {8: 5, 16: 4, 32: 2, 64: 2},
}
_ROW_BYTES = 128  # of a weight, in a stage
_MOST_BLOCKS = 8  # of a cluster


@dataclass(frozen=True, slots=True)
class Cut:
    """How a weight is cut into tiles and these among blocks."""

    rows: int
    blocks: float  # to aim for, a multiprocessor


# By bits: of up to 32 tokens, and of more. Measured on an H200, products of a model one behind
# another. Of wide tiles with 16 bits three blocks fit, but their sums take long to add up.
_CUTS = {
    16: (Cut(64, 1.2), Cut(64, 2.0)),
    8: (Cut(64, 2.8), Cut(64, 2.8)),
    4: (Cut(64, 2.8), Cut(256, 0.8)),
}


@dataclass(frozen=True, slots=True)
class ProductPlan:
    """A kernel's tile and a launch: `clusters` of `blocks`, each with `shared_bytes`."""

    bits: int  # of the weight
    rows: int
    tokens: int
    groups: bool  # warp groups multiply
    stages: int
    clusters: int
    blocks: int

    @property
    def shared_bytes(self) -> int:
        """The ring of a block."""
        return self.stages * _stage_bytes(self.bits, self.rows, self.tokens)

    @property
    def threads(self) -> int:
        """Of a block: a warp for 16 rows, or two that share a stage's columns."""
        return self.rows * (4 if self.bits == 16 and not self.groups else 2)

    def macros(self, bf16: bool) -> list[tuple[str, str]]:
        """As the kernel's sources expect them."""
        numbers = {
            "BF16": int(bf16),
            "BITS": self.bits,
            "ROWS": self.rows,
            "TOKENS": self.tokens,
            "STAGES": self.stages,
            "GROUPS": int(self.groups),
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
    wide = tile == MOST_TOKENS
    groups = wide and gpu.compute_capability == (9, 0)
    if wide and bits == 16 and not groups:
        return None
    cut = _CUTS[bits][wide]
    stage_bytes = _stage_bytes(bits, cut.rows, tile)
    stages = min(_STAGES[bits][tile], gpu.shared_per_block // stage_bytes)
    if stages < 2:
        return None
    clusters = -(-n // (cut.rows // 2 if gated else cut.rows))
    chunks = -(-k // _chunk(bits))
    aim = round(gpu.multiprocessors * cut.blocks / clusters)
    blocks = max(1, min(_MOST_BLOCKS, chunks, aim))
    return ProductPlan(bits, cut.rows, tile, groups, stages, clusters, blocks)


def _chunk(bits: int) -> int:
    """Columns of a stage."""
    return _ROW_BYTES * 8 // bits


def _stage_bytes(bits: int, rows: int, tokens: int) -> int:
    scales = 0 if bits == 16 else (_chunk(bits) // BLOCK // 2 + 1) * 4
    used = rows * (_ROW_BYTES + scales) + tokens * _chunk(bits) * 2
    return -(-used // 1024) * 1024
