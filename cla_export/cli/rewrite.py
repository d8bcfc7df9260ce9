"""rewrite: a graph that somebody else traced gets its caches."""

from pathlib import Path
from typing import Annotated

import typer

import cla_export
from cla_export.cli.app import app
from cla_export.cli.options import AsJson, Target
from cla_export.cli.terminal import console_for, show


@app.command(epilog="Example: cla-export rewrite stateless.onnx stateful.onnx")
def rewrite(
    source: Annotated[
        Path, typer.Argument(help="ONNX file: input_ids, position_ids -> logits; no caches.")
    ],
    dest: Annotated[Path, typer.Argument(help="File to write; weights go to DEST.data.")],
    target: Annotated[
        Target, typer.Option(help="What to lower the graph for.")
    ] = Target.onnxruntime,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Run both graphs and compare them.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Give a graph that somebody else traced one KV cache per group; sharing is discovered."""
    done = cla_export.rewrite_graph(source, dest, target=target.value, check=check, force=force)
    if as_json:
        show(done.to_json())
        return
    console = console_for()
    console.print(f"[bold green]rewritten[/] {dest}: {done.layout.describe()}", highlight=False)
    operators = ", ".join(dict.fromkeys(done.attention))
    console.print(f"  {done.target}; caches are read by {operators}", highlight=False)
    if done.error is not None:
        console.print(
            f"  a prompt and single steps against the stateless graph: logits within "
            f"{done.error:.1e}, the largest is {done.largest:.3g}",
            highlight=False,
        )
