"""A sample of rows that depends on neither batches nor processes: those of the smallest keys.

    key(n) = the n-th number that SplitMix64 gives for a fixed seed

The keys are alike to random ones, so that the K rows of the smallest keys are a simple random sample without
replacement; of two samples the K smallest keys together are the sample of both.
Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from xent.auditing.rows import Rows
from xent.auditing.tiles import Tile

NUMBERS = 1 << 22
"""Log-probabilities that a sample holds at most, 16 MiB of float32."""

MOST = 8192
"""Rows of a sample at most."""


class Sample:
    """Log-probabilities, classes and weights of some rows, in no order."""

    def __init__(self, classes: int) -> None:
        self.size = max(16, min(MOST, NUMBERS // classes))
        self.key = np.empty(0, np.uint64)
        self.log_p = torch.empty((0, classes))
        self.label = torch.empty(0, dtype=torch.int64)
        self.weight = torch.empty(0, dtype=torch.float64)
        self.mass: Tensor | None = None
        self._largest = np.uint64(0)  # of the keys

    def update(self, tile: Tile, rows: Rows) -> None:
        """Add the rows of a tile; those of weight 0 or of infinite loss are passed over."""
        key = keys(np.arange(rows.start, rows.start + len(rows), dtype=np.uint64))
        wanted = ((rows.weight > 0) & rows.loss.isfinite()).numpy()
        if len(self.key) == self.size:
            wanted &= key < self._largest
        if not wanted.any():
            return
        chosen = np.flatnonzero(wanted)
        if len(chosen) > self.size:
            chosen = chosen[np.argpartition(key[chosen], self.size)[: self.size]]
        part = tile.chosen(torch.from_numpy(chosen))
        self._join(key[chosen], part.log_p, part.label, part.weight, part.mass)

    def merge(self, other: Sample) -> None:
        """Add the rows of another."""
        self._join(other.key, other.log_p, other.label, other.weight, other.mass)

    def sorted(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return log-probabilities (k, C), classes, weights (k,) and masses, in the order of the keys."""
        at = torch.from_numpy(np.argsort(self.key))
        return self.log_p[at], self.label[at], self.weight[at], None if self.mass is None else self.mass[at]

    def _join(
        self, key: np.ndarray, log_p: Tensor, label: Tensor, weight: Tensor, mass: Tensor | None
    ) -> None:
        if not len(key):
            return
        own, room = len(self.key), max(0, self.size - len(self.key))
        if room:  # rows are only appended while there is room
            self.key = np.concatenate([self.key, key])
            self.log_p = torch.cat([self.log_p.to(log_p.dtype), log_p])
            self.label, self.weight = torch.cat([self.label, label]), torch.cat([self.weight, weight])
            if mass is not None:
                self.mass = mass.clone() if self.mass is None else torch.cat([self.mass, mass])
            if len(self.key) > self.size:
                self._keep(np.argpartition(self.key, self.size)[: self.size])
        else:
            every = np.concatenate([self.key, key])
            kept = np.zeros(len(every), dtype=bool)
            kept[np.argpartition(every, self.size)[: self.size]] = True
            free, new = np.flatnonzero(~kept[:own]), np.flatnonzero(kept[own:])
            self.key[free] = key[new]
            to, of = torch.from_numpy(free), torch.from_numpy(new)
            self.log_p[to], self.label[to], self.weight[to] = log_p[of].to(self.log_p), label[of], weight[of]
            if mass is not None and self.mass is not None:
                self.mass[to] = mass[of]
        self._largest = self.key.max()

    def _keep(self, rows: np.ndarray) -> None:
        at = torch.from_numpy(rows)
        self.key, self.log_p = self.key[rows], self.log_p[at]
        self.label, self.weight = self.label[at], self.weight[at]
        self.mass = None if self.mass is None else self.mass[at]


def keys(rows: np.ndarray) -> np.ndarray:
    """Return the keys of row numbers, (n,) uint64.

    >>> [hex(int(key)) for key in keys(np.arange(2, dtype=np.uint64))]
    ['0xe220a8397b1dcdaf', '0x6e789e6aa1b965f4']
    """
    with np.errstate(over="ignore"):
        z = (rows + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))
