"""``.csv`` and ``.tsv`` files to a ``Table``, through Arrow.

Arrow infers a column's type from the first block of the file and fails, late, where a later block differs.
Here that block only says which columns are numeric; these are then read as float64 throughout, so integers
may turn into decimals, and the label column is always text, so ``7`` may turn into ``cat``.

How many rows there are shows only when all are read. For a share of them the file is gone through twice,
block by block: once for the count, then up to the share's last row.
"""

from __future__ import annotations

import codecs
import csv as python_csv
import dataclasses
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xent._processes.group import Share
from xent._util.text import quoted
from xent.data.categories import MISSING, TooMany, numbered
from xent.data.columns import Columns, choose_columns
from xent.data.layout import Layout, check_text, opened
from xent.data.limits import MOST_CELL, MOST_NAME, check_columns, check_names
from xent.data.parquet import check_kept, from_arrow, within
from xent.data.table import NoRows, Table, Wanted, bad_number, no_number
from xent.errors import BadInput, needs

BLOCK = 8 << 20
"""Bytes of the file that Arrow parses at a time; a line must fit."""

STREAMED = 1 << 20
"""Bytes that are parsed at a time where rows are not kept, unless lines are long."""

_COMMA = re.compile(r"\s*[+-]?[0-9]+,[0-9]+\s*")

BOOLEANS = {"1": ["1", "True", "TRUE", "true"], "0": ["0", "False", "FALSE", "false"]}
"""Cells of a column of booleans, which as numbers are 1 and 0; Arrow's."""

_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?$|^nan$"

SAMPLE = 1000
"""Cells that say whether a column of text is one of numbers with something else in between."""


def read_csv(path: Path, wanted: Wanted, share: Share) -> Table:
    """Return the share's rows of a file of text with commas or, called ``.tsv``, tabs."""
    with needs("probe"):
        import pyarrow as pa
    text = TextFile(path, wanted.layout)
    text.check_header()
    try:
        with text.open(types(text, as_text(wanted))) as file:
            schema, head = file.schema, next(iter(file), None)
        if head is None:
            raise NoRows(path)
        _check_cells(path, head)
        _no_text_chosen(path, wanted, head)
        _no_number_spoiled(path, wanted, head)
        columns = _without_many(path, wanted, head, choose_columns(path, wanted, schema, no_lists))
        column_types = {c.name: _number_type(c.kind) for c in (*columns.features, *columns.beside)}
        column_types |= dict.fromkeys(columns.categorical, pa.dictionary(pa.int32(), pa.string()))
        if columns.label is not None:
            column_types[columns.label] = pa.string()
        convert = types(text, column_types, list(column_types))
        start = 0
        if share.whole:
            arrow = text.read(convert)
        else:
            with text.open(types(text, {}, schema.names[:1])) as file:
                rows = share.of(sum(len(block) for block in file))
            start = rows.start
            with text.open(convert) as file:
                arrow = pa.Table.from_batches(list(within(file, rows)), file.schema)
    except BadInput:
        raise
    except (pa.ArrowInvalid, OSError, UnicodeError) as error:
        raise _diagnose_csv(text, wanted, error) from error
    return from_arrow(path, wanted, arrow, columns, start, MISSING)


def csv_batches(path: Path, wanted: Wanted, keep: Sequence[str]) -> Iterator[tuple[Table, Any]]:
    """Yield the rows of a file of text, some at a time, with the columns that are kept, as text.

    Where bad rows are to be passed over, a cell that is no number is read as inf, and a line of too many or
    too few cells is a row that is not readable.
    """
    with needs("probe"):
        import pyarrow as pa
    text = TextFile(path, wanted.layout, wanted.skip_bad)
    text.check_header()
    text.take_small_blocks()
    try:
        with text.open(types(text, as_text(wanted)), threads=False) as file:
            schema, head = file.schema, next(iter(file), None)
        if head is not None:
            _check_cells(path, head)
        elif not text.odd_rows:
            raise NoRows(path)
        columns = choose_columns(path, wanted, schema, no_lists)
        check_kept(path, wanted, keep, schema.names)
        numbers = {each.name: _number_type(each.kind) for each in (*columns.features, *columns.beside)}
        column_types = dict.fromkeys([*keep, *([columns.label] if columns.label else [])], pa.string())
        column_types |= dict.fromkeys(numbers, pa.string()) if wanted.skip_bad else numbers
        column_types |= dict.fromkeys(columns.categorical, pa.dictionary(pa.int32(), pa.string()))
        read = list(dict.fromkeys([*columns.every, *keep]))
        # several threads would read ahead, some blocks each
        text.odd_rows.clear()  # those that were seen when the columns were chosen
        with text.open(types(text, column_types, read), threads=False) as file:
            start = 0
            for part, readable in _with_odd_rows(file, text.odd_rows):
                kept = part.select(list(keep))
                if wanted.skip_bad:
                    for name, kind in numbers.items():
                        place = part.schema.get_field_index(name)
                        made = _numbers_of(part.column(name), text.layout.decimal, kind)
                        part = part.set_column(place, name, made)
                table = from_arrow(path, wanted, part, columns, start, MISSING)
                yield dataclasses.replace(table, readable=readable), kept
                start += len(part)
    except BadInput:
        raise
    except (pa.ArrowInvalid, OSError, UnicodeError) as error:
        raise _diagnose_csv(text, wanted, error) from error


