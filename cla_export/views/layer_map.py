"""What is drawn by layer: the KV layout, and error by layer and call of the graph."""

import re
from itertools import groupby

from cla_export.compare.report import ROLES, CaseShape, LayerErrors, LayerMap, ParityReport
from cla_export.layout import Group, KVLayout
from cla_export.views.heat_map import heat, legend, worst_of
from cla_export.views.markup import Html, join, row, svg, table, tag, times

_TICKS = 12  # numbers of calls on the axis, at most
_DENSE = 32  # layers, from which lines are drawn thinner


# KV layout


def kv_layout(report: ParityReport, layout: KVLayout) -> Html:
    """A table of the groups, each with its layers drawn, and its worst cache."""
    marked = report.divergence.layer if report.divergence is not None else None
    cell = next((c for most, c in ((16, 30), (32, 20), (64, 13)) if layout.num_layers <= most), 9)
    rows = []
    for group in layout.groups:
        worst = worst_of(result for result in report.tensors if result.group == group.index)
        rows.append(
            row(
                f"{group.index}",
                _group_map(group, layout.num_layers, cell, marked),
                f"{group.owner}",
                ", ".join(map(str, group.sharers)) or "none",
                "full" if group.window is None else f"{group.window:,} tokens",
                f"{group.kv_heads} x {group.head_dim}",
                times(worst.share) if worst else "",
                class_="here" if marked in group.layers else None,
            )
        )
    titles = (
        "group#, layers, owner#, sharers, window, kv heads x dim#, worst cache error / tolerance#"
    )
    head = row("", _layer_axis(layout.num_layers, cell, marked), *[""] * 5, class_="axis")
    drawn = table("KV layout", titles, [head, *rows])
    key = "● owner, writes the group's cache; ○ sharer, reads it."
    if marked is not None:
        key += f" Layer {marked}, marked, is where the first value differs."
    return join([tag("p", layout.describe(), ". ", key), drawn])


def _group_map(group: Group, layers: int, cell: int, marked: int | None) -> Html:
    """One line of the map: a place for each layer."""

    def middle(layer: int) -> float:
        return (layer + 0.5) * cell

    size, radius = 24, min(cell * 0.32, 8)
    parts = [_column(marked, cell, size)] if marked is not None else []
    y = size / 2
    parts += [
        tag("circle", cx=middle(i), cy=y, r=1, class_="other")
        for i in range(layers)
        if i not in group.layers
    ]
    if group.sharers:
        ends = {"x1": middle(group.owner), "x2": middle(group.layers[-1])}
        parts.append(tag("line", **ends, y1=y, y2=y, class_="link"))
    for layer in group.layers:
        role = "owner" if layer == group.owner else "sharer"
        title = tag("title", f"layer {layer}: {role} of group {group.index}")
        look = role + (" hit" if layer == marked else "")
        parts.append(tag("circle", title, cx=middle(layer), cy=y, r=radius, class_=look))
    said = f"group {group.index}: owner layer {group.owner}"
    if group.sharers:
        said += f", sharers {', '.join(map(str, group.sharers))}"
    if marked in group.layers:
        said += f"; first divergence in layer {marked}"
    return svg(said, layers * cell, size, parts)


def _layer_axis(layers: int, cell: int, marked: int | None) -> Html:
    every = 1 if cell >= 20 else 5
    parts = [_column(marked, cell, 16)] if marked is not None else []
    parts += [
        tag("text", str(i), x=(i + 0.5) * cell, y=12, class_="hit" if i == marked else None)
        for i in range(layers)
        if i == marked or (i % every == 0 and (every == 1 or abs(i - (marked or i)) != 1))
    ]
    return svg(f"layers 0 to {layers - 1}", layers * cell, 16, parts)


def _column(layer: int, cell: int, height: int) -> Html:
    return tag("rect", x=layer * cell, y=0, width=cell, height=height, class_="column")


# Error by layer and call


