"""The job of ``xent predict``: read a table for a model, score it where it holds labels."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xent._processes.group import ALONE, Ranks
from xent._util.text import class_text, quoted
from xent.data.batches import as_array
from xent.data.labels import ClassIndex
from xent.data.layout import PLAIN, Layout
from xent.data.model_file import Model, wanted_for
from xent.data.read import read_table
from xent.data.rows import SelectedRows, blocks, steps
from xent.data.stream import stream
from xent.data.table import Table, Wanted, some
from xent.errors import BadInput
from xent.report.evaluation import Evaluation, Sums, evaluate
from xent.report.prediction_file import PredictionFile
from xent.report.predictions import log_proba, step


@dataclasses.dataclass(frozen=True)
class Scored:
    """The evaluation over rows whose label the model knows, and how many rows have another or none."""

    evaluation: Evaluation
    unlabelled: int
    unknown: dict[str, int]  # label -> rows


def read_for(
    model: Model,
    model_path: Path,
    path: Path | Sequence[Path],
    label: str | None,
    ranks: Ranks = ALONE,
    layout: Layout = PLAIN,
) -> Table:
    """Read the columns that the model needs, in its order, and the label's where it is there.

    ``label`` names another label column than the model's; it must then be there, with labels in it.
    """
    table = model.encoded(read_table(path, wanted_for(model, model_path, label, layout), ranks))
    if label is not None and table.codes is None:
        raise _unlabelled(table.source, label)
    return table


def _unlabelled(source: str, label: str) -> BadInput:
    return BadInput(
        f"{source}: no row has a label in {quoted(label)}; name other labels with --label, or leave it out"
    )


def check_output(model: Model, path: Path, keep: Sequence[str], top: int | None, skip_bad: bool) -> None:
    """Raise ``BadInput`` for columns of the predictions that would have one name, or more than there are."""
    names = [class_text(value) for value in model.classes]
    if top is not None:
        if top > len(names):
            raise BadInput(f"--top {top} is more than the {len(names)} classes of {path}; name fewer")
        names = [f"{what}_{i + 1}" for i in range(top) for what in ("class", "probability")]
    times = Counter([*(["row_number"] if skip_bad else []), *keep, *names, "prediction"])
    twice = [name for name, count in times.items() if count > 1]
    if twice:
        raise BadInput(
            f"two columns of the predictions would be called {quoted(twice[0])}; rename one in DATA"
        )


class Labels:
    """The labels of rows beside a model's classes, compared by the kind of the model's."""

    def __init__(self, model: Model) -> None:
        self.model, self._index = model, ClassIndex(model.classes, model.kind)

    def codes(self, table: Table) -> tuple[np.ndarray, dict[str, int]]:
        """Return the positions (N,) among the model's classes, −1 of others, and how often others occur."""
        assert table.codes is not None
        assert table.classes is not None
        return self._index.codes(table.codes, table.classes)

    def none_known(self, source: str, name: str | None, texts: Sequence[str]) -> BadInput:
        """Return the error for labels of which none is a class of the model."""
        found = name is not None and name == self.model.label_name
        where = "" if name is None else f" in column {quoted(name)}"
        classes = some([class_text(value) for value in self.model.classes], most=3)
        return BadInput(
            f"{source}: none of its labels{where} is a class of the model: they are "
            f"{some(texts, most=3)}, and the classes {classes}; name other labels "
            f"with --label, or {'rename the column' if found else 'leave --label out'} to predict without any"
        )


def score(model: Model, table: Table, ranks: Ranks = ALONE) -> Scored | None:
    """Return how good the predictions are; None for a table without labels.

    Labels are compared by the kind of the model's: one fitted on CSV knows the 7 of a Parquet file. Raises
    ``BadInput`` where there are labels and the model knows none of them.
    """
    if table.codes is None or table.classes is None:
        return None
    labels = Labels(model)
    codes, own = labels.codes(table)
    unknown = dict(sum((Counter(each) for each in ranks.gather(own)), Counter()))
    rows = np.flatnonzero(codes >= 0)
    if not ranks.sum(len(rows)):
        texts = [class_text(value) for value in table.classes]
        raise labels.none_known(table.source, table.label_name, texts)
    return Scored(
        evaluate(model, table, codes, rows, ranks=ranks), int(ranks.sum((table.codes < 0).sum())), unknown
    )


@dataclasses.dataclass
class Streamed:
    """The counts of a prediction in a stream, and its evaluation where there are labels."""

    sums: Sums
    rows: int = 0
    skipped: int = 0
    first_skipped: list[int] = dataclasses.field(default_factory=list)  # rows, counted from 1
    unlabelled: int = 0
    label_name: str | None = None
    unknown: Counter[str] = dataclasses.field(default_factory=Counter)
    unknown_categories: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def scored(self) -> Scored | None:
        """The evaluation; None without a label that the model knows."""
        if not self.sums.rows.any():
            return None
        return Scored(self.sums.evaluation(), self.unlabelled, dict(self.unknown))


