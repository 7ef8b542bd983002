"""Labels as columns: which column of the predictions is a row's own.

    code_n = the c with values_c = y_n

Nothing of 10⁶ rows is sorted: whole numbers are looked up in a table where their range is small (0..C−1 are
codes as they stand) and by bisection where it is not; everything else, strings above all, in a dictionary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator
from itertools import repeat
from typing import Any

import numpy as np

from xent.metrics._arrays import as_array

ROWS = 1 << 16  # that are looked at together: as many strings are a few MiB
TABLE = 1 << 20  # the largest range of whole numbers that is looked up in a table: 8 MiB of it
EXACT = 2**53  # whole numbers that float64 tells apart

Encoder = Callable[[slice], np.ndarray]
"""Some rows → (R,) int64: the position of each row's label among the values, −1 where it is none of them."""


@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels of N rows, each one of C values."""

    values: np.ndarray  # (C,) in the order of the columns
    y: np.ndarray  # (N,), or (N, C) one-hot
    encoder: Encoder
    name: str = "y_true"

    @property
    def count(self) -> int:
        """N."""
        return len(self.y)

    def codes(self, part: slice) -> np.ndarray:  # (R,) int64
        """Columns of some rows; ValueError names the first row whose label has none."""
        codes = self.encoder(part)
        if codes.min() < 0:
            row = part.start + int(np.flatnonzero(codes < 0)[0])
            raise ValueError(
                f"{self.name} is {self.y[row : row + 1].tolist()[0]!r} at row {row}, "
                f"which is none of the labels {shown(self.values)}"
            )
        return codes

    def split(self, positive: list[bool]) -> Labels:
        """The same rows over two values: is the row's value one of the positive ones?"""
        to = np.asarray(positive, dtype=np.int64)
        return dataclasses.replace(
            self, values=np.array([False, True]), encoder=lambda part: to[self.codes(part)]
        )

    def parts(self) -> Iterator[slice]:
        """Slices that cover 0..N in order."""
        return _parts(slice(0, self.count))


def read_labels(given: Any, labels: Any = None, *, name: str = "y_true") -> Labels:
    """Labels of rows: (N,) or (N, 1) of whole numbers, bools, strings or what is hashable, or (N, C) one-hot.

    ``labels`` gives the values in the order of the columns; without it they are those that occur, sorted.
    """
    y = as_array(given, name)
    values = None if labels is None else as_array(labels, "labels")
    if values is not None:
        if values.ndim != 1:
            raise ValueError(f"labels must be a list of labels, got shape {values.shape}")
        _check_distinct(values)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim not in (1, 2):
        raise ValueError(f"{name} must be (N,), (N, 1) or one-hot (N, C); got shape {y.shape}")
    if not len(y):
        raise ValueError(f"{name} has no rows")
    if y.ndim == 2:
        return _one_hot(y, values, name)
    if _whole(y) and (values is None or _whole(values)):
        return _numbers(y, values, name)
    return _names(y, values, name)


def shown(values: np.ndarray, most: int = 8) -> str:
    """A list of labels in a message, cut where it is long."""
    listed = [repr(value) for value in values[:most].tolist()]
    return f"[{', '.join(listed)}]" if len(values) <= most else f"[{', '.join(listed)}, ...: {len(values)}]"


def missing(value: Any) -> bool:
    """Return whether a value stands for none: None, nan of any type, pandas' NA, a date that is none."""
    try:
        return value is None or bool(value != value)
    except TypeError:  # NA has no truth
        return True
    except ValueError:  # nor has an array, which is a value
        return False


def _parts(rows: slice) -> Iterator[slice]:
    for start in range(rows.start, rows.stop, ROWS):
        yield slice(start, min(rows.stop, start + ROWS))


def _piecewise(encode: Encoder) -> Encoder:
    """The same with working memory for a few rows at a time."""

    def encode_all(part: slice) -> np.ndarray:
        codes = np.empty(part.stop - part.start, dtype=np.int64)
        for few in _parts(part):
            codes[few.start - part.start : few.stop - part.start] = encode(few)
        return codes

    return encode_all


def _check_distinct(values: np.ndarray) -> None:
    seen: set[Any] = set()
    for value in _hashable(values, "labels"):
        if value in seen:
            raise ValueError(f"labels names {value!r} twice; a label has one column")
        seen.add(value)


def _hashable(values: np.ndarray, name: str, start: int = 0) -> list[Any]:
    """The values as Python objects; TypeError names the first that cannot be looked up."""
    listed: list[Any] = values.tolist()
    try:
        hash(tuple(listed))
    except TypeError:
        row, value = next((n, value) for n, value in enumerate(listed) if not isinstance(value, Hashable))
        where = "position" if name == "labels" else "row"
        raise TypeError(
            f"{name} is {value!r} at {where} {start + row}, which is no label: labels are whole numbers, "
            f"bools or strings"
        ) from None
    return listed


# --- one-hot rows ----------------------------------------------------------------------------------------


