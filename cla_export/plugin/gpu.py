"""What the layout of a call needs to know of a GPU."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """Shared memory in bytes."""

    compute_capability: tuple[int, int]
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int

    @property
    def has_clusters(self) -> bool:
        """Whether blocks can read each other's shared memory."""
        return self.compute_capability >= (9, 0)
