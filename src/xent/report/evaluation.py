"""A model judged over the rows of a table: its loss, what it takes for what, how far it can be believed.

    loss = Σ m −log p_y / Σ m          baseline = Σ m −log f_y / Σ m, f the training rows' class frequencies
    precision_c = right_c / predicted_c     recall_c = right_c / mass_c     F1 = their harmonic mean
    reliability: of the rows whose largest probability lies in a bin, its mean, and how many are right

m is a row's weight, 1 where there is none; of a row with masses of classes t, −Σ_c t_c log p_c stands for
−log p_y, and y is the class of the largest. Of several ranks each sees the rows of its share.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

from xent._processes.group import ALONE, Ranks
from xent._util.text import class_text
from xent.data.model_file import Model
from xent.data.table import Table
from xent.report.predictions import log_proba

BINS = 15
"""Bins of equal width of the reliability curve, from 0 to 1."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Loss, accuracy and errors of a model on some rows."""

    rows: int
    loss: float  # nats, the mean over rows
    baseline: float | None  # nats, of knowing only the class frequencies; None where these are not known
    accuracy: float
    errors: np.ndarray  # (E, 3): true class, class predicted for it, how often; the most frequent first
    per_class: np.ndarray  # (C,) rows of each class
    mass: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0))  # (C,) weight of its rows
    class_loss: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0))  # (C,) nats, their sum
    predicted: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0))  # (C,) weight predicted
    right: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0))  # (C,) weight rightly so
    bins: np.ndarray = dataclasses.field(default_factory=lambda: np.empty((0, 3)))  # see `reliability`

    @property
    def precision(self) -> np.ndarray:
        """The share of the rows predicted as a class that are of it, (C,); 0 where none is."""
        return _ratio(self.right, self.predicted)

    @property
    def recall(self) -> np.ndarray:
        """The share of a class's rows that are predicted as it, (C,); 0 where it has none."""
        return _ratio(self.right, self.mass)

    @property
    def f1(self) -> np.ndarray:
        """The harmonic mean of precision and recall, (C,); 0 where no row is right."""
        return _ratio(2 * self.right, self.predicted + self.mass)

    @property
    def macro_f1(self) -> float:
        """The mean of F1 over the classes that have rows or are predicted."""
        there = (self.mass > 0) | (self.predicted > 0)
        return float(self.f1[there].mean()) if there.any() else 0.0

    @property
    def calibration_error(self) -> float:
        """The mean distance of confidence from accuracy over the bins, each by its weight (ECE)."""
        mass, confidence, right = self.bins.T
        return float(np.abs(confidence - right).sum() / mass.sum())

    def reliability(self) -> list[dict[str, float]]:
        """Return, of each bin that has rows, its ends, weight, mean confidence and accuracy."""
        edges = np.linspace(0, 1, len(self.bins) + 1).tolist()
        return [
            {
                "from": low,
                "to": high,
                "weight": float(mass),
                "confidence": float(confidence / mass),
                "accuracy": float(right / mass),
            }
            for (low, high), (mass, confidence, right) in zip(
                itertools.pairwise(edges), self.bins, strict=True
            )
            if mass > 0
        ]

    def classes(self, names: np.ndarray) -> list[dict[str, Any]]:
        """Return the figures of each class as plain JSON values; the loss is null of one without rows."""
        columns = (self.per_class, self.mass, self.class_loss, self.precision, self.recall, self.f1)
        return [
            {
                "class": class_text(name),
                "rows": int(rows),
                "loss": float(loss / mass) if mass > 0 else None,
                "precision": float(precision),
                "recall": float(recall),
                "f1": float(f1),
            }
            for name, rows, mass, loss, precision, recall, f1 in zip(names, *columns, strict=True)
        ]

    def summary(self) -> dict[str, Any]:
        """Return the numbers worth reading, as plain JSON values."""
        return {
            "rows": self.rows,
            "loss": self.loss,
            "label_entropy": self.baseline,
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "calibration_error": self.calibration_error,
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


def evaluate(
    model: Model,
    table: Table,
    codes: np.ndarray,  # (N,) positions in model.classes
    rows: np.ndarray,  # positions in the table of those that count; over all ranks, at least one
    frequencies: np.ndarray | None = None,  # (C,) of the training rows
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Return how good the model is on the given rows of all ranks.

    Weights and masses of classes are the table's, where it has them.
    """
    classes = len(model.classes)
    with ranks.raise_together():
        sums = np.zeros((4, classes))  # mass, loss, predicted, right
        bins = np.zeros((3, BINS))  # mass, confidence, right
        wrong = [np.empty(0, dtype=np.int64)]
        for part, log_p in log_proba(model, table, rows if ranks.counts else rows[:0]):
            y, mass = codes[part], _mass(table, part)
            predicted = log_p.argmax(axis=1)
            wrong.append(y[predicted != y] * classes + predicted[predicted != y])
            right = np.where(predicted == y, mass, 0.0)
            with np.errstate(over="ignore"):  # of rows wrong beyond the largest number the sum is infinite
                losses = _losses(table, part, log_p, y)
            added = (mass, losses, mass, right)
            for row, code, value in zip(sums, (y, y, predicted, y), added, strict=True):
                row += np.bincount(code, value, classes)
            confidence = np.exp(log_p[np.arange(len(y)), predicted], dtype=np.float64)
            place = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
            for row, value in zip(bins, (mass, mass * confidence, right), strict=True):
                row += np.bincount(place, value, BINS)
        own = (sums, bins, *np.unique(np.concatenate(wrong), return_counts=True))
    all_sums, all_bins, found, times = zip(*ranks.gather(own), strict=True)
    pairs, place = np.unique(np.concatenate(found), return_inverse=True)
    counts = np.zeros(len(pairs), dtype=np.int64)
    np.add.at(counts, place, np.concatenate(times))
    order = np.argsort(-counts, kind="stable")
    errors = np.stack([pairs // classes, pairs % classes, counts], axis=1)[order]
    per_class = ranks.sum(np.bincount(codes[rows], minlength=classes)).astype(np.int64)
    mass, class_loss, predicted, right = sum(all_sums)
    total, count = mass.sum(), int(per_class.sum())
    baseline = None
    if frequencies is not None:
        masses = ranks.sum(class_masses(table, codes, rows, classes))
        there = masses > 0
        with np.errstate(divide="ignore"):  # a class that the training rows lack costs inf
            baseline = float(-(masses[there] @ np.log(frequencies[there])) / total)
    accuracy = float(right.sum() / total)
    loss = float(class_loss.sum() / total)
    return Evaluation(
        count,
        loss,
        baseline,
        accuracy,
        errors,
        per_class,
        mass,
        class_loss,
        predicted,
        right,
        sum(all_bins).T,
    )


def class_masses(table: Table, codes: np.ndarray, rows: np.ndarray, classes: int) -> np.ndarray:
    """Return the weight of each class among some rows, (C,)."""
    if table.soft is None:
        return np.bincount(codes[rows], _mass(table, rows), classes)
    weight = np.ones(len(rows)) if table.weight is None else table.weight[rows]
    return weight @ table.soft[rows]


def _mass(table: Table, rows: np.ndarray) -> np.ndarray:
    """Return the weight of some rows, (n,), times the sum of their masses of classes."""
    mass = np.ones(len(rows)) if table.weight is None else table.weight[rows]
    return mass if table.soft is None else mass * table.soft[rows].sum(axis=1)


def _losses(table: Table, rows: np.ndarray, log_p: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the weighted losses of some rows, (n,), of log-probabilities (n, C); weight 0 costs 0."""
    weight = np.ones(len(rows)) if table.weight is None else table.weight[rows]
    if table.soft is None:
        loss = -log_p[np.arange(len(y)), y].astype(np.float64)
    else:
        masses = table.soft[rows]
        loss = -(masses * np.where(masses > 0, log_p, 0.0)).sum(axis=1)
    return weight * np.where(weight > 0, loss, 0.0)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(len(whole)), where=whole > 0)
