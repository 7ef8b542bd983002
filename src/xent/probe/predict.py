"""From a model and a table to predictions, and how good they are where the table holds labels."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from xent.probe import data
from xent.probe.data import Table
from xent.probe.evaluate import Evaluation, evaluate
from xent.probe.model_file import Model
from xent.probe.ranks import ALONE, Ranks
from xent.probe.text import class_text


@dataclasses.dataclass(frozen=True)
class Scored:
    """The evaluation over rows whose label the model knows, and how many rows have another or none."""

    evaluation: Evaluation | None
    unlabelled: int
    unknown: dict[str, int]  # label -> rows


def read_for(model: Model, model_path: Path, path: Path, label: str | None, ranks: Ranks = ALONE) -> Table:
    """Read the columns that the model needs, in its order, and the label's where it is there.

    ``label`` names another label column than the model's; it must then be there.
    """
    return data.read(
        path,
        data.Wanted(
            label=label or model.label_name,
            features=model.feature_names,
            label_optional=label is None,
            origin=f"a feature of {model_path}",
        ),
        ranks,
    )


def score(model: Model, table: Table, ranks: Ranks = ALONE) -> Scored | None:
    """How good the predictions are; None for a table without labels.

    Labels are compared as text: a model fitted on CSV knows the 7 of a Parquet file.
    """
    if table.codes is None or table.classes is None:
        return None
    known = {class_text(value): code for code, value in enumerate(model.classes)}
    texts = [class_text(value) for value in table.classes]
    place = np.array(
        [known.get(text, -1) for text in texts] + [-1], dtype=np.int64
    )  # the last is where −1 points
    codes = place[table.codes]
    counts = ranks.sum(np.bincount(table.codes[table.codes >= 0], minlength=len(texts)))
    rows = np.flatnonzero(codes >= 0)
    return Scored(
        evaluate(model, table, codes, rows, ranks=ranks) if ranks.sum(len(rows)) else None,
        int(ranks.sum((table.codes < 0).sum())),
        {text: int(n) for text, n in zip(texts, counts, strict=True) if text not in known},
    )
