"""Rows whose label looks wrong, and an estimate of their number.

    threshold_j = mean of p_j over the rows labelled j
    expected(n) = the most probable class j with p_nj ≥ threshold_j        n̂ = #{n: expected(n) ≠ y_n}
    saving(n) = log p_n,prediction − log p_n,y        suspects: the rows of largest saving

n̂ counts the rows that the model believes of another class as firmly as it believes the rows of that class;
which rows they are is better told by what another label would save. As many are listed as n̂ may be by its
interval, so that one near the end is not missed.
Source of n̂: Northcutt, Jiang and Chuang, "Confident learning: estimating uncertainty in dataset labels",
2021.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from xent.auditing.largest import Largest
from xent.auditing.mean_loss import QUANTILE, Interval
from xent.auditing.rows import Rows
from xent.auditing.tiles import Tile

MOST = 10_000
"""Suspects that are listed at most."""


class Suspects:
    """The number of rows whose label looks wrong, and those that another label would save most."""

    def __init__(self, thresholds: np.ndarray) -> None:
        self.thresholds = torch.from_numpy(thresholds)  # (C,)
        self.count = 0
        self.rows = 0
        self.largest = Largest(MOST)

    def count_of(self, tile: Tile, rows: Rows) -> int:
        """Return the number of rows of a tile whose label looks wrong."""
        counts = rows.weight > 0
        # a threshold is in the digits of the numbers, as the mean over one row is that row's number
        threshold = self.thresholds.to(tile.x.dtype).double()
        # one of two classes that are equally sure may be the label
        own = torch.where(rows.own >= threshold[rows.label], rows.own, 0.0)
        sure = rows.confidence >= threshold[rows.prediction]
        found = int((sure & ~rows.right & (rows.confidence > own) & counts).sum())
        # most rows are decided by their most probable class: it is above its threshold, or below all of them
        others = (~sure & (rows.confidence >= threshold.min()) & counts).nonzero()[:, 0]
        if len(others):
            p = tile.p_in(others)
            above = torch.ge(p, threshold.to(p.dtype), out=torch.empty_like(p)).mul_(p)
            above.scatter_(1, rows.label[others, None], 0.0)
            found += int((above.amax(1) > own[others]).sum())
        return found

    def add(self, found: int, rows: int) -> None:
        """Add the number found among some rows, of a weight above 0."""
        self.count += found
        self.rows += rows

    def list(self, rows: Rows, ids: Sequence[Any] | None = None) -> None:
        """Hold those of the rows that another label would save most; ``ids`` (n,) are their names."""
        self.largest.update(rows, rows.saving.numpy(), ids)

    def merge(self, other: Suspects) -> None:
        """Add the rows of another."""
        self.count += other.count
        self.rows += other.rows
        self.largest.merge(other.largest)

    def interval(self) -> Interval:
        """Return an interval of the number: Wilson's for a share of the rows."""
        n, z = self.rows, QUANTILE
        if not n:
            return Interval(0.0, 0.0)
        share = self.count / n
        center = share + z * z / (2 * n)
        half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        scale = n / (1 + z * z / n)
        return Interval(max(0.0, (center - half) * scale), min(float(n), (center + half) * scale))

    def listed(self) -> Largest:
        """Return the suspects, as many as the interval's upper end, the largest saving first."""
        return self.largest.first(min(math.ceil(self.interval().high) if self.count else 0, MOST))
