"""Log-probabilities of tokens, by the model's own logits: before penalties and temperature."""

from dataclasses import dataclass

import numpy as np

from cla_export.engines.executor import Logits
from cla_export.kth_largest import kth_largest


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's, and those of the likeliest in its place, falling."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def logprob_of(logits: Logits, token: int, top: int = 0) -> TokenLogprob:
    """Of `token` by logits [V], with the `top` likeliest beside it (ties by id)."""
    largest = float(logits.max())
    total = largest + float(np.log(np.exp(logits - largest).sum(dtype=np.float64)))
    top = min(top, len(logits))
    likeliest: tuple[tuple[int, float], ...] = ()
    if top:
        ids = np.flatnonzero(logits >= np.float32(kth_largest(logits, top)))
        ids = ids[np.argsort(-logits[ids], kind="stable")][:top]
        likeliest = tuple((int(i), float(logits[i]) - total) for i in ids)
    return TokenLogprob(token, float(logits[token]) - total, likeliest)
