"""The PyTorch executor: the family's own module, incrementally, over the same pools."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cla_export.engines.executor import Array, Cache, Logits, PooledExecutor
from cla_export.models.decoder import KV, Decoder


class TorchExecutor(PooledExecutor):
    """Runs a decoder in PyTorch on the CPU, in the dtype of its parameters."""

    backend = "torch"

    def __init__(self, model: Decoder, *, capacity: int, slots: int = 1) -> None:
        spec = model.spec
        super().__init__(spec.layout, min(capacity, spec.max_positions), slots, spec.vocab_size)
        self._model = model
        dtype = next(model.parameters()).dtype
        self._pools: list[KV] = []
        for group in self.layout.groups:
            shape = (slots, group.kv_heads, self.capacity, group.head_dim)
            self._pools.append((torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)))

    def cache(self, group: int) -> Cache:
        """The group's pools, [slots, Hkv, C, D]: themselves where they are float32."""
        key, value = self._pools[group]
        return key.float().numpy(), value.float().numpy()

    def read(self, group: int, slot: int) -> Cache:
        key, value = self._pools[group]
        return key[slot].float().numpy(), value[slot].float().numpy()

    def write(self, group: int, slot: int, keys: Array, values: Array) -> None:
        for pool, new in zip(self._pools[group], (keys, values), strict=True):
            pool[slot, :, : new.shape[1]] = torch.from_numpy(new.astype(np.float32))

    @torch.inference_mode()
    def _run(
        self,
        first: int,
        input_ids: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        keep: int,
    ) -> Logits:
        positions = torch.from_numpy(starts[:, None] + np.arange(input_ids.shape[1]))
        cache = _SlotView(self._pools, first, positions)
        logits = self._model(torch.from_numpy(input_ids), positions, cache)
        kept = (torch.from_numpy(counts)[:, None] - keep).clamp(min=0) + torch.arange(keep)
        result: Logits = logits[torch.arange(len(counts))[:, None], kept].float().numpy()
        return result


class _SlotView:
    """Consecutive slots of every group's pools, as a KVCache for one step."""

    def __init__(self, pools: list[KV], first: int, positions: Tensor) -> None:
        self._pools = pools
        self._slots = slice(first, first + positions.shape[0])
        self._positions = positions  # [B, S]
        self._length = int(positions.max()) + 1

    def update(self, group: int, key: Tensor, value: Tensor) -> KV:
        rows = torch.arange(self._positions.shape[0])[:, None]
        views = []
        for pool, new in zip(self._pools[group], (key, value), strict=True):
            view = pool[self._slots]
            view.transpose(1, 2)[rows, self._positions] = new.transpose(1, 2)
            views.append(view[:, :, : self._length])
        return views[0], views[1]

    def mask(self, position_ids: Tensor, window: int | None) -> Tensor:
        distance = position_ids[:, None, :, None] - torch.arange(self._length)
        allowed = distance >= 0
        return allowed if window is None else allowed & (distance < window)
