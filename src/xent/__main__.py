"""``python -m xent``, ``torchrun -m xent`` and the ``xent`` script: the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable


def main() -> None:
    """Run the command line."""
    try:
        _command_line()()
    except KeyboardInterrupt:  # within an import; the command line itself sees the others
        sys.stderr.write("xent: interrupted\n")
        sys.exit(130)


def _command_line() -> Callable[[], object]:
    """Return the group of commands; end the process with one line where it lacks a package."""
    try:
        import rich  # noqa: F401  (commands import it when they print; a missing one is to be known before)

        from xent.cli.commands import cli
    except ModuleNotFoundError as error:
        if error.name in {"click", "rich"}:
            sys.exit(f"xent: the command line needs {error.name}: pip install 'xent[cli,probe]'")
        raise
    return cli


if __name__ == "__main__":
    main()
