"""deploy triton: a model of a Triton model repository."""

from pathlib import Path
from typing import Annotated

import typer

from cla_export.cli.deploy import group
from cla_export.cli.options import AsJson, BundleFolder, EngineFolder, Threads
from cla_export.cli.serve_options import (
    BackendChoice,
    Chunk,
    KvMemory,
    MaxLen,
    MaxQueuedRequests,
    PrefillBudget,
    RequestTimeout,
    Slots,
)
from cla_export.cli.terminal import console_for, show


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
    backend: BackendChoice = None,
    engine: EngineFolder = None,
    slots: Slots = None,
    kv_memory: KvMemory = None,
    max_len: MaxLen = None,
    chunk: Chunk = None,
    prefill_budget: PrefillBudget = None,
    threads: Threads = None,
    max_queued_requests: MaxQueuedRequests = 256,
    request_timeout: RequestTimeout = 600.0,
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
        chunk=chunk,
        prefill_budget=prefill_budget,
        threads=threads,
        max_queued_requests=max_queued_requests,
        request_timeout=request_timeout,
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
