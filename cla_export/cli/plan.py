"""plan: what fits a memory budget."""

from pathlib import Path
from typing import Annotated

import typer

import cla_export
from cla_export.cli.app import app
from cla_export.cli.options import AsJson, CacheDType, DType
from cla_export.cli.terminal import console_for, show


@app.command(epilog="Example: cla-export plan my-model --memory 16GiB --context 8192")
def plan(
    source: Annotated[Path, typer.Argument(help="Model folder, or its config.json.")],
    memory: Annotated[str, typer.Option(help="Memory for weights and caches, such as 16GiB.")],
    context: Annotated[int, typer.Option(help="Tokens each slot must hold.")],
    batch: Annotated[int | None, typer.Option(help="Slots wanted side by side.")] = None,
    dtype: Annotated[DType, typer.Option(help="Weights and caches.")] = DType.bf16,
    kv_cache: Annotated[CacheDType | None, typer.Option(help="Caches alone.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw slots by context: .png or .svg.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say which KV layouts fit a memory budget, and how many slots each leaves room for."""
    from cla_export.views import planning as planning_view

    caches = dtype.value if kv_cache is None else kv_cache.value
    found = cla_export.plan(
        source,
        memory=memory,
        context=context,
        batch=batch,
        dtype=caches,
        weights_dtype=dtype.value,
    )
    if plot is not None:
        planning_view.plot(found, plot)
    show(found.to_json()) if as_json else planning_view.render(found, console_for())
