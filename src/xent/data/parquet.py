"""``.parquet`` files to a ``Table``, and Arrow tables in general.

Features are decoded a batch at a time: into memory where they are few, else anew each time that the rows are
gone through. Of a share of the rows only the row groups are opened that hold some of them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xent._processes.group import Share
from xent._util.ahead import made_ahead
from xent._util.text import quoted
from xent.data.batches import Batch, DenseBatch, as_tensor, computed_dtype
from xent.data.categories import Category, TooMany, numbered
from xent.data.columns import (
    Columns,
    check_numbers,
    choose_columns,
    is_text,
    matrix,
    numbers_beside,
    width_of,
)
from xent.data.labels import encode_labels, encode_text_labels
from xent.data.limits import check_columns, check_memory, check_names
from xent.data.reading import reading
from xent.data.rows import BATCH, row_source
from xent.data.table import (
    NoRows,
    Table,
    Wanted,
    check_finite,
    no_category,
    no_label,
    some,
    some_unused,
    too_many,
    with_masses,
)
from xent.errors import BadInput, needs

MOST_ROWS = 1 << 16
"""Rows that are decoded at a time, at most."""

PIECEWISE: dict[str, Any] = {"pre_buffer": False, "buffer_size": 1 << 16}
"""Options to open a file with: Arrow would else hold all that is to be read of it, and decode no sooner."""

AT_ONCE = 64 << 20
"""Bytes of row groups that are decoded at the same time; a larger one is decoded by one thread."""

MOST_FIRST = 1024
"""Rows that are decoded at a time to find a column's first list."""

IN_MEMORY = 384 << 20
"""Bytes of features up to which a file's rows are decoded once, and kept."""


def read_parquet(path: Path, wanted: Wanted, share: Share) -> Table:
    """Return the share's rows of a Parquet file."""
    with needs("probe"):
        import pyarrow as pa
        from pyarrow import parquet
    with parquet.ParquetFile(path, **PIECEWISE) as file:
        about, schema = file.metadata, file.schema_arrow
        check_columns(path, len(schema.names))
        check_names(path, schema.names)
        columns = choose_columns(path, wanted, schema, lambda name: _first_width(path, wanted, file, name))
    check_numbers(path, wanted, columns, schema)
    rows = share.of(about.num_rows)
    count, names = rows.stop - rows.start, columns.names
    # every label takes eight bytes at least, as does the memory of a position
    check_memory(path, 16 * count, f"{count:,} rows")
    source = ParquetRows(path, wanted, columns, rows)
    features: np.ndarray | ParquetRows = source
    if not names:
        features = np.empty((count, 0))
    elif count * len(names) * source.stored.itemsize <= IN_MEMORY // wanted.parts:
        features = np.empty((count, len(names)), source.stored)
        for here, batch in source.batches():
            features[here] = batch[:].numpy()
    check_finite(path, wanted, row_source(features), names, rows.start, columns.bases)
    table = Table(
        str(path), features, tuple(names), unused=columns.unused, lists=columns.lists, start=rows.start
    )

    def column(name: str) -> Iterator[Any]:
        # text of the file's dictionary is there once, however many rows have it
        encoded = [name] if is_text(schema.field(name).type) else []
        with parquet.ParquetFile(path, metadata=about, read_dictionary=encoded, **PIECEWISE) as file:
            for batch in _batches_of(file, [name], rows, MOST_ROWS):
                batch.validate(full=True)  # text is UTF-8, and what points into a dictionary lies in it
                yield batch.column(0)

    table = with_categories(path, wanted, columns, table, column)
    if columns.beside:
        with parquet.ParquetFile(path, metadata=about, **PIECEWISE) as file:
            read = list(dict.fromkeys(each.name for each in columns.beside))
            batches = list(_batches_of(file, read, rows, MOST_ROWS))
        arrow = pa.Table.from_batches(batches, pa.schema([schema.field(name) for name in read]))
        table = with_numbers_beside(path, wanted, arrow, columns, table)
    if columns.label is None:
        return table
    of_label = schema.field(columns.label).type
    parts = list(column(columns.label))
    kind = parts[0].type if parts else of_label
    codes, classes = _arrow_labels(path, wanted, pa.chunked_array(parts, kind), columns.label, rows.start)
    return dataclasses.replace(table, label_name=columns.label, codes=codes, classes=classes)


