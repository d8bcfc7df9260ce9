"""What is timed, and what was found."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Cell:
    """Decode steps behind `context` tokens, or the prefill of that many."""

    phase: str
    batch: int
    context: int

    @property
    def name(self) -> str:
        head = "" if self.phase == "decode" else f"{self.phase} "
        return f"{head}{self.batch} / {self.context}"

    def capacity(self, steps: int) -> int:
        """Tokens that a slot must hold, for so many steps in a row."""
        return self.context + (steps + 1 if self.phase == "decode" else 0)


@dataclass(slots=True)
class Row:
    """One peer in one cell."""

    peer: str
    phase: str
    batch: int
    context: int
    ms_per_step: float | None = None
    tokens_per_s: float | None = None
    floor_share: float | None = None  # the floor's time over the peer's
    peak_rss_bytes: int | None = None  # of its process, so far
    outcome: str = "ok"
    round_ms: list[float] = field(default_factory=list)  # medians

    @property
    def cell(self) -> Cell:
        return Cell(self.phase, self.batch, self.context)
