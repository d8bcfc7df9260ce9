"""Stop strings, found across the borders of pieces."""

from collections.abc import Sequence


class StopMatcher:
    """Ends a text where the first of some strings is complete; the string itself is left out.

    The text is read character by character, so what comes out does not depend on how it was cut
    into pieces: of several strings the one that ends first counts, and of those the longest. What
    may yet become a stop string is held back.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found: str | None = None

    def add(self, piece: str) -> str:
        """The text that is certain now. After a match there is no more."""
        if not self._stops:
            return piece
        text = self._held + piece
        self._held = ""
        matches = [(text.find(stop), stop) for stop in self._stops]
        ends = [(at + len(stop), at, stop) for at, stop in matches if at >= 0]
        if ends:
            _, at, self.found = min(ends)
            return text[:at]
        kept = self._open(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """What is held back, once nothing follows."""
        text, self._held = self._held, ""
        return text

    def _open(self, text: str) -> int:
        """Characters at the end that begin a stop string."""
        for size in range(min(len(text), max(map(len, self._stops)) - 1), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