def with_categories(
    path: Path,
    wanted: Wanted,
    columns: Columns,
    table: Table,
    column: Callable[[str], Iterable[Any]],
    blank: Sequence[str] = (),
) -> Table:
    """Return a table with its columns of categories; ``column(name)`` are the Arrow arrays of one.

    Those with too many values are left out, which is an error for one that is named.
    """
    found: list[Category] = []
    unused = dict(table.unused)
    for name in columns.categorical:
        most = wanted.most_of(name)
        try:
            made = numbered(path, name, column(name), most, wanted.blank_in(name, blank))
        except TooMany:
            if wanted.categorical != "auto":
                raise too_many(path, name, most) from None
            unused[name] = f"text of more than {most} values"
            continue
        lacking = np.flatnonzero(made.codes < 0)
        if len(lacking) and wanted.missing == "error" and not wanted.skip_bad:
            raise no_category(path, wanted, name, table.start + int(lacking[0]))
        found.append(made)
    if not found and not table.feature_names:
        raise BadInput(f"{path}: no column is left for features; {some_unused(unused)}")
    return dataclasses.replace(table, categories=tuple(found), unused=unused)


def with_numbers_beside(path: Path, wanted: Wanted, arrow: Any, columns: Columns, table: Table) -> Table:
    """Return a table with weights and masses of classes, the names of whose columns are the classes."""
    weight, soft = numbers_beside(path, wanted, arrow, columns, table.start)
    table = dataclasses.replace(table, weight=weight)
    if soft is None:
        return table
    masses = columns.beside[wanted.weight is not None :]
    return with_masses(path, table, soft, [name for column in masses for name in column.names])


def parquet_batches(path: Path, wanted: Wanted, keep: Sequence[str]) -> Iterator[tuple[Table, Any]]:
    """Yield the rows of a Parquet file, some at a time, with the columns that are kept."""
    for _, table, kept in parquet_batches_of(path, wanted, keep, Share()):
        yield table, kept


