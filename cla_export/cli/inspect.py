"""inspect: which layers share a cache."""

from pathlib import Path
from typing import Annotated

import typer

import cla_export
from cla_export.cli.app import app
from cla_export.cli.options import AsJson, Module, importable
from cla_export.cli.terminal import console_for, show
from cla_export.errors import CheckFailed


@app.command(epilog="Example: cla-export inspect my-model")
def inspect(
    path: Annotated[
        Path, typer.Argument(help="A config, a model folder, an .onnx file, a bundle.")
    ],
    module: Module = None,
    as_json: AsJson = False,
) -> None:
    """Show which layers share a cache, and what sharing saves against the dense twin."""
    from cla_export.views.inspection import render

    found = cla_export.inspect(path, module=importable(module))
    show(found.to_json()) if as_json else render(found, console_for())
    if not found.ok:
        raise CheckFailed(f"{path}: not what it says it is; see the failed checks above")
