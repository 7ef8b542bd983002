"""Files as tables of some rows each, one after the other, so that memory does not grow with the rows.

    file → (table of the next rows, other columns of them as they are), ...

A format without ``batches`` is read as one table, whose rows are then taken in turn: arrays are mapped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from xent._processes.group import Share
from xent._util.text import quoted
from xent.data._registry import format_of
from xent.data.batches import as_array
from xent.data.layout import matching
from xent.data.parts import files_of
from xent.data.read import check_layout, read_share
from xent.data.reading import reading
from xent.data.rows import BATCH, steps
from xent.data.table import NoRows, Table, Wanted
from xent.errors import BadInput

ROWS = 1 << 16
"""Rows of a table at most."""


@dataclasses.dataclass(frozen=True)
class Part:
    """The next rows of some files."""

    table: Table
    kept: Any  # an Arrow table of the columns that are kept, with as many rows
    start: int  # of its first row among the rows of all files


def stream(
    paths: Sequence[Path], wanted: Wanted, keep: Sequence[str] = (), share: Share | None = None
) -> Iterator[Part]:
    """Yield the rows of some files; files without rows are passed over, unless all are.

    Of a share of several there are some of the parts, and each row is in one share. Raises ``BadInput`` as
    ``read_table`` does, and for columns to keep that are not there.
    """
    start, number, empty = 0, 0, None
    share = Share() if share is None else share
    for file in files_of([each for path in paths for each in matching(path)]):
        try:
            found = format_of(file)
            if not share.whole and found is not None and found.shared_batches and found.count:
                # a file of one row group is that of another share than the file before it
                own = Share((share.index - number) % share.count, share.count)
                with reading(file, found.name):
                    check_layout(file, found, wanted)
                    for at, table, kept in found.shared_batches(file, wanted, keep, own):
                        yield Part(table, kept, start + at)
                    start += found.count(file)
                number += 1
                continue
            for table, kept in _parts(file, wanted, keep):
                if number % share.count == share.index:
                    yield Part(table, kept, start)
                start += len(table)
                number += 1
        except NoRows as error:
            empty = empty or error
    if not start and empty is not None:
        raise empty


def _parts(file: Path, wanted: Wanted, keep: Sequence[str]) -> Iterator[tuple[Table, Any]]:
    import pyarrow as pa

    found = format_of(file)
    if found is not None and found.batches is not None and file.is_file():
        with reading(file, found.name):
            check_layout(file, found, wanted)
            yield from found.batches(file, wanted, keep)
        return
    if keep:
        option = wanted.option("--keep")
        raise BadInput(
            f"{file}: has no columns with names, of which {quoted(keep[0])} could be kept ({option})"
        )
    whole = read_share(file, wanted, Share())
    none = pa.table({})
    if not len(whole):
        raise NoRows(file)
    step = min(ROWS, max(1, BATCH // max(1, whole.rows.shape[1])))
    for rows, x in steps(whole.rows, step):
        codes = None if whole.codes is None else whole.codes[rows]
        categories = tuple(column.at(rows) for column in whole.categories)
        part = dataclasses.replace(
            whole, features=as_array(x), codes=codes, categories=categories, start=rows.start
        )
        yield part, none
