"""``python -m xent``, ``torchrun -m xent`` and the ``xent`` script: the command line."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from xent.cli import cli
    except ModuleNotFoundError as error:
        if error.name in {"click", "rich"}:
            sys.exit(f"xent: the command line needs {error.name}: pip install 'xent[cli,probe]'")
        raise
    cli()


if __name__ == "__main__":
    main()
