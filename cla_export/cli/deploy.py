"""deploy: a bundle on somebody else's serving platform; a subcommand each."""

from pathlib import Path
from typing import Annotated

import typer

from cla_export.cli.app import app
from cla_export.cli.options import AsJson, Backend, BundleFolder, EngineFolder, Threads
from cla_export.cli.terminal import console_for, show

group = typer.Typer(no_args_is_help=True, help="Put a bundle on a serving platform.")
app.add_typer(group, name="deploy")


@group.command(epilog="Example: cla-export deploy triton my-bundle repository --kv-memory 8GiB")
def triton(
    bundle: BundleFolder,
    repository: Annotated[Path, typer.Argument(help="Triton model repository; made if missing.")],
    name: Annotated[
        str | None, typer.Option(help="Of the model; by default the bundle folder's.")
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Put the bundle into the repository, not its path.")
    ] = False,
    backend: Annotated[
        Backend | None,
        typer.Option(help="What runs it; by default what the bundle was exported for."),
    ] = None,
    engine: EngineFolder = None,
    slots: Annotated[int | None, typer.Option(help="Sequences that run side by side.")] = None,
    kv_memory: Annotated[
        str | None, typer.Option(help="Memory for KV caches, such as 8GiB; becomes slots.")
    ] = None,
    max_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer; by default all positions.")
    ] = None,
    threads: Threads = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a model of that name.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a bundle as a model of a Triton model repository: text in, text out, decoupled.

    Other limits are parameters in its config.pbtxt, named as the options of `serve`.
    """
    from cla_export.serve.server import Options, check_options

    check_options(Options())  # that the packages of `serve` are there
    from cla_export.deploy.triton import write_model
    from cla_export.deploy.triton_config import Parameters

    parameters = Parameters(
        bundle=str(bundle),
        backend=None if backend is None else backend.value,
        engine=None if engine is None else str(engine),
        slots=slots,
        kv_memory=kv_memory,
        max_len=max_len,
        threads=threads,
    )
    model = write_model(repository, parameters, name=name, copy=copy, force=force)
    if as_json:
        show({"folder": str(model.folder), "bundle": str(model.bundle)})
        return
    console = console_for()
    console.print(f"[bold green]written[/] {model.folder}", highlight=False)
    console.print(
        f"  serves {model.bundle}; tritonserver --model-repository {repository}", highlight=False
    )
