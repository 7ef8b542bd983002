"""Several files as one table: their rows follow each other, in the order of the names of a folder's files.

    rows of the table = rows of part 1, rows of part 2, ...        of a share: those of them that lie in it

Every part has the same columns; the classes are those of all parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from xent._processes.group import Share
from xent._util.text import quoted
from xent.data._registry import format_of, known_suffixes
from xent.data.categories import Category, united
from xent.data.columns import NO_VALUES, column_of
from xent.data.labels import recoded, union, whole_alike
from xent.data.rows import ConcatenatedRows
from xent.data.table import NoRows, Table, Wanted, bad_number, no_category, too_many
from xent.errors import BadInput

_Found = TypeVar("_Found")


@dataclasses.dataclass(frozen=True)
class Span(Share):
    """The rows of a part from one position to another."""

    start: int = 0
    stop: int = 0

    @property
    def whole(self) -> bool:
        """False: some of the rows are meant."""
        return False

    def of(self, rows: int) -> slice:
        """Return the span, whatever the number of rows."""
        return slice(self.start, self.stop)


def files_of(paths: Sequence[Path]) -> list[Path]:
    """Return the files that some paths name: of a folder those whose suffix has a reader, by their names.

    Hidden files and those that begin with ``_`` are left out. Raises ``BadInput`` for a folder without any,
    and for files of two formats.
    """
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        found = [each for each in sorted(path.iterdir()) if each.name[0] not in "._" and format_of(each)]
        if not found:
            known = ", ".join(known_suffixes())
            below = (
                "; folders in it are not searched" if any(each.is_dir() for each in path.iterdir()) else ""
            )
            raise BadInput(
                f"{path}: the folder holds no file that is read, which end in one of {known}{below}"
            )
        files += found
    formats = {getattr(format_of(file), "name", None): file for file in reversed(files)}
    if len(formats) > 1:
        first, second = list(formats.values())[::-1][:2]
        raise BadInput(f"{first} and {second} are of two formats; name files of one")
    return files


def read_parts(
    files: Sequence[Path], wanted: Wanted, share: Share, read: Callable[[Path, Wanted, Share], Table]
) -> Table:
    """Return the share's rows of several files; ``read`` returns those of one.

    Raises ``BadInput`` for parts whose columns differ.
    """
    found = format_of(files[0])
    apart = found is not None and found.labels is not None and wanted.label and not wanted.label_optional
    label = None if apart else wanted.label
    if found is not None and found.labels is not None and wanted.beside:
        raise BadInput(
            f"{files[0]} and {len(files) - 1} more: weights and masses of several {found.name} files are not "
            "read; save the arrays as one file"
        )
    of_part = dataclasses.replace(wanted, label=label, parts=len(files))
    tables: list[Table] = []
    if share.whole:
        files, tables = _with_rows(files, lambda file: read(file, of_part, share))

        def again(at: int, wanted: Wanted) -> Table:
            return read(files[at], wanted, share)

        counts = [table.rows.shape[0] for table in tables]
        start = 0
    else:
        files, counts = _with_rows(files, lambda file: _count(file, of_part, read))
        rows, ends = share.of(sum(counts)), np.cumsum(counts)
        start = rows.start

        def again(at: int, wanted: Wanted) -> Table:
            before = int(ends[at]) - counts[at]
            low, high = (min(max(row - before, 0), counts[at]) for row in (rows.start, rows.stop))
            return _part(files[at], wanted, read, slice(low, high))

        tables = [again(at, of_part) for at in range(len(files))]
    joined = _joined(files, _alike(files, tables, of_part, again), start, wanted)
    if not apart:
        return joined
    assert found is not None
    assert found.labels is not None
    codes, classes = found.labels(files[0].parent, wanted, share, sum(counts))
    return dataclasses.replace(joined, codes=codes, classes=classes)


def _alike(
    files: Sequence[Path], tables: Sequence[Table], wanted: Wanted, again: Callable[[int, Wanted], Table]
) -> list[Table]:
    """Return the tables of some parts with the columns that have a value in other parts alone.

    ``again(at, wanted)`` reads a part another time.
    """
    numbers = max((table.feature_names for table in tables), key=len)
    lists = {name: width for table in tables for name, width in table.lists.items()}
    names = dict.fromkeys(column.name for table in tables for column in table.categories)
    made = []
    for at, (file, table) in enumerate(zip(files, tables, strict=True)):
        own = {*table.feature_names, *(column.name for column in table.categories)}
        of_feature = {name: column_of(name, lists) for name in numbers}
        empty = {name for name, why in table.unused.items() if why == NO_VALUES}
        features = [name for name in numbers if name in own or of_feature[name] in empty]
        categorical = [name for name in names if name in own or name in empty]
        if len(features) + len(categorical) > len(own):
            if wanted.missing == "error" and not wanted.skip_bad:
                odd = next(name for name in (*features, *categorical) if name not in own)
                raise (
                    bad_number(file, wanted, odd, 0, None)
                    if odd in features
                    else no_category(file, wanted, odd, 0)
                )
            named = dataclasses.replace(
                wanted, features=features, exclude=(), lists=lists, categorical=categorical
            )
            used = {of_feature.get(name, name) for name in (*features, *categorical)}
            unused = {name: why for name, why in table.unused.items() if name not in used}
            table = dataclasses.replace(again(at, named), unused=unused)
        made.append(table)
    return made


def _with_rows(files: Sequence[Path], read: Callable[[Path], _Found]) -> tuple[list[Path], list[_Found]]:
    """Return the files that have rows, and what was read of them; raise ``NoRows`` if none has."""
    there, found, empty = [], [], None
    for file in files:
        try:
            found.append(read(file))
            there.append(file)
        except NoRows as error:
            empty = empty or error
    if not there and empty is not None:
        raise empty
    return there, found


def _count(file: Path, wanted: Wanted, read: Callable[[Path, Wanted, Share], Table]) -> int:
    found = format_of(file)
    if found is None or found.count is None:
        return read(file, wanted, Share()).rows.shape[0]
    if not (count := found.count(file)):
        raise NoRows(file)
    return count


def _part(file: Path, wanted: Wanted, read: Callable[[Path, Wanted, Share], Table], rows: slice) -> Table:
    """Return some rows of a file, none where the span is empty; its columns are checked all the same."""
    found = format_of(file)
    if found is not None and found.count is not None:
        return read(file, wanted, Span(start=rows.start, stop=rows.stop))
    whole = read(file, wanted, Share())
    chosen = np.arange(rows.start, rows.stop)
    return whole.taken(chosen)


def _joined(files: Sequence[Path], tables: Sequence[Table], start: int, wanted: Wanted) -> Table:
    """Return the tables of some parts as one."""
    first = tables[0]
    unused = {name: why for table in tables for name, why in table.unused.items()}
    categories: list[Category] = []
    for name, columns in united([table.categories for table in tables], wanted.most_of):
        if columns is not None:
            of_all = np.concatenate([column.codes for column in columns])
            categories.append(dataclasses.replace(columns[0], codes=of_all))
        elif wanted.categorical != "auto":
            raise too_many(f"{files[0]} and {len(files) - 1} more", name, wanted.most)
        else:
            lacking = [each for each in zip(files, tables, strict=True) if not _has(each[1], name)]
            why = f"text of more than {wanted.most} values"
            if lacking:
                file, table = lacking[0]
                why = table.unused.get(name, f"not a column of {file}")
            unused[name] = why
    for file, table in zip(files, tables, strict=True):
        if table.feature_names != first.feature_names:
            odd = sorted(set(table.feature_names) ^ set(first.feature_names))
            what = f"{quoted(odd[0])} is a feature in one alone" if odd else "their order differs"
            raise BadInput(f"{file}: has other columns than {files[0]}: {what}; write the parts alike")
        if table.width != first.width:
            raise BadInput(
                f"{file}: has {table.width} columns and {files[0]} {first.width}; write them alike"
            )
    source = f"{files[0]} and {len(files) - 1} more"
    features = ConcatenatedRows([table.rows for table in tables])
    joined = dataclasses.replace(
        first,
        source=source,
        features=features,
        start=start,
        codes=None,
        classes=None,
        unused=unused,
        categories=tuple(categories),
        weight=_stacked([table.weight for table in tables]),
        soft=None,
    )
    if first.soft is not None:
        soft = _stacked([table.soft for table in tables])
        assert soft is not None
        return dataclasses.replace(joined, soft=soft, codes=soft.argmax(1), classes=first.classes)
    named = [(file, t.classes) for file, t in zip(files, tables, strict=True) if t.classes is not None]
    if not named:
        return joined
    _check_types(named)
    alike = whole_alike([found for _, found in named])
    classes = union(alike)
    of_table = dict(zip([file for file, _ in named], alike, strict=True))
    codes = [
        np.full(t.rows.shape[0], -1)
        if t.codes is None or t.classes is None
        else recoded(t.codes, of_table[file], classes)
        for file, t in zip(files, tables, strict=True)
    ]
    label = next(table.label_name for table in tables if table.classes is not None)
    return dataclasses.replace(joined, label_name=label, codes=np.concatenate(codes), classes=classes)


def _has(table: Table, category: str) -> bool:
    return any(column.name == category for column in table.categories)


def _stacked(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
    there = [array for array in arrays if array is not None]
    return np.concatenate(there) if there else None


def _check_types(named: Sequence[tuple[Path, np.ndarray]]) -> None:
    """Raise ``BadInput`` for labels that are text in one part and numbers in another."""
    words = {"U": "text", "b": "booleans"}
    kinds = {words.get(own.dtype.kind, "numbers"): file for file, own in reversed(named) if len(own)}
    if len(kinds) > 1:
        (one, file), (other, odd) = list(kinds.items())[::-1][:2]
        raise BadInput(f"{file}: its labels are {one}, and those of {odd} {other}; write the parts alike")
