"""Sums over rows of what is measured of each, and over the rows of each class.

    mean f = Σ s f / Σ s        share of class c = Σ_{n of c} s ℓ / Σ s ℓ        D² = 1 − mean ℓ / H(labels)

H(labels) is the entropy of the labels' frequencies: the loss of who knows these alone. Of a row with masses
of classes, each class has its mass of the row's weight; its loss is the class's part of the row's.
Source of D²: McFadden, "Conditional logit analysis of qualitative choice behavior", 1974.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from xent.auditing.rows import MeasuredRows
from xent.auditing.sums import add_at
from xent.auditing.tiles import DEEPEST

TOP = (1, 2, 3, 5, 10, 20, 50, DEEPEST)
"""Numbers k of the top-k accuracies; those below the number of classes are reported."""

SCALARS = ("hit", "confidence", "entropy", "brier", "gradient_norm", "curvature_trace")

PER_CLASS = ("weight", "finite", "loss", "hits", "predicted", "own", "labelled")
"""Sums of each class: weight, that of finite loss, loss, hits; weight predicted so; Σ p, weight of labels."""


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
        self.ranks = np.zeros(len(TOP))  # weight of the labels that are among the k most probable classes
        self.margins = np.zeros((2, MARGINS.count))  # weight of the rows in each cell: wrong ones, right ones
        self.losses = np.zeros((2, LOSSES.count))  # weight and loss of the rows in each cell
        self.margin = np.zeros(2)  # Σ s m and Σ s of finite margins

    def update(self, rows: MeasuredRows) -> None:
        """Add rows; a loss that is infinite is left out, as `MeanLoss` counts it."""
        weight, hit = rows.weight, rows.weight * rows.hit
        loss = torch.where(weight > 0, rows.loss, 0.0)
        infinite = loss.isinf()
        counted = weight
        if infinite.any():
            loss, counted = loss.masked_fill(infinite, 0.0), weight.masked_fill(infinite, 0.0)
        part = weight * loss
        add_at(self.rows, rows.label.numpy())
        self._add_classes(rows, part, hit, counted)
        self.scalars += [float(weight @ getattr(rows, name)) for name in SCALARS]
        s, right, rank = weight.numpy(), hit.numpy(), rows.rank.numpy()
        for i, k in enumerate(TOP):
            if k < len(self.rows) and rows.soft_top is None:
                self.ranks[i] += s[rank < k].sum()
            elif k < len(self.rows) and rows.soft_top is not None:
                self.ranks[i] += float(rows.weight @ rows.soft_top[:, k - 1])
        margin = rows.margin.numpy()
        cells = MARGINS.of(margin)
        add_at(self.margins[0], cells, s - right)
        add_at(self.margins[1], cells, right)
        finite = np.isfinite(margin)
        kept = s if finite.all() else s[finite]
        self.margin += [(kept * (margin if len(kept) == len(s) else margin[finite])).sum(), kept.sum()]
        with np.errstate(divide="ignore"):
            cells = LOSSES.of(np.log2(loss.numpy()))
        add_at(self.losses[0], cells, counted.numpy())
        add_at(self.losses[1], cells, part.numpy())

    def _add_classes(self, rows: MeasuredRows, loss: Tensor, hit: Tensor, counted: Tensor) -> None:
        """Add to the sums of each class: weighted losses and hits, and the weights of finite losses, (n,)."""
        sums = dict(zip(PER_CLASS, self.classes, strict=True))
        label, prediction, s = rows.label.numpy(), rows.prediction.numpy(), rows.weight
        add_at(sums["labelled"], label, s.numpy())
        add_at(sums["predicted"], prediction, s.numpy())
        add_at(sums["own"], label, (s * rows.own).numpy())
        add_at(sums["hits"], prediction, hit.numpy())
        if rows.by_class is not None:
            for name, sums_of in zip(("weight", "finite", "loss"), rows.by_class.numpy(), strict=True):
                sums[name] += sums_of
            return
        add_at(sums["weight"], label, s.numpy())
        add_at(sums["finite"], label, counted.numpy())
        add_at(sums["loss"], label, loss.numpy())

    def merge(self, other: Totals) -> None:
        """Add the rows of another."""
        for name in ("rows", "classes", "scalars", "ranks", "margins", "losses", "margin"):
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
