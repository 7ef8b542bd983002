"""``xent verify``: every identity of the mathematics, checked on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from xent._util.atomic_write import check_writable
from xent._util.text import json_text, printable
from xent.cli.options import device

if TYPE_CHECKING:
    from xent.verify.report import DtypeName


@click.command()
@device
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(["float64", "float32", "bfloat16", "float16"]),
    help="A type to check. May be repeated. [default: float64 and float32]",
)
@click.option(
    "--figures",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write figures of the identities into this directory, as SVG.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def verify(device: str, dtypes: tuple[DtypeName, ...], figures: Path | None, as_json: bool) -> None:
    """Check every identity of the mathematics on this machine: which hold, and how closely.

    \b
    xent verify
    xent verify --device cuda --dtype bfloat16
    xent verify --figures figures
    """
    from xent import verify as job
    from xent.verify.table import say

    if figures is not None:
        check_writable(figures)
    report = job.verify(tuple(dict.fromkeys(dtypes)) or job.DEFAULT_DTYPES, device)
    files = [] if figures is None else [str(path) for path in job.draw(figures)]
    if as_json:
        click.echo(json_text({**report.summary(), "files": files}))
    else:
        console = Console(highlight=False)
        console.width = console.width if console.is_terminal else 120  # a file is as wide as the table
        with console.capture() as printed:
            say(console, report)
        click.echo(printed.get(), nl=False)
        if files:
            click.echo("drawn: " + printable(", ".join(files)))
    if not report.holds:
        sys.exit(1)
