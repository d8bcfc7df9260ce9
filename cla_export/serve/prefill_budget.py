"""How much of a round goes to reading prompts, while others wait for their next token."""


class PrefillBudget:
    """Calls that may read prompts in a round of the scheduler.

    Where a call is longer than what a round has, rounds save up for it: the others then wait for
    one call now and then, and no longer than the budget on average.

    Args:
        seconds: of each round; None: one call, however long.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._seconds = seconds
        self._saved = 0.0
        self._call = 0.0  # seconds that a call takes, smoothed; 0: none was measured yet
        self._calls = 0  # in this round

    def begin(self) -> None:
        """A round begins."""
        self._calls = 0
        if self._seconds is not None:
            self._saved = min(self._saved + self._seconds, max(self._seconds, self._call))

    @property
    def left(self) -> bool:
        """Whether there is time for another call in this round."""
        return self._calls == 0 if self._seconds is None else self._saved >= self._call

    def spend(self, seconds: float) -> None:
        """Note how long a call took."""
        self._calls += 1
        self._saved -= seconds
        self._call += (seconds - self._call) * (0.25 if self._call else 1.0)
