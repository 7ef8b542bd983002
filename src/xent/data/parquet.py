"""``.parquet`` files to a ``Table``, and Arrow tables in general.

Features are decoded a batch at a time: into memory where they are few, else anew each time that the rows are
gone through. Of a share of the rows only the row groups are opened that hold some of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from xent._processes.group import Share
from xent._util.text import quoted
from xent.data.labels import encode_labels, encode_text_labels
from xent.data.limits import check_columns, check_memory, check_names
from xent.data.reading import reading
from xent.data.rows import BATCH, Batch, computed_dtype, row_source
from xent.data.table import Table, Wanted, bad_number, check_finite, choose, no_label
from xent.errors import BadInput, needs

MOST_ROWS = 1 << 16
"""Rows that are decoded at a time, at most."""

PIECE = 1 << 16
"""Bytes of a column that are read at a time."""

IN_MEMORY = 384 << 20
"""Bytes of features up to which a file's rows are decoded once, and kept."""


class Columns(NamedTuple):
    """The wanted columns of an Arrow table."""

    features: list[str]
    label: str | None
    skipped: tuple[str, ...]  # those that are neither features nor excluded nor the label

    @property
    def names(self) -> list[str]:
        """The names of those that are read, the label last."""
        return self.features if self.label is None else [*self.features, self.label]


def choose_columns(path: Path, wanted: Wanted, schema: Any) -> Columns:
    """Choose among the columns of an Arrow schema."""
    features = choose(path, wanted, schema.names, [is_number(field.type) for field in schema])
    label = wanted.label if wanted.label in schema.names else None
    passed_over = {*features, wanted.label, *wanted.exclude}
    others = [name for name in schema.names if wanted.features is None and name not in passed_over]
    return Columns(features, label, tuple(others))


def read_parquet(path: Path, wanted: Wanted, share: Share) -> Table:
    """Return the share's rows of a Parquet file."""
    with needs("probe"):
        import pyarrow as pa
        from pyarrow import parquet
    with parquet.ParquetFile(path) as file:
        about, schema = file.metadata, file.schema_arrow
        check_columns(path, len(schema.names))
        check_names(path, schema.names)
        columns = choose_columns(path, wanted, schema)
    rows = share.of(about.num_rows)
    count, size = rows.stop - rows.start, len(columns.features)
    # every label takes eight bytes at least, as does the memory of a position
    check_memory(path, 16 * count, f"{count:,} rows")
    kinds = [schema.field(name).type for name in columns.features]
    source = ParquetRows(path, wanted, columns.features, rows, matrix_type(kinds))
    for name, kind in zip(columns.features, kinds, strict=True):
        _check_number(path, wanted, name, kind)
    features: np.ndarray | ParquetRows = source
    if count * size * source.stored.itemsize <= IN_MEMORY // wanted.parts:
        features = np.empty((count, size), source.stored)
        for here, batch in source.batches():
            features[here] = batch[:].numpy()
    check_finite(path, wanted, row_source(features), columns.features, rows.start)
    table = Table(str(path), features, tuple(columns.features), skipped=columns.skipped, start=rows.start)
    if columns.label is None:
        return table
    # text of the file's dictionary is there once, however many rows have it
    encoded = [columns.label] if is_text(schema.field(columns.label).type) else []
    with parquet.ParquetFile(path, metadata=about, read_dictionary=encoded) as file:
        wanted_schema = pa.schema([file.schema_arrow.field(columns.label)])
        batches = _batches_of(file, [columns.label], rows, MOST_ROWS)
        arrow = pa.Table.from_batches(batches, wanted_schema)
    arrow.validate(full=True)  # text is UTF-8, and what points into a dictionary lies in it
    codes, classes = _arrow_labels(path, wanted, arrow.column(0), columns.label, rows.start)
    return dataclasses.replace(table, label_name=columns.label, codes=codes, classes=classes)


def count_parquet(path: Path) -> int:
    """Return the number of rows that a file's metadata claim."""
    with needs("probe"):
        from pyarrow import parquet
    return int(parquet.read_metadata(path).num_rows)


