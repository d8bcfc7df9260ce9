"""What every peer can do."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from random_model import Floats, Prompts

from cla_export.bundle import Bundle


class Refused(Exception):
    """A peer cannot run a cell, for a reason known in advance."""


class Peer(ABC):
    """Decodes rows of equal length over caches of its own."""

    fills = True  # whether its caches can be filled with made-up keys and values
    goes_on = False  # whether a round starts where the last one ended

    @staticmethod  # noqa: B027  most need nothing
    def prepare(bundle: Bundle, **options: bool) -> None:
        """Write what it needs, beside the bundle's folder."""

    @abstractmethod
    def start(self, batch: int, capacity: int) -> None:
        """Have empty caches, and no others, for `batch` rows of up to `capacity` tokens."""

    @abstractmethod
    def fill(self, context: int) -> None:
        """Hold `context` made-up tokens in each row."""

    @abstractmethod
    def prefill(self, rows: Prompts) -> Floats:
        """Hold first prompts [B, S]; logits [B, V] of their last tokens."""

    @abstractmethod
    def decode(self, tokens: Sequence[int], length: int) -> Floats:
        """Append a token to rows that hold `length`; logits [B, V]."""

    @abstractmethod
    def free(self) -> None:
        """Let the caches go."""

    def rewind(self, context: int) -> None:  # noqa: B027  most have nothing to do
        """Hold `context` tokens again; what is behind them may stay."""

    def step(self, tokens: Sequence[int], length: int) -> Sequence[int]:
        """From tokens to the next, greedily."""
        best: list[int] = self.decode(tokens, length).argmax(-1).tolist()
        return best
