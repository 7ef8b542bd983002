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
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from xent._processes.group import Share
from xent._util.text import quoted
from xent.data.arrays import Beside, Stored, array_labels, check_count, chosen, from_arrays
from xent.data.limits import check_memory
from xent.data.reading import reading
from xent.data.table import Table, Wanted
from xent.errors import BadInput


def read_npz(path: Path, wanted: Wanted, share: Share) -> Table:
    """Return the share's rows of an archive of arrays: the features, and the label's."""
    with open(path, "rb") as file:
        if file.read(len(npy.MAGIC_PREFIX)) == npy.MAGIC_PREFIX:
            raise BadInput(f"{path}: is a single array, not an archive of them; call it .npy")
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        features, beside = chosen(path, wanted, names, lambda name: _in_archive(path, archive, name))
        return from_arrays(path, wanted, share, features, beside)


def read_npy(path: Path, wanted: Wanted, share: Share) -> Table:
    """Return the share's rows of an array, the labels being another file."""
    features = _alone(path)
    files = {"--weight": wanted.weight, "--soft-labels": wanted.soft[0] if wanted.soft else None}
    if not wanted.label_optional:  # an optional label is a column's name, never a path
        files["--label"] = wanted.label
    found = {option: _file(path, option, name) for option, name in files.items() if name is not None}
    beside = {option: _alone(file) for option, file in found.items()}
    for option, file in found.items():
        with reading(file, "NPY"):  # of what this one does not hold it is to be named
            check_count(path, wanted, features.rows, beside[option])
    label = found.get("--label")
    arrays = Beside(beside.get("--label"), beside.get("--weight"), beside.get("--soft-labels"))
    with reading(label or path, "NPY"):
        table = from_arrays(path, wanted, share, features, arrays)
    return dataclasses.replace(table, label_name=None)


def labels_of_npy(path: Path, wanted: Wanted, share: Share, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and classes of the share's rows, of several files of features with as many rows."""
    label = _file(path, "--label", str(wanted.label))
    with reading(label, "NPY"):
        stored = _alone(label)
        check_count(path, wanted, rows, stored)
        return array_labels(wanted, share, stored)


def _file(path: Path, option: str, name: str) -> Path:
    """Return the file that an option names beside a file of features."""
    if not name.endswith(".npy"):
        what, example = {
            "--label": ("labels", "y.npy"),
            "--weight": ("weights", "w.npy"),
            "--soft-labels": ("masses", "p.npy"),
        }[option]
        raise BadInput(
            f"{path}: the {what} are a second file, {option} {example}; got {option} {quoted(name)}"
        )
    file = Path(name)
    if not file.is_file():
        raise BadInput(f"{file}: no such file ({option})")
    return file


def _alone(path: Path) -> Stored:
    """Read the header of a ``.npy`` file."""
    with open(path, "rb") as file:
        if file.read(4) == b"PK\3\4":
            raise BadInput(f"{path}: is an archive of arrays; call it .npz")
        file.seek(0)
        shape, dtype = _claims(file, path.stat().st_size, path, "")
    there = math.prod(shape) > 0  # an empty array cannot be mapped
    return Stored(
        str(path), shape, dtype, lambda: np.load(path, mmap_mode="r" if there else None, allow_pickle=False)
    )


def count_npy(path: Path) -> int:
    """Return the number of rows that the header of a ``.npy`` file claims."""
    return _alone(path).rows


def _in_archive(path: Path, archive: zipfile.ZipFile, name: str) -> Stored:
    """Read the header of an array in a ``.npz`` file."""
    about = archive.getinfo(name + ".npy")
    with archive.open(about) as file:
        shape, dtype = _claims(file, about.file_size, path, f" in array {quoted(name)}")
    claim = f"an array of shape {shape} and type {dtype} in array {quoted(name)}"
    check_memory(path, math.prod(shape) * dtype.itemsize, claim)

    def load() -> np.ndarray:
        with archive.open(about) as file:
            return npy.read_array(file, allow_pickle=False)

    return Stored(f"{path}: array {quoted(name)}", shape, dtype, load)


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
