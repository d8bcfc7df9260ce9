"""A load test's result: a table for the terminal, one as CSV, and a figure."""

import csv
import io
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cla_export.benchmark.load import LoadBench, Spread, flat
from cla_export.views.benchmark import check_plot

_LOOKS = (("p50", "o-", "#1e6091"), ("p95", "s--", "#2a9d8f"), ("p99", "^:", "#c2410c"))
_GRID, _NOTE = "#e4e7eb", "#52606d"


def render(found: LoadBench, console: Console) -> None:
    """Print a row for each level."""
    work = found.work
    console.print(
        f"[bold]{escape(found.model)}[/] at {escape(found.target)}: prompts of "
        f"{work.prompt_tokens} tokens, {work.new_tokens} new ones; milliseconds, p50/p95/p99",
        highlight=False,
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in (
        "streams",
        "tokens/s",
        "first token",
        "between",
        "whole answer",
        "good/s",
        "refused",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for level in found.levels:
        table.add_row(
            str(level.concurrency),
            f"{level.output_token_throughput:,.0f}",
            _three(level.time_to_first_token),
            _three(level.inter_token_latency),
            _three(level.request_latency),
            f"{level.goodput:.2f}",
            str(level.refused),
        )
    console.print(table)
    console.print(f"good: {_good(found)}", highlight=False)


def _good(found: LoadBench) -> str:
    return (
        f"the first token within {found.work.first_token_limit_ms:g} ms, and tokens at most "
        f"{found.work.between_tokens_limit_ms:g} ms apart on average"
    )


def _three(of: Spread) -> str:
    return "/".join(f"{ms:.0f}" if ms >= 10 else f"{ms:.1f}" for ms in (of.p50, of.p95, of.p99))


def as_csv(found: LoadBench) -> str:
    """A row for each level, a column for each figure."""
    rows = [flat(level) for level in found.levels]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def plot(found: LoadBench, file: Path) -> None:
    """Draw throughput, time to the first token and time between tokens over the streams.

    PNG, SVG or PDF by the file's name. Raises as `check_plot`.
    """
    check_plot(file)
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    levels = sorted(found.levels, key=lambda level: level.concurrency)
    streams = [level.concurrency for level in levels]
    figure = Figure(figsize=(11.5, 4.2), dpi=150, layout="constrained")
    tokens, first, between = figure.subplots(1, 3)
    rates = [level.output_token_throughput for level in levels]
    tokens.plot(streams, rates, "o-", color=_LOOKS[0][2], linewidth=2)
    tokens.set_title("output tokens/s", loc="left", fontsize=11)
    for axes, title, spreads in (
        (first, "time to the first token, ms", [level.time_to_first_token for level in levels]),
        (between, "inter-token latency, ms", [level.inter_token_latency for level in levels]),
    ):
        for part, style, color in _LOOKS:
            values = [getattr(spread, part) for spread in spreads]
            axes.plot(streams, values, style, color=color, linewidth=1.8, label=part)
        axes.set_title(title, loc="left", fontsize=11)
        axes.legend(frameon=False, fontsize=9)
    for axes in (tokens, first, between):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(streams))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("streams at a time")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{found.model}: prompts of {found.work.prompt_tokens} tokens, {found.work.new_tokens} new "
        f"ones; {found.date}",
        x=0.01, ha="left", fontsize=11, color=_NOTE,
    )  # fmt: skip
    figure.savefig(file)
