"""The two sides as polygraphy runners over the same feed: PyTorch, and a bundle's executor.

Both return, for all rows of a case one after another and valid positions only,

    logits           [N, V]
    cache.{g}.key    [M, Hkv, D]   what group g's cache holds of them at the end, and .value

PyTorch in float64, a bundle in float32.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from cla_export.compare.cases import INPUTS, Feed, earlier_request, rows_of
from cla_export.compare.reference import GroupKV, Side
from cla_export.engines.executor import Executor

Outputs = OrderedDict[str, NDArray[np.floating]]


class _CaseRunner(BaseRunner, ABC):  # type: ignore[misc]  # polygraphy ships no types
    """Runs cases; subclasses say how. `held` is what fills caches in front of a row's tokens."""

    def __init__(self, name: str, held: GroupKV) -> None:
        super().__init__(name=name)
        self._held = held

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for name in INPUTS:
            shape = {"tokens": ["B", "T"], "prompts": ["B"], "logits_from": ["B"]}.get(name, [])
            metadata.add(name, np.int64, shape)
        return metadata

    def infer_impl(self, feed_dict: Feed) -> Outputs:
        start = perf_counter()
        outputs = self.run_case(feed_dict)
        self.inference_time = perf_counter() - start
        return outputs

    @abstractmethod
    def run_case(self, feed: Feed) -> Outputs:
        """Run one case."""


class TorchRunner(_CaseRunner):
    """The reference: every row recomputed from its first token, without any cache of its own."""

    def __init__(self, side: Side, held: GroupKV) -> None:
        super().__init__("pytorch", held)
        self._side = side

    def run_case(self, feed: Feed) -> Outputs:
        held = tiled(self._held, int(feed["held"]))
        logits, caches = [], []
        for tokens, first in zip(rows_of(feed), feed["logits_from"], strict=True):
            row_logits, groups = self._side.forward(tokens, held)
            logits.append(row_logits[int(first) :])
            caches.append([part for pair in groups for part in pair])
        return _outputs(logits, caches)


class ExecutorRunner(_CaseRunner):
    """A bundle: prompts, chunks and steps as a server would run them."""

    def __init__(self, executor: Executor, held: GroupKV) -> None:
        super().__init__("bundle", held)
        self._executor = executor

    def run_case(self, feed: Feed) -> Outputs:
        executor, rows = self._executor, rows_of(feed)
        prompts, first_slot = feed["prompts"].tolist(), int(feed["first_slot"])
        slots = range(first_slot, first_slot + len(rows))
        held, reused, chunk = int(feed["held"]), int(feed["reused"]), int(feed["chunk"])
        asked = feed["logits_from"].tolist()
        logits: list[list[NDArray[np.float32]]] = [[] for _ in rows]
        if held:
            fill_with(executor, first_slot, tiled(self._held, held))
        if (earlier := earlier_request(feed)) is not None:
            executor.prefill(first_slot, earlier.tolist(), 0)
        if chunk:
            for index in _order(len(rows)):
                for start in range(reused, prompts[index], chunk):
                    piece = rows[index][start : min(start + chunk, prompts[index])].tolist()
                    keep = start + len(piece) - max(start, asked[index])
                    made = executor.prefill(slots[index], piece, held + start, keep=max(1, keep))
                    logits[index] += [made] if keep > 0 else []
        else:
            prompted = [row[:n].tolist() for row, n in zip(rows, prompts, strict=True)]
            for index, made in enumerate(executor.prefill_rows(first_slot, prompted)):
                logits[index].append(made[None])
        for step in range(int(feed["steps"])):
            lengths = [held + prompt + step for prompt in prompts]
            tokens = [int(row[prompt + step]) for row, prompt in zip(rows, prompts, strict=True)]
            for index, row_logits in enumerate(executor.decode(slots, tokens, lengths)):
                logits[index].append(row_logits[None])
        caches = [
            cache_rows(executor, slot, held, held + len(row))
            for slot, row in zip(slots, rows, strict=True)
        ]
        return _outputs([np.concatenate(parts) for parts in logits], caches)


def _order(rows: int) -> list[int]:
    """Both neighbours of a slot are filled after it somewhere, so that no overrun is healed."""
    return [*range(1, rows, 2), *range(0, rows, 2)]


def fill_with_garbage(executor: Executor) -> None:
    """Stale numbers in every slot: reading past a row's length must not go unnoticed."""
    generator = np.random.default_rng(0)
    for group in range(executor.layout.num_groups):
        for pool in executor.cache(group):
            for slot in pool:  # one at a time: pools can be large
                slot[...] = (generator.standard_normal(slot.shape) * 50).astype(pool.dtype)


def fill_with(executor: Executor, slot: int, held: GroupKV | None) -> None:
    """Put keys and values [T, Hkv, D] of each group into the first places of a slot."""
    for group, pair in enumerate(held or []):
        for pool, part in zip(executor.cache(group), pair, strict=True):
            pool[slot, :, : len(part)] = part.transpose(1, 0, 2)


def cache_rows(executor: Executor, slot: int, start: int, end: int) -> list[NDArray[np.float32]]:
    """Places of a slot: each group's keys, then its values, [end - start, Hkv, D]."""
    return [
        pool[slot][:, start:end].astype(np.float32).transpose(1, 0, 2)
        for group in range(executor.layout.num_groups)
        for pool in executor.cache(group)
    ]


def tiled(kv: GroupKV, length: int) -> GroupKV | None:
    """Keys and values repeated to a length; None for no tokens at all."""
    if not length:
        return None
    return [(_repeat(key, length), _repeat(value, length)) for key, value in kv]


def _repeat(part: NDArray[np.floating], length: int) -> NDArray[np.floating]:
    return np.resize(part, (length, *part.shape[1:]))


def _outputs(
    logits: Sequence[NDArray[np.floating]], caches: Sequence[Sequence[NDArray[np.floating]]]
) -> Outputs:
    outputs: Outputs = OrderedDict()
    for index in range(len(caches[0])):
        name = f"cache.{index // 2}.{'value' if index % 2 else 'key'}"
        outputs[name] = np.ascontiguousarray(np.concatenate([row[index] for row in caches]))
    outputs["logits"] = np.concatenate(logits)
    return outputs
