"""parity: a bundle against its PyTorch model."""

from pathlib import Path
from typing import Annotated

import typer

import cla_export
from cla_export.cli.app import app
from cla_export.cli.options import (
    AsJson,
    BundleFolder,
    EngineFolder,
    Module,
    ParityTarget,
    Threads,
    importable,
)
from cla_export.cli.terminal import console_for, progress_bar, show
from cla_export.errors import CheckFailed


@app.command(epilog="Example: cla-export parity my-bundle --report parity-report")
def parity(
    bundle: BundleFolder,
    reference: Annotated[Path | None, typer.Option(help="Model folder to compare with.")] = None,
    target: Annotated[
        ParityTarget | None,
        typer.Option(help="What runs it; by default what the bundle was exported for."),
    ] = None,
    engine: EngineFolder = None,
    module: Module = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for JSON, JUnit, Markdown, HTML.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text for prompts and perplexity.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the cases' shapes, and of random prompts.")
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="parity.json of an earlier run: fail also on what was better then."),
    ] = None,
    debug_dir: Annotated[
        Path | None,
        typer.Option(help="On failure, leave the first wrong call here, for polygraphy to replay."),
    ] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Prove a bundle equal to its PyTorch model; exit 1 if it is not, 3 if it cannot run here."""
    from cla_export.compare.files import failure, write_report
    from cla_export.views.parity import render

    with progress_bar() as progress:
        found = cla_export.parity(
            bundle,
            reference,
            target=None if target is None else target.value,
            engine=engine,
            module=importable(module),
            text=text,
            threads=threads,
            baseline=baseline,
            debug_dir=debug_dir,
            progress=progress,
            **({} if seed is None else {"seed": seed}),
        )
    if report is not None:
        write_report(found, report)
    show(found.to_json()) if as_json else render(found, console_for())
    if not found.passed:
        raise CheckFailed(f"{bundle}: {failure(found)}")
