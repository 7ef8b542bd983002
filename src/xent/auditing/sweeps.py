"""The two sweeps of an audit: the measures of each, updated batch by batch and merged.

The first sweep needs nothing; what the second measures depends on the first's results: the temperature near
the best one, the classes' thresholds, and of many classes the pairs and classes that carry most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from xent.auditing.calibration import ClassReliability, Numbers, Reliability
from xent.auditing.largest import Largest
from xent.auditing.mean_loss import MeanLoss
from xent.auditing.pairs import DENSE, HEAVIEST, CandidatePairs, ChosenPairs, DensePairs
from xent.auditing.rows import MeasuredRows, Rows, joined
from xent.auditing.sample import Sample
from xent.auditing.suspects import Suspects
from xent.auditing.temperature import Tempered, of_sample
from xent.auditing.threads import Threads
from xent.auditing.tiles import Tile
from xent.auditing.totals import Totals

NUMBERS = 1 << 19
"""Numbers of a tile, of which intermediate results are formed at a time; twice as many of long rows."""

TILES = 2
"""Tiles of a batch at least, for as many threads."""

BATCH = 1 << 24
"""Numbers of a batch at most, unless a row has more."""

ROWS = 2048
"""Rows that a batch has if it can, so that sums over rows are of many."""

ONE = Threads()
"""The calling thread alone."""

WORST = 100
"""Rows of the largest losses that are kept."""

CLASSES = 100
"""Classes whose calibration is taken apart where there are more than 1,000."""


class Batch(NamedTuple):
    """Some consecutive rows."""

    tiles: list[Tile]
    ids: Sequence[Any] | None = None  # (n,) the caller's names of the rows
    length: Tensor | None = None  # (n,) float64, of the features

    def known(self) -> Rows:
        """Return what is known of the rows without all of their measures."""
        return joined([tile.known() for tile in self.tiles])

    def measured(self) -> MeasuredRows:
        """Return the measures of the rows."""
        return joined([tile.measured() for tile in self.tiles])


class Seen(NamedTuple):
    """The parts of a tile's measures in a second sweep."""

    known: Rows
    tempered: Tensor | None  # sums of `Tempered`
    suspects: int
    numbers: Numbers | None  # of the classes whose calibration is taken apart


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

    def update(self, batch: Batch, threads: Threads = ONE) -> MeasuredRows:
        """Add rows, and return their measures."""
        parts = list(threads.map(Tile.measured, batch.tiles))
        rows = joined(parts)

        def of_classes() -> None:
            if len(self.per_class.classes):
                for tile, part in zip(batch.tiles, parts, strict=True):
                    self.per_class.update(self.per_class.numbers(tile), part)

        def of_pairs() -> None:
            if isinstance(self.pairs, CandidatePairs):
                self.pairs.update(rows)
            else:
                for tile, part in zip(batch.tiles, parts, strict=True):
                    self.pairs.update(tile, part)

        def of_rows() -> None:
            for tile, part in zip(batch.tiles, parts, strict=True):
                self.sample.update(tile, part)
            self.mean_loss.update(rows)
            self.totals.update(rows)
            self.reliability.update(rows)
            self.worst.update(rows, rows.loss.numpy(), batch.ids)

        threads.run(of_classes, of_pairs, of_rows)
        return rows

    def merge(self, other: FirstSweep) -> None:
        """Add the rows of another."""
        for own, their in zip(vars(self).values(), vars(other).values(), strict=True):
            own.merge(their)


class SecondSweep:
    """The measures of a second sweep over the same rows."""

    def __init__(self, first: FirstSweep) -> None:
        totals, classes = first.totals, len(first.totals.rows)
        self.rows = 0
        self.tempered = Tempered(of_sample(first.sample))
        self.suspects = Suspects(totals.thresholds)
        self.per_class: ClassReliability | None = None
        self.pairs: ChosenPairs | None = None
        if classes > DENSE:
            heaviest = np.argsort(-totals.per_class("loss"), kind="stable")[:CLASSES]
            self.per_class = ClassReliability(np.sort(heaviest), classes)
            self.pairs = ChosenPairs(first.pairs.heaviest(HEAVIEST), classes)

    def update(self, batch: Batch, threads: Threads = ONE) -> Rows:
        """Add rows, and return what is known of them."""

        def of_tile(tile: Tile) -> Seen:
            known = tile.known()
            numbers = None if self.per_class is None else self.per_class.numbers(tile)
            return Seen(
                known, self.tempered.sums_of(tile, known), self.suspects.count_of(tile, known), numbers
            )

        seen = list(threads.map(of_tile, batch.tiles))
        rows = joined([each.known for each in seen])
        for each in seen:
            self.tempered.add(each.tempered)
            self.suspects.add(each.suspects, int((each.known.weight > 0).sum()))
        if self.per_class is not None and self.pairs is not None:
            of_tiles = [each.numbers for each in seen if each.numbers is not None]
            columns = (None if each[0] is None else torch.cat(each) for each in zip(*of_tiles, strict=True))
            self.per_class.update(Numbers._make(columns), rows)
            for tile, each in zip(batch.tiles, seen, strict=True):
                self.pairs.update(tile, each.known)
        self.suspects.list(rows, batch.ids)
        self.rows += len(rows)
        return rows

    def merge(self, other: SecondSweep) -> None:
        """Add the rows of another."""
        self.rows += other.rows
        for own, their in zip(vars(self).values(), vars(other).values(), strict=True):
            if hasattr(own, "merge"):
                own.merge(their)


def batches(rows: int, classes: int) -> Iterator[slice]:
    """Yield the rows of each batch of as many rows."""
    yield from _steps(slice(0, rows), max(1, TILES * _rows(classes), min(ROWS, BATCH // classes)))


def tiles(batch: slice, classes: int) -> Iterator[slice]:
    """Yield the rows of each tile of a batch."""
    yield from _steps(batch, _rows(classes))


def _rows(classes: int) -> int:
    """Return the rows of a tile."""
    return max(1, NUMBERS * (1 if classes <= DENSE else 2) // classes)


def _steps(rows: slice, step: int) -> Iterator[slice]:
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))
