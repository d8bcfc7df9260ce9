"""Show a plan: a table for the terminal, and a figure of slots against context."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from cla_export.errors import BadInput, MissingEnvironment
from cla_export.planning import Plan, PlanRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FORMATS = (".png", ".svg", ".pdf")
_OWN, _DENSE, _NOTE = "#c2410c", "#1f2933", "#52606d"
_COLORS = ("#1e6091", "#2a9d8f", "#6d597a", "#577590", "#9c6644", "#3d5a80")
_LINES = ("-", "-.", ":", (0, (6, 2)))
_SHORTEST = 256  # tokens, where the figure begins
_LABEL_ROOM = 0.045  # of the axes' height, between two labels


def render(plan: Plan, console: Console) -> None:
    """Print the plan as a table that fits 80 columns."""

    def line(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False)

    wanted = "" if plan.batch is None else f", {_count(plan.batch, 'slot')} wanted"
    line(f"{plan.name} in {_memory(plan.memory)}, slots of {plan.context:,} tokens{wanted}", "bold")
    line(
        f"  caches {plan.dtype}, weights {plan.weights_dtype}, "
        f"{_size(plan.reserve_bytes)} ({plan.reserve:.0%}) kept free for activations"
    )
    line("")
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layout", overflow="fold")
    titles = ("weights", "cache\nB/token", "cache\nper slot", "slots", "longest\ncontext")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("fits", overflow="fold")
    for row in plan.rows:
        table.add_row(
            f"{'> ' if row.own else '  '}{row.name}",
            _size(row.weight_bytes),
            f"{row.bytes_per_token:,}",
            _size(row.bytes_per_slot),
            f"{row.slots:,}",
            f"{row.largest_context:,}",
            "yes" if row.fits else "no",
            style="bold" if row.own else "",
        )
    console.print(table)
    line("")
    for reason in dict.fromkeys(row.reason for row in plan.rows if not row.fits):
        names = [row.name for row in plan.rows if row.reason == reason]
        line(f"no, {reason}: {'all' if len(names) == len(plan.rows) else ', '.join(names)}")
    slots = "one slot" if (plan.batch or 1) == 1 else f"each of {plan.batch:,} slots"
    line(f"> this model's layout; longest context: tokens that memory allows {slots}")
    if any(row.largest_context > plan.max_positions for row in plan.rows):
        line(f"  (the model itself ends at {plan.max_positions:,} positions)")
    for name, reason in plan.skipped:
        line(f"left out, {name}: {reason}")
    for note in plan.notes:
        line(f"note: {note}")


def plot(plan: Plan, file: Path) -> None:
    """Draw slots that fit by context, one line per layout; PNG, SVG or PDF by the file's name.

    Raises BadInput on another suffix, or if no layout leaves room for a cache; MissingEnvironment
    without matplotlib.
    """
    if file.suffix.lower() not in _FORMATS:
        raise BadInput(f"{file}: plots are written as {', '.join(_FORMATS)}; name the file so")
    if not any(row.cache_budget > 0 for row in plan.rows):
        raise BadInput(
            f"{plan.name} in {_memory(plan.memory)}: no layout leaves memory for caches, so there "
            "is nothing to draw; give more memory or narrower weights"
        )
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator
    except ImportError as error:
        raise MissingEnvironment(
            f"matplotlib, which draws plots, cannot be loaded ({error}); install it: "
            "pip install 'cla-export[plot]'"
        ) from error

    figure = Figure(figsize=(10.4, 6.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    contexts = _contexts(plan)
    ends: list[tuple[float, str, str]] = []
    for place, (row, label) in enumerate(_curves(plan)):
        slots = [row.cache_budget / (row.bytes_per_token * context) for context in contexts]
        color, style = _COLORS[place % len(_COLORS)], _LINES[place % len(_LINES)]
        if row.own:
            color, style = _OWN, "-"
        elif row.name == "dense":
            color, style = _DENSE, "--"
        width, order = (2.8, 3) if row.own else (1.5, 2)
        axes.plot(contexts, slots, color=color, linestyle=style, linewidth=width, zorder=order)
        ends.append((slots[-1], label, color))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(contexts[0], contexts[-1])
    lowest = min([end for end, _, _ in ends] + ([plan.batch] if plan.batch else []))
    axes.set_ylim(bottom=max(0.8, lowest / 1.6))
    axes.xaxis.set_major_locator(FixedLocator(contexts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, which="major", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("context (tokens per slot)")
    axes.set_ylabel("slots that fit")
    axes.set_title(
        f"{plan.name}: slots that fit in {_memory(plan.memory)}", loc="left", fontsize=13, pad=24
    )
    subtitle = f"caches {plan.dtype}; weights, {plan.weights_dtype}, and a reserve of "
    subtitle += f"{plan.reserve:.0%} taken off first"
    axes.annotate(
        subtitle, (0, 1), (0, 8), "axes fraction", "offset points", fontsize=9.5, color=_NOTE
    )
    _mark_request(axes, plan)
    _label_ends(axes, ends)
    figure.savefig(file)


def _mark_request(axes: "Axes", plan: Plan) -> None:
    """The context and the batch asked for, what the own layout holds, where positions end."""
    left, right = axes.get_xlim()
    axes.axvline(plan.context, color=_NOTE, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    axes.annotate(
        f"{plan.context:,} tokens asked for",
        (plan.context, 0),
        (-5, 5),
        ("data", "axes fraction"),
        "offset points",
        ha="right",
        fontsize=9,
        color=_NOTE,
    )
    if plan.max_positions < right:
        axes.axvspan(max(plan.max_positions, left), right, color="#f1f3f5", zorder=0)
        axes.annotate(
            "beyond the model's positions",
            (max(plan.max_positions, left), 1),
            (6, -12),
            ("data", "axes fraction"),
            "offset points",
            fontsize=9,
            color=_NOTE,
        )
    if plan.batch is not None:
        axes.axhline(plan.batch, color=_NOTE, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
        axes.annotate(
            f"{_count(plan.batch, 'slot')} wanted",
            (left, plan.batch),
            (5, 4),
            textcoords="offset points",
            fontsize=9,
            color=_NOTE,
        )
    if plan.own.slots:
        axes.plot([plan.context], [plan.own.slots], "o", color=_OWN, markersize=7, zorder=4)
        axes.annotate(
            f"{plan.own.slots:,}",
            (plan.context, plan.own.slots),
            (7, 5),
            textcoords="offset points",
            fontsize=9.5,
            color=_OWN,
            weight="bold",
            zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )


def _label_ends(axes: "Axes", ends: list[tuple[float, str, str]]) -> None:
    """Name each line beside its right end, pushed up where labels would overlap."""
    to_axes = axes.transData + axes.transAxes.inverted()
    right = axes.get_xlim()[1]
    floor = 0.0  # lowest height that is still free, as a fraction of the axes
    for end, label, color in sorted(ends):
        height = max(float(to_axes.transform((right, end))[1]), 0.0)
        room = _LABEL_ROOM * (1 + label.count("\n"))
        text_height = max(height, floor + room / 2)
        floor = text_height + room / 2
        axes.annotate(
            label,
            (1.0, height),
            (1.035, text_height),
            "axes fraction",
            "axes fraction",
            fontsize=9,
            color=color,
            weight="bold" if color == _OWN else "normal",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.8,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 1,
            },
        )


def _curves(plan: Plan) -> list[tuple[PlanRow, str]]:
    """One line per distinct size: layouts that cost the same share a line and its label."""
    same: dict[tuple[int, int], list[PlanRow]] = {}
    for row in plan.rows:
        if row.cache_budget > 0:
            same.setdefault((row.bytes_per_token, row.weight_bytes), []).append(row)
    curves = []
    for rows in same.values():
        own = next((row for row in rows if row.own), rows[0])
        names = list(dict.fromkeys(row.name.partition(" (remainder")[0] for row in rows))
        if len(names) > 2 and all(name.startswith("CLA2-") for name in names):
            names = ["CLA2-" + ",\n".join(name.removeprefix("CLA2-") for name in names)]
        label = ",\n".join(names) + (" (this model)" if own.own else "")
        curves.append((own, label))
    return sorted(curves, key=lambda curve: curve[0].bytes_per_token)


def _contexts(plan: Plan) -> list[int]:
    """Powers of two around the context asked for, up to the model's positions at least."""
    first = min(_SHORTEST, 2 ** (plan.context.bit_length() - 1))
    last = max(plan.max_positions, 4 * plan.context, 8 * first)
    contexts = [first]
    while contexts[-1] < last:
        contexts.append(2 * contexts[-1])
    return contexts


def _memory(size: int) -> str:
    """A round number of GB or MB as such, anything else in GiB, MiB, KiB."""
    for factor, unit in ((10**9, "GB"), (10**6, "MB")):
        if size >= factor and size % (factor // 100) == 0 and size % 1024**2:
            return f"{size / factor:,.10g} {unit}"
    return _size(size)


def _size(size: int) -> str:
    for factor, unit in ((1024**4, "TiB"), (1024**3, "GiB"), (1024**2, "MiB"), (1024, "KiB")):
        if size >= factor:
            text = f"{size / factor:,.2f}".rstrip("0").rstrip(".")
            return f"{text} {unit}"
    return f"{size:,} B"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"
