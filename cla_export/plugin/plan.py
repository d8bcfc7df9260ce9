"""How a call is laid out on a GPU: from its shapes alone, since lengths stay on the device.

The numbers were chosen on an H200 with scripts/bench_attention.py; other GPUs follow from their
multiprocessors and shared memory.
"""

from dataclasses import dataclass, replace

from cla_export.errors import BadInput
from cla_export.plugin.compile import TILE, Variant
from cla_export.plugin.contract import Problem
from cla_export.plugin.gpu import Gpu
from cla_export.plugin.prompt import PromptPlan, plan_prompt

BLOCK_RESERVE = 1024  # bytes of shared memory that the driver keeps of every block
MAX_SPLIT_ITEMS = 1024  # items of a call that splits its rows; bounds the workspace
MAX_GRID = 65535  # blocks of a launch in its second and third dimension
LONG_CONTEXT = 16384  # keys from which rows of a batch are expected to differ widely
LONG_BYTES = 128e6  # of all caches, from which splitting rows costs little
MANY_BYTES = 512e6  # of all caches, from which a tail of long rows costs more than wide blocks
KEYS_PER_WARP = 32  # at least, of a row
GPCS = 8  # clusters of 8 that run at a time without crowding each other
GPC_FIT = 0.92  # of the multiprocessors that large clusters can use
SHARED_KEYS_HEAD_DIM = 128  # up to which the queries of a tile stay in registers
RING_BYTES = 24 * 1024  # of a warp; enough in flight to cover the memory's latency


@dataclass(frozen=True, slots=True)
class Plan:
    """A kernel, and how the work is cut.

    The launch is `grid` clusters: kv heads, tiles of 16 query rows (times slices of the output's
    columns), shares of the batch's rows. `extra` shares, beyond one a row, go to the longest rows,
    by length, on the device.
    """

    variant: Variant
    grid: tuple[int, int, int]
    extra: int
    ordered: bool  # long rows first; only without extra

    @property
    def items(self) -> int:
        """Clusters to launch."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def merges(self) -> bool:
        """Whether rows may be split among clusters, so that a second kernel adds the shares."""
        return self.extra > 0

    @property
    def takes_packed(self) -> bool:
        """Whether q and y may be [B, S, Hq * D]."""
        return False

    @property
    def workspace_bytes(self) -> int:
        """Partial sums, a tile of float32 rows a cluster, then a maximum and a sum a row."""
        return self.items * TILE * (self.variant.columns * 4 + 8) if self.merges else 0


def make_plan(
    problem: Problem,
    gpu: Gpu,
    *,
    warps: int | None = None,
    cluster: int | None = None,
    waves: float | None = None,
) -> Plan | PromptPlan:
    """The plan for a call; what is given is taken as it is, for sweeps and tactics.

    `waves`: shares to aim for, as a multiple of the clusters that run at a time; 0: one a row.
    """
    tiles = -(-problem.group * problem.queries // TILE) * _variant(problem, 1, 1, 1).slices
    if max(tiles, problem.batch) > MAX_GRID:
        raise BadInput(
            f"ClaAttention: {problem.queries} queries times {problem.group} heads are too many for "
            f"one launch ({MAX_GRID} tiles of {TILE} rows); attend to the prompt in chunks"
        )
    lanes = problem.kv_heads * tiles
    if warps is cluster is waves is None:
        if (prompt := plan_prompt(problem, gpu)) is not None:
            return prompt
        if _is_prompt(problem, gpu, lanes):
            return _prompt_plan(problem, gpu)
    choice = _choose(problem, gpu, lanes)
    warps = warps or choice.warps
    cluster = cluster or choice.cluster
    variant = _variant(problem, warps, _stages(problem, gpu, warps), cluster)
    resident = gpu.multiprocessors * _blocks_per_multiprocessor(variant, gpu) // cluster
    shares = choice.shares if waves is None else int(resident * waves) // lanes
    extra = max(0, shares - problem.batch)
    if lanes * (problem.batch + extra) > MAX_SPLIT_ITEMS:
        extra = max(0, MAX_SPLIT_ITEMS // lanes - problem.batch)
    if problem.capacity <= cluster * warps * TILE:
        extra = 0
    ordered = not extra and problem.batch > 1 and lanes * problem.batch > resident
    return Plan(variant, (problem.kv_heads, tiles, problem.batch + extra), extra, ordered)


def _is_prompt(problem: Problem, gpu: Gpu, lanes: int) -> bool:
    """Whether rows fill every multiprocessor twice when a block's warps take a tile each."""
    fits = problem.head_dim <= SHARED_KEYS_HEAD_DIM
    blocks = lanes * problem.batch // 4
    return problem.queries > 1 and fits and blocks >= 2 * gpu.multiprocessors


