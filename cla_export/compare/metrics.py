"""How far two sets of logits or caches are apart, in the terms people compare models in."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LogitMetrics:
    """Next-token distributions compared, position by position."""

    kl_max: float  # nats, KL(reference || bundle)
    kl_mean: float
    top1: float  # share of positions where the best token agrees
    top5: float  # share of positions where the five best agree as sets


def cosine(expected: Array, got: Array) -> float:
    """Cosine of the angle between two tensors taken as vectors."""
    a, b = expected.astype(np.float64).ravel(), got.astype(np.float64).ravel()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm else float(np.array_equal(a, b))


def compare_logits(expected: Array, got: Array) -> LogitMetrics:
    """Compare logits [N, V]; what is not finite counts as disagreement."""
    if not np.isfinite(got).all():
        return LogitMetrics(float("inf"), float("inf"), 0.0, 0.0)
    log_p, log_q = log_softmax(expected), log_softmax(got)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1).clip(min=0)
    few = min(5, expected.shape[-1])
    best_p, best_q = (np.argsort(-x, axis=-1, kind="stable")[:, :few] for x in (expected, got))
    same = (np.sort(best_p, -1) == np.sort(best_q, -1)).all(-1)
    return LogitMetrics(
        kl_max=float(kl.max()),
        kl_mean=float(kl.mean()),
        top1=float((best_p[:, 0] == best_q[:, 0]).mean()),
        top5=float(same.mean()),
    )


def log_softmax(logits: Array) -> NDArray[np.float64]:
    """Log-probabilities [N, V], in float64."""
    exact = logits.astype(np.float64)
    exact -= exact.max(-1, keepdims=True)
    result: NDArray[np.float64] = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    return result


def profile(error: NDArray[np.float64], bins: int = 48) -> list[float]:
    """The largest error in each of at most `bins` stretches of the first axis."""
    pieces = np.array_split(error.reshape(len(error), -1).max(-1), min(bins, len(error)))
    return [float(piece.max()) for piece in pieces]
