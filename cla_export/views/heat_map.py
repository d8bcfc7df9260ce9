"""Heat maps of error over tolerance: outputs down, positions across, one map a case."""

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from cla_export.compare.cases import Case, make_cases
from cla_export.compare.report import ParityReport, TensorResult
from cla_export.views.markup import NOT_FINITE, Html, badge, join, number, ratio_of, tag, times

# Upper ends of the colour classes h1, h2, ... of error over tolerance; h0 is no error at all.
_ENDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0, 100.0, 1000.0, math.inf)


def share_of(result: TensorResult) -> float:
    return ratio_of(result.max_error, result.tolerance)


def worst_of(results: Iterable[TensorResult]) -> TensorResult | None:
    return max(results, key=share_of, default=None)


def label(result: TensorResult) -> str:
    if result.group is None:
        return result.output
    return f"group {result.group} {result.output.rpartition('.')[2]}"


def by_case(report: ParityReport) -> dict[str, list[TensorResult]]:
    cases: dict[str, list[TensorResult]] = {}
    for result in report.tensors:
        cases.setdefault(result.case, []).append(result)
    return cases


def heat(ratio: float) -> str:
    """Class of a colour; also told by words wherever it is used."""
    if not math.isfinite(ratio):
        return "hx"
    return f"h{bisect_left(_ENDS, ratio) + 1 if ratio > 0 else 0}"


@dataclass(frozen=True, slots=True)
class _Axis:
    """The positions that one output's profile runs over."""

    rows: tuple[tuple[int, int], ...]  # of each row: first position compared, how many
    stretches: int

    @classmethod
    def of(cls, result: TensorResult, case: Case | None) -> "_Axis":
        """Read from the case; one that does not fit is ignored: a stretch counts as a position."""
        stretches = len(result.profile)
        if case is None:
            return cls((), stretches)
        steps = int(case.feed["steps"])
        prompts, starts = case.feed["prompts"].tolist(), case.feed["logits_from"].tolist()
        if result.output != "logits":
            starts = [0] * len(prompts)
        counts = [prompt + steps - start for prompt, start in zip(prompts, starts, strict=True)]
        rows = tuple(zip(starts, counts, strict=True))
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


def heat_maps(report: ParityReport) -> str:
    cases = {case.name: case for case in make_cases(report.length, [0])}
    figures = [_heat_map(name, rs, cases.get(name)) for name, rs in by_case(report).items()]
    text = (
        "Each cell is the largest error in a stretch of positions, as a share of what is allowed "
        "for that output; above 1 is a breach. Hover over a cell for its value and place."
    )
    maps = tag("div", *figures, class_="maps")
    return join([tag("p", text), _legend(), maps]) if figures else ""


def _legend() -> Html:
    names = ["0", f"to {_ENDS[0]:g}"]
    names += [f"to {end:g}" for end in _ENDS[1:-1]]
    entries = [(f"h{i}", name) for i, name in enumerate([*names, f"over {_ENDS[-2]:g}"])]
    swatches = (
        tag("li", tag("svg", tag("rect", class_=heat, width=34, height=12)), name)
        for heat, name in [*entries, ("hx", NOT_FINITE)]
    )
    return tag("ol", *swatches, class_="legend", aria_label="Colours of error over tolerance")


def _heat_map(name: str, results: list[TensorResult], case: Case | None) -> Html:
    lines: list[str] = []
    axes = [_Axis.of(result, case) for result in results]
    for result, axis in zip(results, axes, strict=True):
        said = tag("span", times(share_of(result)), class_=None if result.passed else "bad")
        lines += [tag("span", label(result)), _strip(result, axis), said]
    longest = max(axes, key=lambda axis: axis.length)
    if len(longest.rows) == 1:
        ends = tag("i", tag("span", "0"), tag("span", f"{longest.length - 1}"))
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


def _strip(result: TensorResult, axis: _Axis) -> Html:
    edges = axis.edges() if result.profile else []
    cells = []
    for error, start, end in zip(result.profile, edges, edges[1:], strict=False):
        ratio = ratio_of(error, result.tolerance)
        said = f"{times(ratio)} of the tolerance (error {number(error)}): {axis.name(start, end)}"
        place = {"x": start, "width": end - start, "height": 1}
        cells.append(tag("rect", tag("title", said), class_=heat(ratio), **place))
    borders = accumulate(count for _, count in axis.rows[:-1])
    lines = (tag("line", x1=x, x2=x, y1=0, y2=1, class_="border") for x in borders)
    where = f"row {result.row}, position {result.position}"
    said = f"{label(result)}: at most {times(share_of(result))} of the tolerance, at {where}"
    view = {"viewBox": f"0 0 {max(axis.length, 1)} 1", "preserveAspectRatio": "none"}
    return tag("svg", *cells, *lines, role="img", aria_label=said, **view)
