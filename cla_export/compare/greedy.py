"""Free-running generation: does the bundle choose the tokens that the reference would?"""

from collections.abc import Sequence

import numpy as np

from cla_export.compare.reference import Side
from cla_export.compare.report import GreedyResult
from cla_export.compare.routing import Routes, routes_of
from cla_export.compare.thresholds import GREEDY_TOKENS
from cla_export.engines.executor import Executor

PROMPTS = 3
_PROMPT = 12  # tokens of each


def compare_greedy(
    exact: Side, executor: Executor, stream: Sequence[int], tie: float
) -> list[GreedyResult]:
    """Let the bundle generate freely; one reference pass over its text says where it would differ.

    Up to the first disagreement both have the same prefix, so this is free-running agreement. A
    choice that the reference likes less than its own by at most `tie` (logits) is a near-tie.
    """
    length = max(1, min(_PROMPT, executor.capacity // 2))
    count = min(GREEDY_TOKENS, executor.capacity - length)
    results = []
    for prompt in range(PROMPTS):
        start = prompt * len(stream) // PROMPTS
        tokens = [int(token) for token in np.resize(np.roll(stream, -start), length)]
        logits = executor.prefill(0, tokens, 0)[-1]
        for step in range(count):
            tokens.append(int(logits.argmax()))
            if step + 1 < count:
                logits = executor.decode([0], tokens[-1:], [len(tokens) - 1])[0]
        routes = routes_of(executor, 0, 0, len(tokens) - 1)
        results.append(_judge(exact, prompt, tokens, length, tie, routes))
    return results


def _judge(
    exact: Side, prompt: int, tokens: list[int], length: int, tie: float, routes: Routes
) -> GreedyResult:
    reference = exact.logits(np.array(tokens[:-1], np.int64), routes)[length - 1 :]
    chosen = np.array(tokens[length:])
    agree = reference.argmax(-1) == chosen
    gaps = reference.max(-1) - reference[np.arange(len(chosen)), chosen]
    wrong = np.flatnonzero(~agree)
    return GreedyResult(
        prompt=prompt,
        tokens=len(chosen),
        agreeing=int(agree.sum()),
        near_ties=int((gaps[wrong] <= tie).sum()),
        first_divergence=int(wrong[0]) if len(wrong) else None,
        gap=float(gaps[wrong[0]]) if len(wrong) else None,
        passed=bool((gaps[wrong] <= tie).all()),
    )
