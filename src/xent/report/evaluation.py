"""A model over the rows of a table, a chunk at a time: its loss, its errors, its predictions in a file.

loss = mean −log p_y            baseline = mean −log f_y, f the class frequencies of the training rows

Of several ranks each sees the rows of its share; sums and counts are merged, and rank 0 writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from xent._processes.group import ALONE, Ranks
from xent._util.atomic_write import atomic_write
from xent._util.text import class_text
from xent.data.batches import slices
from xent.data.model_file import Model
from xent.data.rows import SelectedRows, steps
from xent.data.table import Table
from xent.errors import BadInput, needs

CHUNK = 1 << 22
"""Numbers (rows × features, rows × classes) that exist at a time."""

COLUMNS = ("prediction", "row_number", "true_label")
"""Columns of predictions beside those named after the classes; the last two where some rows are written."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Loss, accuracy and errors of a model on some rows."""

    rows: int
    loss: float  # nats, the mean over rows
    baseline: float | None  # nats, of knowing only the class frequencies; None where these are not known
    accuracy: float
    errors: np.ndarray  # (E, 3): true class, class predicted for it, how often; the most frequent first
    per_class: np.ndarray  # (C,) rows of each class

    def summary(self) -> dict[str, Any]:
        """Return the numbers worth reading, as plain JSON values."""
        return {
            "rows": self.rows,
            "loss": self.loss,
            "label_entropy": self.baseline,
            "accuracy": self.accuracy,
        }

    def most_confused(self, most: int) -> list[tuple[int, int, int, int, int]]:
        """Return pairs of classes by how often one is taken for the other.

        Each is (a, b, a taken for b, b taken for a, rows of the two); a is the one mistaken more often.
        """
        pairs = {(true, predicted): count for true, predicted, count in self.errors.tolist()}
        together = {
            (a, b): count + pairs.get((b, a), 0)
            for (a, b), count in pairs.items()
            if (count, b) > (pairs.get((b, a), 0), a)  # each pair once
        }
        chosen = sorted(together, key=lambda pair: (-together[pair], pair))[:most]
        size = self.per_class
        return [(a, b, pairs[a, b], pairs.get((b, a), 0), int(size[a] + size[b])) for a, b in chosen]

    def confusion(self, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Return counts (K, K), true by predicted, of the K ≤ most classes with most errors, and these."""
        classes = len(self.per_class)
        shown = np.arange(classes)
        if classes > most:
            part = np.zeros(classes, dtype=np.int64)
            np.add.at(part, self.errors[:, 0], self.errors[:, 2])
            np.add.at(part, self.errors[:, 1], self.errors[:, 2])
            shown = np.sort(np.argsort(-part, kind="stable")[:most])
        place = np.full(classes, -1, dtype=np.int64)
        place[shown] = np.arange(len(shown))
        counts = np.diag(self.per_class[shown])
        for true, predicted, count in self.errors.tolist():
            if place[true] >= 0:
                counts[place[true], place[true]] -= count
                if place[predicted] >= 0:
                    counts[place[true], place[predicted]] = count
        return counts, shown


def step(model: Model) -> int:
    """Return the number of rows whose features, logits, and labels as text each fit the chunk."""
    widest = max(len(model.feature_names), len(model.classes), model.classes.dtype.itemsize // 8)
    return max(1, CHUNK // widest)


def log_proba(
    model: Model, table: Table, rows: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # (n,), (n, C)
    """Yield some positions in the table, ascending, and the log-probabilities of their rows.

    Raises ``BadInput`` for a row whose numbers are too large.
    """
    for here, x in steps(SelectedRows(table.rows, rows), step(model)):
        with np.errstate(over="ignore", invalid="ignore"):
            log_p = model.log_proba(x.numpy())
        finite = np.isfinite(log_p).all(axis=1)
        if not finite.all():
            at = int(np.flatnonzero(~finite)[0])
            peak = x[at].abs().max()
            raise BadInput(
                f"{table.source}: row {table.start + int(rows[here][at]) + 1} has no probabilities: its "
                f"numbers, up to {peak:.3g}, are too large for the model; correct or drop the row"
            )
        yield rows[here], log_p


def evaluate(
    model: Model,
    table: Table,
    codes: np.ndarray,  # (N,) positions in model.classes
    rows: np.ndarray,  # positions in the table of those that count; over all ranks, at least one
    frequencies: np.ndarray | None = None,  # (C,) of the training rows
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Return loss, accuracy and errors of the model on the given rows of all ranks."""
    classes = len(model.classes)
    with ranks.raise_together():
        total = 0.0
        wrong = [np.empty(0, dtype=np.int64)]
        for part, log_p in log_proba(model, table, rows if ranks.counts else rows[:0]):
            y = codes[part]
            with np.errstate(over="ignore"):  # of rows wrong beyond the largest number the sum is infinite
                total -= float(log_p[np.arange(len(y)), y].sum(dtype=np.float64))
            predicted = log_p.argmax(axis=1)
            wrong.append(y[predicted != y] * classes + predicted[predicted != y])
        own = (total, *np.unique(np.concatenate(wrong), return_counts=True))
    totals, found, times = zip(*ranks.gather(own), strict=True)
    pairs, place = np.unique(np.concatenate(found), return_inverse=True)
    counts = np.zeros(len(pairs), dtype=np.int64)
    np.add.at(counts, place, np.concatenate(times))
    order = np.argsort(-counts, kind="stable")
    errors = np.stack([pairs // classes, pairs % classes, counts], axis=1)[order]
    per_class = ranks.sum(np.bincount(codes[rows], minlength=classes)).astype(np.int64)
    count = int(per_class.sum())
    baseline = None
    if frequencies is not None:
        there = per_class > 0
        baseline = float(-(per_class[there] @ np.log(frequencies[there])) / count)
    return Evaluation(count, sum(totals) / count, baseline, 1 - int(counts.sum()) / count, errors, per_class)


def write_predictions(
    model: Model, table: Table, path: Path, rows: np.ndarray | None = None, ranks: Ranks = ALONE
) -> None:
    """Write a column of probabilities a class, and ``prediction``; ``.parquet`` or ``.csv`` by the suffix.

    Probabilities are of the model's type, and read back from either as the same numbers.
    With ``rows`` (positions in the table) only these are written, led by ``row_number``, counted from 1, and
    ``true_label``. Shares follow each other in the file: while rank 0 writes a chunk, the next is computed.
    """
    chosen = np.arange(table.rows.shape[0]) if rows is None else rows
    classes, dtype = len(model.classes), model.weight.dtype
    with contextlib.ExitStack() as stack:
        with ranks.raise_together():
            check_suffix(path)
            check_names(model.classes, COLUMNS[:1] if rows is None else COLUMNS, table.source)
            write: _Write = (
                stack.enter_context(_opened(model, path, rows is not None)) if ranks.is_main else _no
            )
        ready = np.empty((0, classes), dtype), np.empty((0, 2), np.int64)
        own = log_proba(model, table, chosen)
        for share, count in enumerate(ranks.gather(len(chosen))):
            for each in slices((count, 1), step(model)):
                p = about = None
                with ranks.raise_together():
                    write(*ready)
                    if ranks.counts and share == ranks.share.index:
                        part, log_p = next(own)
                        p = np.exp(log_p).astype(dtype, copy=False)
                        true = np.zeros(len(part), np.int64) if table.codes is None else table.codes[part]
                        about = np.stack([table.start + part, true], axis=1)
                size = each.stop - each.start
                ready = (
                    ranks.send(p, share, (size, classes), dtype),
                    ranks.send(about, share, (size, 2), np.int64),
                )
        with ranks.raise_together():
            write(*ready)
            stack.close()


_Write = Callable[[np.ndarray, np.ndarray], None]  # of probabilities (n, C); of rows and true classes (n, 2)


def _no(p: np.ndarray, about: np.ndarray) -> None:
    """Write nothing, as ranks other than rank 0 do."""


@contextlib.contextmanager
def _opened(model: Model, path: Path, with_rows: bool) -> Iterator[_Write]:
    """Open a file of predictions, whole when the block ends."""
    with needs("probe"):
        import pyarrow as pa
        from pyarrow import csv, parquet
    kind = {"U": pa.string(), "b": pa.bool_()}.get(model.classes.dtype.kind, pa.int64())
    text = path.suffix.lower() == ".csv"
    # text is read as float64: the shortest text of a float32 is then another number
    number = pa.float32() if model.weight.dtype == np.float32 and not text else pa.float64()
    fields = [pa.field(class_text(value), number) for value in model.classes]
    fields.append(pa.field("prediction", kind))
    if with_rows:
        fields = [pa.field("row_number", pa.int64()), pa.field("true_label", kind), *fields]
    schema = pa.schema(fields)
    make = csv.CSVWriter if text else parquet.ParquetWriter

    with atomic_write(path) as temporary, make(temporary, schema) as writer:

        def write(p: np.ndarray, about: np.ndarray) -> None:
            columns = [pa.array(p[:, c], number) for c in range(p.shape[1])]
            columns.append(pa.array(model.classes[p.argmax(axis=1)].tolist(), kind))
            if with_rows:
                true = pa.array(model.classes[about[:, 1]].tolist(), kind)
                columns = [pa.array(about[:, 0] + 1, pa.int64()), true, *columns]
            if len(p):
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))

        yield write


def check_suffix(path: Path) -> None:
    """Raise ``BadInput`` for a suffix that is neither ``.parquet`` nor ``.csv``."""
    if path.suffix.lower() not in (".parquet", ".csv"):
        raise BadInput(f"{path}: predictions are written as .parquet or .csv; choose one of these suffixes")


def check_names(classes: np.ndarray, extra: tuple[str, ...], source: str) -> None:
    """Raise ``BadInput`` for a class called like another column of the predictions."""
    taken = [name for name in map(class_text, classes) if name in extra]
    if taken:
        raise BadInput(
            f"{source}: a class is called {taken[0]!r}, as is a column of the predictions; rename it"
        )
