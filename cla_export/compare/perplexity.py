"""Perplexity on a text: of the bundle, of its reference, and of the model before quantisation."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from cla_export.compare.metrics import log_softmax
from cla_export.compare.reference import Side
from cla_export.compare.report import PerplexityResult
from cla_export.compare.routing import Routes, routes_of
from cla_export.engines.executor import Executor

_SCORED = 2048  # tokens of the text, at most
_Read = Callable[[NDArray[np.int64]], NDArray[np.floating]]  # tokens [S] -> logits [S, V]


def compare_perplexity(
    exact: Side, executor: Executor, stream: Sequence[int], origin: str, tolerance: float
) -> PerplexityResult:
    """Score windows of the text as long as a slot; the bundle reads each in two chunks."""
    scored = np.asarray(stream[:_SCORED], np.int64)
    window = executor.capacity

    taken: list[Routes] = []  # in each window

    def read(tokens: NDArray[np.int64]) -> NDArray[np.floating]:
        half = max(1, len(tokens) // 2)
        pieces = [(0, tokens[:half]), (half, tokens[half:])]
        logits = [executor.prefill(0, part.tolist(), at, keep=len(part)) for at, part in pieces]
        taken.append(routes_of(executor, 0, 0, len(tokens)))
        return np.concatenate(logits)

    ours = perplexity(read, scored, window)
    ways = iter(taken)
    theirs = perplexity(lambda tokens: exact.logits(tokens, next(ways)), scored, window)
    difference = abs(ours - theirs) / theirs
    return PerplexityResult(
        text=f"{origin}, windows of {window}",
        tokens=sum(len(tokens) - 1 for tokens in _windows(scored, window)),
        reference=theirs,
        bundle=ours,
        difference=difference,
        tolerance=tolerance,
        passed=difference <= tolerance,
    )


def perplexity(read: _Read, stream: Sequence[int] | NDArray[np.int64], window: int) -> float:
    """Perplexity per token over windows of a text."""
    losses = [
        -log_softmax(read(tokens)[:-1])[np.arange(len(tokens) - 1), tokens[1:]]
        for tokens in _windows(np.asarray(stream[:_SCORED], np.int64), window)
    ]
    return float(np.exp(np.concatenate(losses).mean()))


def _windows(scored: NDArray[np.int64], window: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(scored) - 1, window):
        tokens = scored[start : start + window]
        if len(tokens) > 1:
            yield tokens
