"""bench: time a bundle."""

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import cla_export
from cla_export.cli.app import app
from cla_export.cli.options import (
    AsJson,
    Backend,
    BundleFolder,
    EngineFolder,
    Module,
    Threads,
    importable,
)
from cla_export.cli.terminal import console_for, escape, progress_bar, show
from cla_export.errors import BadInput, CheckFailed


@app.command(epilog="Example: cla-export bench my-bundle --batch 1,8 --context 512,2048")
def bench(
    bundle: BundleFolder,
    batch: Annotated[str, typer.Option(help="Rows side by side, in decode.")] = "1,8",
    context: Annotated[
        str | None,
        typer.Option(
            help="Tokens that each row holds before it decodes; 512,8192 where the model allows."
        ),
    ] = None,
    phase: Annotated[str, typer.Option(help="What to measure.")] = "decode,prefill",
    steps: Annotated[
        int | None, typer.Option(help="Decode steps to time; 16, or 64 as one on a GPU.")
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens that prefill reads.")] = 512,
    backend: Annotated[
        Backend | None,
        typer.Option(help="What runs it; by default what the bundle was exported for."),
    ] = None,
    engine: EngineFolder = None,
    threads: Threads = None,
    module: Module = None,
    output: Annotated[Path | None, typer.Option(help="File for the result, as JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="File for the table.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw decode steps by context: .png or .svg.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="An earlier run's JSON: fail on what was faster then.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time decode steps and prefill, beside the time that memory needs to deliver what they read.

    Batches, contexts and phases are lists with commas. Exit 1 if something was faster in the run
    that --compare names.
    """
    from cla_export import benchmark
    from cla_export.bundle import write_json
    from cla_export.views import benchmark as benchmark_view

    batches = _numbers("--batch", batch)
    contexts = None if context is None else _numbers("--context", context)
    old = None if compare is None else benchmark.read_bench(compare)
    for file in (output, markdown, plot):
        if file is not None and not file.parent.is_dir():
            raise BadInput(f"{file}: there is no folder {file.parent}; make it first")
    if plot is not None:
        benchmark_view.check_plot(plot)
    with progress_bar() as progress:
        found = cla_export.bench(
            bundle,
            batches=batches,
            contexts=contexts,
            phases=phase.split(","),
            steps=steps,
            prompt=prompt,
            backend=None if backend is None else backend.value,
            engine=engine,
            threads=threads,
            module=importable(module),
            progress=progress,
        )
    found = replace(found, command=shlex.join(["cla-export", *sys.argv[1:]]))
    show(found.to_json()) if as_json else benchmark_view.render(found, console_for())
    if output is not None:
        write_json(output, found.to_json())
    if markdown is not None:
        markdown.write_text(benchmark_view.markdown(found), encoding="utf-8")
    if plot is not None:
        benchmark_view.plot(found, plot)
    if old is not None:
        compared = benchmark.compare(found, old)
        for note in compared.notes:
            console_for(stderr=True).print(f"note: {escape(note)}", highlight=False)
        if compared.regressions:
            raise CheckFailed(f"slower than {compare}\n" + "\n".join(compared.regressions))


def _numbers(option: str, text: str) -> list[int]:
    """Whole numbers of a list such as `1,8`."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise BadInput(
            f"{option} is {text!r}; expected whole numbers with commas between, such as 1,8"
        ) from error
