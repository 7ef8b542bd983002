"""The loss carried by each pair of a class and a rival, which adds up to the whole.

    ℓ = Σ_{j≠y} π_j ℓ        π_j = p_j / Σ_{k≠y} p_k        pair (y, j): Σ_{n of y} s π_nj ℓ_n

Up to 1,000 classes every pair has its sum; beyond, those heavy pairs that a first sweep finds among the two
strongest rivals of each row, and what is left to each class. A row with masses of classes carries, for each,
its mass of the loss that the class alone would have.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from xent.auditing.rows import MeasuredRows, Rows
from xent.auditing.tiles import Tile

DENSE = 1000
"""The largest number of classes of which every pair has its sum."""

HEAVIEST = 1000
"""The number of pairs that are reported of more classes."""

KEPT = 1 << 17
"""Pairs that a first sweep keeps before it forgets the lighter half."""


class Pair(NamedTuple):
    """A class, a rival, and the loss that they carry, Σ s π ℓ in nats."""

    label: int
    rival: int
    loss: float


class DensePairs:
    """The loss of every pair."""

    def __init__(self, classes: int) -> None:
        # [rival, class]; the diagonal, a class beside itself, means nothing
        self.loss = torch.zeros((classes, classes), dtype=torch.float64)

    def update(self, tile: Tile, rows: Rows) -> None:
        """Add the rows of a tile, and what is known of each."""
        if tile.mass is None:
            share = _share(rows.weight, rows.loss, rows.others)
            self.loss.index_add_(1, rows.label, (tile.p * share[:, None]).t())
            return
        p = tile.p.double()
        others = (p.sum(1, keepdim=True) - p).clamp_(min=0)
        # the one whose others a difference would not hold
        others.scatter_(1, rows.prediction[:, None], rows.rest[:, None])
        given = _share(rows.weight[:, None], tile.soft_loss(tile.mass), others)
        self.loss += p.t() @ given

    def merge(self, other: DensePairs) -> None:
        """Add the rows of another."""
        self.loss += other.loss

    def heaviest(self, count: int) -> list[Pair]:
        """Return the pairs that carry most, in that order."""
        loss = self.matrix().numpy()
        order = np.argsort(-loss, axis=None, kind="stable")[:count]
        labels, rivals = np.unravel_index(order, loss.shape)
        return [
            Pair(int(y), int(j), float(loss[y, j]))
            for y, j in zip(labels, rivals, strict=True)
            if y != j and loss[y, j] > 0
        ]

    def matrix(self) -> Tensor:
        """Return the loss of each pair, (C, C), by class and rival."""
        own = self.loss.t().clone()
        own.diagonal().zero_()
        return own


class CandidatePairs:
    """The pairs that are heavy among the two strongest rivals of each row."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self._keys: list[np.ndarray] = []  # class · C + rival
        self._losses: list[np.ndarray] = []
        self._count = 0

    def update(self, rows: MeasuredRows) -> None:
        """Add rows."""
        share = _share(rows.weight, rows.loss, rows.others)
        first = torch.where(rows.right, rows.runner_up, rows.prediction)
        p = torch.where(rows.right, rows.second, rows.confidence)
        self._add((rows.label * self.classes + first).numpy(), (share * p).numpy())
        both = ~(rows.right | (rows.runner_up == rows.label))  # the two strongest are rivals
        if both.any():
            key, p = rows.label * self.classes + rows.runner_up, share * rows.second
            self._add(key[both].numpy(), p[both].numpy())

    def merge(self, other: CandidatePairs) -> None:
        """Add the rows of another."""
        self._add(*other.sums())

    def heaviest(self, count: int) -> list[Pair]:
        """Return the pairs that carry most, in that order; their losses are too small."""
        keys, loss = self.sums()
        order = np.argsort(-loss, kind="stable")[:count]
        return [Pair(*divmod(int(keys[i]), self.classes), float(loss[i])) for i in order]

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the keys of the pairs, ascending, and their losses."""
        if not self._keys:
            return np.empty(0, np.int64), np.empty(0)
        keys, place = np.unique(np.concatenate(self._keys), return_inverse=True)
        return keys, np.bincount(place, np.concatenate(self._losses), len(keys))

    def _add(self, keys: np.ndarray, loss: np.ndarray) -> None:
        self._keys.append(keys)
        self._losses.append(loss)
        self._count += len(keys)
        if self._count > 2 * KEPT:
            keys, loss = self.sums()
            if len(keys) > KEPT:
                kept = np.sort(np.argsort(-loss, kind="stable")[: KEPT // 2])
                keys, loss = keys[kept], loss[kept]
            self._keys, self._losses, self._count = [keys], [loss], len(keys)


class ChosenPairs:
    """The loss of pairs that a first sweep has chosen."""

    def __init__(self, pairs: list[Pair], classes: int) -> None:
        self.labels, self.rivals = torch.tensor([pair[:2] for pair in pairs]).reshape(-1, 2).t()
        order = torch.argsort(self.labels, stable=True)
        self.labels, self.rivals = self.labels[order], self.rivals[order]
        self.first = torch.searchsorted(self.labels, torch.arange(classes + 1))
        self.loss = torch.zeros(len(pairs), dtype=torch.float64)

    def update(self, tile: Tile, rows: Rows) -> None:
        """Add the rows of a tile, and what is known of each."""
        share = _share(rows.weight, rows.loss, rows.others)
        counts = self.first[rows.label + 1] - self.first[rows.label]
        row = torch.repeat_interleave(torch.arange(len(rows)), counts)
        before = counts.cumsum(0) - counts
        pair = self.first[rows.label][row] + torch.arange(len(row)) - before[row]
        self.loss.index_add_(0, pair, share[row] * tile.p_at(row, self.rivals[pair]))

    def merge(self, other: ChosenPairs) -> None:
        """Add the rows of another."""
        self.loss += other.loss

    def heaviest(self, count: int) -> list[Pair]:
        """Return the pairs that carry most, in that order."""
        order = torch.argsort(-self.loss, stable=True)[:count]
        return [Pair(int(self.labels[i]), int(self.rivals[i]), float(self.loss[i])) for i in order]


def _share(weight: Tensor, loss: Tensor, others: Tensor) -> Tensor:
    """Return s ℓ / Σ_{k≠y} p_k, of the shape of the losses; 0 where a row does not count or has no loss."""
    there = (weight > 0) & (others > 0) & loss.isfinite()
    return torch.where(there, weight * loss / others, 0.0)
