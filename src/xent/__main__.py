"""``python -m xent``, ``torchrun -m xent`` and the ``xent`` script: the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable


def main() -> None:
    try:
        _command_line()()
    except KeyboardInterrupt:  # within an import; the command line itself sees the others
        sys.stderr.write("xent: interrupted\n")
        sys.exit(130)


def _command_line() -> Callable[[], object]:
    try:
        from xent.cli.commands import cli
    except ModuleNotFoundError as error:
        if error.name in {"click", "rich"}:
            sys.exit(f"xent: the command line needs {error.name}: pip install 'xent[cli,probe]'")
        raise
    return cli


if __name__ == "__main__":
    main()
