"""The commands by name, each imported when it is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import click

_COMMANDS: dict[str, str | click.Command] = {}


def register_command(name: str, command: str | click.Command) -> None:
    """Register a command, which people then call as ``xent NAME``.

    Args:
        name: the name.
        command: a command of click, or ``"module:attribute"``, which is imported when the command is used. An
            error that it raises becomes one line and an exit code, as for the commands of xent.

    Raises:
        ValueError: a name that another command has.

    Example:
        >>> register_command("fit", "my_package.commands:fit")
        Traceback (most recent call last):
            ...
        ValueError: there is a command called 'fit' already; choose another name
    """
    if name in _COMMANDS:
        raise ValueError(f"there is a command called {name!r} already; choose another name")
    _COMMANDS[name] = command


def command_names() -> list[str]:
    """Return the names of the commands in alphabetical order."""
    return sorted(_COMMANDS)


def load_command(name: str) -> click.Command | None:
    """Return the command of a name, importing it where that is to be done; None if there is none."""
    command = _COMMANDS.get(name)
    if not isinstance(command, str):
        return command
    module, _, attribute = command.partition(":")
    loaded: click.Command = getattr(importlib.import_module(module), attribute)
    return loaded


register_command("audit", "xent.cli.audit:audit")
register_command("fit", "xent.cli.fit:fit")
register_command("predict", "xent.cli.predict:predict")
register_command("verify", "xent.cli.verify:verify")
