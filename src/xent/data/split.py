"""A split into training and validation rows: every class in both, drawn by the seed.

Several ranks draw it from the labels of all rows, each for itself, so that it is one process's.
"""

from __future__ import annotations

import math

import numpy as np

from xent._processes.group import ALONE, Ranks
from xent._util.text import class_text, quoted
from xent.data.labels import look_like_numbers
from xent.data.table import Table
from xent.errors import BadInput, needs


def split(table: Table, share: float, seed: int, ranks: Ranks = ALONE) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions in the file of the training and of the held-out rows, ascending."""
    assert table.codes is not None
    assert table.classes is not None
    codes = ranks.concatenate(table.codes)
    rows, classes = len(codes), len(table.classes)
    where = f" in {quoted(table.label_name)}" if table.label_name else ""
    if classes < 2:
        only = quoted(class_text(table.classes[0]))
        raise BadInput(f"{table.source}: every label{where} is {only}; a classifier needs two classes")
    if share == 0:
        return np.arange(rows), np.arange(0)
    counts = np.bincount(codes, minlength=classes)
    held = math.ceil(share * rows)
    too_few = held < classes or rows - held < classes
    if (counts.min() < 2 or too_few) and look_like_numbers(table.classes, rows):
        example = class_text(table.classes[counts.argmin()])
        raise BadInput(
            f"{table.source}: the labels{where} look like numbers, not classes: {classes:,} different "
            f"ones in {rows:,} rows, such as {quoted(example)}; name other labels with --label, "
            "or put one class in the place of each range of numbers"
        )
    if counts.min() < 2:
        lone = int(counts.argmin())
        row = int(np.flatnonzero(codes == lone)[0])
        raise BadInput(
            f"{table.source}: class {quoted(class_text(table.classes[lone]))} has a single row "
            f"(row {row + 1}) and a validation split needs two; drop it, or fit with --validation 0"
        )
    if too_few:
        raise BadInput(
            f"{table.source}: --validation {share:g} of {rows} rows leaves "
            f"{min(held, rows - held)} on one side, fewer than the {classes} classes; "
            "choose another share, or --validation 0"
        )
    with needs("probe"):
        from sklearn.model_selection import train_test_split
    training, validation = train_test_split(
        np.arange(rows), test_size=held, stratify=codes, random_state=seed
    )
    training, validation = _with_every_class(training, validation, codes)
    validation, training = _with_every_class(validation, training, codes)
    return np.sort(training), np.sort(validation)


def _with_every_class(
    rows: np.ndarray, others: np.ndarray, codes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Move a row of each class that ``rows`` lacks there; a class of few rows may fall on one side alone."""
    found, first = np.unique(codes[others], return_index=True)
    moved = first[~np.isin(found, codes[rows])]
    return np.concatenate([rows, others[moved]]), np.delete(others, moved)
