"""Labels of a file: encoded as numbers from 0, and compared with the classes of a model across formats.

One column is ``3`` in CSV, 3 in Parquet, and 3.0 where pandas saw a row without a label; True, ``true`` or 1.
What makes them one class is the *kind* of a model's labels, which the model keeps:

    whole      every label is a whole number: of a file's labels those are alike that have one value
    boolean    true and false, in any case, and 1 and 0
    text       everything else, ``01`` and ``1.0`` too: alike character by character
"""

from __future__ import annotations

import decimal
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from xent._util.text import class_text, quoted
from xent.data.limits import MOST_TEXT, text_fault
from xent.errors import BadInput

Kind = Literal["whole", "boolean", "text"]

_WHOLE = re.compile(r"[+-]?(0|[1-9][0-9]{0,18})")
_NUMBER = re.compile(r"[+-]?(0|[1-9][0-9]*)(\.[0-9]*)?([eE][+-]?[0-9]{1,2})?")
_TRUTH = {"true": True, "false": False}


def kind_of(classes: np.ndarray) -> Kind:
    """Return the kind of a model's labels.

    Text is whole or boolean only where every class is, and no two have one value.

    >>> [kind_of(np.array(each)) for each in (["10", "-2"], ["01", "2"], ["1.0", "2"], ["True", "False"])]
    ['whole', 'text', 'text', 'boolean']
    """
    if classes.dtype.kind != "U":
        return "boolean" if classes.dtype.kind == "b" else "whole"
    texts = classes.tolist()
    values: set[int]
    if all(_WHOLE.fullmatch(text) for text in texts):
        values = {int(text) for text in texts}
        fits = all(-(2**63) <= value < 2**63 for value in values)
        return "whole" if fits and len(values) == len(texts) else "text"
    if all(text.lower() in _TRUTH for text in texts):
        return "boolean" if len({text.lower() for text in texts}) == len(texts) else "text"
    return "text"


def meaning(label: Any, kind: Kind) -> int | bool | str | None:
    """Return what a label of any type is among labels of the kind; None if it is none of them.

    >>> [meaning(label, "whole") for label in (3, 3.0, "3", " 3.0 ", "+3", "03", 3.5, "three")]
    [3, 3, 3, 3, 3, None, None, None]
    >>> meaning(float(2**53), "whole"), meaning(2**53, "whole") == 2**53, meaning(True, "whole")
    (None, True, None)
    >>> [meaning(label, "boolean") for label in (True, "True", "true", 1, 1.0, "1", "yes")]
    [True, True, True, True, True, True, None]
    >>> [meaning(label, "text") for label in (True, "True", 1, 1.0, "1")]
    ['true', 'True', '1', '1.0', '1']
    """
    if kind == "text":
        return class_text(label)
    if kind == "boolean":
        truth = _TRUTH.get(str(label).strip().lower())
        if truth is not None:
            return truth
    value = _whole(label)
    if kind == "whole":
        return value
    return bool(value) if value in (0, 1) else None


def _whole(label: Any) -> int | None:
    """Return the whole number that a label is, if it is one, and no other is written alike in its type."""
    if isinstance(label, bool | np.bool_):
        return None
    if isinstance(label, float | np.floating):
        # beyond, its neighbours are rounded to it
        within = abs(float(label)) < 2.0 ** (np.finfo(type(label)).nmant + 1)
        return int(label) if within and float(label).is_integer() else None
    if not isinstance(label, str):
        return int(label)
    text = label.strip()
    if not _NUMBER.fullmatch(text):
        return None
    value = decimal.Decimal(text)
    if not _WHOLE.fullmatch(text) and abs(value) >= 2**53:  # a float64 once
        return None
    return int(value) if value == value.to_integral_value() else None


