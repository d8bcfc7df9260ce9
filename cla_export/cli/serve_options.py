"""What `serve` and `deploy` have in common: how a bundle is served."""

from pathlib import Path
from typing import Annotated

import typer

from cla_export.cli.options import Backend

BackendChoice = Annotated[
    Backend | None,
    typer.Option(help="What runs it; by default what the bundle was exported for."),
]
Host = Annotated[
    str, typer.Option(help="Address to listen on; others than this machine need a key.")
]
Port = Annotated[int, typer.Option(help="0: any that is free.")]
Slots = Annotated[int | None, typer.Option(help="Sequences that run side by side.")]
KvMemory = Annotated[
    str | None, typer.Option(help="Memory for KV caches, such as 8GiB; becomes slots.")
]
MaxLen = Annotated[
    int | None, typer.Option(help="Tokens of prompt and answer; by default all positions.")
]
Chunk = Annotated[
    int | None,
    typer.Option(
        help="Prompt tokens read at once, between the others' steps; by default 64, 512 on a GPU."
    ),
]
PrefillBudget = Annotated[
    float | None,
    typer.Option(
        help="Milliseconds that reading prompts may add to each token of the others, on average; "
        "by default a chunk each."
    ),
]
ServedModelName = Annotated[
    str | None, typer.Option(help="What clients call the model; by default the folder's name.")
]
ChatTemplateFile = Annotated[
    Path | None, typer.Option(help="File in jinja2's language, in place of the model's own.")
]
ApiKeyFile = Annotated[Path | None, typer.Option(help="File of keys, one a line.")]
AllowNoKey = Annotated[
    bool, typer.Option("--allow-no-key", help="Let other machines in without a key.")
]
MaxQueuedRequests = Annotated[int, typer.Option(help="More are answered 429.")]
MaxBody = Annotated[str, typer.Option(help="Size of a body; more is answered 413.")]
RequestTimeout = Annotated[float, typer.Option(help="Seconds that a request has in all; then 504.")]
StepTimeout = Annotated[
    float, typer.Option(help="Seconds after which a step is taken to hang: /health is 503.")
]
ShutdownTimeout = Annotated[
    float, typer.Option(help="Seconds that running requests have after SIGTERM.")
]
SslCertfile = Annotated[Path | None, typer.Option(help="TLS certificate.")]
SslKeyfile = Annotated[Path | None, typer.Option(help="Its private key.")]
