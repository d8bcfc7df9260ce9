"""Two runs of bench beside each other: what has become slower."""

from dataclasses import dataclass

from cla_export.benchmark.results import Bench

NOISE = 0.10  # of a time: what two runs on a quiet machine may differ by
_LARGEST_NOISE = 0.5  # what a run's own spread may excuse
_SAME_MACHINE = ("processor", "cpus", "threads", "gpu", "driver")
_SAME_WORK = ("backend", "graph", "weight_bytes")


@dataclass(frozen=True, slots=True)
class Comparison:
    """A line for each finding: regressions fail, notes do not."""

    regressions: tuple[str, ...]
    notes: tuple[str, ...]


def compare(now: Bench, old: Bench, noise: float = NOISE) -> Comparison:
    """What is slower than it was, or not measured any more.

    A row may take longer by `noise`, a share of its time, or by the spread of either run's own
    times if that is more, up to a half. Another machine, graph or model is a note.
    """
    regressions = []
    rows = {(row.phase, row.batch, row.context): row for row in now.rows}
    for before in old.rows:
        after = rows.get((before.phase, before.batch, before.context))
        if after is None:
            regressions.append(f"{before.name}: {before.ms_per_step:.2f} ms then, not measured now")
            continue
        allowed = max(noise, min(max(before.spread, after.spread), _LARGEST_NOISE))
        slower = after.ms_per_step / before.ms_per_step - 1
        if slower > allowed:
            regressions.append(
                f"{after.name}: {after.ms_per_step:.2f} ms, {before.ms_per_step:.2f} ms then: "
                f"{slower:.0%} slower, and {allowed:.0%} is noise"
            )
    return Comparison(
        tuple(regressions),
        tuple(
            f"{what} is {is_!r} now and was {was!r} then"
            for what, is_, was in (
                *((key, now.machine.get(key), old.machine.get(key)) for key in _SAME_MACHINE),
                *((key, getattr(now, key), getattr(old, key)) for key in _SAME_WORK),
            )
            if is_ != was
        ),
    )
