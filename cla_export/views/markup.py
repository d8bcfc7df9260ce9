"""HTML by element: everything is escaped unless it is markup already."""

import math
from collections.abc import Iterable
from html import escape

NOT_FINITE = "not finite"


class Html(str):
    """Markup: escaped where it had to be."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: object) -> Html:
    """An element; `class_` stands for `class`, and an attribute that is None is left out."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{said}>{join(children)}</{name}>")


def join(parts: Iterable[str]) -> Html:
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def number(value: float, form: str = ".2e") -> str:
    return f"{value:{form}}" if math.isfinite(value) else NOT_FINITE


def ratio_of(error: float, tolerance: float) -> float:
    if tolerance > 0:
        return error / tolerance
    return math.inf if error else 0.0


def times(ratio: float) -> str:
    if 0.001 <= ratio < 1e6:
        return f"{ratio:.3f}" if ratio < 10 else f"{ratio:,.0f}"
    return number(ratio, ".1e") if ratio else "0"


def badge(passed: bool) -> Html:
    return tag("b", "✓ pass" if passed else "✗ FAIL", class_="ok" if passed else "bad")


def table(about: str, titles: str, *bodies: Iterable[Html]) -> Html:
    """A table that scrolls sideways on its own. Titles: `name, number#, ...`."""
    names = titles.split(", ")
    classes = [f"n{i}" for i, name in enumerate(names, 1) if name.endswith("#")]
    head = tag("tr", *(tag("th", name.rstrip("#"), scope="col") for name in names))
    parts = (tag("tbody", *rows) for rows in bodies)
    table = tag("table", tag("thead", head), *parts, class_=" ".join(classes))
    return tag("div", table, class_="scroll", role="region", aria_label=about, tabindex=0)


def row(first: str, *cells: str, class_: str | None = None) -> Html:
    head = tag("th", first, scope="row")
    return tag("tr", head, *(tag("td", cell) for cell in cells), class_=class_)


def judged(passed: bool, first: str, *cells: str) -> Html:
    """A row that ends in its verdict."""
    return row(first, *cells, badge(passed), class_=None if passed else "breach")


def facts(facts: dict[str, str]) -> Html:
    pairs = (tag("div", tag("dt", name), tag("dd", fact)) for name, fact in facts.items())
    return tag("dl", *pairs)


def svg(said: str, width: float, height: float, parts: Iterable[str]) -> Html:
    return tag("svg", *parts, role="img", aria_label=said, width=width, height=height)
