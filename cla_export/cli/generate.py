"""generate: continue a prompt."""

import sys
from typing import Annotated

import typer

import cla_export
from cla_export.cli.app import app
from cla_export.cli.options import (
    AsJson,
    Backend,
    BundleFolder,
    EngineFolder,
    Module,
    Threads,
    importable,
)
from cla_export.cli.terminal import show


@app.command(epilog='Example: cla-export generate my-bundle "In the beginning" -n 64')
def generate(
    bundle: BundleFolder,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    tokens: Annotated[int, typer.Option("-n", "--tokens", help="New tokens at most.")] = 64,
    backend: Annotated[
        Backend | None,
        typer.Option(help="What runs it; by default what the bundle was exported for."),
    ] = None,
    engine: EngineFolder = None,
    module: Module = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling: probability mass kept.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed for sampling.")] = 0,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt, streaming the text."""
    from cla_export.sampling import Sampler, SamplingParams

    model = cla_export.load(
        bundle,
        backend=None if backend is None else backend.value,
        engine=engine,
        threads=threads,
        module=importable(module),
    )
    params = SamplingParams(temperature=temperature, top_p=top_p, seed=seed)
    pieces = model.stream(prompt, tokens, Sampler(params))
    if as_json:
        show({"prompt": prompt, "text": "".join(pieces)})
        return
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
