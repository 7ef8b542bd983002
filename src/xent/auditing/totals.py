"""Sums over rows of what is measured of each, and over the rows of each class.

    mean f = Σ s f / Σ s        share of class c = Σ_{n of c} s ℓ / Σ s ℓ        D² = 1 − mean ℓ / H(labels)

H(labels) is the entropy of the labels' frequencies: the loss of who knows these alone. Of a row with masses
of classes, each class has its mass of the row's weight; its loss is the class's part of the row's.
Source of D²: McFadden, "Conditional logit analysis of qualitative choice behavior", 1974.
"""

from __future__ import annotations

import numpy as np
import torch

from xent.auditing.rows import Batch

TOP = (1, 2, 3, 5, 10, 20, 50, 100)
"""Numbers k of the top-k accuracies; those below the number of classes are reported."""

SCALARS = ("hit", "confidence", "entropy", "brier", "gradient_norm", "curvature_trace")

PER_CLASS = ("weight", "loss", "hits", "predicted", "own", "labelled")
"""Sums of each class: weight, loss, hits of its rows; weight predicted as it; Σ p, weight of labels."""


class Cells:
    """Cells of a number, ``per`` a unit from ``low`` to ``high``; the end ones hold what lies beyond."""

    def __init__(self, low: float, high: float, per: int) -> None:
        self.low, self.per = low, per
        self.count = round((high - low) * per)
        self.edges = np.linspace(low, high, self.count + 1)

    def of(self, x: np.ndarray) -> np.ndarray:
        """Return the cell of each number, (n,) int64."""
        return np.clip((x - self.low) * self.per, 0, self.count - 1).astype(np.int64)


MARGINS = Cells(-20, 20, 2)
"""Cells of margins, in nats."""

LOSSES = Cells(-20, 7, 8)
"""Cells of the binary logarithm of losses in nats."""


class Totals:
    """Sums over all rows, and over those of each class."""

    def __init__(self, classes: int) -> None:
        self.rows = np.zeros(classes, dtype=np.int64)  # of each class
        self.classes = np.zeros((len(PER_CLASS), classes))
        self.scalars = np.zeros(len(SCALARS))
        self.ranks = np.zeros(len(TOP))  # weight of rows whose class is among the k most probable
        self.margins = np.zeros((2, MARGINS.count))  # weight of the rows in each cell: wrong ones, right ones
        self.losses = np.zeros((2, LOSSES.count))  # weight and loss of the rows in each cell
        self.margin = np.zeros(2)  # Σ s m and Σ s of finite margins
        self.zeros = 0  # rows that count, of a class whose probability is 0

    def update(self, batch: Batch) -> None:
        """Add rows; the loss of one that is infinite is counted in ``zeros``, not added."""
        s, hit = batch.weight.numpy(), _hits(batch)
        loss = np.where(s > 0, batch.loss.numpy(), 0.0)
        infinite = np.isinf(loss)
        self.zeros += int(infinite.sum())
        loss = np.where(infinite, 0.0, loss)
        self.rows += np.bincount(batch.label.numpy(), minlength=len(self.rows))
        self.classes += self._per_class(batch, s, s * loss, hit)
        self.scalars += [float(batch.weight @ getattr(batch, name)) for name in SCALARS]
        within = np.bincount(np.searchsorted(TOP, batch.rank.numpy(), side="right"), s, len(TOP) + 1)
        self.ranks += [float(hit.sum()), *np.cumsum(within)[1:-1]]
        margin = batch.margin.numpy()
        cells = MARGINS.of(margin)
        for sums, values in zip(self.margins, (s - hit, hit), strict=True):
            sums += np.bincount(cells, values, MARGINS.count)
        finite = np.isfinite(margin)
        self.margin += [float((s[finite] * margin[finite]).sum()), float(s[finite].sum())]
        with np.errstate(divide="ignore"):
            cells = LOSSES.of(np.log2(loss))
        for sums, values in zip(self.losses, (s, s * loss), strict=True):
            sums += np.bincount(cells, values, LOSSES.count)

    def _per_class(self, batch: Batch, s: np.ndarray, loss: np.ndarray, hit: np.ndarray) -> np.ndarray:
        """Return the sums of each class, (6, C), of weights, weighted losses and weighted hits (n,)."""
        classes, label, prediction = len(self.rows), batch.label.numpy(), batch.prediction.numpy()
        labelled = np.bincount(label, s, classes)
        if batch.mass is None:
            weight, losses, hits = (
                labelled,
                np.bincount(label, loss, classes),
                np.bincount(label, hit, classes),
            )
        else:
            mass, counted = batch.mass.double(), batch.weight * batch.loss.isfinite()
            parts = torch.where(mass > 0, mass * batch.log_p.clamp(min=-1e300), 0.0)
            weight, losses = (batch.weight @ mass).numpy(), -(counted @ parts).numpy()
            hits = np.bincount(prediction, hit, classes)
        predicted, own = (
            np.bincount(prediction, s, classes),
            np.bincount(label, s * batch.own.numpy(), classes),
        )
        return np.stack([weight, losses, hits, predicted, own, labelled])

    def merge(self, other: Totals) -> None:
        """Add the rows of another."""
        for name in ("rows", "classes", "scalars", "ranks", "margins", "losses", "margin", "zeros"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def per_class(self, name: str) -> np.ndarray:
        """Return the sums of each class, (C,), by their name in ``PER_CLASS``."""
        return self.classes[PER_CLASS.index(name)]

    def mean(self, name: str) -> float:
        """Return the mean over rows, by its name in ``SCALARS``."""
        return float(self.scalars[SCALARS.index(name)] / self.total)

    @property
    def total(self) -> float:
        """The weight of all rows."""
        return float(self.per_class("labelled").sum())

    @property
    def label_entropy(self) -> float:
        """The entropy of the labels' frequencies, nats."""
        weight = self.per_class("weight")
        share = weight[weight > 0] / weight.sum()
        return float(-(share * np.log(share)).sum()) + 0.0

    @property
    def thresholds(self) -> np.ndarray:
        """The mean probability of each class over its own rows, (C,); infinite for one without rows."""
        own, labelled = self.per_class("own"), self.per_class("labelled")
        return np.divide(own, labelled, out=np.full(len(own), np.inf), where=labelled > 0)


def _hits(batch: Batch) -> np.ndarray:
    """Return the weight of each row that its prediction has right, (n,)."""
    return (batch.weight * batch.hit).numpy()
