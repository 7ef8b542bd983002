"""The command line: a file a command, and one group that turns errors into exit codes.

Importing this package needs neither click nor rich; the commands do.
"""

from xent.cli._registry import register_command

__all__ = ["register_command"]
