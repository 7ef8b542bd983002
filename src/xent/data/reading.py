"""The one place where an error of any library inside a reader becomes a ``BadInput``.

Libraries raise what they like over a damaged file: NumPy's header parser a ``TokenError``, zipfile a
``NotImplementedError``, zlib, thrift and JSON their own. So no list of exceptions is kept here. What passes
is told by who raised it: a ``TypeError`` out of a line of this package is a fault of ours, not the file's.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

from xent.data.limits import memory
from xent.errors import BadInput

FAULTS = (AssertionError, AttributeError, LookupError, NameError, TypeError, ArithmeticError)
"""Errors that a mistake in a program raises; from a line of our own it is one."""

SMALL = 100
"""A file of which so many fit into the memory and which still asks for more of it claims what it has not."""


@contextlib.contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn what a library raises over the file, inside the block, into a ``BadInput`` with the file's name.

    >>> import io, zipfile
    >>> with reading(Path("a.npz"), "NPZ"):
    ...     zipfile.ZipFile(io.BytesIO())
    Traceback (most recent call last):
        ...
    xent.errors.BadInput: a.npz: not readable as NPZ: File is not a zip file
    """
    try:
        yield
    except (BadInput, ImportError):
        raise
    except MemoryError as error:
        if path.stat().st_size * SMALL > memory():
            raise
        raise BadInput(
            f"{path}: a file of {path.stat().st_size:,} bytes that claims more than there is memory; "
            "it is damaged, save it again"
        ) from error
    except Exception as error:
        if isinstance(error, FAULTS) and _ours(error):
            raise
        if isinstance(error, OSError) and error.errno is not None and error.strerror:
            raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise BadInput(f"{path}: not readable as {kind}: {why}") from error


def _ours(error: Exception) -> bool:
    """Return whether a line of this package raised the error, and not one of a library that it called."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")).partition(".")[0] == "xent"
