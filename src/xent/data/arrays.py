"""Arrays to a ``Table``: features (N, D), and beside them labels (N,), weights (N,) or masses (N, C).

Of an archive with several arrays the features are the one that is named, else ``X``, else the only one with
two dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from xent._processes.group import Share
from xent._util.text import quoted
from xent.data.batches import computed_dtype
from xent.data.columns import check_mass, check_rows
from xent.data.labels import encode_labels, encode_text_labels
from xent.data.limits import MOST_NAME, check_columns, check_memory
from xent.data.rows import MappedRows, RowSource, is_mapped, row_source
from xent.data.table import Table, Wanted, check_finite, choose, no_label, some
from xent.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array of which the header is read and the rest is not."""

    where: str  # in messages
    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]
    bits: Callable[[], np.ndarray] | None = None  # those of bfloat16, which NumPy does not have, mapped

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.shape[0] if self.shape else 1

    def part(self, share: Share) -> np.ndarray:
        """Load the share's rows; of a mapped array they are mapped."""
        return self._share(self.load(), share)

    def _share(self, array: np.ndarray, share: Share) -> np.ndarray:
        if share.whole:
            return array
        part = array[share.of(self.rows)]
        return part if isinstance(array, np.memmap) else np.array(part)

    def mapped_bits(self, share: Share) -> np.ndarray | None:
        """Return the share's rows of bfloat16 as uint16, None of other types."""
        return None if self.bits is None else self._share(self.bits(), share)


class Beside(NamedTuple):
    """The arrays beside the features."""

    label: Stored | None = None  # (N,)
    weight: Stored | None = None  # (N,)
    soft: Stored | None = None  # (N, C)


def chosen(
    path: Path, wanted: Wanted, names: Sequence[str], stored: Callable[[str], Stored]
) -> tuple[Stored, Beside]:
    """Return the arrays that are wanted of an archive; ``stored(name)`` reads the header of one."""
    array = wanted.layout.array
    asked = {
        "--array": array,
        "--label": None if wanted.label_optional else wanted.label,
        "--weight": wanted.weight,
        "--soft-labels": wanted.soft[0] if wanted.soft else None,
    }
    for option, name in asked.items():
        if name is not None and name not in names:
            raise BadInput(f"{path}: no array {quoted(name)} for {option}; its arrays are {some(names)}")
    label = wanted.label if wanted.label in names else None
    others = [name for name in (label, asked["--weight"], asked["--soft-labels"]) if name is not None]
    if array in others:
        raise BadInput(f"{path}: array {quoted(array)} is named in --array and for something else")
    if array is None and "X" in names and "X" not in others:
        array = "X"
    if array is None:
        rest = [stored(name) for name in names if name not in others]
        tables = [each for each in rest if len(each.shape) == 2]
        if len(tables) != 1:
            raise BadInput(
                f"{path}: which array holds the features? Name it with --array; there are {some(names)}"
            )
        features = tables[0]
    else:
        features = stored(array)
    beside = (
        None if name is None else stored(name) for name in (label, asked["--weight"], asked["--soft-labels"])
    )
    return features, Beside(*beside)


def check_count(path: Path, wanted: Wanted, rows: int, labels: Stored) -> None:
    """Raise ``BadInput`` for labels, or another array beside the features, of other rows."""
    if labels.rows != rows:
        raise BadInput(
            f"{path}: {rows} rows, but {labels.where} holds {labels.rows} labels; "
            f"bring them together, or {wanted.other_labels}"
        )


