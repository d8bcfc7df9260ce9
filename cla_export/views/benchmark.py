"""Show what bench measured: a table for the terminal, one in Markdown, a figure of decode steps."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from cla_export.benchmark import Bench, Row
from cla_export.errors import BadInput, MissingEnvironment

_FORMATS = (".png", ".svg", ".pdf")
_TITLES = ("batch", "context", "ms", "p10 to p90", "tokens/s", "of floor", "peak MiB")
_ON_GPU = "GPU MiB"
_COLORS = ("#c2410c", "#1e6091", "#2a9d8f", "#6d597a", "#577590", "#9c6644")
_NOTE = "#52606d"


def render(found: Bench, console: Console) -> None:
    """Print a line for each row, in 80 columns."""

    def line(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False)

    line(f"{Path(found.bundle).name}: {_what(found)}", "bold")
    for note in (*_where(found), *_floor(found)):
        line(f"  {note}")
    line("")
    titles = _titles(found)
    gap = 2 if titles == _TITLES else 1  # one column more
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
    table.add_column("phase")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for row in found.rows:
        table.add_row(row.phase, *_cells(row)[: len(titles)])
    console.print(table)


def markdown(found: Bench) -> str:
    """The same as Markdown, with date, machine and command above the table."""
    titles = _titles(found)
    command = () if found.command is None else (f"`{found.command}`",)
    lines = [
        "; ".join((found.date, *_where(found), *command)),
        "",
        "; ".join((f"{Path(found.bundle).name}: {_what(found)}", *_floor(found))),
        "",
        f"| phase | {' | '.join(titles)} |",
        f"|---|{'---:|' * len(titles)}",
        *(f"| {' | '.join((row.phase, *_cells(row)[: len(titles)]))} |" for row in found.rows),
    ]
    return "\n".join(lines) + "\n"


def check_plot(file: Path) -> None:
    """See that `plot` can write this file, before anything is measured for it.

    Raises BadInput on a suffix that is not drawn; MissingEnvironment without matplotlib.
    """
    if file.suffix.lower() not in _FORMATS:
        raise BadInput(f"{file}: plots are written as {', '.join(_FORMATS)}; name the file so")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingEnvironment(
            f"matplotlib, which draws plots, cannot be loaded ({error}); install it: "
            "pip install 'cla-export[plot]'"
        ) from error


def plot(found: Bench, file: Path) -> None:
    """Draw milliseconds of a decode step by context, a line per batch, and the floor under each.

    PNG, SVG or PDF by the file's name. Raises BadInput if nothing was decoded, and as `check_plot`.
    """
    check_plot(file)
    by_batch: dict[int, list[Row]] = {}
    for row in sorted(found.rows, key=lambda row: (row.batch, row.context)):
        if row.phase == "decode":
            by_batch.setdefault(row.batch, []).append(row)
    if not by_batch:
        raise BadInput(f"{file}: a plot shows decode steps, and none was measured; add the phase")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure = Figure(figsize=(8.4, 5.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for place, (batch, rows) in enumerate(by_batch.items()):
        contexts, color = [row.context for row in rows], _COLORS[place % len(_COLORS)]
        axes.fill_between(
            contexts, [row.ms_p10 for row in rows], [row.ms_p90 for row in rows],
            color=color, alpha=0.15, linewidth=0,
        )  # fmt: skip
        times = [row.ms_per_step for row in rows]
        axes.plot(contexts, times, "o-", color=color, linewidth=2, label=f"batch {batch}")
        floors = [row.ms_per_step * row.floor_share for row in rows if row.floor_share is not None]
        if len(floors) == len(rows):
            label = f"its floor, {floors[0]:,.3g} to {floors[-1]:,.3g} ms"
            axes.plot(contexts, floors, ".--", color=color, linewidth=1.2, label=label)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(FixedLocator(sorted({row.context for row in found.rows
                                                      if row.phase == "decode"})))  # fmt: skip
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(visible=True, which="major", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("context (tokens that each row holds)")
    axes.set_ylabel("ms per decode step")
    title = f"{Path(found.bundle).name}: a decode step, {_what(found)}"
    axes.set_title(title, loc="left", fontsize=12, pad=24)
    axes.annotate(
        "; ".join(_where(found)), (0, 1), (0, 8), "axes fraction", "offset points", fontsize=9,
        color=_NOTE,
    )  # fmt: skip
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(file)


def _titles(found: Bench) -> tuple[str, ...]:
    on_gpu = any(row.peak_device_bytes is not None for row in found.rows)
    return (*_TITLES, _ON_GPU) if on_gpu else _TITLES


def _cells(row: Row) -> tuple[str, ...]:
    """What stands under `_TITLES`, and a GPU's memory."""
    device = row.peak_device_bytes
    return (
        f"{row.batch:,}",
        f"{row.context:,}",
        _ms(row.ms_per_step),
        f"{_ms(row.ms_p10)} to {_ms(row.ms_p90)}",
        f"{row.tokens_per_s:,.0f}",
        "-" if row.floor_share is None else f"{row.floor_share:.0%}",
        f"{row.peak_rss_bytes / 2**20:,.0f}",
        "-" if device is None else f"{device / 2**20:,.0f}",
    )


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:,.{3 if milliseconds < 1 else 2}f}"


def _what(found: Bench) -> str:
    return found.backend if found.graph is None else f"{found.backend}, {found.graph}"


def _where(found: Bench) -> tuple[str, str]:
    """The processor or GPU, and what ran on it."""
    machine, ran = found.machine, f"{found.backend} {found.tools[found.backend]}"
    if "gpu" in machine:
        host = f"{machine['processor']}, {machine['cpus']} CPUs"
        return f"{machine['gpu']}, driver {machine['driver']}", f"{ran}; host: {host}"
    threads = "its own choice" if machine["threads"] is None else machine["threads"]
    return str(machine["processor"]), f"{ran}; threads: {threads}, of {machine['cpus']} CPUs"


def _floor(found: Bench) -> tuple[str, ...]:
    """What the floor is made of, where there is one."""
    if found.bandwidth_bytes_per_s is None or found.weight_bytes is None:
        return ()
    rate = found.bandwidth_bytes_per_s / 1e9
    count = found.machine["threads"] or found.machine["cpus"]
    readers = f"{count} thread{'' if count == 1 else 's'}"
    if "gpu" in found.machine:
        readers = "a reading kernel"
    return (
        f"a step reads {found.weight_bytes / 2**20:,.1f} MiB of weights, and the keys and values "
        "of its rows",
        f"memory delivers {rate:,.1f} GB/s to {readers}: the floor under its time",
    )
