"""Two models on the same rows: the mean difference of their losses, and its parts by class.

    d = ℓ of the first − ℓ of the second        mean = Σ s d / Σ s        se² = Σ s² (d − mean)² / (Σ s)²

A row's difference has far less spread than its losses, so that the interval is narrow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from xent._util.text import class_text, quoted
from xent.auditing.files import Faults, Files
from xent.auditing.mean_loss import QUANTILE
from xent.auditing.records import finite
from xent.data.labels import ClassIndex, kind_of
from xent.errors import BadInput


class Losses(NamedTuple):
    """The losses of some rows."""

    start: int
    label: np.ndarray  # (n,) int64
    weight: np.ndarray  # (n,)
    loss: np.ndarray  # (n,) nats
    ids: Any  # (n,) list; None without any


class Paired:
    """Sums of the differences of two models' losses."""

    def __init__(self, classes: int) -> None:
        self.rows, self.higher, self.lower, self.infinite = 0, 0, 0, 0
        self.sums = np.zeros(5)  # Σ s, Σ s d, Σ s², Σ s² d, Σ s² d²
        self.classes = np.zeros((2, classes))  # Σ s d and Σ s of each class

    def update(self, label: np.ndarray, weight: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
        """Add rows: classes, weights and both losses, (n,) each."""
        counts = weight > 0
        there = counts & np.isfinite(first) & np.isfinite(second)
        self.infinite += int((counts & ~there).sum())
        label, s = label[there], weight[there]
        d = first[there] - second[there]
        self.rows += len(d)
        self.higher += int((d > 0).sum())
        self.lower += int((d < 0).sum())
        self.sums += [s.sum(), (s * d).sum(), (s * s).sum(), (s * s * d).sum(), (s * s * d * d).sum()]
        classes = self.classes.shape[1]
        self.classes += np.stack([np.bincount(label, s * d, classes), np.bincount(label, s, classes)])

    def merge(self, other: Paired) -> None:
        """Add the rows of another."""
        for name in ("rows", "higher", "lower", "infinite", "sums", "classes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def to_dict(self, source: str, names: list[str]) -> dict[str, Any]:
        """Return the comparison as plain JSON values."""
        weight, total, ones, part, square = self.sums.tolist()
        mean = total / weight if weight else math.nan
        error = (
            math.sqrt(max(0.0, square - 2 * mean * part + mean * mean * ones)) / weight
            if weight
            else math.nan
        )
        found = [
            {"name": name, "difference": d / s, "share": d / total if total else 0.0}
            for name, d, s in zip(names, *self.classes.tolist(), strict=True)
            if s > 0
        ]
        return {
            "source": source,
            "rows": self.rows,
            "infinite_rows": self.infinite,
            "difference": finite(mean),
            "standard_error": finite(error) if self.rows > 1 else None,
            "low": finite(mean - QUANTILE * error) if self.rows > 1 else None,
            "high": finite(mean + QUANTILE * error) if self.rows > 1 else None,
            "higher_rows": self.higher,
            "lower_rows": self.lower,
            "per_class": sorted(found, key=lambda each: -abs(each["difference"])),
        }


def paired(first: Files, second: Files) -> Paired:
    """Return the comparison of two files, row by row: by their ids, or by position where there are none.

    Raises ``BadInput`` for other classes, another number of rows, other labels, and ids that are not in both
    or there twice.
    """
    if {*first.names} != {*second.names}:
        odd = sorted({*first.names} ^ {*second.names})
        raise BadInput(f"{second.source}: has other classes than {first.source}, such as {quoted(odd[0])}")
    index = ClassIndex(np.array(first.names), kind_of(np.array(first.names)))
    place, _ = index.codes(np.arange(len(second.names)), np.array(second.names))
    found = Paired(len(first.names))
    if first.columns.id is not None:
        _by_id(found, first, second, place)
    else:
        _by_position(found, first, second, place)
    return found


def _losses(files: Files) -> Iterator[Losses]:
    for batch in files.batches(Faults()):
        rows = batch.known()
        # as labels and columns are: what is a number in one file may be text in the other
        names = None if batch.ids is None else [class_text(name) for name in batch.ids]
        yield Losses(rows.start, rows.label.numpy(), rows.weight.numpy(), rows.loss.numpy(), names)


def _by_position(found: Paired, first: Files, second: Files, place: np.ndarray) -> None:
    """Add the rows of both files, which follow each other alike."""
    others = _losses(second)
    kept: list[Losses] = []
    rows = 0
    for own in _losses(first):
        rows += len(own.label)
        while sum(len(each.label) for each in kept) < len(own.label):
            more = next(others, None)
            if more is None:
                raise BadInput(
                    f"{second.source}: has {own.start + sum(len(each.label) for each in kept):,} rows and "
                    f"{first.source} has more; match rows that differ with --id"
                )
            kept.append(more)
        label, loss = (np.concatenate([getattr(each, name) for each in kept]) for name in ("label", "loss"))
        count = len(own.label)
        rest = Losses(0, label[count:], np.empty(0), loss[count:], None)
        label, loss, kept = place[label[:count]], loss[:count], [rest] if len(rest.label) else []
        odd = np.flatnonzero(label != own.label)
        if len(odd):
            row = int(odd[0])
            raise BadInput(
                f"{second.source}: row {own.start + row + 1} is of class "
                f"{quoted(first.names[label[row]])} and in "
                f"{first.source} of {quoted(first.names[own.label[row]])}; match rows with --id"
            )
        found.update(own.label, own.weight, own.loss, loss)
    left = sum(len(each.label) for each in kept) + sum(len(each.label) for each in others)
    if left:
        raise BadInput(
            f"{second.source}: has {rows + left:,} rows and {first.source} has {rows:,}; match rows with --id"
        )


def _by_id(found: Paired, first: Files, second: Files, place: np.ndarray) -> None:
    """Add the rows whose id is in both files; hold those of the second in memory."""
    row_of: dict[Any, int] = {}
    labels, losses = [], []
    for other in _losses(second):
        labels.append(place[other.label])
        losses.append(other.loss)
        for position, name in enumerate(other.ids):
            if name in row_of:
                raise BadInput(f"{second.source}: the id {quoted(name)} is there twice ({first.columns.id})")
            row_of[name] = other.start + position
    label, loss = np.concatenate(labels), np.concatenate(losses)
    seen: set[Any] = set()
    for own in _losses(first):
        rows = np.array([row_of.get(name, -1) for name in own.ids])
        lacking = np.flatnonzero(rows < 0)
        if len(lacking):
            name = own.ids[int(lacking[0])]
            raise BadInput(
                f"{second.source}: has no row with the id {quoted(name)}, which is in {first.source}"
            )
        before = len(seen)
        seen.update(own.ids)
        if len(seen) < before + len(own.ids):
            twice = next(name for name in own.ids if own.ids.count(name) > 1 or name in seen)
            raise BadInput(f"{first.source}: the id {quoted(twice)} is there twice ({first.columns.id})")
        odd = np.flatnonzero(label[rows] != own.label)
        if len(odd):
            row = int(odd[0])
            raise BadInput(
                f"{second.source}: the row with the id {quoted(own.ids[row])} is of class "
                f"{quoted(first.names[label[rows[row]]])} and in {first.source} of "
                f"{quoted(first.names[own.label[row]])}"
            )
        found.update(own.label, own.weight, own.loss, loss[rows])
    if len(seen) < len(row_of):
        name = next(name for name in row_of if name not in seen)
        raise BadInput(f"{first.source}: has no row with the id {quoted(name)}, which is in {second.source}")
