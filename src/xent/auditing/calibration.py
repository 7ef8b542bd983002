"""Calibration of a score of a binary event, taken apart, from cells that add up.

    𝒮(p) = MCB − DSC + UNC        MCB = 𝒮(p) − 𝒮(p̂)        DSC = UNC − 𝒮(p̂)        UNC = 𝒮(base rate)

p̂ is the isotonic recalibration, found by pooling adjacent violators over cells of the score; 𝒮 is the mean
log loss or the mean Brier score. Cells are intervals of p up to one half, and of 1 − p above: as many in each
octave, so that both ends are resolved, and read off the bits of a float32.
Source: Dimitriadis, Gneiting and Jordan, "Stable reliability diagrams", 2021.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from xent.auditing.rows import MeasuredRows, Rows
from xent.auditing.scores import Scores
from xent.auditing.sums import add_at
from xent.auditing.tiles import Tile


@dataclasses.dataclass(frozen=True)
class Grid:
    """Cells of a probability: ``2**bits`` in each of as many octaves below one half, and of 1 − p as many."""

    octaves: int  # smaller probabilities are in the last cell
    bits: int

    @property
    def cells(self) -> int:
        """The number of cells."""
        return 2 * (self.octaves << self.bits)

    def lower(self, p: Tensor) -> Tensor:
        """Return the cells of probabilities up to one half, of any shape, int64."""
        below = (126 - self.octaves) << 23  # the bits of 2**−(octaves + 1), as a float32
        at = (p.float().view(torch.int32) - below) >> (23 - self.bits)
        return at.clamp_(0, self.cells // 2 - 1).long()


FINE = Grid(32, 10)
COARSE = Grid(32, 6)
MOST_CELLS = 1 << 22
"""Cells of all classes together that are fine ones."""


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
    scores: Scores = dataclasses.field(default_factory=Scores)

    @classmethod
    def empty(cls) -> Reliability:
        """Return the cells of no rows."""
        return cls(*np.zeros((3, FINE.cells)))

    def update(self, rows: MeasuredRows) -> None:
        """Add rows: the score is the confidence, the event that the prediction is right."""
        p, q, event, weight = (x.numpy() for x in (rows.confidence, rows.rest, rows.hit, rows.weight))
        at = cell_of(rows.confidence, rows.rest).numpy()
        add_at(self.weight, at, weight)
        add_at(self.hits, at, weight * event)
        add_at(self.confidence, at, weight * p)
        self.log_loss += float((weight * _binary_loss(rows).numpy()).sum())
        self.brier += float((weight * (event * q**2 + (1 - event) * p**2)).sum())
        if self.scores.kept:
            score = rows.top_log - rows.rest_log
            self.scores.add(score[:, None], (rows.weight * rows.hit)[:, None], rows.weight)

    def merge(self, other: Reliability) -> None:
        """Add the rows of another."""
        self.scores.merge(other.scores)
        for name in ("weight", "hits", "confidence", "log_loss", "brier"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def decomposition(self) -> tuple[Decomposition, Decomposition]:
        """Return the decompositions of the log loss and of the Brier score."""
        cells = self.scores.cells() or (self.weight, self.hits)
        return decomposed(*cells, self.log_loss, self.brier)

    def error(self, bins: int = 15) -> float:
        """Return the expected calibration error over bins of equal mass: the mean of |confidence − rate|."""
        order = np.cumsum(self.weight)
        total = order[-1]
        at = np.minimum((bins * (order - self.weight / 2) / total).astype(int), bins - 1)
        gap = np.bincount(at, self.confidence - self.hits, bins)
        return float(np.abs(gap).sum() / total)


class Numbers(NamedTuple):
    """The numbers of some classes, (n, K) each."""

    p: Tensor
    log_p: Tensor | None = None  # where there are masses
    mass: Tensor | None = None


class ClassReliability:
    """The cells of each class against the rest, of some classes."""

    def __init__(self, chosen: np.ndarray, classes: int) -> None:
        self.classes = chosen  # (K,) class numbers, ascending
        self.every = len(chosen) == classes
        count = len(chosen)
        self.grid = FINE if count * FINE.cells <= MOST_CELLS else COARSE
        self.weight, self.hits = torch.zeros((2, count, self.grid.cells), dtype=torch.float64)
        self.log_loss, self.brier = torch.zeros((2, count), dtype=torch.float64)  # sums
        self.scores = Scores()

    def numbers(self, tile: Tile) -> Numbers:
        """Return what is wanted of a tile."""
        chosen = None if self.every else torch.from_numpy(self.classes)
        if tile.mass is None:
            return Numbers(tile.p if chosen is None else tile.p_of(chosen))
        columns = slice(None) if chosen is None else chosen
        return Numbers(tile.p[:, columns], tile.log_p[:, columns], tile.mass[:, columns])

    def update(self, numbers: Numbers, known: Rows) -> None:
        """Add rows: the numbers of the classes, and what is known of each row."""
        n, count, s, p = len(known), len(self.classes), known.weight, numbers.p
        index, miss, square = self.grid.lower(p), torch.log1p(-p), p.square()
        rows, places = self._places(known.prediction, known.confidence > 0.5)  # no other p is above one half
        index[rows, places] = self.grid.cells - 1 - self.grid.lower(known.rest[rows])
        miss[rows, places] = known.rest_log[rows].to(p.dtype)
        self.weight.scatter_add_(1, index.t(), s.expand(count, n))
        if self.scores.kept:
            self._keep(numbers, known, rows, places)
        if numbers.mass is not None and numbers.log_p is not None:
            mass, log_p = numbers.mass, numbers.log_p
            self.hits.scatter_add_(1, index.t(), (s[:, None] * mass).t())
            loss = torch.where(mass > 0, mass * log_p, 0.0) + torch.where(mass < 1, (1 - mass) * miss, 0.0)
            self.log_loss -= _summed(loss, s)
            self.brier += _summed(mass * (1 - p).square() + (1 - mass) * square, s)
            return
        rows, places = self._places(known.label, s > 0)
        self.hits.index_put_((places, index[rows, places]), s[rows], accumulate=True)
        self.log_loss.index_add_(0, places, s[rows] * known.loss[rows])
        self.brier.index_add_(0, places, s[rows] * known.others[rows].square())
        miss[rows, places] = square[rows, places] = 0.0
        self.log_loss -= _summed(miss, s)
        self.brier += _summed(square, s)

    def _keep(self, numbers: Numbers, known: Rows, rows: Tensor, places: Tensor) -> None:
        """Add the scores of the classes; of the confident ones, at places in rows, without a difference."""
        p = numbers.p.double()
        score = p.log() - torch.log1p(-p)
        score[rows, places] = (known.top_log - known.rest_log)[rows]
        if numbers.mass is None:
            hits = torch.zeros_like(score)
            own, at = self._places(known.label, known.weight > 0)
            hits[own, at] = known.weight[own]
        else:
            hits = numbers.mass * known.weight[:, None]
        self.scores.add(score, hits, known.weight)

    def _places(self, of: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows, and the position of the class of each, (n,), among those that are wanted."""
        if self.every:
            rows = where.nonzero()[:, 0]
            return rows, of[rows]
        chosen = torch.from_numpy(self.classes)
        place = torch.searchsorted(chosen, of).clamp_(max=len(chosen) - 1)
        rows = ((chosen[place] == of) & where).nonzero()[:, 0]
        return rows, place[rows]

    def merge(self, other: ClassReliability) -> None:
        """Add the rows of another."""
        self.scores.merge(other.scores)
        for name in ("weight", "hits", "log_loss", "brier"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def decomposition(self, at: int) -> tuple[Decomposition, Decomposition]:
        """Return the decompositions of the log loss and of the Brier score of ``classes[at]``."""
        weight, hits = self.scores.cells(at) or (self.weight[at].numpy(), self.hits[at].numpy())
        return decomposed(weight, hits, float(self.log_loss[at]), float(self.brier[at]))


def _summed(x: Tensor, weight: Tensor) -> Tensor:
    """Return the sums over rows (K,) of numbers (n, K), in float64; what has weight 0 is left out."""
    if (weight == 1).all():
        return x.sum(0).double()
    return torch.where(weight[:, None] > 0, x * weight[:, None], 0.0).sum(0)


def decomposed(
    weight: np.ndarray, hits: np.ndarray, log_loss: float, brier: float
) -> tuple[Decomposition, Decomposition]:
    """Return the decompositions of two scores: cells (cells,) in the order of the score, sums of losses."""
    there = weight > 0
    total = weight[there].sum()
    pools, rate = pool(weight[there] / total, hits[there] / total)
    base = np.array([hits.sum() / total])
    found = []
    for score, mean in ((_entropy, log_loss), (_variance, brier)):
        own, best = float(mean / total), float((pools * score(rate)).sum())
        uncertainty = float(score(base)[0])
        found.append(Decomposition(own, own - best, uncertainty - best, uncertainty))
    return found[0], found[1]


def cell_of(p: Tensor, q: Tensor) -> Tensor:
    """Return the fine cell of each probability p (n,), with q = 1 − p, (n,) int64.

    >>> p = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    >>> cell_of(p, 1 - p).tolist()
    [0, 31744, 32767, 33791, 65535]
    """
    return torch.where(p <= 0.5, FINE.lower(p), FINE.cells - 1 - FINE.lower(q))


def pool(weight: np.ndarray, hits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return weight and rate of the pools in which rates rise: pool-adjacent-violators.

    >>> [part.tolist() for part in pool(np.ones(4), np.array([0.0, 1.0, 0.0, 1.0]))]
    [[1.0, 2.0, 1.0], [0.0, 0.5, 1.0]]
    """
    while True:  # violators that follow each other are pooled at once, for as long as many are
        fall = hits[:-1] * weight[1:] >= hits[1:] * weight[:-1]
        if 8 * np.count_nonzero(fall) < len(hits):
            break
        first = np.flatnonzero(np.concatenate([[True], ~fall]))
        weight, hits = np.add.reduceat(weight, first), np.add.reduceat(hits, first)
    weights: list[float] = []
    sums: list[float] = []
    for w, h in zip(weight.tolist(), hits.tolist(), strict=True):
        while sums and sums[-1] * w >= h * weights[-1]:
            w, h = w + weights.pop(), h + sums.pop()
        weights.append(w)
        sums.append(h)
    return np.array(weights), np.array(sums) / np.array(weights)


def _binary_loss(rows: MeasuredRows) -> Tensor:
    """Return −event·log p − (1 − event)·log(1 − p), (n,), of the confidence p; 0 of rows of weight 0."""
    event, counts = rows.hit, rows.weight > 0
    hit = torch.where((event > 0) & counts, event * rows.top_log, 0.0)
    miss = torch.where((event < 1) & counts, (1 - event) * rows.rest_log, 0.0)
    return -hit - miss


def _entropy(rate: np.ndarray) -> np.ndarray:
    """Return the log loss of predicting the rate itself."""
    other = 1 - rate
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [np.where(x > 0, x * np.log(x), 0.0) for x in (rate, other)]
    return np.asarray(0.0 - parts[0] - parts[1])  # 0, and not −0


def _variance(rate: np.ndarray) -> np.ndarray:
    """Return the Brier score of predicting the rate itself."""
    return rate * (1 - rate)
