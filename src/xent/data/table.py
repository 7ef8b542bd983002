"""A ``Table``, the choice of its columns, and the errors that every reader has in common.

Rows are counted from 1 in every message, a header line not counted.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import io
import itertools
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from xent._util.text import quoted
from xent.data.categories import MISSING, MOST, Category
from xent.data.layout import PLAIN, Layout
from xent.data.rows import RowSource, SelectedRows, blocks, row_source
from xent.errors import BadInput

Missing: TypeAlias = Literal["error", "drop", "impute"]
"""The ways with a row that lacks a number or a category."""


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of a file, or of one share of it: features, labels, weights.

    ``codes`` and ``classes`` are None where no label was wanted or, where it was optional, found. A code is
    −1 where an optional label is missing.

    Example:
        >>> import numpy as np
        >>> from xent.data import Table
        >>> table = Table("flowers.csv", np.array([[0.5], [1.5]]), ("petal",))
        >>> len(table), table.codes is None
        (2, True)
    """

    source: str  # the file or folder, for messages
    features: np.ndarray | RowSource  # (N, D) floating, finite; a mapped array, or rows read when needed
    feature_names: tuple[str, ...]  # (D,) the names of the features
    label_name: str | None = None  # the label's column; None too for labels that are a file of their own
    codes: np.ndarray | None = None  # (N,) int64, positions in classes
    classes: np.ndarray | None = None  # (C,) str, int or bool, sorted
    unused: dict[str, str] = dataclasses.field(default_factory=dict)  # columns not used, and the reason
    start: int = 0  # the position of the first row in the file
    width: int | None = None  # columns of the array that held the features; None where columns have names
    lists: dict[str, int] = dataclasses.field(default_factory=dict)  # lengths of the columns that are lists
    categories: tuple[Category, ...] = ()  # columns of few values, which are not yet features
    unknown: dict[str, int] = dataclasses.field(default_factory=dict)  # rows of a category unknown to a model
    weight: np.ndarray | None = None  # (N,) float64, the weight of each row; None is 1
    soft: np.ndarray | None = None  # (N, C) float64, the mass of each class; codes are of the largest
    dropped: int = 0  # the number of rows left out for what they lack, over all processes
    readable: np.ndarray | None = None  # (N,) bool, False for rows to pass over; None is all True

    def __len__(self) -> int:
        """Return N."""
        return self.features.shape[0]

    @property
    def skipped(self) -> tuple[str, ...]:
        """The columns that are not used."""
        return tuple(self.unused)

    def taken(self, rows: np.ndarray) -> Table:
        """Return the table of some of its rows; ``start`` stays.

        Args:
            rows: positions in this table, ascending.

        Returns:
            The table of these rows.
        """

        def of(array: np.ndarray | None) -> np.ndarray | None:
            return None if array is None else array[rows]

        return dataclasses.replace(
            self,
            features=SelectedRows(self.rows, rows),
            codes=of(self.codes),
            weight=of(self.weight),
            soft=of(self.soft),
            categories=tuple(column.at(rows) for column in self.categories),
        )

    @property
    def rows(self) -> RowSource:
        """The features as rows to go through; ``rows.shape`` is (N, D)."""
        return row_source(self.features)

    def own(self, rows: np.ndarray) -> np.ndarray:
        """Return the positions in this share of those of some rows that lie in it.

        Args:
            rows: positions in the file, ascending.

        Returns:
            Positions in this table, ascending.
        """
        low, high = np.searchsorted(rows, [self.start, self.start + len(self)])
        return rows[low:high] - self.start if self.start else rows[low:high]


class NoRows(BadInput):
    """A file that has columns but no rows; among several it is passed over."""

    def __init__(self, source: object) -> None:
        super().__init__(f"{source}: the file has columns but no rows")


