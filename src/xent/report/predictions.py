"""A model's probabilities for the rows of a table, a chunk at a time, and their file.

Of several ranks each sees the rows of its share, and rank 0 writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from xent._processes.group import ALONE, Ranks
from xent._util.text import class_text
from xent.data.batches import as_array, slices
from xent.data.model_file import Model
from xent.data.rows import SelectedRows, steps
from xent.data.table import Table
from xent.errors import BadInput
from xent.report.prediction_file import PredictionFile, check_suffix

CHUNK = 1 << 22
"""Numbers (rows × features, rows × classes) that exist at a time."""

COLUMNS = ("prediction", "row_number", "true_label")
"""Columns of predictions beside those named after the classes; the last two where some rows are written."""


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
            log_p = model.log_proba(as_array(x))
        finite = np.isfinite(log_p).all(axis=1)
        if not finite.all():
            at = int(np.flatnonzero(~finite)[0])
            peak = x[at].abs().max()
            raise BadInput(
                f"{table.source}: row {table.start + int(rows[here][at]) + 1} has no probabilities: its "
                f"numbers, up to {peak:.3g}, are too large for the model; correct or drop the row"
            )
        yield rows[here], log_p


def write_predictions(
    model: Model, table: Table, path: Path, rows: np.ndarray | None = None, ranks: Ranks = ALONE
) -> None:
    """Write a column of probabilities a class, and ``prediction``, in the form that the suffix names.

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
    import pyarrow as pa

    file = PredictionFile(model, path)
    if with_rows:
        kind = file.labels(np.empty(0, np.int64)).type
        before = [pa.field("row_number", pa.int64()), pa.field("true_label", kind)]
        file = PredictionFile(model, path, before)
    with file.opened():

        def write(p: np.ndarray, about: np.ndarray) -> None:
            rows = [pa.array(about[:, 0] + 1, pa.int64()), file.labels(about[:, 1])] if with_rows else []
            file.write(p, rows)

        yield write


def check_names(classes: np.ndarray, extra: tuple[str, ...], source: str) -> None:
    """Raise ``BadInput`` for a class called like another column of the predictions."""
    taken = [name for name in map(class_text, classes) if name in extra]
    if taken:
        raise BadInput(
            f"{source}: a class is called {taken[0]!r}, as is a column of the predictions; rename it"
        )
