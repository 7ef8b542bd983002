"""A file of predictions, written some rows at a time: Parquet, CSV, or a line of JSON a row.

columns before | p_1 ... p_C | prediction                          all classes
columns before | class_1, probability_1, class_2, ... | prediction    the k most probable ones
"""

from __future__ import annotations

import base64
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from xent._util.atomic_write import atomic_write
from xent._util.text import class_text, json_text
from xent.data.model_file import Model
from xent.errors import BadInput, needs

SUFFIXES = (".parquet", ".csv", ".jsonl")
STANDARD_OUTPUT = Path("-")


class PredictionFile:
    """An open file of predictions.

    Args:
        model: the model whose classes they are of.
        path: ``.parquet``, ``.csv`` or ``.jsonl``; ``-`` is standard output.
        before: Arrow fields of the columns that lead each row.
        top: how many of the most probable classes are written; None is all, a column each.
        form: the suffix of what goes to standard output.
    """

    def __init__(
        self, model: Model, path: Path, before: Sequence[Any] = (), top: int | None = None, form: str = ".csv"
    ) -> None:
        with needs("probe"):
            import pyarrow as pa
        self._model, self._path, self._top = model, path, top
        self.form = form if path == STANDARD_OUTPUT else path.suffix.lower()
        self._kind = {"U": pa.string(), "b": pa.bool_()}.get(model.classes.dtype.kind, pa.int64())
        # text is read as float64: the shortest text of a float32 is then another number
        narrow = model.weight.dtype == np.float32 and self.form == ".parquet"
        self._number = pa.float32() if narrow else pa.float64()
        names = [class_text(value) for value in model.classes]
        if top is None:
            of_classes = [pa.field(name, self._number) for name in names]
        else:
            pairs = [(f"class_{i + 1}", f"probability_{i + 1}") for i in range(top)]
            of_classes = [
                field
                for label, number in pairs
                for field in (pa.field(label, self._kind), pa.field(number, self._number))
            ]
        self._classes = pa.array(model.classes.tolist(), self._kind)
        self._as_json = [self.form == ".csv" and _lacks_text(field.type) for field in before]
        led_by = [
            field.with_type(pa.string()) if as_json else field
            for field, as_json in zip(before, self._as_json, strict=True)
        ]
        self._schema = pa.schema([*led_by, *of_classes, pa.field("prediction", self._kind)])

    @contextlib.contextmanager
    def opened(self) -> Iterator[PredictionFile]:
        """Open it: a file is whole when the block ends, and is not there if it fails."""
        from pyarrow import csv, parquet

        if self._path == STANDARD_OUTPUT:
            self._write = self._print_csv if self.form == ".csv" else self._print_lines
            self._begun = False
            yield self
            return
        with atomic_write(self._path) as temporary:
            if self.form == ".jsonl":
                with open(temporary, "w", encoding="utf-8") as file:
                    self._write = lambda table: _lines(table, file.write)
                    yield self
                return
            make = csv.CSVWriter if self.form == ".csv" else parquet.ParquetWriter
            with make(temporary, self._schema) as writer:
                self._write = writer.write_table
                yield self

    def write(self, p: np.ndarray, before: Sequence[Any] = ()) -> None:
        """Write rows of probabilities (n, C), led by Arrow columns."""
        import pyarrow as pa

        if len(p):
            led_by = [
                pa.array(
                    [None if value is None else _json(value) for value in column.to_pylist()], pa.string()
                )
                if as_json
                else column
                for column, as_json in zip(before, self._as_json, strict=True)
            ]
            columns = [*led_by, *self._columns(p), self._labels(p.argmax(axis=1))]
            self._write(pa.Table.from_arrays(columns, schema=self._schema))

    def labels(self, codes: np.ndarray) -> Any:
        """Return the classes at some positions as an Arrow array."""
        return self._labels(codes)

    def _labels(self, codes: np.ndarray) -> Any:
        import pyarrow as pa

        return self._classes.take(pa.array(codes))

    def _columns(self, p: np.ndarray) -> Iterator[Any]:
        import pyarrow as pa

        if self._top is None:
            for c in range(p.shape[1]):
                yield pa.array(p[:, c], self._number)
            return
        best = np.argsort(-p, axis=1, kind="stable")[:, : self._top]
        for i in range(self._top):
            yield self._labels(best[:, i])
            yield pa.array(np.take_along_axis(p, best[:, i : i + 1], 1)[:, 0], self._number)

    def _print_csv(self, table: Any) -> None:
        import pyarrow as pa
        from pyarrow import csv

        buffer = pa.BufferOutputStream()
        csv.write_csv(table, buffer, csv.WriteOptions(include_header=not self._begun))
        self._begun = True
        click.echo(buffer.getvalue().to_pybytes(), nl=False)
        sys.stdout.flush()

    @staticmethod
    def _print_lines(table: Any) -> None:
        _lines(table, lambda line: click.echo(line, nl=False))
        sys.stdout.flush()


def _lines(table: Any, write: Any) -> None:
    for row in table.to_pylist():
        write(_json(row) + "\n")


def _lacks_text(kind: Any) -> bool:
    """Return whether CSV has no text of its own for values of an Arrow type."""
    import pyarrow as pa

    return bool(pa.types.is_nested(kind) or isinstance(kind, pa.BaseExtensionType)) or any(
        is_such(kind)
        for is_such in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    )


def _json(value: Any) -> str:
    """Return JSON, in which times are as ISO 8601 has them, bytes are in base64 and decimals are text."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else json_text(value, default=_plain)


def _plain(value: Any) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def check_suffix(path: Path) -> None:
    """Raise ``BadInput`` for a suffix of no kind of file that predictions are written to."""
    if path != STANDARD_OUTPUT and path.suffix.lower() not in SUFFIXES:
        raise BadInput(
            f"{path}: predictions are written as .parquet, .csv or .jsonl; choose one of these suffixes"
        )
