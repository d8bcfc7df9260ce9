"""Host memory that copies to a GPU go through: no part is given twice before they are over."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cla_export.engines.cuda_memory import _LEAST_STAGED, Staging


class Copies:
    """What a stream has not done yet: parts, and what must be in them until it has."""

    def __init__(self) -> None:
        self.queued: list[tuple[np.ndarray, int]] = []
        self.pinned: list[int] = []
        self.waited = 0

    def pin(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        assert not self.queued, "memory that copies use is given up"
        self.pinned.append(size)
        made = np.zeros(size, np.uint8)
        return made, made

    def wait(self) -> None:
        for part, number in self.queued:
            assert (part == number).all(), "a part was given again before it was copied"
        self.queued.clear()
        self.waited += 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, _LEAST_STAGED), st.booleans()), max_size=30))
def test_parts_hold_what_was_put_in_until_it_is_copied(sizes: list[tuple[int, bool]]) -> None:
    copies = Copies()
    staging = Staging(copies.pin, copies.wait)
    for number, (size, back) in enumerate(sizes):
        part = staging.part(size)
        assert len(part) == size
        part[:] = number
        copies.queued.append((part, number))
        if back:  # a copy to the host, which is read once it is there
            staging.wait()
            assert (part == number).all()
    copies.wait()


def test_many_small_copies_wait_for_nothing_and_a_large_one_makes_room() -> None:
    copies = Copies()
    staging = Staging(copies.pin, copies.wait)
    staging.part(1)
    waited = copies.waited
    for _ in range(100):
        staging.part(1000)
    assert copies.waited == waited
    assert len(staging.part(3 * _LEAST_STAGED)) == 3 * _LEAST_STAGED
    assert copies.waited == waited + 1
    assert copies.pinned == [_LEAST_STAGED, 3 * _LEAST_STAGED]
