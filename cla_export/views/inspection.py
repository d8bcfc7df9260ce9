"""Draw an inspection: a map of layers and groups, then this model beside its dense twin.

Every mark is one column wide and means the same without colour.
"""

from collections.abc import Iterable
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cla_export.inspection import Inspection
from cla_export.layout import Group, KVLayout

_EVERY = 5  # layers between two numbers on the axis
_GAP = 2  # columns between the label and the map
_SPREAD = 3  # most columns a layer takes
_ALL_DRAWN = 16  # groups; of more, the inside of a regular run is told in words
_UNICODE, _ASCII = ("●", "○", "·"), ("O", "o", ".")


class _Row(NamedTuple):
    """One line of the map."""

    label: str
    owners: frozenset[int]
    sharers: frozenset[int]
    window: int | None


def render(inspection: Inspection, console: Console) -> None:
    """Print an inspection on a console of any width from about 60 columns."""

    def line(text: str | Text = "", style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=False)

    layout = inspection.layout
    what = {"config": "config", "model": "model folder", "graph": "ONNX graph", "bundle": "bundle"}
    said = [what[inspection.kind]]
    if inspection.target is not None:
        said.append(f"target {inspection.target}")
    if inspection.model_type is not None:
        said.append(f"model_type {inspection.model_type}")
    line(f"{inspection.name}: {', '.join(said)}", "bold")
    line(f"  {layout.describe()}")
    for shape in _shapes(layout):
        line(f"  {shape}")
    caches = inspection.cache_dtype
    narrow = "" if caches == inspection.dtype else f", {caches} cache"
    line(f"  {inspection.dtype}{narrow} ({inspection.dtype_source})")
    if inspection.weight_bytes:
        sizes = (f"{count:,} B {dtype}" for dtype, count in inspection.weight_bytes.items())
        line(f"  weights: {', '.join(sizes)}")
    if inspection.graph is not None:
        graph = inspection.graph
        nodes = ", ".join(f"{count} {operator}" for operator, count in graph.attention.items())
        line(f"  {graph.file}: {graph.stage}, {nodes}, {graph.cache_inputs} cache inputs")
    for choice in inspection.attention:
        line(f"  attention, {choice}")
    for engine in inspection.engines:
        line(f"  engine {engine}")
    line()
    for text in map_lines(layout, console.width, ascii_only=console.options.ascii_only):
        line(text)
    line()
    console.print(_costs_table(inspection))
    if layout.num_groups < layout.num_layers:
        line(
            "Sharing saves cache memory. It does not shorten attention itself: every sharer still "
            "reads the whole cache.",
            "dim",
        )
    for check in inspection.checks:
        line(f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.detail}")
    for note in inspection.notes:
        line(f"note: {note}")


