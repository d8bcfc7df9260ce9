"""Heat maps of error over tolerance: outputs down, positions across, one map a case."""

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from cla_export.compare.report import CaseShape, ParityReport, TensorResult
from cla_export.views.markup import NOT_FINITE, Html, badge, join, number, ratio_of, tag, times

# Upper ends of the colour classes h1, h2, ... of error over tolerance; h0 is no error at all.
_ENDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0, 100.0, 1000.0, math.inf)


def worst_of(results: Iterable[TensorResult]) -> TensorResult | None:
    """The one that takes most of what is allowed; not finite is most of all."""
    return max(results, key=lambda r: r.share if math.isfinite(r.share) else math.inf, default=None)


def label(result: TensorResult) -> str:
    if result.group is None:
        return result.output
    return f"group {result.group} {result.output.rpartition('.')[2]}"


def by_case(report: ParityReport) -> dict[str, list[TensorResult]]:
    results: dict[str, list[TensorResult]] = {}
    for result in report.tensors:
        results.setdefault(result.case, []).append(result)
    return results


def cases_of(report: ParityReport) -> dict[str, CaseShape]:
    return {case.name: case for case in report.cases}


def heat(ratio: float) -> str:
    """Class of a colour; also told by words wherever it is used."""
    if not math.isfinite(ratio):
        return "hx"
    return f"h{bisect_left(_ENDS, ratio) + 1 if ratio > 0 else 0}"


def legend() -> Html:
    """What the colours stand for."""
    names = ["0", f"to {_ENDS[0]:g}"]
    names += [f"to {end:g}" for end in _ENDS[1:-1]]
    entries = [(f"h{i}", name) for i, name in enumerate([*names, f"over {_ENDS[-2]:g}"])]
    swatches = (
        tag("li", tag("svg", tag("rect", class_=heat, width=34, height=12)), name)
        for heat, name in [*entries, ("hx", NOT_FINITE)]
    )
    return tag("ol", *swatches, class_="legend", aria_label="Colours of error over tolerance")


@dataclass(frozen=True, slots=True)
class _Axis:
    """The positions that one output's profile runs over."""

    rows: tuple[tuple[int, int], ...]  # of each row: first position compared, how many
    stretches: int

    @classmethod
    def of(cls, result: TensorResult, case: CaseShape | None) -> "_Axis":
        """Read from the case; one that does not fit is ignored: a stretch counts as a position."""
        stretches = len(result.profile)
        if case is None:
            return cls((), stretches)
        skipped = case.logits_from if result.output == "logits" else [0] * len(case.tokens)
        counts = [tokens - first for tokens, first in zip(case.tokens, skipped, strict=True)]
        firsts = [start + first for start, first in zip(case.starts, skipped, strict=True)]
        rows = tuple(zip(firsts, counts, strict=True))
        return cls(rows if stretches <= sum(counts) else (), stretches)

    @property
    def length(self) -> int:
        return sum(count for _, count in self.rows) if self.rows else self.stretches

    def edges(self) -> list[int]:
        """Where stretches begin and end, as numpy.array_split cuts them."""
        size, longer = divmod(self.length, self.stretches)
        sizes = [size + (index < longer) for index in range(self.stretches)]
        return [0, *accumulate(sizes)]

    def name(self, start: int, end: int) -> str:
        if not self.rows:
            return f"stretch {start + 1} of {self.stretches}"
        (row, first), (last_row, last) = self._place(start), self._place(end - 1)
        if row != last_row:
            return f"row {row}, position {first} to row {last_row}, position {last}"
        return f"row {row}, position {first}" + (f" to {last}" if last > first else "")

    def _place(self, index: int) -> tuple[int, int]:
        for row, (first, count) in enumerate(self.rows):
            if index < count:
                return row, first + index
            index -= count
        raise AssertionError(index)


def heat_maps(report: ParityReport, cases: dict[str, CaseShape]) -> str:
    figures = [_heat_map(name, rs, cases.get(name)) for name, rs in by_case(report).items()]
    text = (
        "Each cell is the largest error in a stretch of positions, as a share of what is allowed "
        "for that output; above 1 is a breach. The figure behind a line is the whole output's, by "
        "its largest or its mean error, whichever takes more. Hover over a cell for its value and "
        "place."
    )
    maps = tag("div", *figures, class_="maps")
    return join([tag("p", text), legend(), maps]) if figures else ""


def _heat_map(name: str, results: list[TensorResult], case: CaseShape | None) -> Html:
    lines: list[str] = []
    axes = [_Axis.of(result, case) for result in results]
    longest = max(axes, key=lambda axis: axis.length)
    for result, axis in zip(results, axes, strict=True):
        said = tag("span", times(result.share), class_=None if result.passed else "bad")
        lines += [tag("span", label(result)), _strip(result, axis, longest), said]
    if len(longest.rows) == 1:
        ((first, count),) = longest.rows
        ends = tag("i", tag("span", f"{first}"), tag("span", f"{first + count - 1}"))
        lines += [tag("span", "position"), tag("div", ends, class_="rows")]
    elif longest.rows:
        marks = (
            tag("i", f"{row}", style=f"flex-grow:{count}", title=f"row {row}: {count} positions")
            for row, (_, count) in enumerate(longest.rows)
        )
        lines += [tag("span", "row"), tag("div", *marks, class_="rows")]
    about = "" if case is None else f" {case.about}."
    for result, axis in zip(results, axes, strict=True):
        if axis.length < longest.length:
            about += f" {label(result)}: {axis.length} positions compared."
    verdict = badge(all(result.passed for result in results))
    caption = tag("figcaption", verdict, " ", tag("strong", name), tag("span", about))
    return tag("figure", caption, tag("div", *lines, class_="map"))


def _strip(result: TensorResult, axis: _Axis, longest: _Axis) -> Html:
    """One line of cells; of a single row, drawn where its positions are on the longest axis."""
    shift, width = 0, max(axis.length, 1)
    if len(axis.rows) == len(longest.rows) == 1:
        shift, width = axis.rows[0][0] - longest.rows[0][0], longest.length
    edges = axis.edges() if result.profile else []
    cells = []
    for error, start, end in zip(result.profile, edges, edges[1:], strict=False):
        ratio = ratio_of(error, result.tolerance)
        said = f"{times(ratio)} of the tolerance (error {number(error)}): {axis.name(start, end)}"
        place = {"x": shift + start, "width": end - start, "height": 1}
        cells.append(tag("rect", tag("title", said), class_=heat(ratio), **place))
    borders = accumulate(count for _, count in axis.rows[:-1])
    lines = (tag("line", x1=x, x2=x, y1=0, y2=1, class_="border") for x in borders)
    where = f"row {result.row}, position {result.position}"
    said = f"{label(result)}: {times(result.share)} of the tolerance; largest error at {where}"
    view = {"viewBox": f"0 0 {width} 1", "preserveAspectRatio": "none"}
    return tag("svg", *cells, *lines, role="img", aria_label=said, **view)
