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
    """An error of data, a model file or a setting that cannot be used.

    The message is one line that names the place and the way out. The command line prints it and ends with the
    exit code 2.

    Example:
        >>> import xent
        >>> from xent.errors import BadInput
        >>> try:
        ...     xent.load_model("no-such-file.safetensors")
        ... except BadInput as error:
        ...     print(error)
        no-such-file.safetensors: ...
    """


class MissingExtra(ImportError):
    """An error of an optional extra whose package is not installed; the message names the extra.

    Example:
        >>> from xent.errors import MissingExtra, needs
        >>> try:
        ...     with needs("report"):
        ...         raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        ... except MissingExtra as error:
        ...     print(error)
        matplotlib is not installed; it comes with: pip install 'xent[report]'
    """


class NoBestTemperature(ValueError):
    """An error of ``fit_temperature`` where the loss keeps falling as the temperature goes to a limit.

    ``limit`` is 0.0 where the logits put every target first, so that any smaller T is better. It is
    ``math.inf`` where they predict the targets worse than equal logits would, so that any larger T is better.

    Args:
        message: the text of the error.
        limit: 0.0 or ``math.inf``.

    Example:
        >>> import torch, xent
        >>> try:
        ...     xent.fit_temperature(torch.tensor([[5.0, 0.0]]), torch.tensor([0]))  # right already
        ... except xent.errors.NoBestTemperature as error:
        ...     print(error.limit)
        0.0
    """

    def __init__(self, message: str, limit: float) -> None:
        super().__init__(message)
        self.limit = limit


class RankLost(ConnectionError):
    """An error of a job that processes share, where another of them has ended or does not answer.

    Example:
        >>> from xent.errors import RankLost
        >>> issubclass(RankLost, ConnectionError)
        True
    """


class Terminated(SystemExit):
    """An exit by SIGTERM, which torchrun sends to the other processes of a job when one has ended.

    Example:
        >>> from xent.errors import Terminated
        >>> Terminated().code  # 128 + 15
        143
    """

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class RankFailed(RuntimeError):
    """An error of a job that processes share, where another of them met an error that is no ``BadInput``.

    The message names that process (its rank) and its error.

    Example:
        >>> from xent.errors import RankFailed
        >>> issubclass(RankFailed, RuntimeError)
        True
    """


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Turn a failed import of one of an extra's packages, inside the block, into a ``MissingExtra``.

    Args:
        extra: the name of the extra, such as ``"report"``.

    Returns:
        A context manager.

    Raises:
        MissingExtra: a package of the extra is not installed.

    Example:
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
