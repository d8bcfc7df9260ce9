"""bench-server: load a server, or a bundle's engine in this process."""

from pathlib import Path
from typing import Annotated

import typer

from cla_export.cli.app import app
from cla_export.cli.options import AsJson, Threads
from cla_export.cli.terminal import console_for, escape, progress_bar, show
from cla_export.errors import BadInput, CheckFailed


@app.command(
    name="bench-server",
    epilog="Example: cla-export bench-server http://127.0.0.1:8000 --concurrency 1,4,16",
)
def bench_server(
    target: Annotated[
        str,
        typer.Argument(
            help="A server of OpenAI's completions; or a bundle's folder, whose engine is loaded "
            "in this process, without HTTP."
        ),
    ],
    concurrency: Annotated[str, typer.Option(help="Streams at a time.")] = "1,4,16",
    requests: Annotated[int, typer.Option(help="Requests of each level.")] = 32,
    prompt: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 64,
    tokens: Annotated[int, typer.Option("-n", "--tokens", help="New tokens of each.")] = 64,
    first_token: Annotated[
        float, typer.Option(help="Milliseconds that a good request's first token may take.")
    ] = 1000.0,
    between_tokens: Annotated[
        float, typer.Option(help="Milliseconds that its tokens may be apart, on average.")
    ] = 100.0,
    api_key: Annotated[str | None, typer.Option(help="Sent along.")] = None,
    slots: Annotated[
        int | None, typer.Option(help="Of a bundle's engine; by default the most streams.")
    ] = None,
    chunk: Annotated[int | None, typer.Option(help="Of a bundle's engine, as of serve.")] = None,
    prefill_budget: Annotated[
        float | None, typer.Option(help="Of a bundle's engine, as of serve.")
    ] = None,
    threads: Threads = None,
    output: Annotated[Path | None, typer.Option(help="File for the result, as JSON.")] = None,
    csv: Annotated[
        Path | None, typer.Option(help="File for a row of each level, columns named as aiperf's.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw throughput and times: .png or .svg.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="An earlier run's JSON: fail on what was better then.")
    ] = None,
    noise: Annotated[
        float, typer.Option(help="Share by which a figure may be worse than in that run.")
    ] = 0.2,
    as_json: AsJson = False,
) -> None:
    """Load a server: time to the first token, between tokens, and requests that keep limits.

    Exit 1 if something was better in the run that --compare names.
    """
    from cla_export.benchmark import load, load_comparison
    from cla_export.bundle import write_json
    from cla_export.views import benchmark as benchmark_view
    from cla_export.views import load as load_view

    work = load.Work(_numbers(concurrency), requests, prompt, tokens, first_token, between_tokens)
    old = None if compare is None else load.read_load(compare)
    for file in (output, csv, plot):
        if file is not None and not file.parent.is_dir():
            raise BadInput(f"{file}: there is no folder {file.parent}; make it first")
    if plot is not None:
        benchmark_view.check_plot(plot)
    with progress_bar() as progress:
        if Path(target).is_dir():
            from cla_export.benchmark.engine_load import bench_engine

            found = bench_engine(
                target,
                work,
                slots=slots,
                chunk=chunk,
                prefill_seconds=None if prefill_budget is None else prefill_budget / 1e3,
                threads=threads,
                progress=progress,
            )
        else:
            from cla_export.benchmark import server

            found = server.bench_server(target, work, api_key=api_key, progress=progress)
    show(found.to_json()) if as_json else load_view.render(found, console_for())
    if output is not None:
        write_json(output, found.to_json())
    if csv is not None:
        csv.write_text(load_view.as_csv(found), encoding="utf-8")
    if plot is not None:
        load_view.plot(found, plot)
    if old is not None:
        compared = load_comparison.compare_loads(found, old, noise)
        for note in compared.notes:
            console_for(stderr=True).print(f"note: {escape(note)}", highlight=False)
        if compared.regressions:
            raise CheckFailed(f"worse than {compare}\n" + "\n".join(compared.regressions))


def _numbers(concurrency: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in concurrency.split(","))
    except ValueError as error:
        raise BadInput(
            f"--concurrency is {concurrency!r}; expected whole numbers with commas between"
        ) from error
