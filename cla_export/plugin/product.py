"""How a product of a few tokens is laid out on a GPU with clusters: see decode_product.cu."""

from dataclasses import dataclass

from cla_export.plugin.gpu import Gpu

MOST_TOKENS = 64
THREADS = 256
WARP_GROUP_THREADS = 128
_TILES = (8, 16, 32, 64)  # tokens
_STAGES = {8: 8, 16: 8, 32: 6, 64: 4}  # of a block's ring, by tokens of a tile
_ROWS = 64  # of a weight, in a tile
_CHUNK = 64  # columns of a stage
_MOST_BLOCKS = 8  # of a cluster
# Blocks to aim for, a multiprocessor: measured on an H200. With wide tiles three fit, and their
# sums take long to add up; the others are better off with room for the next kernel's first stages.
_BLOCKS, _WIDE_BLOCKS = 1.2, 2.0


@dataclass(frozen=True, slots=True)
class ProductPlan:
    """A kernel's tile and a launch: `clusters` of `blocks`, each with `shared_bytes`."""

    tokens: int
    stages: int
    clusters: int
    blocks: int

    @property
    def shared_bytes(self) -> int:
        """The ring of a block."""
        return self.stages * (_ROWS + self.tokens) * _CHUNK * 2

    @property
    def threads(self) -> int:
        """Of a block; tiles of 64 tokens are multiplied by a warp group."""
        return WARP_GROUP_THREADS if self.tokens == MOST_TOKENS else THREADS


def plan_product(tokens: int, n: int, k: int, gpu: Gpu, *, gated: bool) -> ProductPlan | None:
    """The plan for y [tokens, n] from x [tokens, k]; None: the kernel does not take it.

    Warp groups are Hopper's alone. Up to 32 tokens, what a token gets does not depend on how many
    there are: neither the blocks nor the order of their sums do.
    """
    if not gpu.has_clusters or tokens > MOST_TOKENS or k % 8 or n % 4:
        return None
    tile = next(size for size in _TILES if tokens <= size)
    if tile == MOST_TOKENS and gpu.compute_capability != (9, 0):
        return None
    clusters = -(-n // (_ROWS // 2 if gated else _ROWS))
    aim = gpu.multiprocessors * (_WIDE_BLOCKS if tile == MOST_TOKENS else _BLOCKS)
    blocks = max(1, min(_MOST_BLOCKS, -(-k // _CHUNK), round(aim / clusters)))
    return ProductPlan(tile, _STAGES[tile], clusters, blocks)
