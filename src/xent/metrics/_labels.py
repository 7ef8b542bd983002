"""Labels as codes: for each row the column of the predictions that belongs to its label.

    code_n = the c with values_c = y_n

No array of N rows is sorted. Whole numbers are looked up in a table where their range is small (0..C−1
already are codes), and by bisection where it is not; all other labels, mostly strings, in a dictionary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator
from itertools import repeat
from typing import Any

import numpy as np

from xent.metrics._arrays import as_array

ROWS = 1 << 16  # encoded together; as many strings take a few MiB
TABLE = 1 << 20  # the largest range of whole numbers that is looked up in a table, of 8 MiB
EXACT = 2**53  # float64 holds all whole numbers up to here

Encoder = Callable[[slice], np.ndarray]
"""Some rows → (R,) int64, the position of each row's label among the values, −1 where it is not one."""


@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels of N rows, each one of C values."""

    values: np.ndarray  # (C,) in the order of the columns
    y: np.ndarray  # (N,), or (N, C) one-hot
    encoder: Encoder
    name: str = "y_true"

    @property
    def count(self) -> int:
        """The number of rows, N."""
        return len(self.y)

    def codes(self, part: slice) -> np.ndarray:  # (R,) int64
        """Return the codes of some rows; raise a ValueError that names the first row whose label has none."""
        codes = self.encoder(part)
        if codes.min() < 0:
            row = part.start + int(np.flatnonzero(codes < 0)[0])
            raise ValueError(
                f"{self.name} is {self.y[row : row + 1].tolist()[0]!r} at row {row}, "
                f"which is none of the labels {format_labels(self.values)}"
            )
        return codes

    def split(self, positive: list[bool]) -> Labels:
        """Return the same rows with two values, False and True: True where the label is a positive one."""
        code_of = np.asarray(positive, dtype=np.int64)
        return dataclasses.replace(
            self, values=np.array([False, True]), encoder=lambda part: code_of[self.codes(part)]
        )

    def parts(self) -> Iterator[slice]:
        """Yield slices that cover 0..N in order."""
        return _parts(slice(0, self.count))


def read_labels(given: Any, labels: Any = None, *, name: str = "y_true") -> Labels:
    """Read labels: (N,) or (N, 1) of whole numbers, bools, strings or other hashables, or (N, C) one-hot.

    ``labels`` gives the values in the order of the columns; by default they are those that occur, sorted.
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
        return _one_hot_labels(y, values, name)
    if _may_be_whole(y) and (values is None or _may_be_whole(values)):
        return _whole_number_labels(y, values, name)
    return _hashable_labels(y, values, name)


def format_labels(values: np.ndarray, most: int = 8) -> str:
    """Format labels for a message, at most `most` of them."""
    listed = [repr(value) for value in values[:most].tolist()]
    return f"[{', '.join(listed)}]" if len(values) <= most else f"[{', '.join(listed)}, ...: {len(values)}]"


def missing(value: Any) -> bool:
    """Return whether a value is missing: None, nan of any type, pandas' NA or NaT."""
    try:
        return value is None or bool(value != value)
    except TypeError:  # NA has no truth value
        return True
    except ValueError:  # nor has an array, but it is a value
        return False


def _parts(rows: slice) -> Iterator[slice]:
    for start in range(rows.start, rows.stop, ROWS):
        yield slice(start, min(rows.stop, start + ROWS))


def _piecewise(encode: Encoder) -> Encoder:
    """Return an encoder that calls `encode` on a few rows at a time, to bound its working memory."""

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
    """Return the values as Python objects; raise a TypeError that names the first unhashable one."""
    listed: list[Any] = values.tolist()
    try:
        hash(tuple(listed))
    except TypeError:
        row, value = next((n, value) for n, value in enumerate(listed) if not isinstance(value, Hashable))
        raise TypeError(_no_label(value, name, start + row)) from None
    return listed


def _no_label(value: Any, name: str, at: int) -> str:
    place = f"{'position' if name == 'labels' else 'row'} {at}"
    return f"{name} is {value!r} at {place}, which is no label: labels are whole numbers, bools or strings"


# --- one-hot rows ----------------------------------------------------------------------------------------


def _one_hot_labels(y: np.ndarray, values: np.ndarray | None, name: str) -> Labels:
    """Return labels whose codes are the columns of the ones in y (N, C)."""
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


def _may_be_whole(array: np.ndarray) -> bool:
    """Return whether the type allows whole numbers within int64; floats are checked when they are read."""
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
            raise ValueError(_no_label(numbers[row].item(), name, part.start + row))
    return numbers.astype(np.int64, copy=False)


def _whole_number_labels(y: np.ndarray, given: np.ndarray | None, name: str) -> Labels:
    if given is None:
        values = _distinct_numbers(y, name)
        as_given = values.astype(y.dtype)
    else:
        values = _integers(given, slice(0, len(given)), "labels")
        as_given = given
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)

    if np.array_equal(values, np.arange(len(values))):

        def encode(part: slice) -> np.ndarray:
            codes = _integers(y, part, name)
            if codes.min() < 0 or codes.max() >= len(values):
                return np.where((codes < 0) | (codes >= len(values)), -1, codes)
            return codes

        return Labels(as_given, y, encode, name)

    if high - low < TABLE and low > -EXACT and high < EXACT:
        table = np.full(high - low + 3, -1)  # with one entry for smaller numbers and one for larger ones
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

    return Labels(as_given, y, _piecewise(encode), name)


def _distinct_numbers(y: np.ndarray, name: str) -> np.ndarray:  # (C,) int64, ascending
    """Return the whole numbers that occur."""
    parts = list(_parts(slice(0, len(y))))
    extremes = []
    for part in parts:
        numbers = _integers(y, part, name)
        extremes.append((int(numbers.min()), int(numbers.max())))
    low, high = min(least for least, _ in extremes), max(most for _, most in extremes)
    if high - low >= TABLE:
        return np.unique(np.concatenate([np.unique(_integers(y, part, name)) for part in parts]))
    seen = np.zeros(high - low + 1, dtype=np.bool_)
    for part in parts:
        seen[_integers(y, part, name) - low] = True
    return np.flatnonzero(seen) + low


# --- strings and other hashables --------------------------------------------------------------------


def _hashable_labels(y: np.ndarray, given: np.ndarray | None, name: str) -> Labels:
    """Return labels that are strings or other hashables, compared as Python compares them."""
    values = _distinct(y, name) if given is None else given
    column = {value: c for c, value in enumerate(values.tolist())}

    def encode(part: slice) -> np.ndarray:
        return np.fromiter(map(column.get, _hashable(y[part], name, part.start), repeat(-1)), np.int64)

    return Labels(values, y, _piecewise(encode), name)


def _distinct(y: np.ndarray, name: str) -> np.ndarray:
    """Return the values that occur, sorted."""
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
