"""One output of one case, measured."""

import math

import numpy as np
from numpy.typing import NDArray

from cla_export.compare.cases import Case
from cla_export.compare.metrics import compare_logits, cosine, profile
from cla_export.compare.report import TensorResult


def tensor_result(
    case: Case,
    name: str,
    expected: NDArray[np.floating],
    got: NDArray[np.floating],
    within: bool,
    allowed: tuple[float, float],
) -> TensorResult:
    """Measure an output; `within` is polygraphy's verdict on the largest error.

    `allowed` are the largest and the mean error that may be.
    """
    error = np.abs(got.astype(np.float64) - expected)
    error[~np.isfinite(error)] = math.inf
    worst = int(np.unravel_index(int(error.argmax()), error.shape)[0])
    row, position = _place(case, name, worst)
    rms = float(np.sqrt(np.mean(np.square(expected, dtype=np.float64))))
    tolerance, mean_tolerance = allowed
    is_logits = name == "logits"
    return TensorResult(
        case=case.name,
        output=name,
        group=None if is_logits else int(name.split(".")[1]),
        passed=within and float(error.mean()) <= mean_tolerance,  # an infinite one is not
        max_error=float(error.max()),
        mean_error=float(error.mean()),
        mean_tolerance=mean_tolerance,
        rms=rms,
        tolerance=tolerance,
        row=row,
        position=position,
        cosine=cosine(expected, got),
        max_relative=float(error.max()) / rms if rms else math.inf,
        mean_relative=float(error.mean()) / rms if rms else math.inf,
        profile=profile(error),
        logits=compare_logits(expected, got) if is_logits else None,
    )


def _place(case: Case, name: str, index: int) -> tuple[int, int]:
    """Row, and position in its slot, of one of the tokens that an output runs over."""
    starts = case.feed["logits_from"] if name == "logits" else np.zeros_like(case.feed["prompts"])
    ends = np.cumsum(case.feed["prompts"] + case.feed["steps"] - starts)
    row = int(np.searchsorted(ends, index, side="right"))
    before = int(ends[row - 1]) if row else 0
    return row, case.held[row] + index - before + int(starts[row])
