"""The columns of an Arrow table that are features: numbers, or lists of as many numbers in every row.

    a column x of numbers            x
    a column emb of lists of 768     emb[0], emb[1], ..., emb[767]

Lists are of any of Arrow's kinds: ``list``, ``large_list``, ``fixed_size_list`` and fixed-shape tensors,
which are taken flat.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xent._util.text import quoted
from xent.data.limits import check_columns
from xent.data.table import NoRows, Wanted, bad_number, check_once, choose, no_number
from xent.errors import BadInput

_ENTRY = re.compile(r"(.+)\[([0-9]+)\]")
_UNNAMED = re.compile(r"\s*|Unnamed: [0-9]+(\.[0-9]+)*")  # as pandas reads, and reads again, no name
_LEVEL = re.compile(r"__index_level_[0-9]+__")

NO_VALUES = "no value in any row"
"""The description of a column whose type says that no row has a value."""


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of features, or some entries of the lists in it."""

    name: str
    kind: Any  # its Arrow type
    width: int | None = None  # numbers in each row's list; None for a column of numbers
    entries: tuple[int, ...] | None = None  # those that are meant; None is all, in their order

    @property
    def names(self) -> list[str]:
        """The names of the features in it."""
        if self.width is None:
            return [self.name]
        return [f"{self.name}[{i}]" for i in self.entries or range(self.width)]

    @property
    def number(self) -> Any:
        """The Arrow type of its numbers."""
        return self.kind if self.width is None else list_of(self.kind)


@dataclasses.dataclass(frozen=True)
class Columns:
    """The wanted columns of an Arrow table."""

    features: tuple[Column, ...]
    label: str | None
    unused: dict[str, str]  # those that are neither features nor excluded nor the label, and why
    categorical: tuple[str, ...] = ()  # those whose values are numbered, unless they have too many
    beside: tuple[Column, ...] = ()  # weights, then masses of classes

    @property
    def names(self) -> list[str]:
        """The names of the features, in their order."""
        return [name for column in self.features for name in column.names]

    @property
    def bases(self) -> list[str]:
        """The column that each of the features lies in."""
        return [column.name for column in self.features for _ in column.names]

    @property
    def every(self) -> list[str]:
        """The columns of the file that are read, each once."""
        label = [] if self.label is None else [self.label]
        return list(dict.fromkeys([*self.read, *self.categorical, *(c.name for c in self.beside), *label]))

    @property
    def read(self) -> list[str]:
        """The columns of the file that hold features, each once."""
        return list(dict.fromkeys(column.name for column in self.features))

    @property
    def lists(self) -> dict[str, int]:
        """The length of the lists in each column of features that holds some."""
        return {column.name: column.width for column in self.features if column.width is not None}

    @property
    def dtype(self) -> np.dtype:
        """The type that they are decoded into: the narrowest that holds them all."""
        import pyarrow as pa

        kinds = [column.number for column in self.features if not is_null(column.kind)]
        if not kinds or not all(pa.types.is_float32(kind) or pa.types.is_float16(kind) for kind in kinds):
            return np.dtype(np.float64)
        return np.dtype(np.float32 if any(pa.types.is_float32(kind) for kind in kinds) else np.float16)


