"""The two sides as polygraphy runners over the same feed: PyTorch, and a bundle's executor.

Both return, for all rows of a case one after another and valid positions only,

    logits           float32 [N, V]
    cache.{g}.key    float32 [M, Hkv, D]   what group g's cache holds at the end, and .value
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from cla_export.compare.cases import INPUTS, Feed
from cla_export.engines.executor import Executor
from cla_export.models.cla import ClaDecoder

Outputs = OrderedDict[str, NDArray[np.float32]]


class _CaseRunner(BaseRunner, ABC):  # type: ignore[misc]  # polygraphy ships no types
    """Runs cases; subclasses say how."""

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        shapes: dict[str, list[str]] = {
            "tokens": ["B", "T"],
            "steps": [],
            "chunk": [],
            "first_slot": [],
        }
        for name in INPUTS:
            metadata.add(name, np.int64, shapes.get(name, ["B"]))
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
    """The reference: every row recomputed from its first token, without any cache."""

    def __init__(self, model: ClaDecoder) -> None:
        super().__init__(name="pytorch")
        self._model = model

    @torch.inference_mode()
    def run_case(self, feed: Feed) -> Outputs:
        logits: list[NDArray[np.float32]] = []
        caches: list[list[NDArray[np.float32]]] = []
        for tokens, first in zip(rows_of(feed), feed["logits_from"], strict=True):
            ids = torch.from_numpy(tokens)[None]
            positions = torch.arange(len(tokens))[None]
            row_logits, groups = self._model.forward_with_kv(ids, positions)
            logits.append(row_logits[0, int(first) :].float().numpy())
            caches.append([_tokens_first(part[0].float().numpy()) for kv in groups for part in kv])
        return _outputs(logits, caches)


class ExecutorRunner(_CaseRunner):
    """A bundle: prompts, chunks and steps as a server would run them."""

    def __init__(self, executor: Executor, name: str) -> None:
        super().__init__(name=name)
        self._executor = executor

    def run_case(self, feed: Feed) -> Outputs:
        executor, rows = self._executor, rows_of(feed)
        prompts, first_slot = feed["prompts"].tolist(), int(feed["first_slot"])
        slots = range(first_slot, first_slot + len(rows))
        logits: list[list[NDArray[np.float32]]] = [[] for _ in rows]
        if chunk := int(feed["chunk"]):
            for index in _order(len(rows)):
                slot = slots[index]
                for start in range(0, prompts[index], chunk):
                    piece = rows[index][start : min(start + chunk, prompts[index])].tolist()
                    logits[index].append(executor.prefill(slot, piece, start, keep=len(piece)))
        else:
            together = executor.prefill_rows(
                first_slot, [row[:n].tolist() for row, n in zip(rows, prompts, strict=True)]
            )
            for index in range(len(rows)):
                logits[index].append(together[index : index + 1])
        for step in range(int(feed["steps"])):
            lengths = [prompt + step for prompt in prompts]
            tokens = [int(row[n]) for row, n in zip(rows, lengths, strict=True)]
            for index, row_logits in enumerate(executor.decode(slots, tokens, lengths)):
                logits[index].append(row_logits[None])
        groups = range(executor.layout.num_groups)
        caches = [
            [
                _tokens_first(pool[slot][:, : len(row)].astype(np.float32))
                for group in groups
                for pool in executor.cache(group)
            ]
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
            pool[...] = (generator.standard_normal(pool.shape) * 50).astype(pool.dtype)


def rows_of(feed: Feed) -> list[NDArray[np.int64]]:
    """Each row's tokens, without the padding."""
    totals = feed["prompts"] + feed["steps"]
    return [tokens[:total] for tokens, total in zip(feed["tokens"], totals, strict=True)]


def _tokens_first(cache: NDArray[np.float32]) -> NDArray[np.float32]:
    return cache.transpose(1, 0, 2)  # [Hkv, T, D] -> [T, Hkv, D]


def _outputs(logits: list[NDArray[np.float32]], caches: list[list[NDArray[np.float32]]]) -> Outputs:
    outputs: Outputs = OrderedDict()
    for index in range(len(caches[0])):
        name = f"cache.{index // 2}.{'value' if index % 2 else 'key'}"
        outputs[name] = np.ascontiguousarray(np.concatenate([row[index] for row in caches]))
    outputs["logits"] = np.concatenate(logits)
    return outputs
