"""A right graph in a wrong executor: lengths, slots, padding, stale state."""

from typing import Any

import numpy as np
from subject import ANYWHERE, OUTSIDE, Place, Subject, mutant

from cla_export.engines.onnxruntime import OnnxRuntimeExecutor

# Lengths


@mutant()
def lengths_of_the_first_row_for_all(s: Subject) -> Place:
    """A scalar length where rows have their own: right while they are equal."""

    class Wrong(OnnxRuntimeExecutor):
        def _lengths(self, starts, counts, length):
            return super()._lengths(np.full_like(starts, starts[0]), counts, length)

    s.engine = Wrong
    return ANYWHERE


@mutant()
def lengths_of_the_longest_row_for_all(s: Subject) -> Place:
    """Rows are padded to the longest, and all take its length."""

    class Wrong(OnnxRuntimeExecutor):
        def _lengths(self, starts, counts, length):
            return super()._lengths(np.full_like(starts, starts.max()), counts, length)

    s.engine = Wrong
    return ANYWHERE


@mutant()
def one_rows_length_short(s: Subject) -> Place:
    """The last row of a batch is one token behind."""

    class Wrong(OnnxRuntimeExecutor):
        def _lengths(self, starts, counts, length):
            last = np.arange(len(starts)) == max(len(starts) - 1, 1)
            return super()._lengths(np.maximum(starts - last, 0), counts, length)

    s.engine = Wrong
    return ANYWHERE


@mutant()
def lengths_sorted(s: Subject) -> Place:
    """Rows are batched by length and their lengths are not put back in order."""

    class Wrong(OnnxRuntimeExecutor):
        def _lengths(self, starts, counts, length):
            return super()._lengths(np.sort(starts), counts, length)

    s.engine = Wrong
    return ANYWHERE


@mutant()
def length_short_after_the_first_chunk(s: Subject) -> Place:
    """A later chunk overwrites the last token of the one before."""

    class Wrong(OnnxRuntimeExecutor):
        def _lengths(self, starts, counts, length):
            earlier = np.maximum(starts - (length > 1), 0)
            return super()._lengths(earlier, counts, length)

    s.engine = Wrong
    return ANYWHERE


@mutant()
def every_chunk_starts_a_sequence(s: Subject) -> Place:
    """Chunks of a prompt do not see the ones before."""

    class Wrong(OnnxRuntimeExecutor):
        def _lengths(self, starts, counts, length):
            return super()._lengths(starts if length == 1 else 0 * starts, counts, length)

    s.engine = Wrong
    return ANYWHERE


@mutant()
def length_short_in_decode(s: Subject) -> Place:
    """A single token overwrites the last one."""

    class Wrong(OnnxRuntimeExecutor):
        def _lengths(self, starts, counts, length):
            earlier = np.maximum(starts - (length == 1), 0)
            return super()._lengths(earlier, counts, length)

    s.engine = Wrong
    return ANYWHERE


@mutant()
def length_long_in_decode(s: Subject) -> Place:
    """A place is left free between prompt and generation, and read."""

    class Wrong(OnnxRuntimeExecutor):
        def _lengths(self, starts, counts, length):
            later = np.minimum(starts + (length == 1), self.capacity - length)
            return super()._lengths(later, counts, length)

    s.engine = Wrong
    return ANYWHERE


@mutant()
def length_in_seven_bits(s: Subject) -> Place:
    """Lengths are kept as int8 and wrap at 128."""

    class Wrong(OnnxRuntimeExecutor):
        def _lengths(self, starts, counts, length):
            return super()._lengths(starts % 128, counts, length)

    s.engine = Wrong
    return ANYWHERE


# Padding


@mutant()
def padding_mask_dropped(s: Subject) -> Place:
    """Padding counts as tokens."""

    class Wrong(OnnxRuntimeExecutor):
        def _lengths(self, starts, counts, length):
            return super()._lengths(starts, np.full_like(counts, length), length)

    s.engine = Wrong
    return ANYWHERE


@mutant()
def padding_on_the_left(s: Subject) -> Place:
    """Short rows are padded in front, as for libraries that expect it."""

    class Wrong(OnnxRuntimeExecutor):
        def _run_with(self, first, input_ids, starts, counts, keep, more):
            length = input_ids.shape[1]
            shifted = [
                np.roll(row, length - count) for row, count in zip(input_ids, counts, strict=True)
            ]
            return super()._run_with(first, np.stack(shifted), starts, counts, keep, more)

    s.engine = Wrong
    return ANYWHERE


