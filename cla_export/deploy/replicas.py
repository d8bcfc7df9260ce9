"""How many servers of a bundle there are."""

from typing import NamedTuple, Self

from cla_export.errors import BadInput


class Replicas(NamedTuple):
    """At least, and at most: whatever runs them adds and removes between these by load."""

    least: int
    most: int

    def __str__(self) -> str:
        return f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `2`, or `1:8`; BadInput for anything else."""
        least, colon, most = text.partition(":")
        try:
            found = cls(int(least), int(most if colon else least))
        except ValueError as error:
            raise BadInput(f"--replicas is {text!r}; expected such as 2, or 1:8") from error
        return found.checked()

    def checked(self) -> Self:
        """Itself; BadInput if there cannot be so many."""
        if not 1 <= self.least <= self.most:
            raise BadInput(
                f"--replicas is {self.least}:{self.most}; expected at least 1, and no fewer at most"
            )
        return self
