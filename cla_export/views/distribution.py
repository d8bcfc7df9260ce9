"""The distribution of error over tolerance: how much room is left, at a glance."""

import math
from collections import Counter

from cla_export.compare.report import ParityReport, TensorResult
from cla_export.views.heat_map import label, worst_of
from cla_export.views.markup import Html, join, ratio_of, tag, times

_BINS = 6  # a decade
_LOWEST, _HIGHEST = -3, 6  # decades, as powers of ten; what lies outside counts at the ends


def distributions(report: ParityReport) -> str:
    """A histogram each of keys, values and logits over one axis, with the limit drawn."""
    kinds: dict[str, list[TensorResult]] = {"keys": [], "values": [], "logits": []}
    for result in report.tensors:
        kinds["logits" if result.group is None else f"{label(result).split()[-1]}s"].append(result)
    shares = [
        share for results in kinds.values() for r in results for share in (r.share, *_ratios(r))
    ]
    if not shares:
        return ""
    most = max((share for share in shares if math.isfinite(share)), default=0.0)
    top = min(max(1, math.ceil(math.log10(most or 1))), _HIGHEST)
    lines: list[str] = []
    for kind, results in kinds.items():
        if (worst := worst_of(results)) is None:
            continue
        count = tag("small", f"{len(results)} outputs")
        lines += [tag("span", kind, count), _histogram(kind, results, top), _room(worst)]
    decades = [
        tag("i", f"{10.0**power:,g}", style=f"flex-grow:{_BINS}", class_=None if power else "bad")
        for power in range(_LOWEST, top)
    ]
    below = tag("i", style="flex-grow:1", title="less")
    beyond = tag("i", f"{10**top:,}", style="flex-grow:1", title="more, or not finite")
    axis = tag("div", below, *decades, beyond, class_="rows")
    lines += [tag("span", "share of tolerance"), axis]
    text = (
        "How much of what is allowed the errors take; the red line, at 1, is the limit. Bars count "
        "stretches of positions by their largest error. Each tick below them is a whole output of "
        "one case, by its largest or its mean error, whichever takes more."
    )
    return join([tag("p", text), tag("div", *lines, class_="map spread")])


def _ratios(result: TensorResult) -> list[float]:
    return [ratio_of(error, result.tolerance) for error in result.profile]


def _place(share: float, top: int) -> float:
    """Where on the axis: up to 1 for what is below it, and one behind the last bin for beyond."""
    end = _BINS * (top - _LOWEST)
    if share <= 10.0**_LOWEST:
        return 0.5
    if not math.isfinite(share) or share > 10.0**top:
        return end + 1.5
    return 1 + (math.log10(share) - _LOWEST) * _BINS


def _histogram(kind: str, results: list[TensorResult], top: int) -> Html:
    end, limit = _BINS * (top - _LOWEST), 1 - _LOWEST * _BINS
    bins = Counter(
        math.ceil(_place(share, top) - 1e-9) - 1 for result in results for share in _ratios(result)
    )
    highest = max(bins.values(), default=1)
    parts = []
    for at, count in sorted(bins.items()):
        low, high = (f"{10.0 ** ((i - 1) / _BINS + _LOWEST):.2g}" for i in (at, at + 1))
        span = f"at most {high}" if at < 1 else f"{low} to {high}"
        said = f"{count:,} stretches: {f'over {low}, or not finite' if at > end else span}"
        height = max(count / highest * 30, 1)
        look = {"class_": "beyond" if at >= limit else "within"}
        box = {"x": at, "y": round(32 - height, 2), "width": 1, "height": round(height, 2)}
        parts.append(tag("rect", tag("title", said), **look, **box))
    for result in results:
        x = round(_place(result.share, top), 3)
        title = tag("title", f"{times(result.share)}: case {result.case}, {label(result)}")
        look = {"class_": "tick" if result.passed else "tick bad"}
        parts.append(tag("line", title, x1=x, x2=x, y1=34, y2=42, **look))
    parts.append(tag("line", x1=limit, x2=limit, y1=0, y2=44, class_="limit"))
    view = {"viewBox": f"0 0 {end + 2} 44", "preserveAspectRatio": "none"}
    beyond = sum(not result.passed for result in results)
    said = f"{kind}: {len(results)} outputs, {beyond} of them beyond their tolerance"
    return tag("svg", *parts, role="img", aria_label=said, **view)


def _room(worst: TensorResult) -> Html:
    """How far the worst output is from its limit, in words."""
    share = worst.share
    if worst.passed:
        room = f"{1 / share:.1f} times as much is allowed" if share else "exact"
        return tag("span", f"at most {times(share)}", tag("small", room))
    return tag("span", f"✗ {times(share)}", tag("small", "times what is allowed"), class_="bad")
