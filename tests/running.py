"""Commands run in this process, as in a terminal."""

from __future__ import annotations

from click.testing import CliRunner, Result

from xent.cli.commands import cli


def run(*arguments: object, code: int = 0, **options) -> Result:
    """Run xent with some arguments; it must end with the exit code."""
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments], **options)
    assert done.exit_code == code, (done.exit_code, done.output, done.exception)
    return done
