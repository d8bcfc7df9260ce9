"""deploy ray: replicas of a bundle behind Ray Serve."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cla_export.cli.deploy import group
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


class Affinity(StrEnum):
    """Which replica a request goes to."""

    none = "none"
    prefix = "prefix"


@group.command(epilog="Example: cla-export deploy ray my-bundle --replicas 1:8 --kv-memory 8GiB")
def ray(
    bundle: BundleFolder,
    replicas: Annotated[
        str, typer.Option(help="How many, such as 2; or at least and at most: 1:8.")
    ] = "1",
    num_cpus: Annotated[float, typer.Option(help="Processors of each replica.")] = 1.0,
    num_gpus: Annotated[
        float | None,
        typer.Option(help="GPUs of each replica; by default one if the bundle runs on one."),
    ] = None,
    affinity: Annotated[
        Affinity,
        typer.Option(help="prefix: prompts that begin alike go to one replica, to its cache."),
    ] = Affinity.none,
    upscale_delay: Annotated[
        float, typer.Option(help="Seconds of more requests than slots, before a replica is added.")
    ] = 10.0,
    downscale_delay: Annotated[
        float, typer.Option(help="Seconds of less, before one is taken away.")
    ] = 300.0,
    write: Annotated[
        Path | None,
        typer.Option(help="Write a Serve config, for a cluster, and start nothing: FILE.yaml."),
    ] = None,
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
    api_key_file: ApiKeyFile = None,
    allow_no_key: AllowNoKey = False,
    max_queued_requests: MaxQueuedRequests = 256,
    max_body: MaxBody = "4MiB",
    request_timeout: RequestTimeout = 600.0,
    step_timeout: StepTimeout = 60.0,
    shutdown_timeout: ShutdownTimeout = 30.0,
    ssl_certfile: SslCertfile = None,
    ssl_keyfile: SslKeyfile = None,
    as_json: AsJson = False,
) -> None:
    """Serve a bundle by several replicas, which Ray Serve starts, scales, watches and replaces.

    Each replica is an engine of its own, on one device, with its own KV pool; --slots, --kv-memory
    and --threads are of one replica. Ray runs on this machine, and ends with the command; for a
    cluster, --write a config. SIGTERM drains. A second one stops at once.
    """
    from cla_export.deploy import ray_config, ray_local, ray_plan
    from cla_export.deploy.ray_args import ReplicaArgs
    from cla_export.deploy.replicas import Replicas
    from cla_export.views import serving

    ray_local.check_installed()
    options = ray_plan.RayOptions(
        replica=ReplicaArgs(
            bundle=str(bundle.resolve()),
            backend=None if backend is None else backend.value,
            engine=_path(engine),
            slots=slots,
            kv_memory=kv_memory,
            max_len=max_len,
            chunk=chunk,
            prefill_budget=prefill_budget,
            threads=threads or max(1, int(num_cpus)),
            served_model_name=served_model_name,
            chat_template=_path(chat_template),
            api_key_file=_path(api_key_file),
            max_body=max_body,
            request_timeout=request_timeout,
            step_timeout=step_timeout,
        ),
        replicas=Replicas.parse(replicas),
        host=host,
        port=port,
        allow_no_key=allow_no_key,
        cpus=num_cpus,
        gpus=num_gpus,
        affinity=affinity.value,
        scaling=ray_plan.Scaling(upscale_delay, downscale_delay),
        queued=max_queued_requests,
        shutdown_seconds=shutdown_timeout,
        certificate=ssl_certfile,
        private_key=ssl_keyfile,
    )
    plan = ray_plan.make_plan(options)
    if as_json:
        show(
            {
                "model": plan.name,
                "backend": plan.backend,
                "pool": plan.pool.to_json(),
                "config": ray_config.config(plan),
            }
        )
    console = console_for(stderr=True)
    serving.render(plan.name, plan.backend, plan.layout, plan.pool, console)
    each = (
        f"each of {options.replicas}: {options.cpus:g} CPU, {plan.gpus:g} GPU, and the pool above"
    )
    console.print(f"replicas, {each}", highlight=False)
    if write is not None:
        ray_config.write(plan, write)
        console.print(
            f"wrote {escape(str(write))}: serve deploy {escape(str(write))}", highlight=False
        )
        return

    def say(line: str) -> None:
        console.print(escape(line), highlight=False)

    raise typer.Exit(ray_local.run(plan, say))


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())
