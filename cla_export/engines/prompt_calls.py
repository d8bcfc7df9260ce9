"""In which calls prompts are read: long ones in chunks, several short ones side by side.

Prompts of a call are padded on the right. A call gives logits of its last places, as many for all
of its rows; those of a row's last tokens lie in front of its padding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Take(NamedTuple):
    """Logits of a call that are of some row's last tokens."""

    row: int  # of the batch
    to: int  # the first one's place among those that are kept of the row
    source: int  # and in the call's logits, row after row
    length: int


@dataclass(frozen=True, slots=True)
class PromptCall:
    """Tokens `at` to `at + length` of rows `first` to `last`, not included."""

    first: int
    last: int
    at: int
    length: int
    kept: int  # places of each row that have logits, at least one
    takes: tuple[Take, ...]


def plan_prompts(
    counts: Sequence[int],
    keep: int,
    chunk: int,
    fits: Callable[[int, int, int], bool] = lambda _rows, _length, _kept: False,
) -> Iterator[PromptCall]:
    """Calls that read rows of `counts` tokens, in order, whose last `keep` logits are wanted.

    Rows that follow each other share a call where so many, of that length and with so many logits
    of each, are said to fit in one. By itself a row is read in chunks.
    """
    first = 0
    while first < len(counts):
        longest = shortest = counts[first]
        last = first + 1
        while last < len(counts):
            longer, shorter = max(longest, counts[last]), min(shortest, counts[last])
            if not fits(last + 1 - first, longer, longer - shorter + keep):
                break
            longest, shortest, last = longer, shorter, last + 1
        size = chunk if last == first + 1 else longest
        for at in range(0, longest, size):
            yield _call(counts, keep, first, last, at, min(size, longest - at))
        first = last


def _call(
    counts: Sequence[int], keep: int, first: int, last: int, at: int, length: int
) -> PromptCall:
    wanted = []  # row, and its tokens in the call whose logits are
    for row in range(first, last):
        end = min(counts[row] - at, length)
        wanted.append((row, range(max(0, counts[row] - keep - at), end)))
    kept = max([1, *(length - tokens.start for _, tokens in wanted if tokens)])
    takes = tuple(
        Take(
            row,
            to=at + tokens.start - (counts[row] - keep),
            source=(row - first + 1) * kept - (length - tokens.start),
            length=len(tokens),
        )
        for row, tokens in wanted
        if tokens
    )
    return PromptCall(first, last, at, length, kept, takes)
