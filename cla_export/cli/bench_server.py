"""bench-server: load a server."""

from pathlib import Path
from typing import Annotated

import typer

from cla_export.cli.app import app
from cla_export.cli.options import AsJson
from cla_export.cli.terminal import console_for, progress_bar, show
from cla_export.errors import BadInput


@app.command(
    name="bench-server",
    epilog="Example: cla-export bench-server http://127.0.0.1:8000 --concurrency 1,4,16",
)
def bench_server(
    url: Annotated[str, typer.Argument(help="A server of OpenAI's completions.")],
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
    output: Annotated[Path | None, typer.Option(help="File for the result, as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Load a server: time to the first token, between tokens, and requests that keep limits."""
    from cla_export.benchmark import server
    from cla_export.bundle import write_json
    from cla_export.views import load as load_view

    try:
        levels = [int(number) for number in concurrency.split(",")]
    except ValueError as error:
        raise BadInput(
            f"--concurrency is {concurrency!r}; expected whole numbers with commas between"
        ) from error
    with progress_bar() as progress:
        found = server.bench_server(
            url,
            concurrency=levels,
            requests=requests,
            prompt_tokens=prompt,
            new_tokens=tokens,
            first_token_limit_ms=first_token,
            between_tokens_limit_ms=between_tokens,
            api_key=api_key,
            progress=progress,
        )
    show(found.to_json()) if as_json else load_view.render(found, console_for())
    if output is not None:
        write_json(output, found.to_json())