def _with_odd_rows(file: Any, odd: Sequence[int]) -> Iterator[tuple[Any, np.ndarray]]:
    """Yield the batches of a reader as tables, with rows of null where it left rows out, and which it read.

    ``odd`` are the positions in the file of the rows left out, ascending; the reader adds those before and
    in a batch, and some behind it, before it returns the batch.
    """
    import pyarrow as pa

    start, passed = 0, 0  # rows of the file, and those of ``odd`` among them
    for batch in file:
        left_out = np.array(odd[passed:], dtype=np.int64) - start
        left_out = left_out[
            left_out - np.arange(len(left_out)) < len(batch)
        ]  # with a row that was read behind
        readable = np.ones(len(batch) + len(left_out), dtype=bool)
        readable[left_out] = False
        part = pa.Table.from_batches([batch])
        if len(left_out):
            part = part.take(pa.array(readable.cumsum() - 1, mask=~readable))
        start, passed = start + len(readable), passed + len(left_out)
        yield part, readable
    if left := len(odd) - passed:
        none = file.schema.empty_table().take(pa.nulls(left, pa.int64()))
        yield none, np.zeros(left, dtype=bool)


def _number_type(kind: Any) -> Any:
    """Return the type that a column of numbers is read as: its own where it is one of booleans."""
    import pyarrow as pa

    return kind if pa.types.is_boolean(kind) else pa.float64()


def _numbers_of(column: Any, decimal: str, kind: Any) -> Any:
    """Return text as numbers: null where one is missing, inf where there is something else."""
    import pyarrow as pa
    import pyarrow.compute as pc

    cells = pc.utf8_trim_whitespace(column)
    if pa.types.is_boolean(kind):
        for number, names in BOOLEANS.items():
            cells = pc.if_else(pc.is_in(cells, pa.array(names)), number, cells)
    missing = pc.or_(pc.is_in(column, pa.array(MISSING)), pc.is_null(column))
    if decimal != ".":
        cells = pc.replace_substring(pc.replace_substring(cells, ".", "?"), decimal, ".")
    number = pc.match_substring_regex(cells, _NUMBER, ignore_case=True)
    values = pc.cast(pc.if_else(number, cells, None), pa.float64())
    return pc.if_else(pc.or_(number, missing), values, float("inf"))


