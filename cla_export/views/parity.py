"""The gate's report in the terminal."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from cla_export.compare.files import arithmetic, summaries, worst_cache
from cla_export.compare.report import ParityReport


def render(report: ParityReport, console: Console) -> None:
    """Print one line per case, then the summaries and the verdict. Fits 80 columns."""
    console.print(
        f"[bold]parity[/] {Path(report.bundle).name}: {report.target}, {arithmetic(report)}, "
        f"against PyTorch in float64 on {report.tokens}",
        highlight=False,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("case")
    for heading in ("logits error", "allowed", "cache error", "allowed"):
        table.add_column(heading, justify="right")
    table.add_column("worst cache")
    table.add_column("")
    for case in dict.fromkeys(result.case for result in report.tensors):
        rows = [result for result in report.tensors if result.case == case]
        logits = next(result for result in rows if result.output == "logits")
        cache = worst_cache(rows)
        passed = all(result.passed for result in rows)
        table.add_row(
            case,
            f"{logits.max_error:.1e}",
            f"{logits.tolerance:.1e}",
            f"{cache.max_error:.1e}" if cache else "",
            f"{cache.tolerance:.1e}" if cache else "",
            cache.output.removeprefix("cache.") if cache else "",
            "[green]pass[/]" if passed else "[bold red]FAIL[/]",
        )
    if report.tensors:
        console.print(table)
    for line in summaries(report):
        console.print(f"  {line}", highlight=False, markup=False)
    verdict = "[bold green]PASSED[/]" if report.passed else "[bold red]FAILED[/]"
    console.print(f"{verdict} in {report.seconds:.1f} s", highlight=False)