def map_lines(layout: KVLayout, width: int, *, ascii_only: bool = False) -> list[str]:
    """Draw one row per group along a layer axis, wrapped to `width` columns.

    Owners that nobody shares with stand together in rows named `alone`, one per sliding window.
    """
    owner, sharer, other = _ASCII if ascii_only else _UNICODE
    rows = list(_rows(layout))
    marked = [row for row in rows if row.owners]
    slides = any(row.window is not None for row in marked)
    label_width = max(len("group"), *(len(row.label) for row in marked))
    window_width = max(len("window"), *(len(_window(row)) for row in marked))
    head = "group".ljust(label_width) + ("  window".ljust(window_width + 2) if slides else "")
    start = len(head) + _GAP
    room = max(width - start, 20)
    spread = max(1, min(_SPREAD, room // layout.num_layers))
    count = min(layout.num_layers, room // spread)
    if count < layout.num_layers:
        count -= count % _EVERY  # a wrapped map breaks at a number of the axis
    lines: list[str] = []
    for first in range(0, layout.num_layers, count):
        layers = range(first, min(first + count, layout.num_layers))
        if not any((row.owners | row.sharers) & set(layers) for row in marked):
            continue  # inside a run that is told in words
        if first:
            lines.append("")
        lines.append(head + " " * _GAP + _axis(layers, spread))
        for row in rows:
            if not row.owners:
                if first == 0:
                    lines.append(row.label)
                continue
            if not (row.owners | row.sharers) & set(layers):
                continue
            label = row.label.ljust(label_width)
            if slides:
                label += f"  {_window(row):<{window_width}}"
            marks = [
                owner if i in row.owners else sharer if i in row.sharers else other for i in layers
            ]
            lines.append((label + " " * _GAP + (" " * (spread - 1)).join(marks)).rstrip())
    lines.append("")
    legend = f"layers across; {owner} owner, writes the cache; {sharer} sharer, reads it"
    if any(row.label == "alone" for row in rows):
        legend += "; alone: not shared"
    lines.append(legend)
    return lines


def _rows(layout: KVLayout) -> Iterable[_Row]:
    shared = [group for group in layout.groups if group.sharers]
    alone = [group for group in layout.groups if not group.sharers]
    for window in dict.fromkeys(group.window for group in alone):
        owners = frozenset(group.owner for group in alone if group.window == window)
        yield _Row("alone", owners, frozenset(), window)
    start = 0
    while start < len(shared):
        stop = _regular_run(shared, start)
        run = shared[start:stop]
        hidden = len(run) - 4 if len(shared) > _ALL_DRAWN else 0
        for place, group in enumerate(run):
            if hidden > 1 and place == 3:
                step = run[1].owner - run[0].owner
                text = f"... {hidden} more groups alike, each {step} layers after the one before"
                yield _Row(text, frozenset(), frozenset(), None)
            if hidden > 1 and 3 <= place < len(run) - 1:
                continue
            label = str(group.index)
            yield _Row(label, frozenset({group.owner}), frozenset(group.sharers), group.window)
        start = stop


def _regular_run(groups: list[Group], start: int) -> int:
    """End of the run of groups, from `start`, of one shape at equal distances."""

    def shape(group: Group) -> tuple[object, ...]:
        offsets = tuple(layer - group.owner for layer in group.layers)
        return offsets, group.window, group.kv_heads, group.head_dim

    stop = start + 1
    while stop < len(groups) and shape(groups[stop]) == shape(groups[start]):
        first_step = groups[start + 1].owner - groups[start].owner
        if groups[stop].owner - groups[stop - 1].owner != first_step:
            break
        stop += 1
    return stop


def _window(row: _Row) -> str:
    return "full" if row.window is None else str(row.window)


def _axis(layers: range, spread: int) -> str:
    axis = ""
    for place, layer in enumerate(layers):
        if layer % _EVERY == 0:
            axis = axis.ljust(place * spread) + str(layer)
    return axis


def _shapes(layout: KVLayout) -> Iterable[str]:
    """One line per cache shape: `10 caches of 1 kv head x 128`."""
    counts: dict[tuple[int, int, int | None], int] = {}
    for group in layout.groups:
        shape = (group.kv_heads, group.head_dim, group.window)
        counts[shape] = counts.get(shape, 0) + 1
    for (heads, dim, window), count in counts.items():
        pairs = f"{count} cache pair{'s' if count > 1 else ''} (key and value)"
        slides = "" if window is None else f", sliding window {window:,} tokens"
        yield f"{pairs} of {heads} kv head{'s' if heads > 1 else ''} x {dim}{slides}"


def _costs_table(inspection: Inspection) -> Table:
    own, dense = inspection.own, inspection.dense
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("")
    for title in ("this model", "dense twin", "saved"):
        table.add_column(title, justify="right", no_wrap=True)
    flops = f"forward FLOPs per token, context {inspection.context:,}" if inspection.context else ""
    rows: tuple[tuple[str, int | None, int | None, str], ...] = (
        ("KV cache per token", own.cache_bytes_per_token, dense.cache_bytes_per_token, "bytes"),
        (
            "KV activations per token, training",
            own.kv_activation_bytes_per_token,
            dense.kv_activation_bytes_per_token,
            "bytes",
        ),
        ("cache inputs", own.cache_inputs, dense.cache_inputs, ""),
        ("parameters", own.parameters, dense.parameters, "short"),
        (flops, own.flops_per_token, dense.flops_per_token, "short"),
    )
    for name, mine, twin, form in rows:
        if mine is None or twin is None:
            if name:
                table.add_row(name, "not known", "not known", "")
            continue
        saved = f"{100 * (twin - mine) / twin:.1f} %" if twin != mine else "-"
        table.add_row(name, _number(mine, form), _number(twin, form), saved)
    return table


def _number(value: int, form: str) -> str:
    if form == "bytes":
        return f"{value:,} B"
    for size, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M")):
        if form == "short" and value >= size:
            return f"{value / size:,.1f} {unit}" if value < 10**9 else f"{value / size:,.3f} {unit}"
    return f"{value:,}"