OF_AUDIT = {"--features": "--classes", "--soft-labels": "--soft-prefix", "--keep": "--id"}
"""Names of options in ``xent audit``, by those in the other commands."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The columns to read from a file, and the treatment of rows that lack something.

    Example:
        >>> from xent.data import Wanted
        >>> wanted = Wanted("kind", exclude=["id"], missing="drop")
        >>> wanted.label, wanted.features is None
        ('kind', True)
    """

    label: str | None = None  # the column of the labels; None is no label
    features: Sequence[str] | None = None  # None: every numeric column but the label and ``exclude``
    exclude: Sequence[str] = ()  # columns that are not features
    label_optional: bool = False  # whether the label's column, or a row's label, may be missing
    model: Path | None = None  # the model file whose features these are; labels are then for comparison
    width: int | None = None  # columns of the arrays that the model was fitted on
    lists: dict[str, int] = dataclasses.field(default_factory=dict)  # the lengths of columns that are lists
    parts: int = 1  # the number of files of the table; each may take that part of the memory
    layout: Layout = PLAIN  # the layout of text files and archives
    categorical: Sequence[str] | Literal["auto"] = ()  # columns of categories; "auto": text of few values
    most: int = MOST  # the largest number of values of a column of categories
    known: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)  # values fixed by a fit
    missing: Missing = "error"  # rows that lack a number or category: an error, "drop", or "impute" (nan)
    weight: str | None = None  # the column of the rows' weights
    soft: Sequence[str] = ()  # columns of the classes' masses, in place of a label
    skip_bad: bool = False  # whether unusable numbers are read as nan or inf, for the caller to pass over
    raw: bool = False  # whether numbers come as they are stored, nan and infinite ones too

    def most_of(self, column: str) -> int:
        """Return the number of values up to which a column is one of categories.

        Args:
            column: the name of the column.
        """
        return sys.maxsize if column in self.known else self.most

    def blank_in(self, column: str, blank: Collection[str]) -> Collection[str]:
        """Return the texts that are no value in a column of categories.

        Args:
            column: the name of the column.
            blank: the texts that are no value in its file format.
        """
        return set(MISSING) - {*self.known[column]} if column in self.known else blank

    @property
    def beside(self) -> list[str]:
        """The columns of numbers that are not features: weights and masses."""
        return [*([] if self.weight is None else [self.weight]), *self.soft]

    def option(self, name: str) -> str:
        """Return the name by which the running command calls an option of ``xent fit``.

        Args:
            name: the option of ``xent fit``.
        """
        return OF_AUDIT.get(name, name) if self.raw else name

    @property
    def origin(self) -> str:
        """The option or the model that names the features."""
        return self.option("--features") if self.model is None else f"a feature of {self.model}"

    @property
    def every_row(self) -> bool:
        """True where a row without a label is an error."""
        return not self.label_optional and self.model is None

    @property
    def other_labels(self) -> str:
        """The advice to a command that is to go on without these labels."""
        if self.model is not None and self.label_optional:
            return "rename it to predict without labels"
        return "name another with --label"

    def without(self, column: str) -> str:
        """Return the advice to a command that is to go on without a column.

        Args:
            column: the name of the column.
        """
        if self.model is not None:
            return "fit a model without the column"
        if column in self.beside:
            option = "--weight" if column == self.weight else "--soft-labels"
            return f"name another column with {self.option(option)}"
        if self.features is not None:
            return f"leave the column out of {self.option('--features')}"
        option = as_option(column)
        return f"leave the column out with --exclude {option if len(option) <= 200 else 'and its name'}"


