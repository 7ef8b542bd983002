"""Files to a ``Table``: a dense matrix of features, and class numbers with the classes that they stand for.

CSV (``.csv``, ``.tsv``) and Parquet go through Arrow, ``.npz`` and ``.npy`` through NumPy without pickle.
Rows are counted from 1 in every message, a header line not counted.

Arrow infers a CSV column's type from the first block of the file and fails, late, where a later block
differs. Here that block only says which columns are numeric; these are then read as float64 throughout, so
integers may turn into decimals, and the label column is always text, so ``7`` may turn into ``cat``.
"""

from __future__ import annotations

import dataclasses
import itertools
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xent.probe.errors import BadInput, needs

BLOCK = 8 << 20
"""Bytes of a CSV file that Arrow parses at a time; a line must fit."""

MISSING = ["", "NA", "N/A", "n/a", "#N/A", "NULL", "null"]
"""What counts as a missing number in CSV. (As a label, all but the empty text are text like any other.)"""


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of a file.

    ``codes`` and ``classes`` are None where no label was asked for or, if it was optional, found; a code is
    −1 where an optional label is missing.
    """

    source: str
    features: np.ndarray  # (N, D) float32 or float64, finite
    feature_names: tuple[str, ...]  # D
    label_name: str | None = None
    codes: np.ndarray | None = None  # (N,) int64, positions in classes
    classes: np.ndarray | None = None  # (C,) str, int or bool, sorted
    skipped: tuple[str, ...] = ()  # columns that are neither, for not being numeric


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which columns to read.

    ``features`` None: every numeric column but the label and ``exclude``. ``origin`` says in messages who
    asks for them. ``label`` None: no label. ``label_optional``: the column, or a row's label, may be missing.
    """

    label: str | None = None
    features: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    label_optional: bool = False
    origin: str = "--features"


def read(path: str | Path, wanted: Wanted) -> Table:
    """Read a ``.csv``, ``.tsv``, ``.parquet``, ``.npz`` or ``.npy`` file.

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
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise BadInput(f"{path}: files are told by their suffix, which is to be one of {', '.join(_READERS)}")
    if not path.exists():
        raise BadInput(f"{path}: no such file")
    if path.is_dir():
        raise BadInput(f"{path}: is a directory, not a file")
    if path.stat().st_size == 0:
        raise BadInput(f"{path}: the file is empty")
    table = reader(path, wanted)
    if not len(table.features):
        raise BadInput(f"{path}: the file has columns but no rows")
    return table


# ----------------------------------------------------------------------
# Which columns


def _choose(path: Path, wanted: Wanted, names: Sequence[str], numeric: Sequence[bool]) -> list[str]:
    """The feature columns, in the order asked for, else the file's."""
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise BadInput(
            f"{path}: column {twice[0]!r} is there {names.count(twice[0])} times; rename all but one"
        )
    if wanted.label is not None and wanted.label not in names and not wanted.label_optional:
        raise BadInput(f"{path}: no column {wanted.label!r} for --label; {_there_are(names)}")
    for option, asked in (("--exclude", wanted.exclude), (wanted.origin, wanted.features or ())):
        lacking = [name for name in asked if name not in names]
        if lacking:
            raise BadInput(f"{path}: no column {_some(lacking)} ({option}); {_there_are(names)}")
    if wanted.features is not None:
        if wanted.label in wanted.features:
            raise BadInput(
                f"{path}: the label column {wanted.label!r} cannot be a feature; drop it from --features"
            )
        return list(wanted.features)
    passed_over = {wanted.label, *wanted.exclude}
    chosen = [
        name for name, is_number in zip(names, numeric, strict=True) if is_number and name not in passed_over
    ]
    if not chosen:
        raise BadInput(f"{path}: no numeric column is left for features; {_there_are(names)}")
    return chosen


