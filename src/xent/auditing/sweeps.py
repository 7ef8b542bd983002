"""The two sweeps of an audit: the measures of each, updated batch by batch and merged.

The first sweep needs nothing; what the second measures depends on the first's results: the temperature near
the best one, the classes' thresholds, and of many classes the pairs and classes that carry most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from xent.auditing.calibration import ClassReliability, Reliability
from xent.auditing.largest import Largest
from xent.auditing.mean_loss import MeanLoss
from xent.auditing.pairs import DENSE, HEAVIEST, CandidatePairs, ChosenPairs, DensePairs
from xent.auditing.rows import Batch
from xent.auditing.sample import Sample
from xent.auditing.suspects import Suspects
from xent.auditing.temperature import Tempered, of_sample
from xent.auditing.totals import Totals

NUMBERS = 1 << 20
"""Probabilities of which intermediate results are formed at a time."""

WORST = 100
"""Rows of the largest losses that are kept."""

CLASSES = 100
"""Classes whose calibration is taken apart where there are more than 1,000."""


class FirstSweep:
    """The measures of one sweep over the rows."""

    def __init__(self, classes: int, worst: int = WORST) -> None:
        self.mean_loss = MeanLoss()
        self.totals = Totals(classes)
        self.reliability = Reliability.empty()
        self.per_class = ClassReliability(np.arange(classes if classes <= DENSE else 0), classes)
        self.pairs: DensePairs | CandidatePairs = (
            DensePairs(classes) if classes <= DENSE else CandidatePairs(classes)
        )
        self.sample = Sample(classes)
        self.worst = Largest(worst)

    def update(self, batch: Batch, ids: Sequence[Any] | None = None) -> None:
        """Add rows; ``ids`` (n,) are the caller's names of them."""
        self.mean_loss.update(batch)
        self.totals.update(batch)
        arrays = (batch.confidence, batch.rest, batch.hit, batch.weight)
        self.reliability.update(*(x.numpy() for x in arrays))
        if len(self.per_class.classes):
            self.per_class.update(batch)
        self.pairs.update(batch)
        self.sample.update(batch)
        self.worst.update(batch, batch.loss.numpy(), ids)

    def merge(self, other: FirstSweep) -> None:
        """Add the rows of another."""
        for own, their in zip(vars(self).values(), vars(other).values(), strict=True):
            own.merge(their)


class SecondSweep:
    """The measures of a second sweep over the same rows."""

    def __init__(self, first: FirstSweep) -> None:
        totals, classes = first.totals, len(first.totals.rows)
        self.tempered = Tempered(of_sample(first.sample))
        self.suspects = Suspects(totals.thresholds)
        self.per_class: ClassReliability | None = None
        self.pairs: ChosenPairs | None = None
        if classes > DENSE:
            heaviest = np.argsort(-totals.per_class("loss"), kind="stable")[:CLASSES]
            self.per_class = ClassReliability(np.sort(heaviest), classes)
            self.pairs = ChosenPairs(first.pairs.heaviest(HEAVIEST), classes)

    def update(self, batch: Batch, ids: Sequence[Any] | None = None) -> None:
        """Add rows; ``ids`` (n,) are the caller's names of them."""
        self.tempered.update(batch)
        self.suspects.update(batch, ids)
        if self.per_class is not None and self.pairs is not None:
            self.per_class.update(batch)
            self.pairs.update(batch)

    def merge(self, other: SecondSweep) -> None:
        """Add the rows of another."""
        for own, their in zip(vars(self).values(), vars(other).values(), strict=True):
            if own is not None:
                own.merge(their)


def parts(rows: int, classes: int) -> Iterator[slice]:
    """Yield consecutive ranges of rows whose probabilities are measured at a time."""
    step = max(1, NUMBERS // classes)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