class TextFile:
    """A file of text with a delimiter, opened by Arrow."""

    def __init__(self, path: Path, layout: Layout, skip_bad: bool = False) -> None:
        from pyarrow import csv

        self.path, self.layout, self.delimiter = path, layout, layout.delimiter_of(path)
        self.block = BLOCK
        # Arrow decodes a line of too many cells before it is passed over, and so it must be in the encoding;
        # from utf-8-sig it decodes all lines, where of utf-8 it does so with those columns that are read
        utf8 = codecs.lookup(layout.encoding).name == "utf-8"
        self.encoding = "utf-8-sig" if skip_bad and utf8 else layout.encoding
        self.odd_rows: list[int] = []  # of too many or too few cells, where they are passed over
        self._parse = csv.ParseOptions(
            delimiter=self.delimiter,
            newlines_in_values=True,
            invalid_row_handler=self._pass_over if skip_bad else None,
        )

    def _pass_over(self, row: Any) -> str:
        self.odd_rows.append(row.number - 1 - self.layout.header)  # Arrow counts from 1, and the header
        return "skip"

    def _how(self, threads: bool) -> dict[str, Any]:
        from pyarrow import csv

        header = self.layout.header
        read = csv.ReadOptions(
            block_size=self.block,
            use_threads=threads,
            encoding=self.encoding,
            autogenerate_column_names=not header,
        )
        return {"parse_options": self._parse, "read_options": read}

    def open(self, convert: Any, threads: bool = True) -> Any:
        """Return a reader of the file, a batch at a time."""
        from pyarrow import csv

        return csv.open_csv(opened(self.path), convert_options=convert, **self._how(threads))

    def read(self, convert: Any) -> Any:
        """Return the file as an Arrow table."""
        from pyarrow import csv

        return csv.read_csv(opened(self.path), convert_options=convert, **self._how(True))

    def take_small_blocks(self) -> None:
        """Set the size of blocks to that of few lines, which takes less memory."""
        longest = max((len(line) for line in _start(self.path).split(b"\n")), default=0)
        self.block = min(BLOCK, max(STREAMED, 4 * longest))

    def check_header(self) -> None:
        """Raise ``BadInput`` for a header that is no text, or that names more columns than are read.

        Before Arrow sees it, which makes room for each column in each block. The bytes are read as Latin-1,
        which every byte is, so that a quote is found before it is known whether they are in the encoding.
        """
        path, encoding = self.path, codecs.lookup(self.layout.encoding).name
        start = _start(path)
        check_text(path, start)
        if encoding.startswith(("utf-16", "utf-32")):
            return
        if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise BadInput(f"{path}: the text is UTF-16; read it with --encoding utf-16")
        if b"\0" in start.partition(b"\n")[0]:
            raise BadInput(
                f"{path}: the header holds NUL bytes; if it is UTF-16, read it with --encoding utf-16"
            )
        text = io.StringIO(start.removeprefix(b"\xef\xbb\xbf").decode("latin-1"), newline="")
        try:
            rows = python_csv.reader(text, delimiter=self.delimiter)
            header = next((row for row in rows if row), [])
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
            check_names(path, [name.encode("latin-1").decode(encoding) for name in header])
        except UnicodeDecodeError as error:
            raise not_encoded(path, encoding) from error


def _start(path: Path) -> bytes:
    """Return the first bytes of a file, decompressed."""
    with opened(path) as file:
        return bytes(file.read(BLOCK + 1))


def types(text: TextFile, columns: dict[str, Any], include: list[str] | None = None) -> Any:
    """Return how Arrow converts cells: columns in the types given, others as they look."""
    from pyarrow import csv

    return csv.ConvertOptions(
        column_types=columns,
        include_columns=include,
        null_values=[*MISSING],
        strings_can_be_null=False,
        decimal_point=text.layout.decimal,
    )


def as_text(wanted: Wanted) -> dict[str, Any]:
    """Return the columns that are text whatever they look like: labels and categories."""
    import pyarrow as pa

    names = [] if wanted.categorical == "auto" else [*wanted.categorical]
    return dict.fromkeys([*names, *([] if wanted.label is None else [wanted.label])], pa.string())


def _without_many(path: Path, wanted: Wanted, head: Any, columns: Columns) -> Columns:
    """Return the columns without those whose first rows alone have too many values to be numbered."""
    if wanted.categorical != "auto":
        return columns
    unused, kept = dict(columns.unused), []
    for name in columns.categorical:
        try:
            numbered(path, name, [head.column(name)], wanted.most, MISSING)
        except TooMany:
            unused[name] = f"text of more than {wanted.most} values"
        else:
            kept.append(name)
    return dataclasses.replace(columns, unused=unused, categorical=tuple(kept))


def no_lists(name: str) -> int:
    """Raise an error: a column of text holds no lists."""
    raise AssertionError(f"column {name} of a file of text is none of lists")


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


def _no_text_chosen(path: Path, wanted: Wanted, head: Any) -> None:
    """Raise ``BadInput`` for a column of ``--features`` that begins with text, where no number was meant."""
    if wanted.model is not None or wanted.categorical == "auto":
        return
    for name in wanted.features or ():
        if name in {wanted.label, *wanted.categorical} or name not in head.schema.names:
            continue
        cells = head.column(name).slice(0, SAMPLE).to_pylist()
        texts = [cell for cell in cells if isinstance(cell, str) and cell not in MISSING]
        if len(texts) > 1 and all(_is_bad(text, wanted.layout.decimal) for text in texts):
            raise no_number(path, wanted, name, "text")


