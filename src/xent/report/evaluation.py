"""A model judged over the rows of a table: its loss, what it takes for what, how far it can be believed.

    loss = Σ m −log p_y / Σ m          baseline = Σ m −log f_y / Σ m, f the training rows' class frequencies
    precision_c = right_c / predicted_c     recall_c = right_c / mass_c     F1 = their harmonic mean
    reliability: of the rows whose largest probability lies in a bin, its mean, and how many are right

m is a row's weight, 1 where there is none; of a row with masses of classes t, −Σ_c t_c log p_c stands for
−log p_y, and y is the class of the largest. Of several ranks each sees the rows of its share.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
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


class Sums:
    """The sums over rows of which an evaluation is made; rows are added some at a time."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.rows = np.zeros(classes, dtype=np.int64)
        self.masses = np.zeros(classes)  # of each class, which with masses of classes is not that of its rows
        self.sums = np.zeros((4, classes))  # mass, loss, predicted, right
        self.bins = np.zeros((3, BINS))  # mass, confidence, right
        self.wrong: dict[int, int] = {}  # true class · classes + class predicted: how often

    def add(self, table: Table, rows: np.ndarray, codes: np.ndarray, log_p: np.ndarray) -> None:
        """Add some rows of a table: their positions (n,), class numbers (n,) and log-probabilities (n, C)."""
        classes, mass = self.classes, _mass(table, rows)
        predicted = log_p.argmax(axis=1)
        right = np.where(predicted == codes, mass, 0.0)
        with np.errstate(over="ignore"):  # of rows wrong beyond the largest number the sum is infinite
            losses = _losses(table, rows, log_p, codes)
        added = (mass, losses, mass, right)
        for row, code, value in zip(self.sums, (codes, codes, predicted, codes), added, strict=True):
            row += np.bincount(code, value, classes)
        confidence = np.exp(log_p[np.arange(len(codes)), predicted], dtype=np.float64)
        place = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
        for row, value in zip(self.bins, (mass, mass * confidence, right), strict=True):
            row += np.bincount(place, value, BINS)
        self.rows += np.bincount(codes, minlength=classes)
        if table.soft is None:
            self.masses += np.bincount(codes, mass, classes)
        else:
            weight = np.ones(len(rows)) if table.weight is None else table.weight[rows]
            self.masses += weight @ table.soft[rows]
        pairs = codes[predicted != codes] * classes + predicted[predicted != codes]
        for pair, times in zip(
            *(each.tolist() for each in np.unique(pairs, return_counts=True)), strict=True
        ):
            self.wrong[pair] = self.wrong.get(pair, 0) + times

    def __add__(self, other: Sums) -> Sums:
        """Return the sums over both."""
        both = Sums(self.classes)
        for name in ("rows", "masses", "sums", "bins"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        both.wrong = dict(self.wrong)
        for pair, times in other.wrong.items():
            both.wrong[pair] = both.wrong.get(pair, 0) + times
        return both

    def evaluation(self, frequencies: np.ndarray | None = None) -> Evaluation:
        """Return the evaluation; ``frequencies`` (C,) are those of the training rows."""
        mass, class_loss, predicted, right = self.sums
        total, classes = mass.sum(), self.classes
        baseline = None
        if frequencies is not None:
            there = self.masses > 0
            with np.errstate(divide="ignore"):  # a class that the training rows lack costs inf
                baseline = float(-(self.masses[there] @ np.log(frequencies[there])) / total)
        pairs = np.array(sorted(self.wrong), dtype=np.int64)
        counts = np.array([self.wrong[pair] for pair in pairs.tolist()], dtype=np.int64)
        order = np.argsort(-counts, kind="stable")
        errors = np.stack([pairs // classes, pairs % classes, counts], axis=1)[order]
        return Evaluation(
            rows=int(self.rows.sum()),
            loss=float(class_loss.sum() / total),
            baseline=baseline,
            accuracy=float(right.sum() / total),
            errors=errors,
            per_class=self.rows,
            mass=mass,
            class_loss=class_loss,
            predicted=predicted,
            right=right,
            bins=self.bins.T,
        )


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
    own = Sums(len(model.classes))
    with ranks.raise_together():
        for part, log_p in log_proba(model, table, rows if ranks.counts else rows[:0]):
            own.add(table, part, codes[part], log_p)
    return functools.reduce(operator.add, ranks.gather(own)).evaluation(frequencies)


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
