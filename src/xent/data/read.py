"""Files to a ``Table``: a dense matrix of features, and class numbers with the classes that they stand for.

CSV and Parquet go through Arrow, ``.npz`` and ``.npy`` through NumPy without pickle. Each of several ranks
reads its own share of the rows; the classes are those of all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xent._processes.group import ALONE, Ranks, Share
from xent.data._registry import Format, format_of, known_suffixes, register_reader
from xent.data.categories import Category, as_whole, united
from xent.data.csv import csv_batches, read_csv
from xent.data.labels import recoded, union
from xent.data.layout import OF_TEXT, matching
from xent.data.numpy import count_npy, labels_of_npy, read_npy, read_npz
from xent.data.parquet import count_parquet, parquet_batches, parquet_batches_of, read_parquet
from xent.data.parts import files_of, read_parts
from xent.data.reading import reading
from xent.data.rows import blocks
from xent.data.safetensors import read_safetensors
from xent.data.table import NoRows, Table, Wanted, too_many
from xent.errors import BadInput

register_reader(".csv", read_csv, name="CSV", compressed=True, batches=csv_batches, layout=OF_TEXT)
register_reader(".tsv", read_csv, name="CSV", compressed=True, batches=csv_batches, layout=OF_TEXT)
register_reader(
    ".parquet",
    read_parquet,
    name="Parquet",
    count=count_parquet,
    batches=parquet_batches,
    shared_batches=parquet_batches_of,
)
register_reader(".npz", read_npz, layout=["--array"])
register_reader(".safetensors", read_safetensors, name="safetensors", layout=["--array"])
register_reader(".npy", read_npy, count=count_npy, labels=labels_of_npy)


def read_table(path: str | Path | Sequence[str | Path], wanted: Wanted, ranks: Ranks = ALONE) -> Table:
    """Return the wanted columns of a file, or of several, as a table.

    Several files, or a folder of them, are one table: their rows follow each other, and their columns must be
    alike. For ``.npy`` the label is the name of a second ``.npy`` file. For ``.npz`` it is the name of an
    array beside the features, which are the array ``X`` or the only two-dimensional one. Columns of arrays
    are named x0, x1, ...

    Args:
        path: a file or a folder, or several of them.
        wanted: the columns to read.
        ranks: the processes of a job, each of which gets its share of the rows; the default is one process.

    Returns:
        A :class:`Table`.

    Raises:
        BadInput: a ValueError; a file that is not there, is damaged, or lacks a column, a number or a label.
            The message is one line that names the file and, where there are such, row, column and value.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "flowers.csv"
        >>> _ = path.write_text("id,petal,kind\\n1,0.5,rose\\n2,1.5,iris\\n")
        >>> table = read_table(path, Wanted("kind", exclude=["id"]))
        >>> table.feature_names, table.features.tolist(), table.classes[table.codes].tolist()
        (('petal',), [[0.5], [1.5]], ['rose', 'iris'])
    """
    given = [Path(path)] if isinstance(path, str | Path) else [Path(each) for each in path]
    with ranks.raise_together():
        paths = [file for each in given for file in matching(each)]
        files = files_of(paths)
        if len(files) == 1:
            table = read_share(files[0], wanted, ranks.share)
        else:
            table = read_parts(files, wanted, ranks.share, read_share)
            if len(given) == 1:
                table = dataclasses.replace(table, source=str(given[0]))
    ranks.check_equal(f"copy of {table.source}", [file.stat().st_size for file in files])
    table = merge_categories(merge_classes(table, ranks), wanted, ranks)
    categories = tuple(each if each.name in wanted.known else as_whole(each) for each in table.categories)
    table = dataclasses.replace(table, categories=categories)
    return complete(table, ranks) if wanted.missing == "drop" else table


def read_share(path: Path, wanted: Wanted, share: Share) -> Table:
    """Return a share of the rows, with the classes that occur in it."""
    found = format_of(path)
    if found is None and not path.exists():
        raise BadInput(f"{path}: no such file")
    if found is None:
        known = ", ".join(known_suffixes())
        raise BadInput(f"{path}: files are told by their suffix, which is to be one of {known}")
    with reading(path, found.name):
        if not path.exists():
            raise BadInput(f"{path}: no such file")
        if path.stat().st_size == 0:
            raise BadInput(f"{path}: the file is empty")
        check_layout(path, found, wanted)
        return found.reader(path, wanted, share)


def check_layout(path: Path, found: Format, wanted: Wanted) -> None:
    """Raise ``BadInput`` for an option that says how to read files of another format."""
    odd = [option for option in wanted.layout.given if option not in found.layout]
    if odd:
        of = "NPZ and safetensors" if odd[0] == "--array" else "text"
        raise BadInput(f"{path}: {odd[0]} is of {of} files, and this is {found.name}; leave it out")


def merge_categories(table: Table, wanted: Wanted, ranks: Ranks) -> Table:
    """Return the share's table with the categories of all shares."""
    if ranks.size == 1:
        return table
    empty = np.empty(0, np.int32)
    of_shares = ranks.gather([dataclasses.replace(column, codes=empty) for column in table.categories])
    own = {column.name: column for column in table.categories}
    made, unused = [], dict(table.unused)
    for name, columns in united(of_shares, wanted.most_of):
        if columns is None:
            if wanted.categorical != "auto":
                raise too_many(table.source, name, wanted.most)
            unused[name] = f"text of more than {wanted.most} values"
        else:
            values = columns[0].values
            made.append(Category(name, values, own[name].recoded(values)))
    return dataclasses.replace(table, categories=tuple(made), unused=unused)


def complete(table: Table, ranks: Ranks = ALONE) -> Table:
    """Return the table of the rows that lack no number and no category; the rest is counted."""
    kept = np.ones(len(table), dtype=bool)
    for here, x in blocks(table.rows):
        kept[here] = ~x.isnan().any(1).numpy()
    for column in table.categories:
        kept &= column.codes >= 0
    counts = ranks.gather((int(kept.sum()), len(table)))
    total, left = sum(rows for _, rows in counts), sum(rows for rows, _ in counts)
    if not left:
        raise BadInput(f"{table.source}: every row lacks a number or a category; --missing impute keeps them")
    if left == total:
        return table
    start = sum(rows for rows, _ in counts[: ranks.share.index]) if ranks.share.count > 1 else 0
    made = table.taken(np.flatnonzero(kept))
    return dataclasses.replace(made, start=start, dropped=total - left)


def merge_classes(table: Table, ranks: Ranks) -> Table:
    """Return the share's table with the classes of all shares; everything else must be equal on all ranks."""
    ranks.check_equal(
        f"view of {table.source}", (table.feature_names, table.label_name, table.rows.dtype.str)
    )
    if not ranks.sum(table.rows.shape[0]):
        raise NoRows(table.source)
    if table.classes is None or table.codes is None:
        return table
    classes = union(ranks.gather(table.classes))
    if not len(classes):  # an optional label, which no row has
        return dataclasses.replace(table, label_name=None, codes=None, classes=None)
    codes = recoded(table.codes, table.classes, classes)
    return dataclasses.replace(table, codes=codes, classes=classes)