@mutant()
def mask_made_from_the_pad_id(s: Subject) -> Place:
    """attention_mask is `input_ids != pad_token_id`; a prompt may hold that id."""

    class Wrong(OnnxRuntimeExecutor):
        def _run_with(self, first, input_ids, starts, counts, keep, more):
            valid = np.arange(input_ids.shape[1]) < counts[:, None]
            seen = ((input_ids != 0) & valid).sum(1)
            return super()._run_with(first, input_ids, starts, np.maximum(seen, 1), keep, more)

    s.engine = Wrong
    return ANYWHERE


@mutant()
def first_token_replaced_by_bos(s: Subject) -> Place:
    """The runtime insists on a BOS token in front."""

    class Wrong(OnnxRuntimeExecutor):
        def _run_with(self, first, input_ids, starts, counts, keep, more):
            ids = input_ids.copy()
            ids[starts == 0, 0] = 1
            return super()._run_with(first, ids, starts, counts, keep, more)

    s.engine = Wrong
    return ANYWHERE


# Slots


@mutant()
def slot_not_reset(s: Subject) -> Place:
    """A new prompt is appended to what its slot held before."""

    class Wrong(OnnxRuntimeExecutor):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._held = np.zeros(self.slots, np.int64)

        def _run_with(self, first, input_ids, starts, counts, keep, more):
            rows, length = input_ids.shape
            held = self._held[first : first + rows]
            fits = (starts == 0) & (held + length <= self.capacity) & (rows == 1)
            starts = np.where(fits, held, starts)
            self._held[first : first + rows] = starts + counts
            return super()._run_with(first, input_ids, starts, counts, keep, more)

    s.engine = Wrong
    return ANYWHERE


@mutant()
def reused_prefix_appended_to(s: Subject) -> Place:
    """A request that reuses a prefix goes on behind all that its slot holds, not behind that."""

    class Wrong(OnnxRuntimeExecutor):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._held = np.zeros(self.slots, np.int64)

        def _run_with(self, first, input_ids, starts, counts, keep, more):
            rows, length = input_ids.shape
            held = self._held[first : first + rows]
            late = (starts > 0) & (starts < held) & (held + length <= self.capacity) & (rows == 1)
            starts = np.where(late, held, starts)
            self._held[first : first + rows] = starts + counts
            return super()._run_with(first, input_ids, starts, counts, keep, more)

    s.engine = Wrong
    return ANYWHERE


@mutant()
def reused_prefix_one_short(s: Subject) -> Place:
    """A request that reuses a prefix overwrites the last token of it."""

    class Wrong(OnnxRuntimeExecutor):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._held = np.zeros(self.slots, np.int64)

        def _run_with(self, first, input_ids, starts, counts, keep, more):
            rows = len(starts)
            reuses = (starts > 0) & (starts < self._held[first : first + rows])
            self._held[first : first + rows] = starts + counts
            return super()._run_with(first, input_ids, starts - reuses, counts, keep, more)

    s.engine = Wrong
    return ANYWHERE


def _shifted_views(s: Subject, group: int, shift) -> None:
    """Bind one group's caches to the slots from shift(first, rows) on."""

    class Wrong(OnnxRuntimeExecutor):
        def _views_of(self, first, rows):
            right = super()._views_of(first, rows)
            other = super()._views_of(shift(self, first, rows), rows)
            return [
                (name, wrong if name.startswith(f"{group}.") else view)
                for (name, view), (_, wrong) in zip(right, other, strict=True)
            ]

    s.engine = Wrong


@mutant()
def cache_bound_to_the_neighbouring_slot(s: Subject) -> Place:
    """One group's pool is addressed one slot on."""
    _shifted_views(s, s.shared.index, lambda e, first, rows: min(first + 1, e.slots - rows))
    return Place((s.shared.index,))


@mutant()
def first_slot_ignored_in_batches(s: Subject) -> Place:
    """Several rows are always bound from slot 0 on."""
    _shifted_views(s, s.shared.index, lambda _, first, rows: first if rows == 1 else 0)
    return Place((s.shared.index,))