class ClassIndex:
    """The labels of rows beside known classes, compared by the kind of these."""

    def __init__(self, classes: np.ndarray, kind: Kind) -> None:
        self.kind = comparison_kind(classes, kind)
        self._known = {meaning(value, self.kind): code for code, value in enumerate(classes.tolist())}

    def codes(self, codes: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
        """Return the positions (N,) among the classes, −1 of others, and how often others occur.

        ``codes`` (N,) are positions in ``values``, −1 of a row without a label.
        """
        own = [self._known.get(meaning(value, self.kind), -1) for value in values]
        place = np.array([*own, -1], dtype=np.int64)  # the last is where −1 points
        if min(own, default=0) >= 0:
            return place[codes], {}
        counts = np.bincount(codes[codes >= 0], minlength=len(own))
        texts = [class_text(value) for value in values]
        unknown = {t: int(n) for t, n, code in zip(texts, counts, own, strict=True) if code < 0 and n}
        return place[codes], unknown


def comparison_kind(classes: np.ndarray, kind: Kind) -> Kind:
    """Return the kind by which labels are compared: the whole numbers 0 and 1 are booleans too."""
    two = kind == "whole" and {int(each) for each in classes.tolist()} == {0, 1}
    return "boolean" if two else kind


def look_like_numbers(classes: np.ndarray, rows: int) -> bool:
    """Return whether the labels are rather the values of a number: decimals, or nearly one for each row."""
    if classes.dtype.kind == "b":
        return False
    try:
        values = [float(label) for label in classes.tolist()]
    except ValueError:
        return False
    if not all(map(math.isfinite, values)):  # nan is a missing label that was written out
        return False
    return not all(value.is_integer() for value in values) or 2 * len(values) > rows


def encode_text_labels(where: str, codes: np.ndarray, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and classes, as ``encode_labels``, of texts; a blank one is no label, −1."""
    blank = [i for i, text in enumerate(texts) if not text.strip()]
    return encode_labels(where, np.where(np.isin(codes, blank), -1, codes), array_of_texts(where, texts))


def array_of_texts(where: str, texts: Sequence[str]) -> np.ndarray:
    """Return labels as an array, in which each takes as much as the longest."""
    for text in texts:
        fault = text_fault(text)
        if fault is not None:
            raise BadInput(f"{where}: the label {quoted(text)} {fault}; rename it")
    size = 4 * len(texts) * max(map(len, texts), default=0)
    if size > MOST_TEXT:
        raise BadInput(
            f"{where}: {len(texts):,} different labels, each as long as {quoted(max(texts, key=len))}, take "
            f"{size / 2**30:.1f} GiB, more than {MOST_TEXT / 2**30:g}; shorten them"
        )
    return np.array(texts, dtype=str)


def whole_alike(each: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    """Return the classes of several parts, all whole numbers as such where one part writes them as 3.0.

    A part is written so where a label was missing once. Where all parts write 3.0, that is the class.

    >>> [own.tolist() for own in whole_alike([np.array(["0", "1"]), np.array(["0.0", "2.0"])])]
    [['0', '1'], ['0', '2']]
    """
    if not any(own.dtype.kind == "U" and len(own) and kind_of(own) == "whole" for own in each):
        return each
    values = [[meaning(label, "whole") for label in own.tolist()] for own in each]
    if not all(None not in own and len(set(own)) == len(own) for own in values):
        return each
    return [np.array([str(value) for value in own], dtype=str) for own in values]


def union(each: Sequence[np.ndarray]) -> np.ndarray:
    """Return the classes of several parts of some rows, sorted."""
    found = [classes for classes in each if len(classes)]
    return np.unique(np.concatenate(found)) if found else np.array([], dtype=str)


def recoded(codes: np.ndarray, own: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return positions in ``classes`` of codes that are positions in some of these, ``own``; −1 stays."""
    place = np.searchsorted(classes, own.astype(classes.dtype)) if len(own) else np.empty(0, np.int64)
    return np.append(place, -1)[codes]


def encode_labels(where: str, codes: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the position of each row's value among the values that occur, sorted, and these.

    The codes −1, and those of nan, become −1; unsigned values become int64.
    """
    if values.dtype.kind == "u":
        if len(values) and values.max() > np.iinfo(np.int64).max:
            raise BadInput(f"{where}: the label {values.max()} is above 2**63 - 1; save the labels as text")
        values = values.astype(np.int64)
    used = np.unique(codes[codes >= 0])
    if values.dtype.kind == "f":
        used = used[~np.isnan(values[used])]
    used = used[np.argsort(values[used], kind="stable")]
    place = np.full(len(values) + 1, -1, dtype=np.int64)  # the last one is where −1 points
    place[used] = np.arange(len(used))
    return place[codes], values[used]
