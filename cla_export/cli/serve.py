"""serve: a bundle behind an OpenAI-compatible HTTP API."""

from typing import Annotated

import typer

from cla_export.cli.app import app
from cla_export.cli.options import AsJson, BundleFolder, EngineFolder, Threads
from cla_export.cli.serve_options import (
    AllowNoKey,
    ApiKeyFile,
    BackendChoice,
    ChatTemplateFile,
    Chunk,
    Host,
    KvMemory,
    MaxBody,
    MaxLen,
    MaxQueuedRequests,
    Port,
    PrefillBudget,
    RequestTimeout,
    ServedModelName,
    ShutdownTimeout,
    Slots,
    SslCertfile,
    SslKeyfile,
    StepTimeout,
)
from cla_export.cli.terminal import console_for, escape, show


@app.command(epilog="Example: cla-export serve my-bundle --kv-memory 8GiB --api-key-file keys.txt")
def serve(
    bundle: BundleFolder,
    backend: BackendChoice = None,
    engine: EngineFolder = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    slots: Slots = None,
    kv_memory: KvMemory = None,
    max_len: MaxLen = None,
    chunk: Chunk = None,
    prefill_budget: PrefillBudget = None,
    threads: Threads = None,
    served_model_name: ServedModelName = None,
    chat_template: ChatTemplateFile = None,
    api_key: Annotated[
        list[str] | None, typer.Option(help="A key that clients must send; repeatable.")
    ] = None,
    api_key_file: ApiKeyFile = None,
    allow_no_key: AllowNoKey = False,
    max_queued_requests: MaxQueuedRequests = 256,
    max_queued_tokens: Annotated[
        int, typer.Option(help="Tokens that waiting requests may come to.")
    ] = 262_144,
    max_body: MaxBody = "4MiB",
    request_timeout: RequestTimeout = 600.0,
    step_timeout: StepTimeout = 60.0,
    shutdown_timeout: ShutdownTimeout = 30.0,
    ssl_certfile: SslCertfile = None,
    ssl_keyfile: SslKeyfile = None,
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
    from cla_export.serve.gate import read_keys
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
        keys=(*(api_key or ()), *(read_keys(api_key_file) if api_key_file else ())),
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
