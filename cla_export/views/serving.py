"""The server's start, on the terminal: the KV pool, and what it would be without sharing."""

from typing import TYPE_CHECKING

from cla_export.serve.pool import PoolSize

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def render(model: str, backend: str, layout: str, pool: PoolSize, console: "Console") -> None:
    """Print the banner."""
    from rich.markup import escape

    console.print(
        f"[bold]{escape(model)}[/] on {backend}: {layout}; slots of {pool.capacity:,} tokens",
        highlight=False,
    )
    console.print(_table(pool))


def as_text(pool: PoolSize) -> str:
    """The table alone, for a message."""
    from io import StringIO

    from rich.console import Console

    file = StringIO()
    Console(file=file, width=72).print(_table(pool))
    return file.getvalue().rstrip()


def _table(pool: PoolSize) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table("KV cache", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("this model", justify="right")
    table.add_column("without sharing", justify="right")
    for name, own, dense in (
        ("per token", _size(pool.bytes_per_token), _size(pool.dense_bytes_per_token)),
        ("per slot", _size(pool.bytes_per_slot), _size(pool.dense_bytes_per_slot)),
        (f"slots in {_size(pool.total)}", f"{pool.slots:,}", f"{pool.dense_slots:,}"),
    ):
        table.add_row(name, own, dense)
    return table


def _size(size: int) -> str:
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= factor:
            return f"{size / factor:,.2f} {unit}"
    return f"{size:,} B"
