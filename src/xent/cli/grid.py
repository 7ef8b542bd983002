"""A table in a terminal without lines, as all commands print it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click
from rich.console import Console
from rich.table import Table


def grid(first: str, *others: str) -> Table:
    """Return an empty table, its first column flush left and the others flush right."""
    made = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    made.add_column(first)
    for name in others:
        made.add_column(name, justify="right")
    return made


def show(pieces: Iterable[Any]) -> None:
    """Print texts and tables to standard output."""
    console = Console(highlight=False, soft_wrap=True)
    with console.capture() as printed:  # printed by click: rich ends the process, with 1, on a closed pipe
        for piece in pieces:
            console.print(piece)
    click.echo(printed.get(), nl=False)