def layer_map(report: ParityReport, layout: KVLayout, case: CaseShape | None) -> str:
    """Layers down, calls across; the first divergence's cell is outlined."""
    shown, first = report.layer_map, report.divergence
    if shown is None or not shown.layers or not shown.calls:
        return ""
    here = (first.layer, first.call) if first is not None and first.case == shown.case else None
    text = join(
        [
            "Case ",
            tag("strong", shown.case),
            "" if case is None else f" ({case.about})",
            ", run again. PyTorch computes every step of a layer from what the bundle had before "
            "it, so a cell shows what goes wrong there, not what earlier layers hand on: of one "
            "layer in one call of the graph, the worst step's error as a share of what is allowed "
            "for it; above 1 is a breach. ● owner, ○ sharer. Hover over a cell for the step and "
            "the call.",
            ""
            if here is None
            else f" Outlined, layer {here[0]} in call {here[1]}: the first value that differs.",
        ]
    )
    lines: list[str] = [
        part for errors in shown.layers for part in _line(errors, shown, layout, here)
    ]
    count = len(shown.calls)
    every = next((n for n in (1, 5, 10, 20, 50) if count <= n * _TICKS), 100)
    spans = ((start, min(every, count - start)) for start in range(0, count, every))
    ticks = (
        tag("i", f"{start}" if 2 * span >= every else "", style=f"flex-grow:{span}")
        for start, span in spans
    )
    lines += [tag("span", "call"), tag("div", *ticks, class_="rows")]
    look = "map layers dense" if len(shown.layers) > _DENSE else "map layers"
    drawn = tag("div", *lines, class_=look, style=f"max-width:{400 + 36 * count}px")
    return join([tag("p", text), legend(), drawn, _calls(shown.calls)])


def _line(
    errors: LayerErrors, shown: LayerMap, layout: KVLayout, here: tuple[int, int] | None
) -> list[Html]:
    """A layer's name, its cells, its worst share and which step that is of."""
    layer, group = errors.layer, layout.group_of(errors.layer)
    role, sign = ("owner", "●") if layout.is_owner(layer) else ("sharer", "○")
    found = here is not None and here[0] == layer
    cells, outline = [], []
    for call, (share, name) in enumerate(zip(errors.shares, errors.roles, strict=True)):
        said = (
            f"layer {layer}, {role} of group {group}: {ROLES.get(name, name)} takes {times(share)} "
            f"of the tolerance in call {call}, {shown.calls[call]}"
        )
        if here == (layer, call):
            said += "; the first value that differs is here"
            place = {"x": call, "width": 1, "height": 1}
            outline = [tag("rect", **place, class_=look) for look in ("first", "first inner")]
        cells.append(tag("rect", tag("title", said), class_=heat(share), x=call, width=1, height=1))
    worst = max(range(len(cells)), key=lambda call: errors.shares[call])
    share, name = errors.shares[worst], ROLES.get(errors.roles[worst], errors.roles[worst])
    said = f"layer {layer}, {role} of group {group}: at most {times(share)}, {name}, call {worst}"
    view = {"viewBox": f"0 0 {len(cells)} 1", "preserveAspectRatio": "none"}
    label = tag("span", f"group {group} {sign} {layer}", class_="hit" if found else None)
    drawn = tag("svg", *cells, *outline, role="img", aria_label=said, **view)
    figure = tag("span", times(share), class_=None if share <= 1 else "bad")
    return [label, drawn, figure, tag("span", name, class_="quiet")]


def _calls(calls: list[str]) -> Html:
    """What each call was; neighbours that differ in numbers alone are told as one."""
    parts = []
    for _, run in groupby(enumerate(calls), key=lambda call: re.sub(r"[\d, -]+", " ", call[1])):
        same = list(run)
        (first, said), (last, end) = same[0], same[-1]
        alone = first == last
        parts.append(
            f"call {first}: {said}" if alone else f"calls {first} to {last}: {said} … {end}"
        )
    return tag("p", "C", "; ".join(parts)[1:], ".", class_="quiet")
