"""The job of ``xent predict``: read a table for a model, score it where it holds labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xent._processes.group import ALONE, Ranks
from xent._util.text import class_text, quoted
from xent.data.labels import comparison_kind, meaning
from xent.data.layout import PLAIN, Layout
from xent.data.model_file import Model
from xent.data.read import read_table
from xent.data.table import Table, Wanted, some
from xent.errors import BadInput
from xent.report.evaluation import Evaluation, evaluate


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
    encoding = model.encoding
    table = read_table(
        path,
        Wanted(
            label=label or model.label_name,
            features=model.feature_names if encoding is None else encoding.numbers,
            label_optional=label is None,
            model=model_path,
            width=model.array_width,
            layout=layout,
            categorical=[] if encoding is None else list(encoding.categories),
            missing="error" if encoding is None or encoding.fill is None else "impute",
        ),
        ranks,
    )
    table = model.encoded(table)
    if label is not None and table.codes is None:
        raise BadInput(
            f"{table.source}: no row has a label in {quoted(label)}; name other labels with --label, or "
            "leave it out"
        )
    return table


def score(model: Model, table: Table, ranks: Ranks = ALONE) -> Scored | None:
    """Return how good the predictions are; None for a table without labels.

    Labels are compared by the kind of the model's: one fitted on CSV knows the 7 of a Parquet file. Raises
    ``BadInput`` where there are labels and the model knows none of them.
    """
    if table.codes is None or table.classes is None:
        return None
    kind = comparison_kind(model.classes, model.kind)
    known = {meaning(value, kind): code for code, value in enumerate(model.classes.tolist())}
    own = [known.get(meaning(value, kind), -1) for value in table.classes]
    place = np.array([*own, -1], dtype=np.int64)  # the last is where −1 points
    codes = place[table.codes]
    counts = ranks.sum(np.bincount(table.codes[table.codes >= 0], minlength=len(own)))
    texts = [class_text(value) for value in table.classes]
    unknown = {text: int(n) for text, n, code in zip(texts, counts, own, strict=True) if code < 0}
    rows = np.flatnonzero(codes >= 0)
    if not ranks.sum(len(rows)):
        found = table.label_name is not None and table.label_name == model.label_name
        where = "" if table.label_name is None else f" in column {quoted(table.label_name)}"
        classes = some([class_text(value) for value in model.classes], most=3)
        raise BadInput(
            f"{table.source}: none of its labels{where} is a class of the model: they are "
            f"{some(texts, most=3)}, and the classes {classes}; name other labels "
            f"with --label, or {'rename the column' if found else 'leave --label out'} to predict without any"
        )
    return Scored(
        evaluate(model, table, codes, rows, ranks=ranks), int(ranks.sum((table.codes < 0).sum())), unknown
    )
