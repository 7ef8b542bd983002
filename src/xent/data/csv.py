"""``.csv`` and ``.tsv`` files to a ``Table``, through Arrow.

Arrow infers a column's type from the first block of the file and fails, late, where a later block differs.
Here that block only says which columns are numeric; these are then read as float64 throughout, so integers
may turn into decimals, and the label column is always text, so ``7`` may turn into ``cat``.

How many rows there are shows only when all are read. For a share of them the file is gone through twice,
block by block: once for the count, then up to the share's last row.
"""

from __future__ import annotations

import csv as python_csv
import io
import re
from pathlib import Path
from typing import Any

from xent._processes.group import Share
from xent._util.text import quoted
from xent.data.columns import choose_columns
from xent.data.limits import MOST_CELL, MOST_NAME, check_columns, check_names
from xent.data.parquet import from_arrow, within
from xent.data.table import NoRows, Table, Wanted, bad_number
from xent.errors import BadInput, needs

BLOCK = 8 << 20
"""Bytes of the file that Arrow parses at a time; a line must fit."""

MISSING = ["", "NA", "N/A", "n/a", "#N/A", "NULL", "null"]
"""Cells that are a missing number. (As a label, all but the empty text are text like any other.)"""

SAMPLE = 1000
"""Cells that say whether a column of text is one of numbers with something else in between."""


def read_csv(path: Path, wanted: Wanted, share: Share) -> Table:
    """Return the share's rows of a file of text with commas or, called ``.tsv``, tabs."""
    with needs("probe"):
        import pyarrow as pa
        from pyarrow import csv
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    _check_header(path, delimiter)
    parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    given = {"parse_options": parse, "read_options": csv.ReadOptions(block_size=BLOCK)}

    def types(columns: dict[str, Any], include: list[str] | None = None) -> csv.ConvertOptions:
        return csv.ConvertOptions(
            column_types=columns, include_columns=include, null_values=MISSING, strings_can_be_null=False
        )

    try:
        as_text = {} if wanted.label is None else {wanted.label: pa.string()}
        with csv.open_csv(path, convert_options=types(as_text), **given) as file:
            schema = file.schema
            head = next(iter(file), None)
        if head is None:
            raise NoRows(path)
        _check_cells(path, head)
        _no_number_spoiled(path, wanted, head)
        columns = choose_columns(path, wanted, schema, no_lists)
        column_types = {name: pa.float64() for name in columns.read}
        if columns.label is not None:
            column_types[columns.label] = pa.string()
        wanted_types = types(column_types, list(column_types))
        start = 0
        if share.whole:
            arrow = csv.read_csv(path, convert_options=wanted_types, **given)
        else:
            with csv.open_csv(path, convert_options=types({}, schema.names[:1]), **given) as file:
                rows = share.of(sum(len(block) for block in file))
            start = rows.start
            with csv.open_csv(path, convert_options=wanted_types, **given) as file:
                arrow = pa.Table.from_batches(list(within(file, rows)), file.schema)
    except BadInput:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise _diagnose_csv(path, wanted, parse, error) from error
    return from_arrow(path, wanted, arrow, columns, start)


def no_lists(name: str) -> int:
    """Raise an error: a column of text holds no lists."""
    raise AssertionError(f"column {name} of a file of text is none of lists")


def _check_header(path: Path, delimiter: str) -> None:
    """Raise ``BadInput`` for a header that is no text, or that names more columns than are read.

    Before Arrow sees it, which makes room for each column in each block. The bytes are read as Latin-1, which
    every byte is, so that a quote is found before it is known whether they are UTF-8.
    """
    with open(path, "rb") as file:
        start = file.read(BLOCK + 1)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise BadInput(f"{path}: the text is UTF-16; save it as UTF-8, for example with iconv")
    if b"\0" in start.partition(b"\n")[0]:
        raise BadInput(f"{path}: the header holds NUL bytes; if it is UTF-16, save it as UTF-8, with iconv")
    text = io.StringIO(start.removeprefix(b"\xef\xbb\xbf").decode("latin-1"), newline="")
    try:
        header = next((row for row in python_csv.reader(text, delimiter=delimiter) if row), [])
    except python_csv.Error as error:
        if text.tell() > BLOCK:
            raise _long_line(path) from error
        raise BadInput(
            f"{path}: a column's name in the header takes more than {MOST_NAME:,} bytes; "
            "is a quote in it left open?"
        ) from error
    if text.tell() > BLOCK:
        raise _long_line(path)
    check_columns(path, len(header))
    try:
        check_names(path, [name.encode("latin-1").decode() for name in header])
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error


