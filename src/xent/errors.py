"""The errors of bad inputs, missing extras and lost processes; each becomes an exit code in one place."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

EXTRAS = {
    "probe": ("sklearn", "scipy", "pyarrow", "safetensors", "threadpoolctl"),
    "cli": ("click", "rich"),
    "report": ("matplotlib",),
}
"""The packages, by import name, that each extra installs."""

_DISTRIBUTION = {"sklearn": "scikit-learn"}  # where pip's name is not the import's


class BadInput(ValueError):
    """Data, a model file or a setting that cannot be used; the message is one line and names the way out."""


class MissingExtra(ImportError):
    """A package of an optional extra is not installed; the message names the extra."""


class RankLost(ConnectionError):
    """Another of the processes that share a job has ended, or does not answer."""


class Terminated(SystemExit):
    """SIGTERM came, which torchrun sends to the other ranks when one has ended."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class RankFailed(RuntimeError):
    """Another of the processes that share a job met an error that is no bad input; it says which there."""


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Turn a failed import of one of the extra's packages, inside the block, into a ``MissingExtra``.

    >>> with needs("report"):
    ...     raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
    Traceback (most recent call last):
        ...
    xent.errors.MissingExtra: matplotlib is not installed; it comes with: pip install 'xent[report]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS[extra]:
            raise
        said = _DISTRIBUTION.get(package, package)
        raise MissingExtra(
            f"{said} is not installed; it comes with: pip install 'xent[{extra}]'", name=package
        ) from error
