"""export: a model folder becomes a bundle."""

from pathlib import Path
from typing import Annotated

import typer

import cla_export
from cla_export.cli.app import app
from cla_export.cli.options import (
    AsJson,
    AttentionChoice,
    CacheDType,
    DType,
    Force,
    Module,
    Quantize,
    Source,
    Target,
    WeightsChoice,
    importable,
)
from cla_export.cli.terminal import console_for, escape, progress_bar, show


@app.command(epilog="Example: cla-export export my-model my-bundle --target onnxruntime")
def export(
    source: Source,
    dest: Annotated[Path, typer.Argument(help="Folder to create.")],
    target: Annotated[
        Target, typer.Option(help="What to lower the graph for.")
    ] = Target.onnxruntime,
    dtype: Annotated[DType, typer.Option(help="Weights, activations and caches.")] = DType.fp32,
    quantize: Annotated[
        Quantize | None, typer.Option(help="Weights alone, in blocks of 32; target onnxruntime.")
    ] = None,
    kv_cache: Annotated[
        CacheDType | None,
        typer.Option(help="Caches alone, with scales from a text; target onnxruntime in fp32."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="That text; by default the model folder's heldout.txt, or random ids."),
    ] = None,
    attention: Annotated[
        AttentionChoice | None,
        typer.Option(help="TensorRT targets: its own kernels, or the fused plugin."),
    ] = None,
    module: Module = None,
    weights: Annotated[
        WeightsChoice,
        typer.Option(
            help="Link the model folder's files, or copy them; auto: link 1 GiB and more."
        ),
    ] = WeightsChoice.auto,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Export a model folder to a bundle: an ONNX graph with one KV cache per layer group."""
    with progress_bar() as progress:
        bundle = cla_export.export(
            source,
            dest,
            target=target.value,
            dtype=dtype.value,
            quantize=None if quantize is None else quantize.value,
            kv_cache=None if kv_cache is None else kv_cache.value,
            calibration=calibration,
            attention=None if attention is None else attention.value,
            module=importable(module),
            weights=weights.value,
            force=force,
            progress=progress,
        )
    if as_json:
        show(dict(bundle.manifest))
        return
    console = console_for()
    console.print(f"[bold green]exported[/] {dest}: {bundle.layout.describe()}", highlight=False)
    own, dense = (
        layout.bytes_per_token(bundle.cache_dtype)
        for layout in (bundle.layout, bundle.layout.dense_twin())
    )
    console.print(
        f"  {bundle.target}, {bundle.arithmetic}; KV cache {own:,} bytes per token, {dense:,} "
        "without sharing",
        highlight=False,
    )
    if linked := bundle.linked:
        console.print(
            f"  weights are the model folder's own: {', '.join(linked)}, taken in without a copy; "
            "what reads them by the onnx package wants --weights copy",
            highlight=False,
        )
    for line in (*bundle.attention_choices(), *bundle.expert_choices(), *bundle.notes):
        console.print(f"  {escape(line)}", highlight=False)
