"""build: a TensorRT engine of a bundle."""

from pathlib import Path
from typing import Annotated

import typer

import cla_export
from cla_export.cli.app import app
from cla_export.cli.options import AsJson, BundleFolder, DType, EngineTarget, Force
from cla_export.cli.terminal import console_for, progress_bar, show


@app.command(epilog="Example: cla-export build my-bundle --compute-capability '8.6 8.9 12.0'")
def build(
    bundle: BundleFolder,
    target: Annotated[
        EngineTarget | None, typer.Option(help="Flavour; by default the bundle's target.")
    ] = None,
    precision: Annotated[
        DType | None, typer.Option(help="Checked against the bundle's dtype, which decides.")
    ] = None,
    capacity: Annotated[int | None, typer.Option(help="Tokens a slot holds.")] = None,
    slots: Annotated[int, typer.Option(help="Rows side by side in decode.")] = 8,
    chunk: Annotated[int | None, typer.Option(help="Tokens of a prefill call, at most.")] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(help="tensorrt-rtx: GPUs to build for, such as '8.9 12.0'; repeatable."),
    ] = None,
    refit: Annotated[bool, typer.Option("--refit", help="Weights can be replaced.")] = False,
    strip: Annotated[bool, typer.Option("--strip", help="Leave weights out.")] = False,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Weights may stay in host memory.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Runs on later versions too.")
    ] = False,
    timing_cache: Annotated[Path | None, typer.Option(help="File, read and updated.")] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Build a TensorRT engine from a bundle that was exported for it."""
    with progress_bar() as progress:
        built = cla_export.build(
            bundle,
            flavour=None if target is None else target.value,
            precision=None if precision is None else precision.value,
            capacity=capacity,
            slots=slots,
            chunk=chunk,
            compute_capabilities=tuple(
                name
                for given in compute_capability or ()
                for name in given.replace(",", " ").split()
            ),
            refit=refit,
            strip=strip,
            weight_streaming=weight_streaming,
            version_compatible=version_compatible,
            timing_cache=None if timing_cache is None else str(timing_cache),
            force=force,
            progress=progress,
        )
    if as_json:
        show({"folder": str(built.folder), **built.record})
        return
    console, record = console_for(), built.record
    console.print(f"[bold green]built[/] {built.folder}", highlight=False)
    versions = ", ".join(f"{name} {found}" for name, found in record["versions"].items())
    console.print(
        f"  {record['engine']['bytes']:,} bytes in {record['seconds']:.1f} s, at most "
        f"{record['peak_bytes'] / 2**20:,.0f} MiB of memory; {versions}. Built here, not run here",
        highlight=False,
    )
