"""deploy: a bundle on what runs many servers. A file a command: deploy_ray.py, ..."""

from importlib import import_module

import typer

from cla_export.cli.app import app

group = typer.Typer(
    name="deploy", help="Deploy a bundle on what runs many servers.", no_args_is_help=True
)
app.add_typer(group)

COMMANDS = ("ray", "triton", "kubernetes")
for _name in COMMANDS:
    import_module(f"cla_export.cli.deploy_{_name}")