def _check_cells(path: Path, head: Any) -> None:
    """Raise ``BadInput`` for a cell of text that is longer than is read."""
    import pyarrow.compute as pc

    for name, column in zip(head.schema.names, head.columns, strict=True):
        if column.nbytes > MOST_CELL and str(column.type) in ("string", "binary"):
            sizes = pc.binary_length(column).to_numpy(zero_copy_only=False)
            row, size = int(sizes.argmax()), int(sizes.max())
            if size > MOST_CELL:
                raise BadInput(
                    f"{path}: row {row + 1}, column {quoted(name)} holds {size:,} bytes, "
                    f"more than the {MOST_CELL:,} of a cell; is a quote in it left open?"
                )


def _no_number_spoiled(path: Path, wanted: Wanted, head: Any) -> None:
    """Raise ``BadInput`` for a column that would be left out as text though most of it is numbers."""
    import pyarrow as pa

    passed_over = {wanted.label, *wanted.exclude}
    if wanted.features is not None or not passed_over <= {None, *head.schema.names}:  # `choose` names these
        return
    for name, column in zip(head.schema.names, head.columns, strict=True):
        if name in passed_over or not pa.types.is_string(column.type):
            continue
        sample = [_is_bad(text) for text in column.slice(0, SAMPLE).to_pylist() if text not in MISSING]
        if 2 * sum(sample) < len(sample):
            texts = column.to_pylist()
            row = next((i for i, text in enumerate(texts) if _is_bad(text)), None)
            if row is not None:
                raise bad_number(path, wanted, name, row, texts[row])


def _diagnose_csv(path: Path, wanted: Wanted, parse: Any, error: Exception) -> BadInput:
    """Return why Arrow could not read the file: reads it again as text, for the first bad number."""
    import pyarrow as pa
    from pyarrow import csv

    one_thread = csv.ReadOptions(block_size=BLOCK, use_threads=False)  # so that messages carry row numbers
    given = {"parse_options": parse, "read_options": one_thread}
    try:
        with csv.open_csv(path, **given) as head:
            schema = head.schema
        features = choose_columns(path, wanted, schema, no_lists).read
        texts = csv.ConvertOptions(column_types=dict.fromkeys(schema.names, pa.string()))
        with csv.open_csv(path, convert_options=texts, **given) as blocks:
            first = 0
            for block in blocks:
                for name in features:
                    for i, text in enumerate(block.column(name).to_pylist()):
                        if _is_bad(text):
                            return bad_number(path, wanted, name, first + i, text)
                first += len(block)
    except BadInput as found:
        return found
    except (pa.ArrowInvalid, OSError) as again:
        error = again
    why = " ".join(str(error).split())
    if "UTF" in why:
        return _not_utf8(path)
    if "straddl" in why or ("Empty CSV" in why and path.stat().st_size > BLOCK):
        return _long_line(path)
    why = re.sub(r"Row #(\d+)", lambda found: f"row {int(found[1]) - 1}", why)  # Arrow counts the header
    return BadInput(f"{path}: not readable as CSV: {why[:300]}")


def _not_utf8(path: Path) -> BadInput:
    return BadInput(f"{path}: the text is not UTF-8; convert it first, for example with iconv")


def _long_line(path: Path) -> BadInput:
    return BadInput(f"{path}: a line is longer than {BLOCK:,} bytes; is a quote in it left open?")


def _is_bad(text: str) -> bool:
    """Return whether Arrow reads the cell neither as a number nor as a missing one."""
    if text in MISSING:
        return False
    try:
        float(text)
    except ValueError:
        return True
    return "_" in text or not text.isascii()  # which Python alone reads
