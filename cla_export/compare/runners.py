"""The two sides as polygraphy runners over the same feed: PyTorch, and a bundle's executor.

Both return, for all rows of a case one after another and valid positions only,

    logits           [N, V]
    cache.{g}.key    [M, Hkv, D]   what group g's cache holds of them at the end, and .value;
                                   neither where PyTorch's side has none to show

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
from cla_export.compare.routing import Routes, routes_of
from cla_export.engines.executor import Executor
from cla_export.layout import KVLayout

LOUD = 16.0  # times as large; a power of two rounds nothing
_EDGE = 8  # places, as many as a row has tokens
Outputs = OrderedDict[str, NDArray[np.floating]]


class _CaseRunner(BaseRunner, ABC):  # type: ignore[misc]  # polygraphy ships no types
    """Runs cases; subclasses say how. `held` is what fills caches in front of a row's tokens."""

    def __init__(self, name: str, held: GroupKV) -> None:
        super().__init__(name=name)
        self._held = held

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for name in INPUTS:
            rows = name in ("prompts", "held", "logits_from")
            shape = ["B", "T"] if name == "tokens" else ["B"] if rows else []
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
    """The reference: every row recomputed from its first token, without any cache of its own.

    `routes` are where the rows' tokens went in the bundle's run of the case, read when this one's
    begins.
    """

    def __init__(self, side: Side, held: GroupKV, routes: Sequence[Routes] = ()) -> None:
        super().__init__("pytorch", held)
        self._side = side
        self._routes = routes

    def run_case(self, feed: Feed) -> Outputs:
        layout = self._side.model.spec.layout
        logits, caches = [], []
        for row, (tokens, first) in enumerate(zip(rows_of(feed), feed["logits_from"], strict=True)):
            held = held_before(self._held, int(feed["held"][row]), layout)
            routes = self._routes[row] if self._routes else None
            row_logits, groups = self._side.forward(tokens, held, routes)
            logits.append(row_logits[int(first) :])
            caches.append([part for pair in groups for part in pair])
        return _outputs(logits, caches)


class ExecutorRunner(_CaseRunner):
    """A bundle: prompts, chunks and steps as a server would run them.

    Without `caches`, logits alone are returned. `routes` are where each row's tokens went in the
    last case, if the executor knows.
    """

    def __init__(self, executor: Executor, held: GroupKV, *, caches: bool = True) -> None:
        super().__init__("bundle", held)
        self._executor = executor
        self._caches = caches
        self.routes: list[Routes] = []

    def run_case(self, feed: Feed) -> Outputs:
        self.routes.clear()
        if feed["held"].any():
            return self._run_far(feed)
        executor, rows = self._executor, rows_of(feed)
        prompts, first_slot = feed["prompts"].tolist(), int(feed["first_slot"])
        slots = range(first_slot, first_slot + len(rows))
        reused, chunk = int(feed["reused"]), int(feed["chunk"])
        asked = feed["logits_from"].tolist()
        logits: list[list[NDArray[np.float32]]] = [[] for _ in rows]
        if (earlier := earlier_request(feed)) is not None:
            executor.prefill(first_slot, earlier.tolist(), 0)
        if chunk:
            for index in _order(len(rows)):
                for start in range(reused, prompts[index], chunk):
                    piece = rows[index][start : min(start + chunk, prompts[index])].tolist()
                    keep = start + len(piece) - max(start, asked[index])
                    made = executor.prefill(slots[index], piece, start, keep=max(1, keep))
                    logits[index] += [made] if keep > 0 else []
        else:
            prompted = [row[:n].tolist() for row, n in zip(rows, prompts, strict=True)]
            for index, made in enumerate(executor.prefill_rows(first_slot, prompted)):
                logits[index].append(made[None])
        for step in range(int(feed["steps"])):
            lengths = [prompt + step for prompt in prompts]
            tokens = [int(row[n]) for row, n in zip(rows, lengths, strict=True)]
            for index, row_logits in enumerate(executor.decode(slots, tokens, lengths)):
                logits[index].append(row_logits[None])
        self.routes += [
            routes_of(executor, slot, 0, len(row)) for slot, row in zip(slots, rows, strict=True)
        ]
        caches = [
            cache_rows(executor, slot, 0, len(row)) if self._caches else []
            for slot, row in zip(slots, rows, strict=True)
        ]
        return _outputs([np.concatenate(parts) for parts in logits], caches)

    def _run_far(self, feed: Feed) -> Outputs:
        """Rows in turn, each in the same slot behind made-up tokens."""
        executor = self._executor
        logits, caches = [], []
        for row, tokens in enumerate(rows_of(feed)):
            held, prompt = int(feed["held"][row]), int(feed["prompts"][row])
            fill_with(executor, 0, held_before(self._held, held, executor.layout))
            made = [executor.prefill(0, tokens[:prompt].tolist(), held, keep=prompt)]
            for at, token in enumerate(tokens[prompt:].tolist(), held + prompt):
                made.append(executor.decode([0], [token], [at]))
            logits.append(np.concatenate(made))
            caches.append(cache_rows(executor, 0, held, held + len(tokens)))
            self.routes.append(routes_of(executor, 0, held, held + len(tokens)))
        return _outputs(logits, caches)


