"""Where output goes: results to standard output, the rest to standard error."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from cla_export.bundle import Progress


def show(content: object) -> None:
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def console_for(*, stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=True)


def escape(text: str) -> str:
    from rich import markup

    return markup.escape(text)


@contextmanager
def progress_bar() -> Iterator["Progress"]:
    """A progress bar on standard error where that is a terminal, silence elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = console_for(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("start", total=None)

        def update(what: str, done: int, of: int) -> None:
            bar.update(task, description=what, completed=done, total=of)

        yield update
