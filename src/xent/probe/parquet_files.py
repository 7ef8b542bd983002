"""``.parquet`` files to a ``Table``, and Arrow tables in general.

Of a share of the rows only the row groups are opened that hold some of them, and of these a batch at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from xent.probe.errors import BadInput, needs
from xent.probe.ranks import Share
from xent.probe.table import Table, Wanted, bad_number, check_finite, choose, no_label, numbered, skipped

BATCH = 1 << 16
"""Rows of a share that are decoded at a time."""


def read_parquet(path: Path, wanted: Wanted, share: Share) -> Table:
    with needs("probe"):
        import pyarrow as pa
        from pyarrow import parquet
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            features = choose(path, wanted, schema.names, [is_number(field.type) for field in schema])
            label = wanted.label if wanted.label in schema.names else None
            columns = features if label is None else [*features, label]
            start = share.of(file.metadata.num_rows).start
            arrow = file.read(columns=columns) if share.whole else _read_share(file, columns, share)
    except BadInput:
        raise
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{path}: not readable as Parquet: {' '.join(str(error).split())[:300]}") from error
    return from_arrow(path, wanted, arrow, features, label, skipped(wanted, schema.names, features), start)


def _read_share(file: Any, columns: list[str], share: Share) -> Any:
    """The share's rows as an Arrow table."""
    import pyarrow as pa

    about = file.metadata
    ends = np.cumsum([about.row_group(i).num_rows for i in range(about.num_row_groups)], dtype=np.int64)
    rows = share.of(about.num_rows)
    low, high = np.searchsorted(ends, [rows.start, rows.stop - 1], side="right")
    groups = list(range(low, high + 1)) if rows.stop > rows.start else []
    before = int(ends[low - 1]) if low else 0
    batches = file.iter_batches(BATCH, row_groups=groups, columns=columns)
    schema = file.schema_arrow
    wanted = pa.schema([schema.field(name) for name in columns])
    return pa.Table.from_batches(list(within(batches, rows, before)), wanted).select(columns)


def within(batches: Iterable[Any], rows: slice, position: int = 0) -> Iterator[Any]:
    """What of some batches, the first of which begins at a position in the file, lies within the rows."""
    for batch in batches:
        if position >= rows.stop:
            return
        low, high = max(rows.start - position, 0), min(rows.stop - position, len(batch))
        if low < high:
            yield batch.slice(low, high - low)
        position += len(batch)


def is_number(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def from_arrow(
    path: Path,
    wanted: Wanted,
    arrow: Any,
    features: list[str],
    label: str | None,
    left_out: tuple[str, ...],
    start: int,
) -> Table:
    import pyarrow as pa

    kinds = [arrow.schema.field(name).type for name in features]
    single = all(pa.types.is_float32(kind) or pa.types.is_float16(kind) for kind in kinds)
    matrix = np.empty((arrow.num_rows, len(features)), dtype=np.float32 if single else np.float64)
    for j, (name, kind) in enumerate(zip(features, kinds, strict=True)):
        column = arrow.column(name)
        if not (is_number(kind) or pa.types.is_boolean(kind)):
            raise BadInput(
                f"{path}: column {name!r} ({wanted.origin}) holds {kind}, not numbers; leave it out"
            )
        if column.null_count:
            raise bad_number(path, name, start + int(np.flatnonzero(column.is_null().to_numpy())[0]), None)
        if pa.types.is_boolean(kind):
            column = column.cast(pa.int8())
        if pa.types.is_decimal(kind):
            column = column.cast(pa.float64())
        matrix[:, j] = column.to_numpy()
    check_finite(path, matrix, features, start)
    if label is None:
        return Table(str(path), matrix, tuple(features), skipped=left_out, start=start)
    codes, classes = _arrow_labels(path, arrow.column(label), label, wanted.label_optional, start)
    return Table(str(path), matrix, tuple(features), label, codes, classes, left_out, start)


def _is_blank(column: Any) -> bool:
    """Whether no row has a value; data frames write such a column as null, or as nan whatever its type."""
    import pyarrow as pa

    if pa.types.is_floating(column.type):
        return bool(np.isnan(column.to_numpy()).all())
    return bool(column.null_count == len(column))


def _arrow_labels(
    path: Path, column: Any, label: str, optional: bool, start: int
) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow as pa

    if len(column) and _is_blank(column):
        if not optional:
            raise no_label(path, label, start)
        return np.full(len(column), -1), np.array([], dtype=str)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if str(column.type) == "string_view":
        column = column.cast(pa.large_string())
    kind = column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (is_text or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise BadInput(
            f"{path}: label column {label!r} holds {kind}; labels are text, integers, booleans: cast it first"
        )
    encoded = column.dictionary_encode().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = pa.chunked_array(encoded.chunks, encoded.type).unify_dictionaries().chunk(0)
    try:
        values = encoded.dictionary.to_pylist()
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: label column {label!r} holds {error.object!r}, not UTF-8") from error
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    if is_text:
        blank = [i for i, value in enumerate(values) if not value.strip()]
        codes[np.isin(codes, blank)] = -1
    if not optional and (codes < 0).any():
        raise no_label(path, label, start + int(np.flatnonzero(codes < 0)[0]))
    return numbered(f"{path}: column {label!r}", codes, np.array(values, dtype=str if is_text else None))