def _no_number_spoiled(path: Path, wanted: Wanted, head: Any) -> None:
    """Raise ``BadInput`` for a column that would be left out as text though most of it is numbers."""
    import pyarrow as pa

    passed_over = {wanted.label, *wanted.exclude}
    if wanted.features is not None or not passed_over <= {None, *head.schema.names}:  # `choose` names these
        return
    categorical = () if wanted.categorical == "auto" else wanted.categorical
    passed_over |= {*categorical, *wanted.beside}
    decimal = wanted.layout.decimal
    for name, column in zip(head.schema.names, head.columns, strict=True):
        if name in passed_over or not pa.types.is_string(column.type):
            continue
        sample = [text for text in column.slice(0, SAMPLE).to_pylist() if text not in MISSING]
        if decimal == "." and sample and all(_COMMA.fullmatch(text) for text in sample):
            raise BadInput(
                f"{path}: column {quoted(name)} holds {quoted(sample[0])}: if the comma is the decimal mark, "
                f"read it with --decimal ,; else {wanted.without(name)}"
            )
        if 2 * sum(_is_bad(text, decimal) for text in sample) < len(sample):
            texts = column.to_pylist()
            row = next((i for i, text in enumerate(texts) if _is_bad(text, decimal)), None)
            if row is not None:
                raise bad_number(path, wanted, name, row, texts[row])


def _diagnose_csv(text: TextFile, wanted: Wanted, error: Exception) -> BadInput:
    """Return why Arrow could not read the file: reads it again as text, for the first bad number."""
    import pyarrow as pa

    path, decimal = text.path, text.layout.decimal
    try:
        with text.open(types(text, as_text(wanted)), threads=False) as head:  # so that messages name rows
            schema = head.schema
        columns = choose_columns(path, wanted, schema, no_lists)
        numbers = {c.name: pa.types.is_boolean(c.kind) for c in (*columns.features, *columns.beside)}
        with text.open(types(text, dict.fromkeys(schema.names, pa.string())), threads=False) as blocks:
            first = 0
            for block in blocks:
                for name, is_boolean in numbers.items():
                    for i, cell in enumerate(block.column(name).to_pylist()):
                        if is_boolean and cell not in (*MISSING, *BOOLEANS["1"], *BOOLEANS["0"]):
                            return BadInput(
                                f"{path}: row {first + i + 1}, column {quoted(name)} holds {quoted(cell)}, "
                                f"and the rows before it booleans; correct the row, or {wanted.without(name)}"
                            )
                        if not is_boolean and _is_bad(cell, decimal):
                            return bad_number(path, wanted, name, first + i, cell)
                first += len(block)
    except BadInput as found:
        return found
    except (pa.ArrowInvalid, OSError, UnicodeError) as again:
        error = again
    why = " ".join(str(error).split())
    if "UTF" in why or isinstance(error, UnicodeError):
        return not_encoded(path, text.layout.encoding)
    if "straddl" in why or ("Empty CSV" in why and path.stat().st_size > BLOCK):
        return _long_line(path)
    why = re.sub(r"Row #(\d+)", lambda found: f"row {int(found[1]) - text.layout.header}", why)
    if "row" in why and "Expected" in why and text.layout.delimiter is None:
        why = f"{why[:250]}; is {text.delimiter!r} what lies between the columns (--delimiter)?"
    return BadInput(f"{path}: not readable as CSV: {why[:300]}")


def not_encoded(path: Path, encoding: str) -> BadInput:
    """Return the error for text that is not in the encoding."""
    name = codecs.lookup(encoding).name
    return BadInput(
        f"{path}: the text is not {'UTF-8' if name == 'utf-8' else encoding}; name its encoding, as "
        "--encoding latin-1 or cp1252"
    )


def _long_line(path: Path) -> BadInput:
    return BadInput(f"{path}: a line is longer than {BLOCK:,} bytes; is a quote in it left open?")


def _is_bad(text: str, decimal: str) -> bool:
    """Return whether Arrow reads the cell neither as a number nor as a missing one."""
    if text in MISSING:
        return False
    if decimal != ".":
        text = text.replace(".", "?").replace(decimal, ".")
    try:
        float(text)
    except ValueError:
        return True
    return "_" in text or not text.isascii()  # which Python alone reads
