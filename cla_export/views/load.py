"""A server's load test on the terminal."""

from typing import TYPE_CHECKING

from cla_export.benchmark.server import Percentiles, ServerBench

if TYPE_CHECKING:
    from rich.console import Console


def render(found: ServerBench, console: "Console") -> None:
    """Print a row for each level."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    console.print(
        f"[bold]{escape(found.model)}[/] at {escape(found.url)}: prompts of {found.prompt_tokens} "
        f"tokens, {found.new_tokens} new ones; milliseconds, p50 / p99",
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("streams", "tokens/s", "first token", "between tokens", "whole answer"):
        table.add_column(title, justify="right")
    table.add_column("good/s", justify="right")
    table.add_column("refused", justify="right")
    for level in found.levels:
        table.add_row(
            str(level.concurrency),
            f"{level.tokens_per_s:,.0f}",
            _two(level.first_token),
            _two(level.between_tokens),
            _two(level.whole),
            f"{level.good_per_s:.2f}",
            str(level.refused),
        )
    console.print(table)
    console.print(
        f"good: the first token within {found.first_token_limit_ms:g} ms, and tokens at most "
        f"{found.between_tokens_limit_ms:g} ms apart on average",
        highlight=False,
    )


def _two(of: Percentiles) -> str:
    return " / ".join(f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" for ms in (of.p50, of.p99))
