"""What executors on a GPU share: pools by address, and a call's inputs in one block."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cla_export.engines.cuda_memory import Memory
from cla_export.engines.executor import Array, Cache
from cla_export.graph_names import KEEP
from cla_export.layout import KVLayout

_ALIGNED = 256  # bytes


@dataclass(frozen=True, slots=True)
class Pool:
    """A group's keys or values: slots one after another from `start` on."""

    start: int
    shape: tuple[int, int, int]  # of a slot: [Hkv, C, D]
    slot_bytes: int
    dtype: Any

    def address(self, slot: int) -> int:
        return self.start + slot * self.slot_bytes


class DevicePools:
    """Every group's pools, allocated once; `dtypes` are by cache, such as `0.key`."""

    def __init__(
        self, memory: Memory, layout: KVLayout, capacity: int, slots: int, dtypes: Mapping[str, Any]
    ) -> None:
        self._memory = memory
        self._slots = slots
        self.by_name: dict[str, Pool] = {}
        for group in layout.groups:
            for part in ("key", "value"):
                name = f"{group.index}.{part}"
                shape = (group.kv_heads, capacity, group.head_dim)
                dtype = np.dtype(dtypes[name])
                size = int(np.prod(shape)) * dtype.itemsize
                self.by_name[name] = Pool(memory.allocate(size * slots), shape, size, dtype)

    @property
    def bytes(self) -> int:
        return sum(pool.slot_bytes for pool in self.by_name.values()) * self._slots

    def read(self, group: int, slot: int) -> Cache:
        """Copies of what a slot holds, as `Executor.read` gives them."""
        parts = []
        for part in ("key", "value"):
            pool = self.by_name[f"{group}.{part}"]
            array = np.empty(pool.shape, pool.dtype)
            self._memory.download(pool.address(slot), array)
            parts.append(array)
        return parts[0], parts[1]

    def write(self, group: int, slot: int, keys: Array, values: Array) -> None:
        """As `Executor.write`."""
        old = self.read(group, slot)
        for part, whole, new in zip(("key", "value"), old, (keys, values), strict=True):
            whole[:, : new.shape[1]] = new
            self._memory.upload(self.by_name[f"{group}.{part}"].address(slot), whole)

    def copy(self, source: int, target: int) -> None:
        """Give one slot all that another holds, on the device."""
        for pool in self.by_name.values():
            self._memory.copy(pool.address(source), pool.address(target), pool.slot_bytes)


class Inputs:
    """A call's inputs in one block, so that one copy takes them to the GPU."""

    def __init__(self, slots: int, chunk: int, dtypes: Mapping[str, Any]) -> None:
        counts = {
            "input_ids": max(slots, chunk),
            "write_indices": slots,
            "kv_lengths": slots,
            KEEP: 1,
        }
        self.offsets: dict[str, int] = {}
        self.size = 0
        for name, count in counts.items():
            self.offsets[name] = self.size
            used = count * np.dtype(dtypes[name]).itemsize
            self.size += -(-used // _ALIGNED) * _ALIGNED
        self.block = np.zeros(self.size, np.uint8)
        self._views = {
            name: self.block[at : at + counts[name] * np.dtype(dtypes[name]).itemsize].view(
                dtypes[name]
            )
            for name, at in self.offsets.items()
        }

    def fill(
        self,
        input_ids: NDArray[np.int64],
        starts: NDArray[np.int64],
        keep: int,
        ends: NDArray[np.int64] | None = None,
    ) -> None:
        """Put in tokens [B, S] of rows that hold `starts` [B], and how many logits are kept.

        `ends` is what rows hold then; None: S more.
        """
        self._views[KEEP][:] = keep
        rows, length = input_ids.shape
        self._views["input_ids"][: rows * length] = input_ids.ravel()
        self._views["write_indices"][:rows] = starts
        self._views["kv_lengths"][:rows] = starts + length if ends is None else ends