def _order(rows: int) -> list[int]:
    """Both neighbours of a slot are filled after it somewhere, so that no overrun is healed."""
    return [*range(1, rows, 2), *range(0, rows, 2)]


def fill_with_garbage(executor: Executor) -> None:
    """Stale numbers in every slot: reading past a row's length must not go unnoticed."""
    generator = np.random.default_rng(0)
    for group in range(executor.layout.num_groups):
        for slot in range(executor.slots):  # one at a time: pools can be large
            keys, values = (
                (generator.standard_normal(part.shape) * 50).astype(part.dtype)
                for part in executor.read(group, slot)
            )
            executor.write(group, slot, keys, values)


def fill_with(executor: Executor, slot: int, held: GroupKV | None) -> None:
    """Put keys and values [T, Hkv, D] of each group into the first places of a slot."""
    for group, (keys, values) in enumerate(held or []):
        executor.write(group, slot, keys.transpose(1, 0, 2), values.transpose(1, 0, 2))


def cache_rows(executor: Executor, slot: int, start: int, end: int) -> list[NDArray[np.float32]]:
    """Places of a slot: each group's keys, then its values, [end - start, Hkv, D]."""
    return [
        part[:, start:end].astype(np.float32).transpose(1, 0, 2)
        for group in range(executor.layout.num_groups)
        for part in executor.read(group, slot)
    ]


def held_before(kv: GroupKV, length: int, layout: KVLayout) -> GroupKV | None:
    """What fills each group's caches in front of a row; None for no tokens at all.

    The same keys and values over and over, and louder values where an error by one place would
    show: at place 0, and where a window begins for one of the row's tokens. What no window reaches
    is garbage.
    """
    if not length:
        return None
    return [
        (_repeat(key, length, 0, None), _repeat(value, length, LOUD, group.window))
        for (key, value), group in zip(kv, layout.groups, strict=True)
    ]


def _repeat(
    part: NDArray[np.floating], length: int, loud: float, window: int | None
) -> NDArray[np.floating]:
    whole = np.resize(part, (length, *part.shape[1:]))
    if loud:
        whole[0] *= loud
        if window is not None and (begin := length + 1 - window) > 0:
            whole[:begin] = loud * loud
            whole[begin : begin + _EDGE] *= loud
    return whole


def _outputs(
    logits: Sequence[NDArray[np.floating]], caches: Sequence[Sequence[NDArray[np.floating]]]
) -> Outputs:
    outputs: Outputs = OrderedDict()
    for index in range(len(caches[0])):
        name = f"cache.{index // 2}.{'value' if index % 2 else 'key'}"
        outputs[name] = np.ascontiguousarray(np.concatenate([row[index] for row in caches]))
    outputs["logits"] = np.concatenate(logits)
    return outputs