def _one_hot(y: np.ndarray, values: np.ndarray | None, name: str) -> Labels:
    """Rows that mark their class: its column is the code."""
    classes = y.shape[1]
    if values is None:
        values = np.arange(classes)
    if len(values) != classes:
        raise ValueError(f"labels has {len(values)} entries, but {name} has {classes} columns")

    def encode(part: slice) -> np.ndarray:
        marked = y[part] == 1  # (R, C)
        wrong = (marked.sum(1) != 1) | (~marked & (y[part] != 0)).any(1)
        if wrong.any():
            row = part.start + int(np.flatnonzero(wrong)[0])
            raise ValueError(
                f"{name} is not one-hot at row {row}: one 1 among zeros; for rows of probabilities use "
                f"xent.cross_entropy(y_pred.log(), y_true)"
            )
        return marked.argmax(1)

    return Labels(values, y, _piecewise(encode), name)


# --- whole numbers ---------------------------------------------------------------------------------------


def _whole(array: np.ndarray) -> bool:
    """Whether these may be whole numbers that int64 holds (floats are looked at when they are read)."""
    return array.dtype.kind in "bif" or (
        array.dtype.kind == "u" and (array.dtype.itemsize < 8 or not array.size or array.max() < 2**63)
    )


def _integers(y: np.ndarray, part: slice, name: str) -> np.ndarray:  # (R,) int64
    numbers = y[part]
    if numbers.dtype.kind == "f":
        numbers = numbers.astype(np.float64, copy=False)
        with np.errstate(invalid="ignore"):
            good = (np.trunc(numbers) == numbers) & (np.abs(numbers) <= EXACT)
        if not good.all():
            row = int(np.flatnonzero(~good)[0])
            raise ValueError(
                f"{name} is {numbers[row].item()} at {'row' if name != 'labels' else 'position'} "
                f"{part.start + row}, which is no label: labels are whole numbers, bools or strings"
            )
    return numbers.astype(np.int64, copy=False)


def _numbers(y: np.ndarray, given: np.ndarray | None, name: str) -> Labels:
    if given is None:
        values = _occurring(y, name)
        named = values.astype(y.dtype)
    else:
        values = _integers(given, slice(0, len(given)), "labels")
        named = given
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)

    if np.array_equal(values, np.arange(len(values))):

        def encode(part: slice) -> np.ndarray:
            codes = _integers(y, part, name)
            if codes.min() < 0 or codes.max() >= len(values):
                return np.where((codes < 0) | (codes >= len(values)), -1, codes)
            return codes

        return Labels(named, y, encode, name)

    if high - low < TABLE and low > -EXACT and high < EXACT:
        table = np.full(high - low + 3, -1)  # with a place for what lies below, and one for what lies above
        table[values - (low - 1)] = np.arange(len(values))

        def encode(part: slice) -> np.ndarray:
            return table[np.clip(_integers(y, part, name), low - 1, high + 1) - (low - 1)]

    else:
        order = np.argsort(values)
        ascending = values[order]

        def encode(part: slice) -> np.ndarray:
            numbers = _integers(y, part, name)
            at = np.searchsorted(ascending, numbers)
            at[at == len(values)] = 0
            return np.where(ascending[at] == numbers, order[at], -1)

    return Labels(named, y, _piecewise(encode), name)


def _occurring(y: np.ndarray, name: str) -> np.ndarray:  # (C,) int64, ascending
    """The whole numbers that occur."""
    low, high = None, None
    for part in _parts(slice(0, len(y))):
        numbers = _integers(y, part, name)
        least, most = int(numbers.min()), int(numbers.max())
        low = least if low is None else min(low, least)
        high = most if high is None else max(high, most)
    assert low is not None
    assert high is not None
    if high - low >= TABLE:
        each = [np.unique(_integers(y, part, name)) for part in _parts(slice(0, len(y)))]
        return np.unique(np.concatenate(each))
    seen = np.zeros(high - low + 1, dtype=np.bool_)
    for part in _parts(slice(0, len(y))):
        seen[_integers(y, part, name) - low] = True
    return np.flatnonzero(seen) + low


# --- names -----------------------------------------------------------------------------------------------


def _names(y: np.ndarray, given: np.ndarray | None, name: str) -> Labels:
    """Strings and whatever else compares equal to itself: equality is Python's."""
    values = _distinct(y, name) if given is None else given
    column = {value: c for c, value in enumerate(values.tolist())}

    def encode(part: slice) -> np.ndarray:
        return np.fromiter(map(column.get, _hashable(y[part], name, part.start), repeat(-1)), np.int64)

    return Labels(values, y, _piecewise(encode), name)


def _distinct(y: np.ndarray, name: str) -> np.ndarray:
    """The values that occur, sorted."""
    seen: set[Any] = set()
    for part in _parts(slice(0, len(y))):
        seen.update(_hashable(y[part], name, part.start))
    if any(map(missing, seen)):
        row, value = next((n, value) for n, value in enumerate(y.tolist()) if missing(value))
        raise ValueError(f"{name} is {value} at row {row}, which is no label; drop the row or name it")
    try:
        ordered = sorted(seen)
    except TypeError:
        kinds = sorted({type(value).__name__ for value in seen})
        raise ValueError(
            f"{name} holds labels that cannot be sorted ({', '.join(kinds)}); give their order as labels="
        ) from None
    values = np.array(ordered)
    if values.ndim == 1 and values.tolist() == ordered:
        return values
    values = np.empty(len(ordered), dtype=object)
    values[:] = ordered
    return values
