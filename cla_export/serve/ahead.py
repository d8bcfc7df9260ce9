"""Tokens that a device chooses, and decode there: a step is begun before the last one's are told.

So the device works while tokens become text. A sequence that turns out to have ended is part of the
next step too: what that makes of it is dropped, and its slot, which has room for one token more, is
not used again before the step is over.
"""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from typing import NamedTuple

from cla_export.engines.executor import Logits, TokenChooser
from cla_export.serve.sequence import Sequence


class Landed(NamedTuple):
    """What a step or a prompt gave a sequence; no token where its logits are not numbers."""

    token: int | None
    logits: Logits | None  # where the sequence wants them


class Ahead:
    """The step that was begun and has not ended.

    Args:
        chooser: what runs it.
        clock: seconds.
    """

    def __init__(self, chooser: TokenChooser, clock: Callable[[], float]) -> None:
        self._chooser, self._clock = chooser, clock
        self.rows: list[Sequence] = []  # of that step; empty: there is none
        self.began = 0.0

    def end(self, wanted: frozenset[Sequence]) -> dict[Sequence, Landed]:
        """Wait for the step: what it gave those of its rows that are wanted, with the token taken.

        There is no step after that, even if the executor raises.
        """
        rows, self.rows = self.rows, []
        landed = self._land(rows, self._chooser.end_decode(), wanted)
        for sequence in landed:
            sequence.length += 1
        return landed

    def begin(self, rows: Many[Sequence], landed: Mapping[Sequence, Landed]) -> None:
        """Begin a step of sequences in slots 0, 1, ...; of some the last token is not noted yet."""
        tokens = [
            (landed[s].token or 0) if s in landed else s.tokens[-1]  # 0: it is about to fail
            for s in rows
        ]
        self.rows, self.began = [], self._clock()
        choices = (sequence.sampler.next_choice() for sequence in rows)
        lengths = [sequence.length for sequence in rows]
        self._chooser.begin_decode(range(len(rows)), tokens, lengths, choices)
        self.rows = list(rows)

    def read_prompts(self, rows: Many[Sequence], pieces: Many[Many[int]]) -> dict[Sequence, Landed]:
        """Read the last pieces of prompts into slots that follow each other: their first tokens."""
        choices = (sequence.sampler.next_choice() for sequence in rows)
        starts = [sequence.length for sequence in rows]
        tokens = self._chooser.prefill_and_choose(rows[0].slot, pieces, starts, choices)
        return self._land(rows, tokens, frozenset(rows))

    def _land(
        self, rows: Many[Sequence], tokens: Many[int | None], wanted: frozenset[Sequence]
    ) -> dict[Sequence, Landed]:
        """Tokens as their samplers note them, with logits for those who want them."""
        landed = {}
        for row, (sequence, token) in enumerate(zip(rows, tokens, strict=True)):
            if sequence in wanted:
                if token is not None:
                    sequence.sampler.take(token)
                logits = self._chooser.logits_of(row) if sequence.wants_logits else None
                landed[sequence] = Landed(token, logits)
        return landed

    def drop(self) -> None:
        """Forget the step: nobody wants its tokens."""
        self.rows = []
