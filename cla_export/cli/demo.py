"""demo: the main job, on the model that ships here."""

from pathlib import Path
from typing import Annotated

import typer

import cla_export
from cla_export.cli.app import app
from cla_export.cli.export import export
from cla_export.cli.generate import generate
from cla_export.cli.inspect import inspect
from cla_export.cli.options import Force
from cla_export.cli.parity import parity
from cla_export.cli.terminal import console_for, escape


@app.command(epilog="Example: cla-export demo my-demo-bundle")
def demo(
    dest: Annotated[Path, typer.Argument(help="Bundle folder to write.")] = Path("demo-bundle"),
    force: Force = False,
) -> None:
    """Run the main job on the model that ships here: inspect, export, parity, generate."""
    source, prompt = cla_export.demo_checkpoint(), "And it came to pass"
    _announce(f"inspect {source}")
    inspect(source)
    _announce(f"export {source} {dest}")
    export(source, dest, force=force)
    _announce(f"parity {dest}")
    parity(dest)
    _announce(f'generate {dest} "{prompt}" -n 96 --temperature 0.7 --seed 3')
    generate(dest, prompt, tokens=96, temperature=0.7, seed=3)


def _announce(command: str) -> None:
    console_for().print(f"\n[bold cyan]$ cla-export {escape(command)}[/]", highlight=False)
