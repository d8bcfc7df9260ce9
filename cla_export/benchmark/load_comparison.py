"""Two loads beside each other: what has become worse."""

from cla_export.benchmark.comparison import Comparison
from cla_export.benchmark.load import LoadBench, flat

NOISE = 0.2  # by which a figure may be worse: a server's vary more than a step's
_RATES = ("output_token_throughput", "goodput")
_TIMES = tuple(
    f"{name}_{part}"
    for name in ("time_to_first_token", "inter_token_latency", "request_latency")
    for part in ("p50", "p95")
)


def compare_loads(now: LoadBench, old: LoadBench, noise: float = NOISE) -> Comparison:
    """What is worse than it was, or not measured any more.

    Of each level: tokens and good requests a second may be less, and medians and 95th percentiles
    of times more, by `noise`, a share of what was. Another model or load is a note.
    """
    regressions = []
    levels = {level.concurrency: level for level in now.levels}
    for before in old.levels:
        streams = f"{before.concurrency} streams"
        after = levels.get(before.concurrency)
        if after is None:
            regressions.append(f"{streams}: not measured now")
            continue
        is_, was = flat(after), flat(before)
        worse = [name for name in _RATES if is_[name] < was[name] * (1 - noise)]
        worse += [name for name in _TIMES if is_[name] > was[name] * (1 + noise)]
        regressions += [
            f"{streams}: {name} is {is_[name]:,.2f} now and was {was[name]:,.2f} then"
            for name in worse
        ]
    same = (("model", now.model, old.model), ("load", now.work, old.work))
    notes = [f"{what} is {is_} now and was {was} then" for what, is_, was in same if is_ != was]
    return Comparison(tuple(regressions), tuple(notes))
