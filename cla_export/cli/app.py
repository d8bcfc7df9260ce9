"""The application that commands register with."""

from typing import Annotated

import typer

import cla_export

app = typer.Typer(
    name="cla-export",
    help="Deploy decoders with cross-layer KV sharing: export, prove, run. One cache per group.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:  # Typer's callback form
    if wanted:
        typer.echo(f"cla-export {cla_export.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
