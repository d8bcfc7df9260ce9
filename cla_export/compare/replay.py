"""Run one case again with every layer's values marked: which step goes wrong first, and how far?

Calls are compared in the order they ran, and within a call layer by layer, in the order of
`report.ROLES`. The first value beyond tolerance is the first divergence; the largest share of the
tolerance that each layer takes in each call is the map that the report draws.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cla_export.bundle import Bundle
from cla_export.compare.cases import Case, Setup
from cla_export.compare.marks import Call, MarkedExecutor, marked
from cla_export.compare.probe import CACHES, Key, Sensitivity, Tensors, torch_tensors
from cla_export.compare.reference import GroupKV, Reference
from cla_export.compare.report import ROLES, Divergence, LayerErrors, LayerMap
from cla_export.compare.routing import ROUTER, routed
from cla_export.compare.runners import ExecutorRunner, fill_with_garbage, held_before
from cla_export.compare.thresholds import Threshold
from cla_export.engines.onnxruntime import OnnxRuntimeExecutor
from cla_export.kv_scales import LEAST, MOST, Scales
from cla_export.layout import KVLayout

_HALF = 0.5 * (
    1 + 2.0**-15
)  # of a step: the quotient that is rounded has 24 bits, 7 of them before
# the point
_ENOUGH = 32  # tokens whose mean error says something


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor of one layer, of one row of one call, against the reference."""

    call: int
    row: int  # of the case
    layer: int
    role: str
    start: int  # position of its first token
    got: NDArray[np.float32]  # [tokens, width]
    expected: NDArray[np.float64]
    error: NDArray[np.float64]
    tolerance: float
    mean_tolerance: float

    @property
    def passed(self) -> bool:
        few = len(self.got) < _ENOUGH
        typical = few or float(self.error.mean()) <= self.mean_tolerance
        return bool(self.error.max() <= self.tolerance) and typical

    @property
    def share(self) -> float:
        """Largest error over what is allowed."""
        worst = float(self.error.max())
        return worst / self.tolerance if self.tolerance else (np.inf if worst else 0.0)


@dataclass(slots=True)
class Episode:
    """What one slot went through from an empty one, or from a prefix, on: a sequence of tokens."""

    tokens: list[int]
    row: int  # of the case
    held: int  # made-up tokens before
    made: dict[Key, list[NDArray[Any]]] = field(default_factory=dict)  # by the bundle
    expected: Tensors = field(default_factory=dict)
    natives: list[Tensors] = field(default_factory=list)
    sensitivity: Sensitivity = field(default_factory=dict)

    def cut(self, length: int) -> "Episode":
        """An episode that begins with the first tokens of this one."""
        made = {key: [whole[:length]] for key, whole in self.whole().items()} if length else {}
        return Episode(self.tokens[:length], self.row, self.held, made)

    def whole(self) -> dict[Key, NDArray[Any]]:
        """What the bundle made of all the tokens, [S, width]."""
        return {key: np.concatenate(parts) for key, parts in self.made.items()}

    def compute(self, reference: Reference, before: GroupKV | None) -> None:
        """Recompute every step in PyTorch, on both sides."""
        row, forced = np.array(self.tokens, np.int64), self.whole()
        forced = {key: value for key, value in forced.items() if np.isfinite(value).all()}
        routes = {layer: forced.pop((layer, ROUTER)) for layer, role in [*forced] if role == ROUTER}
        side = reference.exact
        self.expected, self.sensitivity = torch_tensors(
            side, row, forced, before, routes=routes, feel=True
        )
        sides = [replace(side, scales=None) for side in reference.yardstick]  # caches are given
        self.natives = [torch_tensors(s, row, forced, before, routes=routes)[0] for s in sides]
        for role, cache in CACHES.items():
            for layer in [layer for layer, found in self.expected if found == role]:
                own = forced.get((layer, role))
                exact = self.expected[layer, role] if own is None else own.astype(np.float64)
                if (scales := reference.native.scales) is not None:
                    group = reference.exact.model.spec.layout.group_of(layer)
                    step = _step(scales[group], cache)
                    exact = exact.clip(LEAST * step, MOST * step)
                for tensors in (self.expected, *self.natives):
                    tensors[layer, cache] = exact


def open_marked(
    bundle: Bundle,
    setup: Setup,
    engine: type[OnnxRuntimeExecutor] = OnnxRuntimeExecutor,
    record: int | None = None,
    *,
    stock: bool = True,
) -> MarkedExecutor:
    """An executor over the marked graph for a setup's cases, full of garbage.

    `stock` says which of a bundle's graphs, as for OnnxRuntimeExecutor.
    """
    executor = marked(routed(engine, bundle))(
        bundle, capacity=setup.capacity, slots=setup.slots, record=record, stock=stock
    )
    fill_with_garbage(executor)
    return executor


def run_marked(executor: MarkedExecutor, case: Case, held: GroupKV) -> list[Call]:
    """Run a case: what each layer made in each of its calls."""
    executor.calls = []
    ExecutorRunner(executor, held).run_case(case.feed)
    return executor.calls


