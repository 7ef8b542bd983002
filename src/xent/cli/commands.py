"""The group of all commands, and the one table from errors to exit codes.

A command is thin: it parses, calls, prints. Started several times by torchrun, ``fit`` and ``predict`` share
the rows; rank 0 writes and prints results.

Exit codes: 0 done, 1 the job could not be done or an identity does not hold, 2 bad input, 3 a threshold of
``xent audit --fail-on`` is crossed, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import click

from xent.cli._registry import command_names, load_command
from xent.cli.output import complain
from xent.errors import BadInput, MissingExtra, RankFailed, RankLost, Terminated


class Exit(NamedTuple):
    """An exit code, and a line on stderr, for some errors."""

    errors: tuple[type[BaseException], ...]
    code: int
    line: Callable[[Any], object]


def _usage(error: click.UsageError) -> str:
    command = error.ctx.command_path if error.ctx else "xent"
    return f"{error.format_message()} ({command} --help)"


EXITS = (
    Exit((click.UsageError,), 2, _usage),
    Exit((BadInput,), 2, str),
    Exit((MissingExtra, RankLost, RankFailed), 1, str),
    Exit((OSError, MemoryError), 1, lambda e: f"the job could not be done: {e or type(e).__name__}"),
    Exit((KeyboardInterrupt,), 130, lambda _: "interrupted; no file is half-written"),
    Exit(
        (Terminated,),
        128 + signal.SIGTERM,
        lambda _: "ended by SIGTERM, as torchrun ends the ranks that are left; nothing is half-written",
    ),
)
"""The first row that an error belongs to counts."""


class Commands(click.Group):
    """The registered commands; the one place where an error becomes a line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        return command_names()

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by its name."""
        return load_command(cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; end the process as the table says where it raises one of its errors."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # by `xent fit … | head`: printing comes last, so the work is done
            with contextlib.suppress(OSError):  # Python's own flush at the end is not to fail again
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)
        except BaseException as error:
            for row in EXITS:
                if isinstance(error, row.errors):
                    complain(row.line(error))
                    ctx.exit(row.code)
            raise


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="xent")
def cli() -> None:
    """Fit softmax classifiers to files, predict with them, audit predictions, and verify the mathematics."""
