"""In which calls prompts are read: every token once, and the right logits of them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cla_export.engines.prompt_calls import plan_prompts

CHUNK, ROOM = 8, 20
counts = st.lists(st.integers(1, 30), min_size=1, max_size=9)


def fits(rows: int, length: int, kept: int) -> bool:
    return rows * length <= ROOM and rows * kept <= ROOM // 2


@settings(max_examples=200, deadline=None)
@given(counts, st.integers(1, 12), st.booleans())
def test_every_token_is_read_once_and_its_logits_are_found(
    counts: list[int], keep: int, together: bool
) -> None:
    """Logits that say of which row's which token they are."""
    keep = min(keep, *counts)
    read = [[] for _ in counts]
    found = np.full((len(counts), keep, 2), -1)
    for call in plan_prompts(counts, keep, CHUNK, *([fits] if together else [])):
        rows, end = call.last - call.first, call.at + call.length
        if rows == 1:
            assert call.length <= CHUNK
        else:
            assert together and fits(rows, call.length, call.kept)
        assert 1 <= call.kept <= call.length
        given_logits = []
        for row in range(call.first, call.last):
            read[row] += range(call.at, min(end, counts[row]))
            given_logits += [(row, place) for place in range(end - call.kept, end)]
        for take in call.takes:
            where = found[take.row, take.to : take.to + take.length]
            where[...] = given_logits[take.source : take.source + take.length]
    assert read == [list(range(count)) for count in counts]
    for row, count in enumerate(counts):
        assert found[row].tolist() == [[row, place] for place in range(count - keep, count)]


def test_rows_share_a_call_as_long_as_it_fits() -> None:
    calls = list(plan_prompts([3, 5, 4, 9, 2, 2], 1, CHUNK, fits))
    assert [(c.first, c.last, c.at, c.length) for c in calls] == [
        (0, 3, 0, 5),
        (3, 4, 0, 8),
        (3, 4, 8, 1),
        (4, 6, 0, 2),
    ]
    assert [c.kept for c in calls] == [3, 1, 1, 1]
