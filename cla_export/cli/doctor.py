"""doctor: what is installed."""

from typing import Annotated

import typer

import cla_export
from cla_export.cli.app import app
from cla_export.cli.options import AsJson
from cla_export.cli.terminal import console_for, escape, show


@app.command()
def doctor(
    fix: Annotated[
        bool, typer.Option("--fix", help="Make the link that TensorRT-RTX's wheel lacks.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what is installed, and what each target would need."""
    from cla_export import environment
    from cla_export.views.environment import render

    for done in environment.fix() if fix else []:
        console_for(stderr=True).print(f"made {escape(done)}", highlight=False)
    found = cla_export.doctor()
    show(found.to_json()) if as_json else render(found, console_for())