def choose_columns(path: Path, wanted: Wanted, schema: Any, width: Callable[[str], int]) -> Columns:
    """Choose among the columns of an Arrow schema; ``width(name)`` is the length of a column's first list.

    A column without a value in any row is a feature or a category where it is named as one.

    Raises ``BadInput`` for columns that are not there, and for too many of them.
    """
    kinds = dict(zip(schema.names, (field.type for field in schema), strict=True))
    lists = {
        name
        for name, kind in kinds.items()
        if is_number(list_of(kind)) or (is_null(kind) and name in wanted.lists)
    }
    asked = None if wanted.features is None else [_entry(name, lists) for name in wanted.features]
    bases = wanted
    if asked is not None and _entries(asked):
        bases = dataclasses.replace(wanted, features=list(dict.fromkeys(name for name, _ in asked)))
        check_once(path, wanted)
    index = (
        index_columns(schema) - {wanted.label, *wanted.exclude, *wanted.beside} - {*(bases.features or ())}
    )
    others = {wanted.label, *wanted.exclude, *index} if bases.features is None else lists - {*bases.features}
    widths = {
        name: width(name) if name in lists and (name not in others or name in wanted.soft) else None
        for name in kinds
    }
    usable = [is_number(kind) or bool(widths.get(name)) for name, kind in kinds.items()]
    categorical = _categorical(path, bases, kinds, index)
    about = [_described(kind, widths.get(name)) for name, kind in kinds.items()]
    chosen = choose(path, bases, schema.names, usable, about, {*categorical, *index})
    if asked is None or not _entries(asked):
        features = [Column(name, kinds[name], widths[name]) for name in chosen]
    else:
        entries = [entry for entry in asked if entry[0] not in categorical]
        features = [_column(path, wanted, kinds, widths, *group) for group in _groups(entries)]
    check_columns(path, sum(column.width or 1 for column in features))
    label = wanted.label if wanted.label in schema.names else None
    beside = tuple(Column(name, kinds[name], widths[name]) for name in wanted.beside)
    passed_over = {*chosen, *categorical, wanted.label, *wanted.exclude, *wanted.beside}
    unused = {
        name: "the index of the data frame" if name in index else kind
        for name, kind in zip(schema.names, about, strict=True)
        if wanted.features is None and name not in passed_over
    }
    return Columns(tuple(features), label, unused, tuple(categorical), beside)


def index_columns(schema: Any) -> set[str]:
    """Return the columns that were the index of a data frame: by what pandas wrote, or without a name.

    A column without a name counts where only such columns are before it, as pandas writes an index to CSV.
    """
    found = {name for name in schema.names if _LEVEL.fullmatch(name)}
    found.update(itertools.takewhile(_UNNAMED.fullmatch, schema.names))
    about = (schema.metadata or {}).get(b"pandas")
    with contextlib.suppress(ValueError, TypeError, AttributeError):  # metadata may hold anything
        index = json.loads(about or b"{}").get("index_columns", [])
        found |= {name for name in index if isinstance(name, str)}
    return found & {*schema.names}


def _categorical(path: Path, wanted: Wanted, kinds: dict[str, Any], index: set[str]) -> list[str]:
    """Return the columns whose values are numbered."""
    if wanted.categorical != "auto":
        names = list(dict.fromkeys(wanted.categorical))
        for name in names:
            if name in kinds and not may_be_numbered(kinds[name]):
                raise BadInput(
                    f"{path}: column {quoted(name)} (--categorical) holds {kinds[name]}, "
                    "not text, booleans or whole numbers; cast it first"
                )
        return names
    passed_over = {wanted.label, *wanted.exclude, *wanted.beside, *index}
    names = list(kinds) if wanted.features is None else [name for name in wanted.features if name in kinds]
    return [
        name
        for name in names
        if name not in passed_over
        and may_be_numbered(kinds[name])
        and not (is_number(kinds[name]) or is_null(kinds[name]))
    ]


def may_be_numbered(kind: Any) -> bool:
    """Return whether a column of an Arrow type can be one of categories.

    Floats can, as whole numbers are where a row has none; that they are whole is seen when they are numbered.
    """
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return may_be_numbered(kind.value_type)
    of_numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return bool(is_text(kind) or pa.types.is_boolean(kind) or is_null(kind) or of_numbers)


def is_null(kind: Any) -> bool:
    """Return whether an Arrow type says that no row has a value."""
    import pyarrow as pa

    return bool(pa.types.is_null(kind))


def is_text(kind: Any) -> bool:
    """Return whether an Arrow type is one of text."""
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or str(kind) == "string_view")