def _prompt_plan(problem: Problem, gpu: Gpu) -> Plan:
    """Blocks of four tiles of rows, one a warp, which read each key once."""
    variant = replace(_variant(problem, 4, 2, 1), shared_keys=True)
    assert variant.shared_bytes + variant.static_shared_bytes <= gpu.shared_per_block
    tiles = -(-problem.group * problem.queries // variant.block_rows)
    return Plan(variant, (problem.kv_heads, tiles, problem.batch), 0, ordered=False)


def workspace_bound(problem: Problem) -> int:
    """Bytes that no plan of this problem, or of a smaller one, exceeds, on any GPU."""
    columns = _variant(problem, 1, 2, 1).columns
    return MAX_SPLIT_ITEMS * TILE * (columns * 4 + 8)


@dataclass(frozen=True, slots=True)
class _Choice:
    warps: int
    cluster: int
    shares: int  # of all rows of the batch, in each lane of work


def _choose(problem: Problem, gpu: Gpu, lanes: int) -> _Choice:
    """Warps, cluster and shares, by the numbered cases that were measured.

    1. A long chunk: its tiles of rows fill the GPU.
    2. Long contexts, where one row may outweigh the others: as many shares as run at a time, in
       small clusters while rows are few; where rows are more than that, twice as many as rows.
       Rows of one kv head that fill the GPU in clusters of two have half as many shares more, so
       that only rows of twice the average length are split, and even ones never merge.
    3. Rows enough for every block: one each; narrow blocks, two a multiprocessor, while the caches
       are small.
    4. Without clusters, shares for as many blocks as run at a time.
    5. Few rows: as many warps a row as run at a time and have keys to read. A merge within a
       cluster costs less than the second kernel. Where a few clusters of 8 are enough, rows are
       split until each part of the GPU that can hold one has one.
    """
    wide, narrow = _widths(problem, gpu)
    rows, blocks = lanes * problem.batch, gpu.multiprocessors
    seen = problem.window + problem.queries if problem.window else problem.capacity
    keys = min(problem.capacity, seen)
    cache_bytes = problem.batch * problem.kv_heads * keys * problem.head_dim * 4
    if problem.queries > 1 and rows >= blocks:  # 1
        return _Choice(narrow, 1, 0)
    if keys >= LONG_CONTEXT and cache_bytes >= LONG_BYTES:  # 2
        return _choose_long(problem, gpu, lanes)
    if rows >= blocks:  # 3
        return _Choice(narrow if cache_bytes < MANY_BYTES else wide, 1, 0)
    if not gpu.has_clusters:  # 4
        return _Choice(wide, 1, blocks // lanes)
    best = _Choice(wide, 1, 0)  # 5
    for warps in (wide, narrow):
        for cluster in (2, 4, 8):
            running = blocks * (1 if warps == wide else 2) / cluster
            fits = rows <= running * (GPC_FIT if cluster > 2 else 1)
            fed = keys >= cluster * warps * KEYS_PER_WARP
            if fits and fed and cluster * warps >= best.cluster * best.warps:
                best = _Choice(warps, cluster, 0)
    if best.cluster < 8 or rows >= GPCS:
        return best
    splits = GPCS // rows
    warps = wide if keys >= splits * 8 * wide * KEYS_PER_WARP else narrow
    splits = min(splits, keys // (8 * warps * KEYS_PER_WARP))
    return _Choice(warps, 8, splits * problem.batch)


def _choose_long(problem: Problem, gpu: Gpu, lanes: int) -> _Choice:
    """Case 2."""
    wide, narrow = _widths(problem, gpu)
    rows, blocks = lanes * problem.batch, gpu.multiprocessors
    if rows > blocks:
        return _Choice(narrow, 1, 2 * problem.batch)
    if gpu.has_clusters and lanes == 1 and blocks // 4 < rows <= blocks // 2:
        return _Choice(wide, 2, problem.batch * 3 // 2)
    if rows * 4 > blocks:
        return _Choice(narrow, 1, 2 * blocks // lanes)
    cluster = 2 if gpu.has_clusters else 1
    return _Choice(wide, cluster, blocks // cluster // lanes)


def _widths(problem: Problem, gpu: Gpu) -> tuple[int, int]:
    """Warps of a block that takes a multiprocessor for itself, and of one that takes half."""
    wide = next(w for w in (8, 4, 2, 1) if w == 1 or _stages(problem, gpu, w) >= 2)
    return wide, max(wide // 2, 1)


def _stages(problem: Problem, gpu: Gpu, warps: int) -> int:
    """Depth of the rings: what covers the memory's latency, or what fits; 0 if nothing does."""
    stage = _variant(problem, 1, 1, 1).shared_bytes - _variant(problem, 1, 0, 1).shared_bytes
    deep = min(max(RING_BYTES // stage, 2), 6)
    for stages in range(deep, 1, -1):
        variant = _variant(problem, warps, stages, 1)
        if variant.shared_bytes + variant.static_shared_bytes <= gpu.shared_per_block:
            return stages
    if warps == 1:
        raise AssertionError(f"head dim {problem.head_dim} does not fit a block of {gpu}")
    return 0


def _blocks_per_multiprocessor(variant: Variant, gpu: Gpu) -> int:
    """Blocks that run at a time, by shared memory and by registers (at most 255 a thread)."""
    shared = variant.shared_bytes + variant.static_shared_bytes + BLOCK_RESERVE
    by_registers = 65536 // (256 * 32 * variant.warps)
    return max(1, min(gpu.shared_per_multiprocessor // shared, by_registers, 8))


def _variant(problem: Problem, warps: int, stages: int, cluster: int) -> Variant:
    return Variant(
        head_dim=problem.head_dim,
        bf16=problem.dtype == "bfloat16",
        softcap=problem.softcap > 0,
        chunk=problem.queries > 1,
        warps=warps,
        stages=stages,
        cluster=cluster,
    )