def from_arrays(path: Path, wanted: Wanted, share: Share, stored: Stored, beside: Beside) -> Table:
    """Return the share's rows of arrays as a table, whose columns are x0, x1, ..."""
    shape, kind = stored.shape, stored.dtype.kind
    if stored.dtype.names is not None:
        raise BadInput(
            f"{path}: is an array of records with the fields {some(stored.dtype.names)}; save the numbers as "
            "an array (rows, columns), or the records as Parquet"
        )
    if len(shape) != 2 or not shape[1]:
        what = "the predictions are to be (rows, classes), or (rows, 1) of a single class"
        what = what if wanted.raw else "the features are to be (rows, columns)"
        raise BadInput(f"{path}: {what}; this array has shape {shape}")
    if kind not in "fiub":
        raise BadInput(f"{path}: the features are of type {stored.dtype}, not real numbers")
    check_columns(path, shape[1])
    if wanted.categorical and wanted.categorical != "auto":
        raise BadInput(f"{path}: an array has no columns of text; drop --categorical")
    for other in beside:
        if other is not None:
            check_count(path, wanted, stored.rows, other)
    names = [f"x{j}" for j in range(shape[1])]
    # the label is another array, not one of these columns
    features = choose(path, _of_features(wanted), names, [True] * len(names))
    if wanted.width is not None and wanted.width != shape[1]:
        raise BadInput(
            f"{path}: has {shape[1]:,} columns, and {wanted.model} takes arrays of {wanted.width:,}; "
            "bring the array to the same columns, in the same order"
        )
    rows = share.of(stored.rows)
    bits = stored.mapped_bits(share)
    array = stored.part(share) if bits is None else bits
    columns = None if features == names else [int(name[1:]) for name in features]
    given: np.ndarray | RowSource
    if bits is not None:
        given = MappedRows(bits, columns, bfloat16=True)
    elif is_mapped(array):
        given = array if columns is None else MappedRows(array, columns)
    else:
        dtype = computed_dtype(stored.dtype)
        claim = f"an array of shape {shape} as {dtype}"
        check_memory(path, (rows.stop - rows.start) * len(features) * dtype.itemsize, claim)
        array = array if columns is None else array[:, columns]
        kept = array.dtype == np.float16 and array.dtype.isnative
        with np.errstate(over="ignore"):  # what leaves the type is not finite, which is looked at next
            given = np.ascontiguousarray(array, dtype=None if kept else dtype)
    check_finite(path, wanted, row_source(given), features, rows.start)
    table = Table(str(path), given, tuple(features), start=rows.start, width=shape[1])
    if beside.weight is not None:
        weight = _masses(beside.weight, share, 1)[:, 0]
        table = dataclasses.replace(table, weight=weight)
    if beside.soft is not None:
        soft = _masses(beside.soft, share, 2)
        check_rows(beside.soft.where, wanted, soft, rows.start)
        return dataclasses.replace(table, soft=soft, codes=soft.argmax(1), classes=np.arange(soft.shape[1]))
    if beside.label is None:
        return table
    codes, classes = array_labels(wanted, share, beside.label)
    return dataclasses.replace(table, label_name=wanted.label, codes=codes, classes=classes)


def _of_features(wanted: Wanted) -> Wanted:
    """Return what is wanted of the columns of an array alone: labels and weights are other arrays."""
    return dataclasses.replace(wanted, label=None, weight=None, soft=(), categorical=())


def _masses(stored: Stored, share: Share, dimensions: int) -> np.ndarray:
    """Return weights or masses of the share's rows, (n, k), in float64."""
    shape = stored.shape
    if len(shape) != dimensions and not (dimensions == 1 and shape[1:] == (1,)):
        what = "weights are to be one-dimensional" if dimensions == 1 else "masses are to be (rows, classes)"
        raise BadInput(f"{stored.where}: {what}; this array has shape {shape}")
    if stored.dtype.kind not in "fiub":
        raise BadInput(f"{stored.where}: holds {stored.dtype}, not real numbers")
    array = stored.part(share).astype(np.float64).reshape(-1, 1 if dimensions == 1 else shape[1])
    check_mass(stored.where, "of the array", array, share.of(stored.rows).start)
    return array


def array_labels(wanted: Wanted, share: Share, stored: Stored) -> tuple[np.ndarray, np.ndarray]:
    """Return codes (n,) and classes of the share's rows."""
    where, shape, dtype = stored.where, stored.shape, stored.dtype
    if len(shape) != 1 and shape[1:] != (1,):
        raise BadInput(
            f"{where}: labels are to be one-dimensional; this array has shape {shape}; "
            f"make it one class a row, or {wanted.other_labels}"
        )
    if dtype.kind not in ("SUiub" if wanted.model is None else "SUiubf"):
        raise BadInput(
            f"{where}: labels are text, integers or booleans, not {dtype}; cast them first "
            f"if they are classes, else {wanted.other_labels}"
        )
    length = dtype.itemsize // (4 if dtype.kind == "U" else 1)
    if length > MOST_NAME:
        raise BadInput(f"{where}: labels of {length:,} characters, more than {MOST_NAME:,}; shorten them")
    check_memory(where, stored.rows * dtype.itemsize, f"{stored.rows:,} labels of type {dtype}")
    labels = stored.part(share).reshape(-1)
    start = share.of(stored.rows).start
    values, codes = np.unique(labels, return_inverse=True)
    codes = codes.astype(np.int64)
    if dtype.kind in "SU":
        codes, classes = encode_text_labels(where, codes, _texts(where, values))
    else:
        codes, classes = encode_labels(where, codes, values)
    if wanted.every_row and (codes < 0).any():
        raise no_label(where, start + int(np.flatnonzero(codes < 0)[0]))
    return codes, classes


def _texts(where: str, values: np.ndarray) -> list[str]:
    """Decode labels: bytes are UTF-8, and numbers of characters are ones that there are."""
    if values.dtype.kind == "S":
        try:
            return [value.decode() for value in values.tolist()]
        except UnicodeDecodeError as error:
            raise BadInput(
                f"{where}: the label {quoted(error.object)} is not UTF-8; save text, not bytes"
            ) from error
    points = np.ascontiguousarray(values, values.dtype.newbyteorder("=")).view(np.uint32)
    if points.size and points.max() > 0x10FFFF:
        raise BadInput(
            f"{where}: a label holds {hex(int(points.max()))}, which is no character; "
            "the file is damaged, save it again"
        )
    return values.tolist()