def _described(kind: Any, width: int | None) -> str:
    """Return what a column holds, in plain words."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _described(kind.value_type, width)
    if width == 0:
        return "empty lists"
    if (number := list_of(kind)) is not None:
        return f"lists of {_described(number, None)}"
    if is_null(kind):
        return NO_VALUES
    return "booleans" if pa.types.is_boolean(kind) else "text" if is_text(kind) else str(kind)


def _entry(name: str, lists: Collection[str]) -> tuple[str, int | None]:
    """Return the column of a feature, and its position in the lists there."""
    found = _ENTRY.fullmatch(name)
    return (found[1], int(found[2])) if found is not None and found[1] in lists else (name, None)


def column_of(name: str, lists: Collection[str]) -> str:
    """Return the column that a feature lies in; ``lists`` are those of lists."""
    return _entry(name, lists)[0]


def _entries(asked: Sequence[tuple[str, int | None]]) -> bool:
    return any(position is not None for _, position in asked)


def _groups(asked: Sequence[tuple[str, int | None]]) -> list[tuple[str, list[int | None]]]:
    """Return neighbouring features of one column together."""
    return [
        (name, [i for _, i in group]) for name, group in itertools.groupby(asked, key=lambda entry: entry[0])
    ]


def _column(
    path: Path,
    wanted: Wanted,
    kinds: dict[str, Any],
    widths: dict[str, int | None],
    name: str,
    positions: list[int | None],
) -> Column:
    width = widths[name]
    if width is None or None in positions:
        return Column(name, kinds[name], width)
    fitted = wanted.lists.get(name, width)
    if width > fitted:
        raise BadInput(
            f"{path}: the lists of column {quoted(name)} hold {width} numbers, and {wanted.model} takes "
            f"lists of {fitted}; are they of another kind of embedding?"
        )
    entries = tuple(position for position in positions if position is not None)
    beyond = [position for position in entries if position >= width]
    if beyond:
        raise BadInput(
            f"{path}: no {quoted(f'{name}[{beyond[0]}]')} ({wanted.origin}): the lists of column "
            f"{quoted(name)} hold {width} numbers"
        )
    return Column(name, kinds[name], width, None if entries == tuple(range(width)) else entries)


def check_numbers(path: Path, wanted: Wanted, columns: Columns, schema: Any) -> None:
    """Raise ``BadInput`` for a column of features that holds none, by its type in an Arrow schema."""
    import pyarrow as pa

    for column in columns.features:
        kind = schema.field(column.name).type
        number = kind if column.width is None else list_of(kind)
        if column.width == 0:
            why = "holds an empty list in the first row"
        elif not (is_number(number) or is_null(kind) or pa.types.is_boolean(number)):
            raise no_number(path, wanted, column.name, _described(kind, column.width), may_be_numbered(kind))
        else:
            continue
        raise BadInput(
            f"{path}: column {quoted(column.name)} ({wanted.origin}) {why}; {wanted.without(column.name)}"
        )


def is_number(kind: Any) -> bool:
    """Return whether an Arrow type is one of real numbers."""
    import pyarrow as pa

    return kind is not None and bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    )


def list_of(kind: Any) -> Any:
    """Return the type of the entries of an Arrow type of lists, None for another."""
    import pyarrow as pa

    if isinstance(kind, pa.FixedShapeTensorType):
        return kind.value_type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return kind.value_type if is_list else None


def width_of(path: Path, wanted: Wanted, arrays: Iterable[Any], name: str) -> int:
    """Return the length of the first list of a column, given as Arrow arrays of its rows, each some.

    Raises ``BadInput`` where the first row has none and that is an error, and where no row has one, unless
    it is known from a fit.
    """
    rows, strict = 0, wanted.missing == "error" and not wanted.skip_bad
    for array in arrays:
        if strict and not rows and len(array) and not array[0].is_valid:
            raise BadInput(
                f"{path}: row 1, column {quoted(name)} is missing where a list of numbers is needed"
            )
        if array.null_count < len(array):
            return int(np.size(next(value for value in array if value.is_valid).as_py()))
        rows += len(array)
    if not rows:
        raise NoRows(path)
    if name in wanted.lists:
        return wanted.lists[name]
    raise BadInput(f"{path}: column {quoted(name)} holds no list in any row; {wanted.without(name)}")


def matrix(
    path: Path, wanted: Wanted, arrow: Any, features: Sequence[Column], start: int, dtype: np.dtype
) -> np.ndarray:
    """Return columns of an Arrow table or batch as (rows, features); the first is at ``start`` of the file.

    Raises ``BadInput`` for a number that is missing, and for lists of another length.
    """
    parts = [_numbers(path, wanted, arrow.column(column.name), column, start) for column in features]
    if len(parts) == 1 and parts[0].dtype == dtype and parts[0].ndim == 2:
        return np.ascontiguousarray(parts[0])
    shape = (arrow.num_rows, sum(part.shape[1] if part.ndim == 2 else 1 for part in parts))
    made = np.empty(shape, dtype, order="F" if wanted.raw else "C")
    at = 0
    for part in parts:
        here = made[:, at : at + part.shape[1]] if part.ndim == 2 else made[:, at]
        here[...] = part
        at += part.shape[1] if part.ndim == 2 else 1
    return made


def _numbers(path: Path, wanted: Wanted, given: Any, column: Column, start: int) -> np.ndarray:
    """Return the numbers of a column, (rows,), or (rows, entries) of lists."""
    import pyarrow as pa

    if is_null(given.type):
        if len(given) and wanted.missing == "error" and not wanted.skip_bad:
            raise bad_number(path, wanted, column.name, start, None)
        return np.full(len(given) if column.width is None else (len(given), len(column.names)), np.nan)
    array = given.combine_chunks() if isinstance(given, pa.ChunkedArray) else given
    if isinstance(array, pa.ChunkedArray):  # of no chunk
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    null = None
    if array.null_count:
        null = array.is_null().to_numpy(zero_copy_only=False)
        if wanted.missing == "error" and not wanted.skip_bad:
            raise bad_number(path, wanted, column.name, start + int(np.flatnonzero(null)[0]), None)
    if column.width is None:
        return _plain(array)
    array = array.storage if isinstance(array, pa.ExtensionArray) else array
    if wanted.skip_bad and not pa.types.is_fixed_size_list(array.type):
        lengths = array.value_lengths().to_numpy(zero_copy_only=False)  # nan for null
        odd = (lengths != column.width) if null is None else (lengths != column.width) & ~null
        if odd.any():
            left_out = odd if null is None else odd | null
            made = _with_gaps(path, wanted, array, column, start, left_out)
            made[odd] = np.inf
            return made
    if null is not None:
        return _with_gaps(path, wanted, array, column, start, null)
    count, width = len(array), column.width
    if not pa.types.is_fixed_size_list(array.type):
        lengths = array.value_lengths().to_numpy(zero_copy_only=False)
        odd = np.flatnonzero(lengths != width)
        if len(odd):
            raise _uneven(path, wanted, column, start + int(odd[0]), int(lengths[odd[0]]))
    elif array.type.list_size != width:
        raise _uneven(path, wanted, column, start, array.type.list_size)
    values = array.flatten()
    if values.null_count and wanted.missing == "error" and not wanted.skip_bad:
        at = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        name, row = f"{column.name}[{at % width}]", start + at // width
        raise bad_number(path, wanted, name, row, None, column.name)
    numbers = _plain(values).reshape(count, width)
    return numbers if column.entries is None else numbers[:, list(column.entries)]


def _with_gaps(
    path: Path, wanted: Wanted, array: Any, column: Column, start: int, null: np.ndarray
) -> np.ndarray:
    """Return the lists of a column, (rows, entries), nan where there is none."""
    import pyarrow.compute as pc

    there = np.flatnonzero(~null)
    made = np.full((len(null), len(column.names)), np.nan, np.float64)
    for row, count in zip(there, pc.list_value_length(array.take(there)).to_pylist(), strict=True):
        if count != column.width:
            raise _uneven(path, wanted, column, start + int(row), count)
    made[there] = _numbers(path, wanted, array.take(there), column, start)
    return made


def numbers_beside(
    path: Path, wanted: Wanted, arrow: Any, columns: Columns, start: int
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the weights (rows,) and the masses of the classes (rows, C) in columns of an Arrow table.

    Raises ``BadInput`` for one that is missing, negative or not finite, and for a row without any mass.
    """
    strict = dataclasses.replace(wanted, missing="error")
    texts = [column.name for column in columns.beside if column.width is None and is_text(column.kind)]
    arrow = _with_numbers(arrow, texts)
    for column in columns.beside:
        lists = column.name == wanted.weight and column.width is not None
        if lists or not is_number(_type_in(arrow, column)):
            option = wanted.option("--soft-labels") if column.name in wanted.soft else "--weight"
            raise BadInput(
                f"{path}: column {quoted(column.name)} ({option}) holds "
                f"{_described(column.kind, column.width)}, not numbers"
            )
    made = [_numbers(path, strict, arrow.column(column.name), column, start) for column in columns.beside]
    stacked = [array.reshape(len(array), -1).astype(np.float64) for array in made]
    for column, array in zip(columns.beside, stacked, strict=True):
        check_mass(path, column.name, array, start, "mass" if column.name in wanted.soft else "weight")
    weight = stacked.pop(0)[:, 0] if wanted.weight is not None else None
    soft = np.concatenate(stacked, axis=1) if stacked else None
    if soft is not None:
        check_rows(path, wanted, soft, start)
    return weight, soft


