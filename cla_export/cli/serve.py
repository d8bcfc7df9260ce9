"""serve: a bundle behind an OpenAI-compatible HTTP API."""

from pathlib import Path
from typing import Annotated

import typer

from cla_export.cli.app import app
from cla_export.cli.options import AsJson, Backend, BundleFolder, EngineFolder, Threads
from cla_export.cli.terminal import console_for, escape, show
from cla_export.errors import BadInput


@app.command(epilog="Example: cla-export serve my-bundle --kv-memory 8GiB --api-key-file keys.txt")
def serve(
    bundle: BundleFolder,
    backend: Annotated[
        Backend | None,
        typer.Option(help="What runs it; by default what the bundle was exported for."),
    ] = None,
    engine: EngineFolder = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.")] = 8000,
    slots: Annotated[int | None, typer.Option(help="Sequences that run side by side.")] = None,
    kv_memory: Annotated[
        str | None, typer.Option(help="Memory for KV caches, such as 8GiB; becomes slots.")
    ] = None,
    max_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer; by default all positions.")
    ] = None,
    chunk: Annotated[
        int, typer.Option(help="Prompt tokens read at once, between the others' steps.")
    ] = 64,
    prefill_budget: Annotated[
        float | None,
        typer.Option(
            help="Milliseconds that reading prompts may add to each token of the others, on "
            "average; by default a chunk each."
        ),
    ] = None,
    threads: Threads = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the model; by default the folder's name.")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="File in jinja2's language, in place of the model's own.")
    ] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(help="A key that clients must send; repeatable.")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File of keys, one a line.")] = None,
    allow_no_key: Annotated[
        bool, typer.Option("--allow-no-key", help="Let other machines in without a key.")
    ] = False,
    max_queued_requests: Annotated[int, typer.Option(help="More are answered 429.")] = 256,
    max_queued_tokens: Annotated[
        int, typer.Option(help="Tokens that waiting requests may come to.")
    ] = 262_144,
    max_body: Annotated[str, typer.Option(help="Size of a body; more is answered 413.")] = "4MiB",
    request_timeout: Annotated[
        float, typer.Option(help="Seconds that a request has in all; then 504.")
    ] = 600.0,
    step_timeout: Annotated[
        float, typer.Option(help="Seconds after which a step is taken to hang: /health is 503.")
    ] = 60.0,
    shutdown_timeout: Annotated[
        float, typer.Option(help="Seconds that running requests have after SIGTERM.")
    ] = 30.0,
    ssl_certfile: Annotated[Path | None, typer.Option(help="TLS certificate.")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="Its private key.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Open everything, and exit.")] = False,
    as_json: AsJson = False,
) -> None:
    """Serve a bundle: OpenAI's completions and chats, with continuous batching.

    SIGTERM drains. A second one stops at once. Exits with 70 where the engine failed for good, to
    be started again.
    """
    from cla_export.planning import parse_bytes
    from cla_export.serve import process, server
    from cla_export.serve.engine import Limits
    from cla_export.views import serving

    options = server.Options(
        backend=None if backend is None else backend.value,
        engine=engine,
        host=host,
        port=port,
        slots=slots,
        kv_memory=None if kv_memory is None else parse_bytes(kv_memory),
        max_len=max_len,
        chunk=chunk,
        prefill_seconds=None if prefill_budget is None else prefill_budget / 1e3,
        threads=threads,
        name=served_model_name,
        keys=(*(api_key or ()), *_keys(api_key_file)),
        allow_no_key=allow_no_key,
        limits=Limits(max_queued_requests, max_queued_tokens, step_timeout),
        most_body=parse_bytes(max_body),
        request_seconds=request_timeout,
        shutdown_seconds=shutdown_timeout,
        certificate=ssl_certfile,
        private_key=ssl_keyfile,
        chat_template=chat_template,
    )
    server.check_options(options)
    console = console_for(stderr=True)

    def tell(opened: server.Opened) -> None:
        name, backend_name = opened.model.name, opened.executor.backend
        if as_json:
            show({"model": name, "backend": backend_name, "pool": opened.pool.to_json()})
        serving.render(name, backend_name, opened.bundle.layout.describe(), opened.pool, console)

    if check:
        tell(server.open_model(bundle, options))
        return

    def listening(address: str) -> None:
        console.print(f"loading {escape(str(bundle))}; {address}/ready says when", highlight=False)

    def taken(address: str, opened: server.Opened) -> None:
        tell(opened)
        console.print(f"serving {escape(opened.model.name)} on {address}", highlight=False)

    raise typer.Exit(process.serve(bundle, options, process.Told(listening, taken)))


def _keys(file: Path | None) -> list[str]:
    if file is None:
        return []
    if not file.is_file():
        raise BadInput(f"{file}: no such file; expected API keys, one a line")
    keys = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    keys = [key for key in keys if key and not key.startswith("#")]
    if not keys:
        raise BadInput(f"{file}: there is no API key in it; expected one a line")
    return keys
