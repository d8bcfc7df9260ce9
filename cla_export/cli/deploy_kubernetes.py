"""deploy kubernetes: the objects that a cluster needs."""

from pathlib import Path
from typing import Annotated

import typer

from cla_export.cli.deploy import group
from cla_export.cli.options import AsJson, BundleFolder
from cla_export.cli.serve_options import KvMemory, MaxLen, Slots
from cla_export.cli.terminal import console_for, show


@group.command(
    epilog="Example: cla-export deploy kubernetes my-bundle manifests --replicas 2:8 --cpus 8"
)
def kubernetes(
    bundle: BundleFolder,
    out: Annotated[Path, typer.Argument(help="New folder for the files.")],
    image: Annotated[
        str | None, typer.Option(help="Image to run; by default one with the bundle in it.")
    ] = None,
    claim: Annotated[
        str | None,
        typer.Option(
            help="PersistentVolumeClaim with the bundle at its root; then not in the image."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of all objects; by default after the bundle's folder.")
    ] = None,
    replicas: Annotated[
        str, typer.Option(help="Pods, or MIN:MAX with an autoscaler.", metavar="N|MIN:MAX")
    ] = "1",
    cpus: Annotated[int, typer.Option(help="Cores of a pod, and threads of its engine.")] = 4,
    slots: Slots = None,
    kv_memory: KvMemory = None,
    max_len: MaxLen = None,
    shutdown_timeout: Annotated[
        int, typer.Option(help="Seconds that running requests have when a pod goes.")
    ] = 60,
    kserve: Annotated[
        bool, typer.Option("--kserve", help="A KServe InferenceService in place of them.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier folder.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write what a cluster needs to serve a bundle on CPUs: Deployment, Service and others.

    The memory that pods ask for is the weights, the KV pool and what the server itself takes.
    """
    from cla_export.deploy.kubernetes import MANIFESTS, write_manifests
    from cla_export.deploy.replicas import Replicas
    from cla_export.planning import parse_bytes

    deployment = write_manifests(
        bundle,
        out,
        image=image,
        claim=claim,
        name=name,
        replicas=Replicas.parse(replicas),
        cpus=cpus,
        slots=slots,
        kv_memory=None if kv_memory is None else parse_bytes(kv_memory),
        max_len=max_len,
        drain=shutdown_timeout,
        kserve=kserve,
        force=force,
    )
    pool = deployment.pool
    if as_json:
        facts = {"memory": deployment.memory, "image": deployment.image, "pool": pool.to_json()}
        show({"folder": str(out), "name": deployment.name, **facts})
        return
    console = console_for()
    console.print(f"[bold green]written[/] {out / MANIFESTS}", highlight=False)
    console.print(
        f"  {deployment.name}: {deployment.image}, {pool.slots} slots of {pool.capacity:,} tokens, "
        f"{deployment.memory / 2**20:,.0f} MiB a pod; its keys are in the secret "
        f"{deployment.keys_secret}",
        highlight=False,
    )