def _skipped(wanted: Wanted, names: Sequence[str], chosen: Sequence[str]) -> tuple[str, ...]:
    if wanted.features is not None:
        return ()
    return tuple(name for name in names if name not in {*chosen, wanted.label, *wanted.exclude})


def _some(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(repr(name) for name in itertools.islice(names, most))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _there_are(names: Sequence[str]) -> str:
    if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
        return f"the header is one column, {names[0]!r}: separate columns by commas (.csv) or tabs (.tsv)"
    return f"its columns are {_some(names)}"


def _bad_number(path: Path, column: str, row: int, value: object) -> BadInput:
    said = "is missing" if value is None else f"holds {value!r}"
    return BadInput(
        f"{path}: row {row + 1}, column {column!r} {said} where a finite number is needed; "
        f"correct or drop the row, or leave the column out with --exclude {column}"
    )


def _no_label(path: Path, label: str, row: int) -> BadInput:
    return BadInput(f"{path}: row {row + 1} has no label in column {label!r}; fill it in or drop the row")


# ----------------------------------------------------------------------
# Arrow: CSV and Parquet


def _read_csv(path: Path, wanted: Wanted) -> Table:
    with needs("probe"):
        import pyarrow as pa
        from pyarrow import csv
    parse = csv.ParseOptions(delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    blocks = csv.ReadOptions(block_size=BLOCK)

    def types(columns: dict[str, Any], include: list[str] | None = None) -> csv.ConvertOptions:
        return csv.ConvertOptions(
            column_types=columns, include_columns=include, null_values=MISSING, strings_can_be_null=False
        )

    try:
        as_text = {} if wanted.label is None else {wanted.label: pa.string()}
        with csv.open_csv(
            path, parse_options=parse, read_options=blocks, convert_options=types(as_text)
        ) as head:
            schema = head.schema
        features = _choose(path, wanted, schema.names, [_is_number(field.type) for field in schema])
        label = wanted.label if wanted.label in schema.names else None
        column_types = {name: pa.float64() for name in features}
        if label is not None:
            column_types[label] = pa.string()
        arrow = csv.read_csv(
            path,
            parse_options=parse,
            read_options=blocks,
            convert_options=types(column_types, list(column_types)),
        )
    except BadInput:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise _diagnose_csv(path, wanted, parse, error) from error
    skipped = _skipped(wanted, schema.names, features)
    return _from_arrow(path, wanted, arrow, features, label, skipped)


def _diagnose_csv(path: Path, wanted: Wanted, parse: Any, error: Exception) -> BadInput:
    """Why Arrow could not read the file: read it again, slowly, as text; look for the first bad number."""
    import pyarrow as pa
    from pyarrow import csv

    one_thread = csv.ReadOptions(block_size=BLOCK, use_threads=False)  # so that messages carry row numbers
    try:
        with csv.open_csv(path, parse_options=parse, read_options=one_thread) as head:
            schema = head.schema
        features = _choose(path, wanted, schema.names, [_is_number(field.type) for field in schema])
        texts = csv.ConvertOptions(column_types=dict.fromkeys(schema.names, pa.string()))
        with csv.open_csv(
            path, parse_options=parse, read_options=one_thread, convert_options=texts
        ) as blocks:
            first = 0
            for block in blocks:
                for name in features:
                    for i, text in enumerate(block.column(name).to_pylist()):
                        if text not in MISSING and not _parses(text):
                            return _bad_number(path, name, first + i, text)
                first += len(block)
    except BadInput as found:
        return found
    except (pa.ArrowInvalid, OSError) as again:
        error = again
    why = " ".join(str(error).split())
    if "UTF" in why:
        return BadInput(f"{path}: the text is not UTF-8; convert it first, for example with iconv")
    return BadInput(f"{path}: not readable as CSV: {why[:300]}")


def _parses(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_parquet(path: Path, wanted: Wanted) -> Table:
    with needs("probe"):
        import pyarrow as pa
        from pyarrow import parquet
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            features = _choose(path, wanted, schema.names, [_is_number(field.type) for field in schema])
            label = wanted.label if wanted.label in schema.names else None
            arrow = file.read(columns=features if label is None else [*features, label])
    except BadInput:
        raise
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{path}: not readable as Parquet: {' '.join(str(error).split())[:300]}") from error
    return _from_arrow(path, wanted, arrow, features, label, _skipped(wanted, schema.names, features))


def _is_number(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _from_arrow(
    path: Path, wanted: Wanted, arrow: Any, features: list[str], label: str | None, skipped: tuple[str, ...]
) -> Table:
    import pyarrow as pa

    kinds = [arrow.schema.field(name).type for name in features]
    single = all(pa.types.is_float32(kind) or pa.types.is_float16(kind) for kind in kinds)
    matrix = np.empty((arrow.num_rows, len(features)), dtype=np.float32 if single else np.float64)
    for j, (name, kind) in enumerate(zip(features, kinds, strict=True)):
        column = arrow.column(name)
        if not (_is_number(kind) or pa.types.is_boolean(kind)):
            raise BadInput(
                f"{path}: column {name!r} ({wanted.origin}) holds {kind}, not numbers; leave it out"
            )
        if column.null_count:
            raise _bad_number(path, name, int(np.flatnonzero(column.is_null().to_numpy())[0]), None)
        if pa.types.is_boolean(kind):
            column = column.cast(pa.int8())
        if pa.types.is_decimal(kind):
            column = column.cast(pa.float64())
        matrix[:, j] = column.to_numpy()
    _check_finite(path, matrix, features)
    if label is None:
        return Table(str(path), matrix, tuple(features), skipped=skipped)
    codes, classes = _arrow_labels(path, arrow.column(label), label, wanted.label_optional)
    return Table(str(path), matrix, tuple(features), label, codes, classes, skipped)


def _arrow_labels(path: Path, column: Any, label: str, optional: bool) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (is_text or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise BadInput(
            f"{path}: label column {label!r} holds {kind}; labels are text, integers, booleans: cast it first"
        )
    encoded = column.dictionary_encode().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = pa.chunked_array(encoded.chunks, encoded.type).unify_dictionaries().chunk(0)
    values = encoded.dictionary.to_pylist()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    if is_text:
        blank = [i for i, value in enumerate(values) if not value.strip()]
        codes[np.isin(codes, blank)] = -1
    if not optional and (codes < 0).any():
        raise _no_label(path, label, int(np.flatnonzero(codes < 0)[0]))
    return _compact(codes, np.array(values, dtype=str if is_text else None))


def _compact(codes: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the values that occur in sorted order; −1 stays."""
    used = np.unique(codes[codes >= 0])
    used = used[np.argsort(values[used], kind="stable")]
    place = np.full(len(values) + 1, -1, dtype=np.int64)  # the last one is where −1 points
    place[used] = np.arange(len(used))
    return place[codes], values[used]


# ----------------------------------------------------------------------
# NumPy


def _read_npz(path: Path, wanted: Wanted) -> Table:
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = list(archive.files)
            label = wanted.label if wanted.label in names else None
            if wanted.label is not None and label is None and not wanted.label_optional:
                raise BadInput(
                    f"{path}: no array {wanted.label!r} for --label; its arrays are {_some(names)}"
                )
            if "X" in names:
                chosen = "X"
            else:
                flat = [name for name in names if name != label and archive[name].ndim == 2]
                if len(flat) != 1:
                    raise BadInput(
                        f"{path}: which array holds the features? Name it X; there are {_some(names)}"
                    )
                chosen = flat[0]
            array, labels = archive[chosen], None if label is None else archive[label]
    except BadInput:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise _unreadable(path, "NPZ", error) from error
    return _from_arrays(path, wanted, array, labels, f"{path}: array {label!r}")


def _read_npy(path: Path, wanted: Wanted) -> Table:
    array = _load_npy(path)
    labels, where = None, ""
    if wanted.label is not None and (not wanted.label_optional or wanted.label.endswith(".npy")):
        if not wanted.label.endswith(".npy"):
            raise BadInput(f"{path}: the labels are a second file, --label y.npy; got --label {wanted.label}")
        where = wanted.label
        if Path(where).is_file():
            labels = _load_npy(Path(where))
        elif not wanted.label_optional:
            raise BadInput(f"{where}: no such file (--label)")
    return _from_arrays(path, wanted, array, labels, where)


def _load_npy(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise _unreadable(path, "NPY", error) from error
    if not isinstance(array, np.ndarray):
        raise BadInput(f"{path}: is an archive of arrays; call it .npz")
    return array


def _unreadable(path: Path, kind: str, error: Exception) -> BadInput:
    if "pickle" in str(error).lower():
        return BadInput(
            f"{path}: holds Python objects or is no {kind} file; save plain arrays (objects are not read)"
        )
    return BadInput(f"{path}: not readable as {kind}: {' '.join(str(error).split())[:300]}")


def _from_arrays(
    path: Path, wanted: Wanted, array: np.ndarray, labels: np.ndarray | None, where: str
) -> Table:
    if array.ndim != 2:
        raise BadInput(f"{path}: the features are to be (rows, columns); this array has shape {array.shape}")
    if array.dtype.kind not in "fiub":
        raise BadInput(f"{path}: the features are of type {array.dtype}, not real numbers")
    if labels is not None and len(np.atleast_1d(labels)) != len(array):
        raise BadInput(f"{path}: {len(array)} rows, but {where} holds {len(np.atleast_1d(labels))} labels")
    names = [f"x{j}" for j in range(array.shape[1])]
    # the label is another array, not one of these columns
    columns = dataclasses.replace(wanted, label=None)
    features = _choose(path, columns, names, [True] * len(names))
    if features != names:
        place = {name: j for j, name in enumerate(names)}
        array = array[:, [place[name] for name in features]]
    single = array.dtype.kind == "f" and array.dtype.itemsize <= 4
    matrix = np.ascontiguousarray(array, dtype=np.float32 if single else np.float64)
    _check_finite(path, matrix, features)
    if labels is None:
        return Table(str(path), matrix, tuple(features))
    codes, classes = _array_labels(where, labels, wanted.label_optional)
    return Table(str(path), matrix, tuple(features), wanted.label, codes, classes)


def _array_labels(where: str, labels: np.ndarray, optional: bool) -> tuple[np.ndarray, np.ndarray]:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise BadInput(f"{where}: labels are to be one-dimensional; this array has shape {labels.shape}")
    if labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf-8")
    if labels.dtype.kind not in "Uiub":
        raise BadInput(f"{where}: labels are text, integers or booleans, not {labels.dtype}; cast them first")
    values, codes = np.unique(labels, return_inverse=True)
    codes = codes.astype(np.int64)
    if labels.dtype.kind == "U":
        blank = np.flatnonzero(np.char.strip(values) == "")
        codes[np.isin(codes, blank)] = -1
    if not optional and (codes < 0).any():
        row = int(np.flatnonzero(codes < 0)[0])
        raise BadInput(f"{where}: row {row + 1} has no label; fill it in or drop the row")
    return _compact(codes, values)


def _check_finite(path: Path, matrix: np.ndarray, names: Sequence[str]) -> None:
    step = max(1, 2**22 // max(1, matrix.shape[1]))  # a flag a number, for a few million at a time
    for i in range(0, len(matrix), step):
        finite = np.isfinite(matrix[i : i + step])
        if not finite.all():
            row, j = np.argwhere(~finite)[0]
            raise _bad_number(path, names[j], i + int(row), float(matrix[i + row, j]))


_READERS: dict[str, Callable[[Path, Wanted], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".npz": _read_npz,
    ".npy": _read_npy,
}