def predict_streaming(
    model: Model,
    files: Sequence[Path],
    wanted: Wanted,
    keep: Sequence[str],
    open_file: Callable[[Sequence[Any]], PredictionFile],
    source: str,
) -> Streamed:
    """Write predictions for the rows of some files as they are read; return what has been seen.

    ``open_file`` returns the file to write to, of the fields of the columns before the probabilities. With
    ``wanted.skip_bad`` rows without probabilities are counted and left out, and each row is led by its
    number; else the first of them is a ``BadInput``.
    """
    import pyarrow as pa

    done, labels = Streamed(Sums(len(model.classes))), Labels(model)
    parts = stream(files, wanted, keep)
    with contextlib.ExitStack() as stack:
        file: PredictionFile | None = None
        for part in parts:
            table = model.encoded(part.table, strict=not wanted.skip_bad)
            done.unknown_categories.update(table.unknown)
            if file is None:
                before = list(part.kept.schema)
                if wanted.skip_bad:
                    before.insert(0, pa.field("row_number", pa.int64()))
                file = stack.enter_context(open_file(before).opened())
            bad = _bad(model, part.table) if wanted.skip_bad else np.zeros(len(table), dtype=bool)
            for rows, p, log_p in _probabilities(model, table, bad, wanted.skip_bad):
                columns = [pa.array(column) for column in part.kept.take(rows).combine_chunks().columns]
                columns = [
                    pa.concat_arrays(c.chunks) if isinstance(c, pa.ChunkedArray) else c for c in columns
                ]
                if wanted.skip_bad:
                    columns.insert(0, pa.array(part.start + rows + 1, pa.int64()))
                file.write(p, columns)
                _count(done, labels, table, rows, log_p)
            lost = np.flatnonzero(bad)
            done.rows += len(table) - len(lost)
            done.skipped += len(lost)
            done.first_skipped += (part.start + lost[: 5 - len(done.first_skipped)] + 1).tolist()
        if done.label_name is not None and done.unknown and not done.sums.rows.any():
            raise labels.none_known(source, done.label_name, list(done.unknown))
        if wanted.label is not None and not wanted.label_optional and done.label_name is None:
            raise _unlabelled(source, wanted.label)
        if not done.rows:
            raise BadInput(
                f"{source}: every row is bad, so none has a prediction; see which without --skip-bad"
            )
    return done


def _bad(model: Model, table: Table) -> np.ndarray:
    """Return which rows (N,) have numbers that the model cannot use, before it encodes them."""
    imputes = model.encoding is not None and model.encoding.fill is not None
    bad = np.zeros(len(table), dtype=bool) if table.readable is None else ~table.readable
    for here, x in blocks(table.rows):
        bad[here] = (x.isinf() if imputes else ~x.isfinite()).any(1).numpy()
    if not imputes:
        for column in table.categories:
            bad |= column.codes < 0
    return bad


def _probabilities(
    model: Model, table: Table, bad: np.ndarray, skip: bool
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield positions (n,), probabilities and log-probabilities (n, C) of rows that are not bad.

    With ``skip`` rows whose numbers are too large become bad; else they are a ``BadInput``.
    """
    dtype = model.weight.dtype
    if not skip:
        for rows, log_p in log_proba(model, table, np.arange(len(table))):
            yield rows, np.exp(log_p).astype(dtype, copy=False), log_p
        return
    good = np.flatnonzero(~bad)
    for at, x in steps(SelectedRows(table.rows, good), step(model)):
        with np.errstate(over="ignore", invalid="ignore"):
            log_p = model.log_proba(as_array(x))
        finite = np.isfinite(log_p).all(axis=1)
        rows = good[at]
        bad[rows[~finite]] = True
        yield rows[finite], np.exp(log_p[finite]).astype(dtype, copy=False), log_p[finite]


def _count(done: Streamed, labels: Labels, table: Table, rows: np.ndarray, log_p: np.ndarray) -> None:
    """Add the rows that have a label to the sums."""
    if table.codes is None or table.classes is None:
        return
    if len(table.classes):
        done.label_name = table.label_name or done.label_name or ""
    chosen = dataclasses.replace(table, features=np.empty((len(rows), 0)), codes=table.codes[rows])
    codes, unknown = labels.codes(chosen)
    done.unknown.update(unknown)
    assert chosen.codes is not None
    done.unlabelled += int((chosen.codes < 0).sum())
    known = codes >= 0
    done.sums.add(table, rows[known], codes[known], log_p[known])
