"""The mean loss over rows, with two intervals: a normal one, and one by a bootstrap over blocks of rows.

    mean = Σ s ℓ / Σ s        se² = Σ s² (ℓ − mean)² / (Σ s)²
    replicate b: Σ_k w_bk Σ_{n in k} s ℓ / Σ_k w_bk Σ_{n in k} s,    w_bk from Poisson(1)

Block k holds the rows 1024·k to 1024·k + 1023 of all, so that rows that follow each other, and are often
alike, stay together. The weights of a replicate are a stream of Philox, keyed by the replicate and taken in
the order of the blocks: they depend on neither batches nor processes.
Source: Künsch, "The jackknife and the bootstrap for general stationary observations", 1989.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from xent.auditing.rows import Rows

BLOCK = 1024
REPLICATES = 200
FEWEST = 20
"""Blocks below which a bootstrap over them says nothing."""
QUANTILE = 1.959963984540054
"""The number below which 97.5 % of the standard normal distribution lie."""


class Interval(NamedTuple):
    """The ends of an interval that covers the truth in 95 of 100 samples."""

    low: float
    high: float


class MeanLoss:
    """Sums of losses and weights, in blocks of rows."""

    def __init__(self) -> None:
        self.blocks = np.zeros((2, 0))  # Σ s ℓ and Σ s of each block
        self.squares = np.zeros(3)  # Σ s², Σ s² ℓ, Σ s² ℓ²
        self.rows = 0
        self.counted = 0  # rows of a weight above 0
        self.infinite = 0  # rows that count, whose loss is infinite

    def update(self, rows: Rows) -> None:
        """Add rows."""
        weight, loss = rows.weight, torch.where(rows.weight > 0, rows.loss, 0.0)
        lost = loss.isinf()
        if lost.any():
            self.infinite += int(lost.sum())
            weight, loss = weight.masked_fill(lost, 0.0), loss.masked_fill(lost, 0.0)
        part = weight * loss
        self.squares += [float(x @ y) for x, y in ((weight, weight), (weight, part), (part, part))]
        s = weight.numpy()
        first, last = rows.start // BLOCK, (rows.start + len(s) - 1) // BLOCK
        self._grow(last + 1)
        place = (rows.start + np.arange(len(s))) // BLOCK - first
        for sums, values in zip(self.blocks, (part.numpy(), s), strict=True):
            sums[first : last + 1] += np.bincount(place, values, last - first + 1)
        self.rows += len(s)
        self.counted += int((rows.weight > 0).sum())

    def merge(self, other: MeanLoss) -> None:
        """Add the rows of another."""
        self._grow(other.blocks.shape[1])
        self.blocks[:, : other.blocks.shape[1]] += other.blocks
        self.squares += other.squares
        self.rows += other.rows
        self.counted += other.counted
        self.infinite += other.infinite

    @property
    def weight(self) -> float:
        """The weight of the rows whose loss is finite."""
        return math.fsum(self.blocks[1])

    @property
    def finite(self) -> float:
        """The mean over the rows whose loss is finite; nan where there are none."""
        return math.fsum(self.blocks[0]) / self.weight if self.weight else math.nan

    @property
    def mean(self) -> float:
        """The mean; infinite where a row's loss is."""
        return math.inf if self.infinite else self.finite

    def standard_error(self) -> float | None:
        """Return the standard error of the mean; None where it is infinite, of one row, or beyond numbers."""
        ones, losses, squares = self.squares.tolist()
        if self.infinite or self.counted < 2 or not ones:
            return None
        mean = self.mean
        variance = (squares - 2 * mean * losses + mean * mean * ones) / self.weight / self.weight
        return math.sqrt(max(0.0, variance)) if math.isfinite(variance) else None

    def normal(self) -> Interval | None:
        """Return the interval of the normal distribution from 0; None where there is no standard error."""
        error = self.standard_error()
        if error is None:
            return None
        return Interval(max(0.0, self.mean - QUANTILE * error), self.mean + QUANTILE * error)

    def bootstrap(self) -> Interval | None:
        """Return the interval of 200 replicates; None for fewer than 20 blocks, or an infinite mean."""
        there = self.blocks[1] > 0
        if self.infinite or there.sum() < FEWEST:
            return None
        ends = np.quantile(self.replicates(), [0.025, 0.975])
        return Interval(float(ends[0]), float(ends[1]))

    def replicates(self) -> np.ndarray:
        """Return the means of the replicates, (200,)."""
        means = np.empty(REPLICATES)
        for replicate in range(REPLICATES):
            random = np.random.Generator(np.random.Philox(key=replicate))
            losses, weights = self.blocks @ random.poisson(1.0, self.blocks.shape[1])
            means[replicate] = losses / weights if weights else self.mean
        return means

    def _grow(self, count: int) -> None:
        """Make room for as many blocks."""
        if count > self.blocks.shape[1]:
            size = max(count, 2 * self.blocks.shape[1]) if self.blocks.shape[1] else count
            self.blocks = np.concatenate([self.blocks, np.zeros((2, size - self.blocks.shape[1]))], axis=1)