def check_names_wanted(path: Path, wanted: Wanted, names: Sequence[str]) -> None:
    """Raise ``BadInput`` for a column that is there twice, and for one that is named and not there."""
    times = collections.Counter(names)
    for name, count in times.items():
        if count > 1:
            if not name.strip():
                raise BadInput(f"{path}: {'two' if count == 2 else count} columns have no name; name them")
            raise BadInput(f"{path}: column {quoted(name)} is there {count} times; rename all but one")
    check_once(path, wanted)
    if wanted.label is not None and wanted.label not in times and not wanted.label_optional:
        raise BadInput(f"{path}: no column {quoted(wanted.label)} for --label; {_there_are(names)}")
    named = [] if wanted.categorical == "auto" else wanted.categorical
    for option, names_wanted in (
        ("--exclude", wanted.exclude),
        (wanted.origin, wanted.features or ()),
        ("--categorical" if wanted.model is None else wanted.origin, named),
        ("--weight", [] if wanted.weight is None else [wanted.weight]),
        (wanted.option("--soft-labels"), wanted.soft),
    ):
        lacking = [name for name in names_wanted if name not in times]
        if lacking:
            raise BadInput(f"{path}: no column {some(lacking)} ({option}); {_there_are(names)}")
    if wanted.features is not None and wanted.label in wanted.features:
        raise BadInput(
            f"{path}: the label column {quoted(wanted.label)} cannot be a feature; "
            + ("drop it from --features" if wanted.model is None else "name another column with --label")
        )
    _check_apart(path, wanted)


def _check_apart(path: Path, wanted: Wanted) -> None:
    """Raise ``BadInput`` for a column that two options take for two things."""
    uses = {"--weight": wanted.beside[: wanted.weight is not None], "--soft-labels": wanted.soft}
    others = {"--label": [wanted.label], "--features": wanted.features or (), "--categorical": ()}
    if wanted.categorical != "auto":
        others["--categorical"] = wanted.categorical
        uses["--exclude"] = [name for name in wanted.exclude if name in wanted.categorical]
        both = [name for name in wanted.categorical if name == wanted.label]
        if both:
            raise BadInput(f"{path}: the label column {quoted(both[0])} cannot be in --categorical")
    for option, columns in uses.items():
        for other, taken in (*others.items(), *((o, c) for o, c in uses.items() if o != option)):
            both = [name for name in columns if name in taken]
            if both:
                raise BadInput(f"{path}: column {quoted(both[0])} is named in {option} and in {other}")


def choose(
    path: Path,
    wanted: Wanted,
    names: Sequence[str],
    numeric: Sequence[bool],
    kinds: Sequence[str] = (),
    others: Collection[str] = (),
) -> list[str]:
    """Return the feature columns, in the order wanted, else the file's, without ``others``.

    ``kinds`` are for messages.
    """
    check_names_wanted(path, wanted, names)
    if wanted.features is not None:
        return [name for name in wanted.features if name not in others]
    passed_over = {wanted.label, *wanted.exclude, *wanted.beside, *others}
    chosen = [
        name for name, is_number in zip(names, numeric, strict=True) if is_number and name not in passed_over
    ]
    if not chosen and not wanted.categorical:
        hint = "; --categorical auto makes indicators of text" if "text" in kinds else ""
        raise BadInput(f"{path}: no numeric column is left for features; {_there_are(names, kinds)}{hint}")
    return chosen


def check_once(path: Path, wanted: Wanted) -> None:
    """Raise ``BadInput`` for a feature that is named twice."""
    for name, count in collections.Counter(wanted.features or ()).items():
        if count > 1:
            raise BadInput(
                f"{path}: column {quoted(name)} is asked for {count} times ({wanted.origin}); once is enough"
            )


def some(names: Sequence[str], kinds: Sequence[str] = (), most: int = 8) -> str:
    """Return a list of names for a message, and of their kinds, cut where it is long."""
    pairs = itertools.zip_longest(names[:most], kinds[:most])
    shown = ", ".join(quoted(name) + (f" ({kind})" if kind else "") for name, kind in pairs)
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _there_are(names: Sequence[str], kinds: Sequence[str] = ()) -> str:
    marks = [mark for mark in ";\t|," if len(names) == 1 and mark in names[0]]
    if marks:
        return (
            f"the header is one column, {quoted(names[0])}: say what lies between the columns, as "
            f"--delimiter {quoted(marks[0])}"
        )
    if any(map(_is_number, names)):
        return f"its header is {some(names)}: if that is a row, read the file with --no-header"
    return f"its columns are {some(names, kinds)}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def bad_number(
    path: Path, wanted: Wanted, name: str, row: int, value: object, column: str | None = None
) -> BadInput:
    """Return the error for a feature, of a row counted from 0, that is no finite number.

    ``column`` is the column that it lies in, where that has another name.
    """
    lacks = value is None or value != value or value == ""
    said = "is missing" if value is None else f"holds {quoted(value)}"
    mend = "correct or drop the row"
    if lacks and wanted.model is None and not wanted.raw and (column or name) not in wanted.beside:
        mend = "correct the row, or let --missing drop or impute it"
    return BadInput(
        f"{path}: row {row + 1}, column {quoted(name)} {said} where a finite number is needed; "
        f"{mend}, or {wanted.without(column or name)}"
    )


