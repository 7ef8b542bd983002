"""The readers of file formats, by the suffix of a file's name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from xent._processes.group import Share
from xent.data.layout import is_compressed, suffix_of
from xent.data.table import Table, Wanted

Reader: TypeAlias = Callable[[Path, Wanted, Share], Table]
"""``reader(path, wanted, share) -> table``; see :func:`register_reader`."""


Batches: TypeAlias = Callable[[Path, Wanted, Sequence[str]], Iterator[tuple[Table, Any]]]
"""``batches(path, wanted, keep)`` yields tables of the next rows, and Arrow tables of columns to keep."""


SharedBatches: TypeAlias = Callable[[Path, Wanted, Sequence[str], Share], Iterator[tuple[int, Table, Any]]]
"""``shared_batches(path, wanted, keep, share)`` also yields the position of each table's first row."""


@dataclasses.dataclass(frozen=True)
class Format:
    """A file format: its name in messages, and what reads it.

    ``count(path)`` returns the number of rows without reading them; formats without it are read for that.
    ``labels(folder, wanted, share, rows)`` returns the codes and classes of several files with as many rows,
    of formats whose labels are a file of their own. ``compressed`` formats are read from compressed files.
    ``layout`` are the options of a layout that the reader goes by.
    """

    name: str
    reader: Reader
    count: Callable[[Path], int] | None = None
    labels: Callable[[Path, Wanted, Share, int], tuple[np.ndarray, np.ndarray]] | None = None
    compressed: bool = False
    batches: Batches | None = None
    layout: Sequence[str] = ()
    shared_batches: SharedBatches | None = None


_FORMATS: dict[str, Format] = {}


def register_reader(
    suffix: str,
    reader: Reader,
    *,
    name: str | None = None,
    count: Callable[[Path], int] | None = None,
    labels: Callable[[Path, Wanted, Share, int], tuple[np.ndarray, np.ndarray]] | None = None,
    compressed: bool = False,
    batches: Batches | None = None,
    layout: Sequence[str] = (),
    shared_batches: SharedBatches | None = None,
) -> None:
    """Register a reader of a file format, by the suffix of the files.

    Args:
        suffix: the suffix with its dot, in lower case, such as ``".csv"``.
        reader: a function, called as ``reader(path, wanted, share)`` for a file that exists and is not empty.
            It returns a :class:`Table` of the wanted columns of the rows ``share.of(n_rows)``.
            :func:`table_from_arrow` makes one of an Arrow table. An error that the reader raises becomes a
            ``BadInput`` that names the file.
        name: the name of the format in messages; None is the suffix in capitals.
        count: a function, called as ``count(path)``, that returns the number of rows. Without it a file is
            read for its number of rows, where several files are shared by several processes.
        labels: for formats whose labels are a file of their own, a function, called as
            ``labels(folder, wanted, share, rows)`` for several files with ``rows`` rows together. It returns
            codes (n,) and classes of the share.
        compressed: whether the reader takes files with ``.gz``, ``.zst`` or ``.bz2`` after the suffix;
            ``xent.data.layout.opened`` decompresses them.
        batches: a function, called as ``batches(path, wanted, keep)``, that yields tables of some rows each
            and an Arrow table of their columns to keep. With it, predictions take constant memory.
        layout: the options of ``wanted.layout`` that the reader uses, such as ``"--encoding"``. Others are an
            error that names them.
        shared_batches: for formats of which a part can be read alone, and with ``count``, a function, called
            as ``shared_batches(path, wanted, keep, share)`` where several processes share a file. It also
            yields the position of each table's first row. Without it each process reads all rows and uses its
            own.

    Raises:
        ValueError: a suffix that has no dot or is not in lower case, or that another reader has.

    Example:
        >>> register_reader("jsonl", lambda path, wanted, share: ...)
        Traceback (most recent call last):
            ...
        ValueError: a suffix is a dot and lower-case letters, such as '.csv'; got 'jsonl'
    """
    if not suffix.startswith(".") or suffix != suffix.lower() or len(suffix) < 2:
        raise ValueError(f"a suffix is a dot and lower-case letters, such as '.csv'; got {suffix!r}")
    if suffix in _FORMATS:
        raise ValueError(f"files called {suffix} have a reader already; choose another suffix")
    _FORMATS[suffix] = Format(
        name or suffix[1:].upper(), reader, count, labels, compressed, batches, layout, shared_batches
    )


def format_of(path: Path) -> Format | None:
    """Return the format of a file by its suffix, None if it has no reader."""
    found = _FORMATS.get(suffix_of(path))
    return found if found is None or found.compressed or not is_compressed(path) else None


def known_suffixes() -> list[str]:
    """Return the suffixes that have a reader, in the order of their registration."""
    return list(_FORMATS)
