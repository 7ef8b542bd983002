"""Lines on stderr."""

from __future__ import annotations

import contextlib

import click

from xent._util.text import printable


def complain(what: object) -> None:
    """Print a complaint as one line on stderr; nothing if nobody reads it."""
    with contextlib.suppress(BrokenPipeError):
        click.echo("xent: " + printable(" ".join(str(what).split())), err=True)