def no_number(path: object, wanted: Wanted, name: str, kind: str, numbered: bool = True) -> BadInput:
    """Return the error for a column of features that holds something else than numbers.

    ``numbered`` says whether its values can be categories.
    """
    hint = f" learn from its values with --categorical {as_option(name)}, or" if numbered else ""
    hint = hint if wanted.model is None else ""
    return BadInput(
        f"{path}: column {quoted(name)} ({wanted.origin}) holds {kind}, not numbers;{hint} "
        f"{wanted.without(name)}"
    )


def no_category(path: object, wanted: Wanted, name: str, row: int) -> BadInput:
    """Return the error for a category that is missing in a row, counted from 0."""
    mend = "correct or drop the row" if wanted.model is not None else "let --missing drop or impute it"
    return BadInput(
        f"{path}: row {row + 1}, column {quoted(name)} is missing where a category is needed; "
        f"{mend}, or {wanted.without(name)}"
    )


def too_many(path: object, name: str, most: int) -> BadInput:
    """Return the error for a column of too many values to be numbered."""
    return BadInput(
        f"{path}: column {quoted(name)} (--categorical) has more than {most} values; "
        "raise --max-categories, or leave the column out"
    )


def some_unused(unused: dict[str, str], most: int = 6) -> str:
    """Return which columns are not used, and why, cut where they are many."""
    shown = [f"{quoted(name)} ({why})" for name, why in itertools.islice(unused.items(), most)]
    more = f" and {len(unused) - most} more" if len(unused) > most else ""
    return f"not used: {', '.join(shown)}{more}"


def with_masses(path: object, table: Table, soft: np.ndarray, names: Sequence[str]) -> Table:
    """Return a table whose labels are masses of classes (N, C), called by the names of their columns."""
    order = np.argsort(np.array(names, dtype=str), kind="stable")
    soft = soft[:, order]
    classes = np.array(names, dtype=str)[order]
    return dataclasses.replace(table, soft=soft, codes=soft.argmax(1), classes=classes, label_name=None)


def no_label(where: object, row: int, column: str | None = None) -> BadInput:
    """Return the error for a row, counted from 0, without a label."""
    of = "" if column is None else f" in column {quoted(column)}"
    return BadInput(f"{where}: row {row + 1} has no label{of}; fill it in or drop the row")


def as_option(name: str) -> str:
    """Return a name as a shell and ``--exclude``, whose value is a row of CSV, read it."""
    row = io.StringIO()
    csv.writer(row, lineterminator="").writerow([name])
    return shlex.quote(row.getvalue())


def check_finite(
    path: Path,
    wanted: Wanted,
    source: RowSource,
    names: Sequence[str],
    start: int,
    columns: Sequence[str] | None = None,
) -> None:
    """Raise ``BadInput`` for the first number that is not finite; ``columns`` are those of the features."""
    if wanted.skip_bad or wanted.raw:
        return
    for here, x in blocks(source):
        if not x.numel() or all(end.isfinite() for end in x.aminmax()):  # one pass; nan is both ends
            continue
        finite = x.isfinite() if wanted.missing == "error" else ~x.isinf()
        if not finite.all():
            row, j = (~finite).nonzero()[0].tolist()
            at, column = start + here.start + row, None if columns is None else columns[j]
            raise bad_number(path, wanted, names[j], at, x[row, j].item(), column)
