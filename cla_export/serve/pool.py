"""How large the KV pool is: a budget in bytes becomes slots."""

from dataclasses import asdict, dataclass

from cla_export.bundle import Bundle
from cla_export.engines.executor import capacity_of
from cla_export.engines.opening import cache_dtype
from cla_export.errors import BadInput
from cla_export.layout import KVLayout

SLOTS = 8  # where neither a number nor a budget is given
_MOST_SLOTS = 256  # that a budget becomes: a step runs on all of them at once


@dataclass(frozen=True, slots=True)
class PoolSize:
    """A pool, beside what the same model would need if every layer had its own cache. In bytes."""

    slots: int
    capacity: int  # tokens of a slot
    bytes_per_token: int
    dense_bytes_per_token: int

    @property
    def bytes_per_slot(self) -> int:
        return self.capacity * self.bytes_per_token

    @property
    def total(self) -> int:
        return self.slots * self.bytes_per_slot

    @property
    def dense_bytes_per_slot(self) -> int:
        return self.capacity * self.dense_bytes_per_token

    @property
    def dense_slots(self) -> int:
        """Slots that the same bytes would be without sharing."""
        return self.total // self.dense_bytes_per_slot

    def to_json(self) -> dict[str, int]:
        """Plain data."""
        return asdict(self) | {
            "bytes_per_slot": self.bytes_per_slot,
            "total_bytes": self.total,
            "dense_bytes_per_slot": self.dense_bytes_per_slot,
            "dense_slots": self.dense_slots,
        }


def size_pool(
    layout: KVLayout, dtype: str, capacity: int, slots: int | None, budget: int | None
) -> PoolSize:
    """A pool of so many slots, or of as many as fit a budget of bytes; of both, the fewer.

    BadInput if not one fits.
    """
    token, dense = layout.bytes_per_token(dtype), layout.dense_twin().bytes_per_token(dtype)
    wanted = slots or (SLOTS if budget is None else _MOST_SLOTS)
    if budget is not None:
        wanted = min(wanted, layout.slots_that_fit(budget, capacity, dtype))
    if wanted < 1:
        raise BadInput(
            f"a KV budget of {budget:,} bytes does not hold one slot: {capacity:,} tokens of "
            f"{token:,} bytes are {capacity * token:,}; give more, or shorter slots with --max-len"
        )
    return PoolSize(wanted, capacity, token, dense)


def pool_of(
    bundle: Bundle, backend: str, max_len: int | None, slots: int | None, budget: int | None
) -> PoolSize:
    """The pool that a backend opens for a bundle, but of an engine's, which is as it was built.

    BadInput as `capacity_of` and `size_pool`.
    """
    dtype, capacity = cache_dtype(bundle, backend), capacity_of(bundle, max_len)
    return size_pool(bundle.layout, dtype, capacity, slots, budget)