def _with_numbers(arrow: Any, names: Sequence[str]) -> Any:
    """Return an Arrow table or batch with columns of text as numbers where every text is one."""
    import pyarrow as pa

    for name in names:
        at = arrow.schema.get_field_index(name)
        with contextlib.suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError):
            arrow = arrow.set_column(at, name, arrow.column(at).cast(pa.float64()))
    return arrow


def _type_in(arrow: Any, column: Column) -> Any:
    """Return the type of the numbers of a column."""
    return column.number if column.width is not None else arrow.schema.field(column.name).type


def check_mass(path: object, name: str, array: np.ndarray, start: int, what: str = "weight") -> None:
    """Raise ``BadInput`` for a weight or a mass (rows, k) that is negative or not finite."""
    bad = ~(np.isfinite(array) & (array >= 0))
    if bad.any():
        row, j = np.argwhere(bad)[0].tolist()
        raise BadInput(
            f"{path}: row {start + row + 1}, column {quoted(name)} holds {array[row, j]:g} where a {what}, "
            "0 or more, is needed; correct or drop the row"
        )


def check_rows(path: object, wanted: Wanted, soft: np.ndarray, start: int) -> None:
    """Raise ``BadInput`` for masses (rows, C) of fewer than two classes, and for a row without any."""
    if soft.shape[1] < 2:
        raise BadInput(f"{path}: {wanted.option('--soft-labels')} names one class; a classifier needs two")
    none = soft.sum(1) == 0
    if none.any():
        row = start + int(np.flatnonzero(none)[0]) + 1
        option = wanted.option("--soft-labels")
        raise BadInput(f"{path}: row {row} has no mass in any of {option}; correct or drop the row")


def _uneven(path: Path, wanted: Wanted, column: Column, row: int, length: int) -> BadInput:
    return BadInput(
        f"{path}: row {row + 1}, column {quoted(column.name)} holds a list of {length} numbers and the first "
        f"row one of {column.width}; correct or drop the row, or {wanted.without(column.name)}"
    )


def _plain(array: Any) -> np.ndarray:
    """Return an Arrow array of numbers or booleans, nan where one is missing."""
    import pyarrow as pa

    if pa.types.is_boolean(array.type):
        array = array.cast(pa.int8())
    if pa.types.is_decimal(array.type):
        array = array.cast(pa.float64())
    return array.to_numpy(zero_copy_only=False)