def parquet_batches_of(
    path: Path, wanted: Wanted, keep: Sequence[str], share: Share
) -> Iterator[tuple[int, Table, Any]]:
    """Yield the first row's position, rows, and columns that are kept, of a share of the row groups."""
    with needs("probe"):
        import pyarrow as pa
        from pyarrow import parquet
    with parquet.ParquetFile(path, **PIECEWISE) as file:
        about, schema = file.metadata, file.schema_arrow
        check_columns(path, len(schema.names))
        check_names(path, schema.names)
        columns = choose_columns(path, wanted, schema, lambda name: _first_width(path, wanted, file, name))
        check_numbers(path, wanted, columns, schema)
        check_kept(path, wanted, keep, schema.names)
        if not about.num_rows:
            raise NoRows(path)
        read = list(dict.fromkeys([*columns.every, *keep]))
        size, ends = max(1, min(MOST_ROWS, BATCH // max(1, len(columns.names)))), _ends(about)
        stretches = [slice(0, about.num_rows)]
        if not share.whole:
            bounds = [0, *ends.tolist()]
            stretches = [slice(*pair) for pair in itertools.pairwise(bounds)][share.index :: share.count]
        for rows in stretches:
            start = rows.start
            for batch in _batches_of(file, read, rows, size):
                batch.validate(full=True)
                part = pa.Table.from_batches([batch])
                yield start, from_arrow(path, wanted, part, columns, start), part.select(list(keep))
                start += len(batch)


def check_kept(path: Path, wanted: Wanted, keep: Sequence[str], names: Sequence[str]) -> None:
    """Raise ``BadInput`` for a column to keep that is not there, or that is named twice."""
    for name in keep:
        if name not in names:
            raise BadInput(
                f"{path}: no column {quoted(name)} ({wanted.option('--keep')}); its columns are {some(names)}"
            )
    if len({*keep}) < len(keep):
        raise BadInput(f"{path}: a column is named twice in --keep; once is enough")


def count_parquet(path: Path) -> int:
    """Return the number of rows that a file's metadata claim."""
    with needs("probe"):
        from pyarrow import parquet
    return int(parquet.read_metadata(path).num_rows)


class ParquetRows:
    """The features of a file, decoded a batch at a time, whenever they are gone through.

    Args:
        rows: positions in the file, of all its rows.
    """

    in_memory = False

    def __init__(self, path: Path, wanted: Wanted, columns: Columns, rows: slice) -> None:
        self._path, self._wanted, self._columns, self._rows = path, wanted, columns, rows
        self.stored = columns.dtype  # that a batch is decoded into
        self.dtype = computed_dtype(self.stored)
        self.shape = (rows.stop - rows.start, len(columns.names))
        self.width = self.shape[1]

    def batches(self) -> Iterator[tuple[slice, Batch]]:
        """Yield the decoded rows; raise ``BadInput`` where the file does not hold what it did."""
        import pyarrow as pa
        from pyarrow import parquet

        with reading(self._path, "Parquet"):
            about = parquet.read_metadata(self._path)
            largest = max(
                (about.row_group(i).total_byte_size for i in range(about.num_row_groups)), default=0
            )
            threads = min(pa.cpu_count(), AT_ONCE // max(1, largest))
            columns_too = threads < 2  # are decoded at the same time
            jobs = [
                functools.partial(self._decoded, rows, columns_too) for rows in _stretches(about, self._rows)
            ]
            start = 0
            for made in made_ahead(jobs, threads):
                yield slice(start, start + len(made)), DenseBatch(as_tensor(made))
                start += len(made)

    def _decoded(self, rows: slice, use_threads: bool) -> Iterator[np.ndarray]:
        """Yield the features of some rows of the file."""
        from pyarrow import parquet

        columns, start = self._columns, rows.start
        size = max(1, min(MOST_ROWS, BATCH // max(1, self.shape[1])))
        with parquet.ParquetFile(self._path, **PIECEWISE) as file:
            for part in _batches_of(file, columns.read, rows, size, use_threads):
                yield matrix(self._path, self._wanted, part, columns.features, start, self.stored)
                start += len(part)


def _first_width(path: Path, wanted: Wanted, file: Any, name: str) -> int:
    """Return the length of the first list in a column."""
    batches = itertools.chain(
        itertools.islice(file.iter_batches(1, columns=[name]), 1),
        file.iter_batches(MOST_FIRST, columns=[name]),
    )
    return width_of(path, wanted, (batch.column(0) for batch in batches), name)


def _batches_of(
    file: Any, columns: Sequence[str], rows: slice, size: int, use_threads: bool = True
) -> Iterator[Any]:
    """Yield some rows of a file as record batches of at most as many rows."""
    ends = _ends(file.metadata)
    low, high = np.searchsorted(ends, [rows.start, rows.stop - 1], side="right")
    groups = list(range(low, min(high + 1, len(ends)))) if rows.stop > rows.start else []
    before = int(ends[low - 1]) if low else 0
    decoded = file.iter_batches(size, row_groups=groups, columns=columns, use_threads=use_threads)
    count = 0
    for batch in within(decoded, rows, before):
        yield batch.select(columns)
        count += len(batch)
    _check_rows(count, rows.stop - rows.start)


def _check_rows(count: int, claimed: int) -> None:
    """Raise ``OSError`` where a file holds other rows than its metadata claim."""
    if count != claimed:
        raise OSError(f"holds {count:,} rows where its metadata claim {claimed:,}; it is damaged")


def _ends(about: Any) -> np.ndarray:
    """Return the row after each row group's last, (groups,)."""
    return np.cumsum([about.row_group(i).num_rows for i in range(about.num_row_groups)], dtype=np.int64)


def _stretches(about: Any, rows: slice) -> list[slice]:
    """Return the part of some rows that each row group of a file has."""
    ends = _ends(about).clip(rows.start, rows.stop).tolist()
    return [slice(a, b) for a, b in itertools.pairwise([rows.start, *ends]) if a < b]


def within(batches: Iterable[Any], rows: slice, position: int = 0) -> Iterator[Any]:
    """Yield the part of some batches within the rows; the first batch begins at a position in the file."""
    for batch in batches:
        if position >= rows.stop:
            return
        low, high = max(rows.start - position, 0), min(rows.stop - position, len(batch))
        if low < high:
            yield batch.slice(low, high - low)
        position += len(batch)


def table_from_arrow(path: Path, wanted: Wanted, arrow: Any, share: Share) -> Table:
    """Return the wanted columns of an Arrow table of a whole file, for the rows of a share.

    Args:
        path: the file, for messages.
        wanted: the columns to read.
        arrow: a ``pyarrow.Table`` of all rows of the file.
        share: the share of the rows; ``Share()`` is all of them.

    Returns:
        A :class:`Table`.

    Raises:
        BadInput: a ValueError; a column that is not there, a number that is missing or not finite, a row
            without a label.

    Example:
        >>> import pyarrow
        >>> from xent.data import Wanted, table_from_arrow
        >>> arrow = pyarrow.table({"petal": [0.5, 1.5], "kind": ["rose", "iris"]})
        >>> table = table_from_arrow(Path("flowers.jsonl"), Wanted("kind"), arrow, Share())
        >>> table.feature_names, table.classes[table.codes].tolist()
        (('petal',), ['rose', 'iris'])
    """
    check_columns(path, len(arrow.schema.names))
    check_names(path, arrow.schema.names)
    columns = choose_columns(
        path, wanted, arrow.schema, lambda name: width_of(path, wanted, [arrow.column(name)], name)
    )
    rows = share.of(arrow.num_rows)
    part = arrow.select(columns.every).slice(rows.start, rows.stop - rows.start)
    return from_arrow(path, wanted, part, columns, rows.start)


def from_arrow(
    path: Path, wanted: Wanted, arrow: Any, columns: Columns, start: int, blank: Sequence[str] = ()
) -> Table:
    """Return some rows of a file as a table, the first at ``start``; ``blank`` are texts of no category."""
    check_numbers(path, wanted, columns, arrow.schema)
    names, label = columns.names, columns.label
    made = matrix(path, wanted, arrow, columns.features, start, columns.dtype)
    if not wanted.raw:
        check_finite(path, wanted, row_source(made), names, start, columns.bases)
    table = Table(str(path), made, tuple(names), unused=columns.unused, lists=columns.lists, start=start)
    table = with_categories(path, wanted, columns, table, lambda name: [arrow.column(name)], blank)
    if columns.beside:
        table = with_numbers_beside(path, wanted, arrow, columns, table)
    if label is None:
        return table
    codes, classes = _arrow_labels(path, wanted, arrow.column(label), label, start)
    return dataclasses.replace(table, label_name=label, codes=codes, classes=classes)


def _is_blank(column: Any) -> bool:
    """Return whether no row has a value; data frames write such a column as null, or as nan in any type."""
    import pyarrow as pa

    if pa.types.is_floating(column.type):
        return bool(np.isnan(column.to_numpy()).all())
    return bool(column.null_count == len(column))


def _arrow_labels(
    path: Path, wanted: Wanted, column: Any, label: str, start: int
) -> tuple[np.ndarray, np.ndarray]:
    if len(column) and _is_blank(column):
        if wanted.every_row:
            raise no_label(path, start, label)
        return np.full(len(column), -1), np.array([], dtype=str)
    where = f"{path}: column {quoted(label)}"
    codes, values = _encoded(path, wanted, column, label)
    number = encode_text_labels if isinstance(values, list) else encode_labels
    codes, classes = number(where, codes, values)
    if wanted.every_row and (codes < 0).any():
        raise no_label(path, start + int(np.flatnonzero(codes < 0)[0]), label)
    return codes, classes


def _encoded(path: Path, wanted: Wanted, column: Any, label: str) -> tuple[np.ndarray, Any]:
    """Number a column's values, −1 for null. Text is a list, in which a long one makes no other longer."""
    import pyarrow as pa

    encoded = pa.types.is_dictionary(column.type)
    kind = column.type.value_type if encoded else column.type
    if encoded and not is_text(kind):
        column = column.cast(kind)
    if pa.types.is_floating(kind) and wanted.model is not None:
        values, codes = np.unique(column.to_numpy(), return_inverse=True)
        return codes.astype(np.int64), values
    if pa.types.is_decimal(kind) and kind.scale == 0:
        column, kind = column.cast(pa.int64()), pa.int64()
    if not (is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise BadInput(
            f"{path}: label column {quoted(label)} holds {kind}; labels are text, integers, booleans: "
            f"cast it first if it holds classes, else {wanted.other_labels}"
        )
    if str(kind) == "string_view" and not encoded:
        column = column.cast(pa.large_string())
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    array = column.unify_dictionaries().combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0)
    once = array.dictionary.dictionary_encode()  # a file's own dictionary may hold null, or a value twice
    place = np.append(_indices(once), -1)
    values = once.dictionary.to_pylist()
    return place[_indices(array)], values if is_text(kind) else np.array(values)


def _indices(encoded: Any) -> np.ndarray:
    return encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