class ParquetRows:
    """Numeric columns of a file, decoded a batch at a time, whenever they are gone through.

    Args:
        features: the columns.
        rows: positions in the file, of all its rows.
        stored: the type that a batch is decoded into.
    """

    in_memory = False

    def __init__(
        self, path: Path, wanted: Wanted, features: Sequence[str], rows: slice, stored: np.dtype
    ) -> None:
        self._path, self._wanted, self._features, self._rows = path, wanted, features, rows
        self.stored, self.dtype = stored, computed_dtype(stored)
        self.shape = (rows.stop - rows.start, len(features))

    def batches(self) -> Iterator[tuple[slice, Batch]]:
        """Yield the decoded rows; raise ``BadInput`` where the file does not hold what it did."""
        from pyarrow import parquet

        size, start = max(1, min(MOST_ROWS, BATCH // len(self._features))), 0
        # Arrow would else hold all that is to be read of the file, and decode no sooner
        how = {"pre_buffer": False, "buffer_size": PIECE}
        with reading(self._path, "Parquet"), parquet.ParquetFile(self._path, **how) as file:
            for part in _batches_of(file, self._features, self._rows, size):
                at = self._rows.start + start
                made = matrix(self._path, self._wanted, part, self._features, at, self.stored)
                yield slice(start, start + len(made)), Batch(torch.from_numpy(made))
                start += len(made)


def _batches_of(file: Any, columns: Sequence[str], rows: slice, size: int) -> Iterator[Any]:
    """Yield some rows of a file as record batches of at most as many rows."""
    about = file.metadata
    ends = np.cumsum([about.row_group(i).num_rows for i in range(about.num_row_groups)], dtype=np.int64)
    low, high = np.searchsorted(ends, [rows.start, rows.stop - 1], side="right")
    groups = list(range(low, min(high + 1, len(ends)))) if rows.stop > rows.start else []
    before = int(ends[low - 1]) if low else 0
    for batch in within(file.iter_batches(size, row_groups=groups, columns=columns), rows, before):
        yield batch.select(columns)


def within(batches: Iterable[Any], rows: slice, position: int = 0) -> Iterator[Any]:
    """Yield the part of some batches within the rows; the first batch begins at a position in the file."""
    for batch in batches:
        if position >= rows.stop:
            return
        low, high = max(rows.start - position, 0), min(rows.stop - position, len(batch))
        if low < high:
            yield batch.slice(low, high - low)
        position += len(batch)


def is_number(kind: Any) -> bool:
    """Return whether an Arrow type is one of real numbers."""
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def is_text(kind: Any) -> bool:
    """Return whether an Arrow type is one of text."""
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or str(kind) == "string_view")


def table_from_arrow(path: Path, wanted: Wanted, arrow: Any, share: Share) -> Table:
    """Return the rows of a share, and the columns that are wanted, of an Arrow table of a whole file.

    Raises ``BadInput`` for columns that are not there, numbers that are missing or not finite, and rows
    without a label.
    """
    check_columns(path, len(arrow.schema.names))
    check_names(path, arrow.schema.names)
    columns, rows = choose_columns(path, wanted, arrow.schema), share.of(arrow.num_rows)
    part = arrow.select(columns.names).slice(rows.start, rows.stop - rows.start)
    return from_arrow(path, wanted, part, columns, rows.start)


def from_arrow(path: Path, wanted: Wanted, arrow: Any, columns: Columns, start: int) -> Table:
    """Return some rows of a file as a table, the first at ``start``."""

    features, label, left_out = columns
    kinds = [arrow.schema.field(name).type for name in features]
    for name, kind in zip(features, kinds, strict=True):
        _check_number(path, wanted, name, kind)
    made = matrix(path, wanted, arrow, features, start, matrix_type(kinds))
    check_finite(path, wanted, row_source(made), features, start)
    if label is None:
        return Table(str(path), made, tuple(features), skipped=left_out, start=start)
    codes, classes = _arrow_labels(path, wanted, arrow.column(label), label, start)
    return Table(str(path), made, tuple(features), label, codes, classes, left_out, start)


def matrix_type(kinds: Sequence[Any]) -> np.dtype:
    """Return the type that columns of some Arrow types are decoded into: the narrowest that holds them."""
    import pyarrow as pa

    if not all(pa.types.is_float32(kind) or pa.types.is_float16(kind) for kind in kinds):
        return np.dtype(np.float64)
    return np.dtype(np.float32 if any(pa.types.is_float32(kind) for kind in kinds) else np.float16)


def _check_number(path: Path, wanted: Wanted, name: str, kind: Any) -> None:
    import pyarrow as pa

    if not (is_number(kind) or pa.types.is_boolean(kind)):
        raise BadInput(
            f"{path}: column {quoted(name)} ({wanted.origin}) holds {kind}, not numbers; "
            f"{wanted.without(name)}"
        )


def matrix(
    path: Path, wanted: Wanted, arrow: Any, features: Sequence[str], start: int, dtype: np.dtype
) -> np.ndarray:
    """Return columns of an Arrow table or batch as (rows, columns); the first is at ``start`` of the file.

    Raises ``BadInput`` for a number that is missing.
    """
    import pyarrow as pa

    made = np.empty((arrow.num_rows, len(features)), dtype)
    for j, name in enumerate(features):
        column = arrow.column(name)
        if column.null_count:
            row = start + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            raise bad_number(path, wanted, name, row, None)
        if pa.types.is_boolean(column.type):
            column = column.cast(pa.int8())
        if pa.types.is_decimal(column.type):
            column = column.cast(pa.float64())
        made[:, j] = column.to_numpy(zero_copy_only=False)
    return made


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