def differences(
    calls: list[Call],
    layout: KVLayout,
    reference: Reference,
    threshold: Threshold,
    case: Case,
    held: GroupKV,
) -> Iterator[Difference]:
    """Every comparison, in the order that values are computed.

    What an int8 cache holds may be half a step from what it was given: only more is an error.
    """
    scales = reference.native.scales
    for number, (call, episodes) in enumerate(zip(calls, episodes_of(calls, case), strict=True)):
        for episode in episodes:
            if not episode.expected:
                episode.compute(reference, held_before(held, episode.held, layout))
        for layer, role in product(range(layout.num_layers), ROLES):
            for index, episode in enumerate(episodes):
                got = _got(call, index, layer, role, layout, episode.held)
                if got is None or (layer, role) not in episode.expected:
                    continue
                whole = episode.expected[layer, role]
                natives = [tensors[layer, role] for tensors in episode.natives]
                start = 0 if role in CACHES.values() else call.starts[index] - episode.held
                expected = whole[start : start + len(got)]
                keys, scores = 0, 0.0
                if role == "attention":
                    keys, scores = episode.held + len(whole), episode.sensitivity[layer]
                tolerance = threshold.of(whole, natives, keys, scores)
                if role == ROUTER:
                    got, expected = _choice(got, expected)
                    tolerance *= 2  # each of two scores may be off
                error = np.abs(got - expected)
                if scales is not None and role in CACHES.values():
                    error -= _rounding(scales[layout.group_of(layer)], role)
                    error = error.clip(0)  # NaN stays
                error[~np.isfinite(error)] = np.inf
                yield Difference(
                    call=number,
                    row=episode.row,
                    layer=layer,
                    role=role,
                    start=episode.held + start,
                    got=got,
                    expected=expected,
                    error=error,
                    tolerance=tolerance,
                    mean_tolerance=threshold.mean_of(whole, natives[0]),
                )


def _choice(
    chosen: NDArray[np.int64], scores: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """The least score [S, 1] among experts chosen [S, k], and the least that it should be.

    That is the greatest of those that were not chosen, where it is more.
    """
    least = np.take_along_axis(scores, chosen, 1).min(1, keepdims=True)
    others = scores.copy()
    np.put_along_axis(others, chosen, -np.inf, 1)
    return least.astype(np.float32), np.maximum(least, others.max(1, keepdims=True))


def episodes_of(calls: list[Call], case: Case) -> list[list[Episode]]:
    """For each call, each row's episode, complete to the end of the case."""
    current: dict[int, Episode] = {}  # by slot, or by row where rows share a slot
    found = []
    for number, call in enumerate(calls):
        row_episodes = []
        for index, (start, tokens) in enumerate(zip(call.starts, call.tokens, strict=True)):
            row = number // case.calls_a_row if case.is_far else call.first_slot + index
            row -= 0 if case.is_far else int(case.feed["first_slot"])
            held = case.held[row]
            old = current.get(row, Episode([], row, held))
            kept = min(max(start - held, 0), len(old.tokens))
            if row not in current or kept < len(old.tokens):
                current[row] = old.cut(kept)
            episode = current[row]
            episode.tokens.extend(tokens)
            for key, value in call.rows[index].items():
                episode.made.setdefault(key, []).append(value)
            row_episodes.append(episode)
        found.append(row_episodes)
    return found


def _step(scales: Scales, role: str) -> NDArray[np.float64]:
    """Of an int8 cache, by channel, [Hkv * D]."""
    return scales[list(CACHES.values()).index(role)].astype(np.float64).ravel()


def _rounding(scales: Scales, role: str) -> NDArray[np.float64]:
    """How far what an int8 cache holds may be from what it was given, by channel."""
    return _step(scales, role) * _HALF


def _got(
    call: Call, row: int, layer: int, role: str, layout: KVLayout, held: int
) -> NDArray[Any] | None:
    """What the bundle made, [tokens, width]; the caches' roles are of owners alone."""
    if role not in CACHES.values():
        return call.rows[row].get((layer, role))
    if not layout.is_owner(layer):
        return None
    index = 2 * layout.group_of(layer) + (role == "value_cache")
    cache = call.caches[row][index][held:]
    return cache.reshape(len(cache), -1)


def first_divergence(found: list[Difference], layout: KVLayout, case: str) -> Divergence | None:
    """The first comparison beyond its tolerance; None if no layer's values differ."""
    first = next((difference for difference in found if not difference.passed), None)
    if first is None:
        return None
    worst = int(first.error.argmax())
    token, channel = divmod(worst, first.error.shape[1])
    return Divergence(
        case=case,
        call=first.call,
        layer=first.layer,
        group=layout.group_of(first.layer),
        role=first.role,
        row=first.row,
        position=first.start + token,
        channel=channel,
        got=float(first.got.flat[worst]),
        expected=float(first.expected.flat[worst]),
        error=float(first.error.flat[worst]),
        tolerance=first.tolerance,
    )


def layer_map(found: list[Difference], calls: list[Call], case: str) -> LayerMap:
    """The largest share of its tolerance that each layer's worst tensor takes in each call."""
    shares: dict[int, list[float]] = {}
    roles: dict[int, list[str]] = {}
    for difference in found:
        row = shares.setdefault(difference.layer, [0.0] * len(calls))
        names = roles.setdefault(difference.layer, [""] * len(calls))
        if difference.share > row[difference.call] or not names[difference.call]:
            row[difference.call], names[difference.call] = difference.share, difference.role
    rows = [LayerErrors(layer, shares[layer], roles[layer]) for layer in sorted(shares)]
    return LayerMap(case, [describe(call) for call in calls], rows)


def describe(call: Call) -> str:
    """`prefill 0-123` of one row, `decode 124`, `4 rows: decode 13, 124, 41, 62`."""
    ends = [start + len(tokens) for start, tokens in zip(call.starts, call.tokens, strict=True)]
    if all(len(tokens) == 1 for tokens in call.tokens):
        what = "decode " + ", ".join(map(str, call.starts))
    else:
        spans = (f"{start}-{end - 1}" for start, end in zip(call.starts, ends, strict=True))
        what = "prefill " + ", ".join(spans)
    return what if len(call.rows) == 1 else f"{len(call.rows)} rows: {what}"
