"""``.npz`` and ``.npy`` files to a ``Table``, through NumPy without pickle.

Of ``.npy`` files a share of the rows is read alone; an array in an archive is read whole, and the rest
let go.
"""

from __future__ import annotations

import contextlib
import dataclasses
import zipfile
from pathlib import Path

import numpy as np

from xent.probe.errors import BadInput
from xent.probe.ranks import Share
from xent.probe.table import Table, Wanted, check_finite, choose, numbered, some


def read_npz(path: Path, wanted: Wanted, share: Share) -> Table:
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = list(archive.files)
            label = wanted.label if wanted.label in names else None
            if wanted.label is not None and label is None and not wanted.label_optional:
                raise BadInput(f"{path}: no array {wanted.label!r} for --label; its arrays are {some(names)}")
            if "X" in names:
                chosen = "X"
            else:
                flat = [name for name in names if name != label and archive[name].ndim == 2]
                if len(flat) != 1:
                    raise BadInput(
                        f"{path}: which array holds the features? Name it X; there are {some(names)}"
                    )
                chosen = flat[0]
            array = _part(archive[chosen], share)
            labels = None if label is None else _part(archive[label], share)
    except BadInput:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise _unreadable(path, "NPZ", error) from error
    return _from_arrays(path, wanted, array, labels, f"{path}: array {label!r}")


def read_npy(path: Path, wanted: Wanted, share: Share) -> Table:
    array = _load_npy(path, share)
    if wanted.label is None or wanted.label_optional:  # an optional label is a column's name, never a path
        return _from_arrays(path, wanted, array, None, "")
    if not wanted.label.endswith(".npy"):
        raise BadInput(f"{path}: the labels are a second file, --label y.npy; got --label {wanted.label}")
    if not Path(wanted.label).is_file():
        raise BadInput(f"{wanted.label}: no such file (--label)")
    table = _from_arrays(path, wanted, array, _load_npy(Path(wanted.label), share), wanted.label)
    return dataclasses.replace(table, label_name=None)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Some rows of an array, and how many it has."""

    array: np.ndarray
    start: int
    rows: int


def _part(array: np.ndarray, share: Share) -> _Part:
    rows = len(np.atleast_1d(array))
    if share.whole or not array.ndim:
        return _Part(array, 0, rows)
    return _Part(np.array(array[share.of(rows)]), share.of(rows).start, rows)


def _load_npy(path: Path, share: Share) -> _Part:
    try:
        array: np.ndarray | None = None
        if not share.whole:
            with contextlib.suppress(ValueError):  # an empty array cannot be mapped, nor can a bad file
                array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array is None:
            array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise _unreadable(path, "NPY", error) from error
    if not isinstance(array, np.ndarray):
        raise BadInput(f"{path}: is an archive of arrays; call it .npz")
    return _part(array, share)


def _unreadable(path: Path, kind: str, error: Exception) -> BadInput:
    if "pickle" in str(error).lower():
        return BadInput(
            f"{path}: holds Python objects or is no {kind} file; save plain arrays (objects are not read)"
        )
    return BadInput(f"{path}: not readable as {kind}: {' '.join(str(error).split())[:300]}")


def _from_arrays(path: Path, wanted: Wanted, part: _Part, given: _Part | None, where: str) -> Table:
    array, start = part.array, part.start
    if array.ndim != 2:
        shape = (part.rows, *array.shape[1:]) if array.ndim else ()
        raise BadInput(f"{path}: the features are to be (rows, columns); this array has shape {shape}")
    if array.dtype.kind not in "fiub":
        raise BadInput(f"{path}: the features are of type {array.dtype}, not real numbers")
    if given is not None and given.rows != part.rows:
        raise BadInput(f"{path}: {part.rows} rows, but {where} holds {given.rows} labels")
    names = [f"x{j}" for j in range(array.shape[1])]
    # the label is another array, not one of these columns
    columns = dataclasses.replace(wanted, label=None)
    features = choose(path, columns, names, [True] * len(names))
    if features != names:
        place = {name: j for j, name in enumerate(names)}
        array = array[:, [place[name] for name in features]]
    single = array.dtype.kind == "f" and array.dtype.itemsize <= 4
    matrix = np.ascontiguousarray(array, dtype=np.float32 if single else np.float64)
    check_finite(path, matrix, features, start)
    if given is None:
        return Table(str(path), matrix, tuple(features), start=start)
    codes, classes = _array_labels(where, given, wanted.label_optional)
    return Table(str(path), matrix, tuple(features), wanted.label, codes, classes, start=start)


def _array_labels(where: str, given: _Part, optional: bool) -> tuple[np.ndarray, np.ndarray]:
    labels = given.array
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        shape = (given.rows, *labels.shape[1:]) if labels.ndim else ()
        raise BadInput(f"{where}: labels are to be one-dimensional; this array has shape {shape}")
    if labels.dtype.kind == "S":
        try:
            labels = np.char.decode(labels, "utf-8")
        except UnicodeDecodeError as error:
            raise BadInput(
                f"{where}: the label {error.object!r} is not UTF-8; save text, not bytes"
            ) from error
    if labels.dtype.kind not in "Uiub":
        raise BadInput(f"{where}: labels are text, integers or booleans, not {labels.dtype}; cast them first")
    values, codes = np.unique(labels, return_inverse=True)
    codes = codes.astype(np.int64)
    if labels.dtype.kind == "U":
        blank = np.flatnonzero(np.char.strip(values) == "")
        codes[np.isin(codes, blank)] = -1
    if not optional and (codes < 0).any():
        row = int(np.flatnonzero(codes < 0)[0])
        raise BadInput(f"{where}: row {given.start + row + 1} has no label; fill it in or drop the row")
    return numbered(where, codes, values)