@mutant()
def views_remembered_by_row_count_alone(s: Subject) -> Place:
    """Bindings are reused for any slots, as many as they were made for."""
    made: dict[int, int] = {}
    _shifted_views(s, s.shared.index, lambda _, first, rows: made.setdefault(rows, first))
    return Place((s.shared.index,))


def _after_run(s: Subject, spoil) -> Place:
    """Spoil the shared group's pools [slots, Hkv, C, D] after every call."""
    group = s.shared.index

    class Wrong(OnnxRuntimeExecutor):
        def _run_with(self, first, input_ids, starts, counts, keep, more):
            before = [pool.copy() for pool in self.cache(group)]
            result = super()._run_with(first, input_ids, starts, counts, keep, more)
            for pool, old in zip(self.cache(group), before, strict=True):
                spoil(pool, old, first, starts, counts)
            return result

    s.engine = Wrong
    return Place((group,))


@mutant()
def last_token_of_a_chunk_not_written(s: Subject) -> Place:
    """The loop that copies a chunk into the cache stops one early."""

    def spoil(pool, old, first, starts, counts) -> None:
        if counts.max() > 1:
            for row, end in enumerate(starts + counts - 1):
                pool[first + row, :, end] = old[first + row, :, end]

    return _after_run(s, spoil)


@mutant()
def cache_written_one_slot_off(s: Subject) -> Place:
    """New tokens land one place later than they are read."""

    def spoil(pool, old, first, starts, counts) -> None:
        for row, (start, end) in enumerate(zip(starts, starts + counts, strict=True)):
            new = pool[first + row, :, start:end].copy()
            pool[first + row, :, start] = old[first + row, :, start]
            room = pool.shape[2] - start - 1
            pool[first + row, :, start + 1 : end + 1] = new[:, :room]

    return _after_run(s, spoil)


@mutant()
def write_runs_into_the_next_slot(s: Subject) -> Place:
    """A write goes on past the end of its slot, into the first place of the next one."""

    def spoil(pool, old, first, starts, counts) -> None:
        after = first + len(starts)
        if after < len(pool):
            pool[after, :, 0] = 0

    return _after_run(s, spoil)


@mutant()
def write_runs_into_the_slot_before(s: Subject) -> Place:
    """A write begins one place early, in the last valid place of the slot before."""

    def spoil(pool, old, first, starts, counts) -> None:
        if first:
            pool[first - 1, :, 0] = 0

    return _after_run(s, spoil)


@mutant()
def last_place_of_a_slot_lost(s: Subject) -> Place:
    """The capacity is off by one: the last place is never written."""

    def spoil(pool, old, first, starts, counts) -> None:
        pool[:, :, -1] = old[:, :, -1]

    return _after_run(s, spoil)


@mutant()
def first_token_evicted_in_decode(s: Subject) -> Place:
    """A rolling cache drops its oldest token though there is room."""

    def spoil(pool, old, first, starts, counts) -> None:
        if counts.max() == 1 and starts.max() > 100:
            pool[first, :, 0] = 0

    return _after_run(s, spoil)


@mutant()
def batch_rows_written_to_each_others_slots(s: Subject) -> Place:
    """In a batched call two rows' caches change places."""

    def spoil(pool, old, first, starts, counts) -> None:
        if len(starts) > 1:
            pool[[first, first + 1]] = pool[[first + 1, first]]

    return _after_run(s, spoil)


# Results


@mutant()
def logits_of_rows_in_another_order(s: Subject) -> Place:
    """A batch's rows are returned in the order they were sorted in."""

    class Wrong(OnnxRuntimeExecutor):
        def _run_with(self, first, input_ids, starts, counts, keep, more):
            logits, others = super()._run_with(first, input_ids, starts, counts, keep, more)
            return logits[::-1], others

    s.engine = Wrong
    return OUTSIDE


@mutant()
def logits_of_the_call_before(s: Subject) -> Place:
    """An output buffer is read before the run that fills it has ended."""

    class Wrong(OnnxRuntimeExecutor):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._last: dict[tuple[int, ...], np.ndarray] = {}

        def _run_with(self, first, input_ids, starts, counts, keep, more):
            logits, others = super()._run_with(first, input_ids, starts, counts, keep, more)
            stale = self._last.get(logits.shape, logits)
            self._last[logits.shape] = logits.copy()
            return stale, others

    s.engine = Wrong
    return OUTSIDE
