"""How a prompt's attention is laid out on Hopper: see prompt_attention.cu."""

from dataclasses import asdict, dataclass
from pathlib import Path

from cla_export.plugin.contract import Problem
from cla_export.plugin.gpu import Gpu

SOURCE = Path(__file__).with_name("prompt_attention.cu")
KERNEL = "cla_prompt"
HOPPER = (9, 0)  # warp groups are its alone
THREADS = 384
_GROUP_ROWS = 64
_KEYS = {64: 128, 128: 128, 256: 64}  # of a tile, by head dim
_SLOTS = {64: 8, 128: 6, 256: 4}  # of the ring: what fits beside the queries
_TURNS_TIME = 0.59  # of a block's that has 64 rows for each group: measured on an H200
# Of the multiprocessors, by head dim: below, rows are better split among blocks.
_LEAST_FILLED = {64: 0.65, 128: 0.45, 256: 0.45}


@dataclass(frozen=True, slots=True)
class PromptVariant:
    """What the kernel is specialised for: the macros that head the source explain them."""

    head_dim: int
    bf16: bool
    softcap: bool
    turns: bool
    slots: int

    @property
    def block_rows(self) -> int:
        """Query rows of a block."""
        return _GROUP_ROWS if self.turns else 2 * _GROUP_ROWS

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block: its queries, and the ring."""
        return (self.block_rows + self.slots * _KEYS[self.head_dim]) * self.head_dim * 2

    @property
    def static_shared_bytes(self) -> int:
        """Static shared memory of a block, with what aligns the queries behind it."""
        return 3072 if self.turns else 1024

    @property
    def source(self) -> Path:
        """Of its kernel."""
        return SOURCE

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names in the source."""
        return (KERNEL,)

    @property
    def macros(self) -> list[tuple[str, str]]:
        """As the source expects them."""
        return [(name.upper(), str(int(value))) for name, value in asdict(self).items()]


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """A kernel, and blocks to launch: kv heads, blocks of rows, rows of the batch."""

    variant: PromptVariant
    grid: tuple[int, int, int]

    @property
    def takes_packed(self) -> bool:
        """Whether q and y may be [B, S, Hq * D]."""
        return True

    @property
    def workspace_bytes(self) -> int:
        """None is needed."""
        return 0


def plan_prompt(problem: Problem, gpu: Gpu, *, turns: bool | None = None) -> PromptPlan | None:
    """The plan for a call; None: it is for the other kernel, as where blocks would be too few.

    Two groups of a block have 64 rows each, or share 64, whichever has the GPU done sooner; what is
    given is taken as it is, for tests and sweeps.
    """
    if gpu.compute_capability != HOPPER or problem.head_dim not in _KEYS or problem.queries == 1:
        return None
    rows, lanes = problem.group * problem.queries, problem.kv_heads * problem.batch
    wide, narrow = (lanes * -(-rows // size) for size in (2 * _GROUP_ROWS, _GROUP_ROWS))
    if turns is None:
        if narrow < _LEAST_FILLED[problem.head_dim] * gpu.multiprocessors:
            return None
        waves = [-(-blocks // gpu.multiprocessors) for blocks in (wide, narrow)]
        turns = waves[1] * _TURNS_TIME < waves[0]
    variant = PromptVariant(
        problem.head_dim,
        problem.dtype == "bfloat16",
        problem.softcap > 0,
        turns,
        _SLOTS[problem.head_dim],
    )
    if variant.shared_bytes + variant.static_shared_bytes > gpu.shared_per_block:
        return None
    return PromptPlan(variant, (problem.kv_heads, -(-rows // variant.block_rows), problem.batch))
