"""``.npz`` and ``.npy`` files to a ``Table``, through NumPy without pickle.

An array's header is read first, and what it claims is held against what is there before anything is
allocated. A ``.npy`` file of features is mapped, so that its rows are read where they are used; an array in
an archive is read whole, and of a share of the rows the rest let go.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from xent._processes.group import Share
from xent._util.text import quoted
from xent.data.batches import computed_dtype
from xent.data.labels import encode_labels, encode_text_labels
from xent.data.limits import MOST_NAME, check_columns, check_memory
from xent.data.reading import reading
from xent.data.rows import MappedRows, RowSource, is_mapped, row_source
from xent.data.table import Table, Wanted, check_finite, choose, no_label, some
from xent.errors import BadInput


def read_npz(path: Path, wanted: Wanted, share: Share) -> Table:
    """Return the share's rows of an archive of arrays: ``X``, and the label's."""
    with open(path, "rb") as file:
        if file.read(len(npy.MAGIC_PREFIX)) == npy.MAGIC_PREFIX:
            raise BadInput(f"{path}: is a single array, not an archive of them; call it .npy")
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        label = wanted.label if wanted.label in names else None
        if wanted.label is not None and label is None and not wanted.label_optional:
            raise BadInput(
                f"{path}: no array {quoted(wanted.label)} for --label; its arrays are {some(names)}"
            )
        arrays = {name: _in_archive(path, archive, name) for name in names if name in ("X", label)}
        if "X" not in arrays:
            others = [_in_archive(path, archive, name) for name in names if name != label]
            flat = [array for array in others if len(array.shape) == 2]
            if len(flat) != 1:
                raise BadInput(f"{path}: which array holds the features? Name it X; there are {some(names)}")
            arrays["X"] = flat[0]
        labels = None if label is None else arrays[label]
        return _from_arrays(path, wanted, share, arrays["X"], labels)


def read_npy(path: Path, wanted: Wanted, share: Share) -> Table:
    """Return the share's rows of an array, the labels being another file."""
    features = _alone(path)
    if wanted.label is None or wanted.label_optional:  # an optional label is a column's name, never a path
        return _from_arrays(path, wanted, share, features, None)
    label = _label_file(path, wanted.label)
    with reading(label, "NPY"):
        table = _from_arrays(path, wanted, share, features, _alone(label))
    return dataclasses.replace(table, label_name=None)


def labels_of_npy(path: Path, wanted: Wanted, share: Share, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and classes of the share's rows, of several files of features with as many rows."""
    label = _label_file(path, str(wanted.label))
    with reading(label, "NPY"):
        stored = _alone(label)
        _check_count(path, wanted, rows, stored)
        return _array_labels(wanted, share, stored)


def _label_file(path: Path, name: str) -> Path:
    if not name.endswith(".npy"):
        raise BadInput(f"{path}: the labels are a second file, --label y.npy; got --label {quoted(name)}")
    label = Path(name)
    if not label.is_file():
        raise BadInput(f"{label}: no such file (--label)")
    return label


def _check_count(path: Path, wanted: Wanted, rows: int, labels: _Stored) -> None:
    if labels.rows != rows:
        raise BadInput(
            f"{path}: {rows} rows, but {labels.where} holds {labels.rows} labels; "
            f"bring them together, or {wanted.other_labels}"
        )


@dataclasses.dataclass(frozen=True)
class _Stored:
    """An array of which the header is read and the rest is not."""

    where: str  # in messages
    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    def part(self, share: Share) -> np.ndarray:
        """Load the share's rows; of a mapped array they are mapped."""
        array = self.load()
        if share.whole:
            return array
        part = array[share.of(self.rows)]
        return part if isinstance(array, np.memmap) else np.array(part)


def _alone(path: Path) -> _Stored:
    """Read the header of a ``.npy`` file."""
    with open(path, "rb") as file:
        if file.read(4) == b"PK\3\4":
            raise BadInput(f"{path}: is an archive of arrays; call it .npz")
        file.seek(0)
        shape, dtype = _claims(file, path.stat().st_size, path, "")
    there = math.prod(shape) > 0  # an empty array cannot be mapped
    return _Stored(
        str(path), shape, dtype, lambda: np.load(path, mmap_mode="r" if there else None, allow_pickle=False)
    )


def count_npy(path: Path) -> int:
    """Return the number of rows that the header of a ``.npy`` file claims."""
    return _alone(path).rows


def _in_archive(path: Path, archive: zipfile.ZipFile, name: str) -> _Stored:
    """Read the header of an array in a ``.npz`` file."""
    about = archive.getinfo(name + ".npy")
    with archive.open(about) as file:
        shape, dtype = _claims(file, about.file_size, path, f" in array {quoted(name)}")
    claim = f"an array of shape {shape} and type {dtype} in array {quoted(name)}"
    check_memory(path, math.prod(shape) * dtype.itemsize, claim)

    def load() -> np.ndarray:
        with archive.open(about) as file:
            return npy.read_array(file, allow_pickle=False)

    return _Stored(f"{path}: array {quoted(name)}", shape, dtype, load)


def _claims(file: IO[bytes], size: int, path: Path, inside: str) -> tuple[tuple[int, ...], np.dtype]:
    """Read an array's shape and type; raise ``BadInput`` unless as many bytes follow as they take."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python's parser, about a header in odd spelling
        read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(file)
    if dtype.hasobject:
        raise BadInput(f"{path}: holds Python objects{inside}; save plain arrays (objects are not read)")
    claim = f"an array of shape {shape} and type {dtype}{inside}"
    claimed, there = math.prod(shape) * dtype.itemsize, size - file.tell()
    if claimed != there or min(shape, default=0) < 0 or not dtype.itemsize:
        raise BadInput(
            f"{path}: its header claims {claim}, {claimed:,} bytes, and {there:,} follow; "
            "it is cut short or damaged, save it again"
        )
    return shape, dtype


def _from_arrays(path: Path, wanted: Wanted, share: Share, stored: _Stored, labels: _Stored | None) -> Table:
    shape, kind = stored.shape, stored.dtype.kind
    if stored.dtype.names is not None:
        raise BadInput(
            f"{path}: is an array of records with the fields {some(stored.dtype.names)}; save the numbers as "
            "an array (rows, columns), or the records as Parquet"
        )
    if len(shape) != 2 or not shape[1]:
        raise BadInput(f"{path}: the features are to be (rows, columns); this array has shape {shape}")
    if kind not in "fiub":
        raise BadInput(f"{path}: the features are of type {stored.dtype}, not real numbers")
    check_columns(path, shape[1])
    if labels is not None:
        _check_count(path, wanted, stored.rows, labels)
    names = [f"x{j}" for j in range(shape[1])]
    # the label is another array, not one of these columns
    features = choose(path, dataclasses.replace(wanted, label=None), names, [True] * len(names))
    if wanted.width is not None and wanted.width != shape[1]:
        raise BadInput(
            f"{path}: has {shape[1]:,} columns, and {wanted.model} takes arrays of {wanted.width:,}; "
            "bring the array to the same columns, in the same order"
        )
    rows = share.of(stored.rows)
    array = stored.part(share)
    columns = None if features == names else [int(name[1:]) for name in features]
    given: np.ndarray | RowSource
    if is_mapped(array):
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
    if labels is None:
        return table
    codes, classes = _array_labels(wanted, share, labels)
    return dataclasses.replace(table, label_name=wanted.label, codes=codes, classes=classes)


def _array_labels(wanted: Wanted, share: Share, stored: _Stored) -> tuple[np.ndarray, np.ndarray]:
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
