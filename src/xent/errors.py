"""Every public exception, one class each, and ``needs``, which names the extra that is missing."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

__all__ = ["BadInput", "MissingExtra", "NoBestTemperature", "RankFailed", "RankLost", "Terminated", "needs"]

EXTRAS = {
    "probe": ("sklearn", "scipy", "pyarrow", "safetensors", "threadpoolctl"),
    "cli": ("click", "rich"),
    "report": ("matplotlib", "jinja2"),
    "onnx": ("onnx",),
}
"""The packages, by import name, that each extra installs."""

_DISTRIBUTION = {"sklearn": "scikit-learn"}  # where pip's name is not the import's


class BadInput(ValueError):
    """Data, a model file or a setting that cannot be used; the message is one line and names the way out."""


class MissingExtra(ImportError):
    """A package of an optional extra is not installed; the message names the extra."""


class NoBestTemperature(ValueError):
    """No finite positive temperature is the best one: the loss keeps falling on the way to a limit.

    ``limit`` is 0.0 where the logits put every target first (any smaller T is better), and ``math.inf`` where
    they say less about the targets than equal logits would (any larger T is better).
    """

    def __init__(self, message: str, limit: float) -> None:
        super().__init__(message)
        self.limit = limit


class RankLost(ConnectionError):
    """Another of the processes that share a job has ended, or does not answer."""


class Terminated(SystemExit):
    """The arrival of SIGTERM, which torchrun sends to the other ranks when one has ended."""

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
        distribution = _DISTRIBUTION.get(package, package)
        raise MissingExtra(
            f"{distribution} is not installed; it comes with: pip install 'xent[{extra}]'", name=package
        ) from error
