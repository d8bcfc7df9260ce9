"""Choosing the next token from one row of logits."""

import numpy as np

from cla_export.engines.executor import Logits
from cla_export.errors import BadInput


class Sampler:
    """Greedy at temperature 0; otherwise temperature, then nucleus (top-p) sampling, seeded."""

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> None:
        if temperature < 0:
            raise BadInput(f"temperature is {temperature}; expected 0 (greedy) or more")
        if not 0 < top_p <= 1:
            raise BadInput(f"top_p is {top_p}; expected more than 0, at most 1")
        self._temperature = temperature
        self._top_p = top_p
        self._generator = np.random.default_rng(seed)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self._temperature == 0

    def pick(self, logits: Logits) -> int:
        """The next token for logits [V]."""
        if self.greedy:
            return int(logits.argmax())
        scaled = logits.astype(np.float64) / self._temperature
        weights = np.exp(scaled - scaled.max())
        order = np.argsort(-weights, kind="stable")
        cumulative = np.cumsum(weights[order])
        kept = int(np.searchsorted(cumulative, self._top_p * cumulative[-1])) + 1
        draw = self._generator.random() * cumulative[min(kept, len(order)) - 1]
        return int(order[np.searchsorted(cumulative, draw, side="right")])
