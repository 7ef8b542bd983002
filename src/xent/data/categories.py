"""Columns of few values, numbered: each row's value by its position among the sorted values, −1 for none.

    values = (Adelie, Chinstrap, Gentoo)        codes = 2 0 0 1 −1 ...

What makes two values one, across formats, is what makes two labels one (`labels.meaning`): 1, ``1`` and 1.0
where all are whole numbers; True, ``true`` and 1 where all are booleans. So a column of whole numbers has one
name for each, also where a row without a value made them floats: ``as_whole``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xent._util.text import class_text, quoted
from xent.data.labels import kind_of, meaning
from xent.data.limits import text_fault
from xent.errors import BadInput

MOST = 64
"""Values up to which a column of text is one of categories, unless something else is said."""


MISSING = (
    *("", "NA", "N/A", "n/a", "#N/A", "#N/A N/A", "#NA", "<NA>", "NULL", "null", "None"),
    *("NaN", "nan", "-NaN", "-nan", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"),
)
"""Cells of text that are no value, those of pandas. (As a label, all but the empty text are text.)"""


@dataclasses.dataclass(frozen=True)
class Category:
    """A column whose values are numbered."""

    name: str
    values: tuple[str, ...]  # sorted
    codes: np.ndarray  # (N,) int32, −1 where the value is missing

    def recoded(self, values: Sequence[str]) -> np.ndarray:
        """Return the positions (N,) among other values; −1 where the value is missing, −2 for another."""
        kind = kind_of(np.array(values, dtype=str))
        known = {meaning(value, kind): code for code, value in enumerate(values)}
        place = [known.get(meaning(value, kind), -2) for value in self.values]
        return np.array([*place, -1], dtype=np.int32)[self.codes]

    def at(self, rows: np.ndarray | slice) -> Category:
        """Return the column of some of the rows."""
        return dataclasses.replace(self, codes=self.codes[rows])


class TooMany(Exception):
    """A column has more values than are numbered."""


def numbered(path: Path, name: str, parts: Iterable[Any], most: int, blank: Collection[str] = ()) -> Category:
    """Return a column, given as Arrow arrays of its rows one after the other, as a category.

    Null, text without a character, and ``blank`` are no value. Raises ``TooMany``, and ``BadInput`` for a
    number that is not whole.
    """
    known: dict[str, int] = {}
    codes = [np.empty(0, np.int32)]
    for own, values in map(_encoded, parts):
        odd = [value for value in values if isinstance(value, float) and not value.is_integer()]
        if not all(map(math.isnan, odd)):
            raise BadInput(
                f"{path}: column {quoted(name)} holds {next(v for v in odd if v == v)}; categories are text, "
                "booleans or whole numbers"
            )
        texts = [None if value is None or value != value else class_text(value) for value in values]
        place = np.full(len(texts) + 1, -1, np.int32)
        for i, text in enumerate(texts):
            if text is None or not text.strip() or text in blank:
                continue
            place[i] = known.setdefault(text, len(known))
            if len(known) > most:
                raise TooMany
        codes.append(place[own])
    for text in known:
        if fault := text_fault(text):
            raise BadInput(f"{path}: column {quoted(name)}: the value {quoted(text)} {fault}; rename it")
    values = sorted(known)
    place = np.append(np.argsort(np.argsort(np.array(list(known), dtype=str), kind="stable")), -1)
    return Category(name, tuple(values), place.astype(np.int32)[np.concatenate(codes)])


def _encoded(array: Any) -> tuple[np.ndarray, list[Any]]:
    """Return codes (n,), −1 for null, and values of an Arrow array."""
    import pyarrow as pa

    if isinstance(array, pa.ChunkedArray):
        array = array.unify_dictionaries().combine_chunks()
        if isinstance(array, pa.ChunkedArray):
            array = array.chunk(0) if array.num_chunks else pa.array([], array.type)
    if str(array.type) == "string_view":
        array = array.cast(pa.large_string())
    if pa.types.is_null(array.type):
        array = array.cast(pa.string())
    if pa.types.is_float16(array.type):
        array = array.cast(pa.float32())
    if not pa.types.is_dictionary(array.type):
        array = array.dictionary_encode()
    codes = array.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return codes.astype(np.int64), array.dictionary.to_pylist()


def as_whole(column: Category) -> Category:
    """Return a column whose values are all whole numbers with one name for each, 1 for ``1.0`` and ``+1``.

    >>> made = as_whole(Category("k", ("1", "1.0", "2.0"), np.array([0, 1, 2, -1], np.int32)))
    >>> made.values, made.codes.tolist()
    (('1', '2'), [0, 0, 1, -1])
    """
    each = [meaning(value, "whole") for value in column.values]
    if None in each or [str(value) for value in each] == list(column.values):
        return column
    values = sorted({str(value) for value in each})
    place = np.array([*(values.index(str(value)) for value in each), -1], np.int32)
    return Category(column.name, tuple(values), place[column.codes])


def united(
    parts: Sequence[Sequence[Category]], most: Callable[[str], int]
) -> Iterator[tuple[str, list[Category] | None]]:
    """Yield each column of several parts of the rows, with one list of values; None where it has too many.

    A column that one part left out, for having too many, is left out.
    """
    names = dict.fromkeys(column.name for part in parts for column in part)
    for name in names:
        own = [column for part in parts for column in part if column.name == name]
        values = sorted({value for column in own for value in column.values})
        if len(own) < len(parts) or len(values) > most(name):
            yield name, None
            continue
        place = {value: code for code, value in enumerate(values)}
        made = []
        for column in own:
            codes = np.array([*(place[value] for value in column.values), -1], np.int32)[column.codes]
            made.append(Category(name, tuple(values), codes))
        yield name, made
