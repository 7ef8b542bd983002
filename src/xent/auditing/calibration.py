"""Calibration of a score of a binary event, taken apart, from cells that add up.

    𝒮(p) = MCB − DSC + UNC        MCB = 𝒮(p) − 𝒮(p̂)        DSC = UNC − 𝒮(p̂)        UNC = 𝒮(base rate)

p̂ is the isotonic recalibration, found by pooling adjacent violators over cells of the score; 𝒮 is the mean
log loss or the mean Brier score. The cells are of equal width in the logit of p, so that both ends are
resolved.
Source: Dimitriadis, Gneiting and Jordan, "Stable reliability diagrams", 2021.
"""

from __future__ import annotations

import dataclasses

import numpy as np

CELLS = 1 << 16
LARGEST = 40.0  # logits beyond this are in the last cell: 1 − p below 4e-18


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """A mean score and its parts."""

    score: float
    miscalibration: float
    discrimination: float
    uncertainty: float


@dataclasses.dataclass
class Reliability:
    """The cells of a score: the weight of their rows and of those with the event, sums of p and of losses."""

    weight: np.ndarray  # (cells,)
    hits: np.ndarray  # (cells,)
    confidence: np.ndarray  # (cells,) Σ s·p
    log_loss: float = 0.0  # Σ s·ℓ
    brier: float = 0.0  # Σ s·(p − y)²

    @classmethod
    def empty(cls, cells: int = CELLS) -> Reliability:
        """Return the cells of no rows."""
        return cls(np.zeros(cells), np.zeros(cells), np.zeros(cells))

    def update(self, p: np.ndarray, event: np.ndarray, weight: np.ndarray) -> None:
        """Add rows: probabilities (n,), whether the event was (n,), and weights (n,)."""
        cells = len(self.weight)
        at, event = cell_of(p, cells), event.astype(np.float64)
        self.weight += np.bincount(at, weight, cells)
        self.hits += np.bincount(at, weight * event, cells)
        self.confidence += np.bincount(at, weight * p, cells)
        with np.errstate(divide="ignore"):
            losses = -np.where(event > 0, np.log(p), np.log1p(-p))
        self.log_loss += float((weight * np.where(weight > 0, losses, 0.0)).sum())
        self.brier += float((weight * (p - event) ** 2).sum())

    def merge(self, other: Reliability) -> None:
        """Add the rows of another."""
        for name in ("weight", "hits", "confidence", "log_loss", "brier"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def recalibrated(self) -> tuple[np.ndarray, np.ndarray]:
        """Return weight and event rate of each pool of cells, in the order of the score."""
        there = self.weight > 0
        return pool(self.weight[there], self.hits[there])

    def decomposition(self) -> tuple[Decomposition, Decomposition]:
        """Return the decompositions of the log loss and of the Brier score."""
        total = self.weight.sum()
        weight, rate = self.recalibrated()
        base = np.array([self.hits.sum() / total])
        whole = np.array([total])
        found = []
        for score, mean in ((_entropy, self.log_loss), (_variance, self.brier)):
            own, best = mean / total, float((weight * score(rate)).sum() / total)
            uncertainty = float((whole * score(base)).sum() / total)
            found.append(Decomposition(own, own - best, uncertainty - best, uncertainty))
        return found[0], found[1]

    def error(self, bins: int = 15) -> float:
        """Return the expected calibration error over bins of equal mass: the mean of |confidence − rate|."""
        order = np.cumsum(self.weight)
        total = order[-1]
        at = np.minimum((bins * (order - self.weight / 2) / total).astype(int), bins - 1)
        gap = np.bincount(at, self.confidence - self.hits, bins)
        return float(np.abs(gap).sum() / total)


def cell_of(p: np.ndarray, cells: int = CELLS) -> np.ndarray:
    """Return the cell of each probability, (n,) int64.

    >>> cell_of(np.array([0.0, 0.5, 1.0]), 10).tolist()
    [0, 5, 9]
    """
    with np.errstate(divide="ignore"):
        logit = np.clip(np.log(p) - np.log1p(-p), -LARGEST, LARGEST)
    return np.minimum((cells * (logit + LARGEST) / (2 * LARGEST)).astype(np.int64), cells - 1)


def pool(weight: np.ndarray, hits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return weight and rate of the pools in which rates rise: pool-adjacent-violators.

    >>> [part.tolist() for part in pool(np.ones(4), np.array([0.0, 1.0, 0.0, 1.0]))]
    [[1.0, 2.0, 1.0], [0.0, 0.5, 1.0]]
    """
    weights: list[float] = []
    sums: list[float] = []
    for w, h in zip(weight.tolist(), hits.tolist(), strict=True):
        while sums and sums[-1] * w >= h * weights[-1]:
            w, h = w + weights.pop(), h + sums.pop()
        weights.append(w)
        sums.append(h)
    return np.array(weights), np.array(sums) / np.array(weights)


def _entropy(rate: np.ndarray) -> np.ndarray:
    """Return the log loss of predicting the rate itself."""
    other = 1 - rate
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.where(rate > 0, rate * np.log(rate), 0.0) - np.where(other > 0, other * np.log(other), 0.0)


def _variance(rate: np.ndarray) -> np.ndarray:
    """Return the Brier score of predicting the rate itself."""
    return rate * (1 - rate)
