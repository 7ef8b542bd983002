"""Files to a ``Table``: a dense matrix of features, and class numbers with the classes that they stand for.

CSV (``.csv``, ``.tsv``) and Parquet go through Arrow, ``.npz`` and ``.npy`` through NumPy without pickle.
Each of several ranks reads its own share of the rows; the classes are those of all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from xent._processes.group import ALONE, Ranks, Share
from xent.data.csv import read_csv
from xent.data.numpy import read_npy, read_npz
from xent.data.parquet import read_parquet
from xent.data.reading import reading
from xent.data.table import Table, Wanted
from xent.errors import BadInput

__all__ = ["Table", "Wanted", "read"]

_READERS: dict[str, tuple[str, Callable[[Path, Wanted, Share], Table]]] = {
    ".csv": ("CSV", read_csv),
    ".tsv": ("CSV", read_csv),
    ".parquet": ("Parquet", read_parquet),
    ".npz": ("NPZ", read_npz),
    ".npy": ("NPY", read_npy),
}


def read(path: str | Path, wanted: Wanted, ranks: Ranks = ALONE) -> Table:
    """Read a ``.csv``, ``.tsv``, ``.parquet``, ``.npz`` or ``.npy`` file, of several ranks each its share.

    For ``.npy`` the label is the name of a second ``.npy`` file; for ``.npz`` that of an array inside, beside
    the features: the array ``X`` or the only two-dimensional one. Columns of arrays are named x0, x1, ...

    Raises ``BadInput`` with one line that names the file, and the row, column and value where there are such.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "flowers.csv"
    >>> _ = path.write_text("id,petal,kind\\n1,0.5,rose\\n2,1.5,iris\\n")
    >>> table = read(path, Wanted("kind", exclude=["id"]))
    >>> table.feature_names, table.features.tolist(), table.classes[table.codes].tolist()
    (('petal',), [[0.5], [1.5]], ['rose', 'iris'])
    """
    path = Path(path)
    with ranks.together():
        table = read_share(path, wanted, ranks.share)
    ranks.alike(f"copy of {path}", path.stat().st_size)
    return united(table, ranks)


def read_share(path: Path, wanted: Wanted, share: Share) -> Table:
    """A share of the rows, with the classes that occur in it."""
    if path.suffix.lower() not in _READERS:
        raise BadInput(f"{path}: files are told by their suffix, which is to be one of {', '.join(_READERS)}")
    kind, reader = _READERS[path.suffix.lower()]
    with reading(path, kind):
        if not path.exists():
            raise BadInput(f"{path}: no such file")
        if path.is_dir():
            raise BadInput(f"{path}: is a directory, not a file")
        if path.stat().st_size == 0:
            raise BadInput(f"{path}: the file is empty")
        return reader(path, wanted, share)


def united(table: Table, ranks: Ranks) -> Table:
    """The share's table with the classes of all shares, and these alike in everything else."""
    ranks.alike(f"view of {table.source}", (table.feature_names, table.label_name, table.features.dtype.str))
    if not ranks.sum(len(table.features)):
        raise BadInput(f"{table.source}: the file has columns but no rows")
    if table.classes is None or table.codes is None:
        return table
    own = table.classes
    found = [classes for classes in ranks.gather(own) if len(classes)]
    if not found:  # an optional label, which no row has
        return dataclasses.replace(table, label_name=None, codes=None, classes=None)
    classes = np.unique(np.concatenate(found))
    place = np.append(np.searchsorted(classes, own.astype(classes.dtype)), -1)  # the last is where −1 points
    return dataclasses.replace(table, codes=place[table.codes], classes=classes)
