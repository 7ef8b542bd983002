"""A sample of rows that depends on neither batches nor processes: a priority sample.

    size q = s (1 + ℓ)        key = u / q        u(n): the n-th number that SplitMix64 gives for a fixed seed
    kept: the K rows of the smallest keys        weight in the sample: s max(1, 1 / (q · the next key))

A row of great weight or great loss is in the sample for certain; the others stand for those that are not, so
that a sum over the sample, by its weights, is that over all rows but for chance. Of two samples the smallest
keys together are the sample of both.
Sources: Duffield, Lund and Thorup, "Priority sampling for estimation of arbitrary subset sums", 2007; Steele,
Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
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
        self.key = np.empty(0)
        self.quantity = np.empty(0)  # s (1 + ℓ)
        self.log_p = torch.empty((0, classes))
        self.label = torch.empty(0, dtype=torch.int64)
        self.weight = torch.empty(0, dtype=torch.float64)
        self.mass: Tensor | None = None
        self._largest = 0.0  # of the keys

    def update(self, tile: Tile, rows: Rows) -> None:
        """Add the rows of a tile; those of weight 0 or of infinite loss are passed over."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            quantity = (rows.weight * (1 + rows.loss)).numpy()
            key = uniform(np.arange(rows.start, rows.start + len(rows), dtype=np.uint64)) / quantity
        wanted = (quantity > 0) & np.isfinite(quantity)
        if len(self.key) > self.size:
            wanted &= key < self._largest
        if not wanted.any():
            return
        chosen = np.flatnonzero(wanted)
        if len(chosen) > self.size + 1:
            chosen = chosen[np.argpartition(key[chosen], self.size)[: self.size + 1]]
        part = tile.chosen(torch.from_numpy(chosen))
        self._join(key[chosen], quantity[chosen], part.log_p, part.label, part.weight, part.mass)

    def merge(self, other: Sample) -> None:
        """Add the rows of another."""
        self._join(other.key, other.quantity, other.log_p, other.label, other.weight, other.mass)

    def result(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return log-probabilities, classes (k,), weights in the sample and masses, by ascending keys."""
        order = np.argsort(self.key)
        stands_for = np.ones(len(order))
        if len(order) > self.size:
            stands_for = np.maximum(1.0, 1 / (self.quantity[order] * self._largest))
        at = torch.from_numpy(order[: self.size])
        weight = self.weight[at] * torch.from_numpy(stands_for[: self.size])
        return self.log_p[at], self.label[at], weight, None if self.mass is None else self.mass[at]

    def _join(
        self,
        key: np.ndarray,
        quantity: np.ndarray,
        log_p: Tensor,
        label: Tensor,
        weight: Tensor,
        mass: Tensor | None,
    ) -> None:
        """Hold the rows of the smallest keys, one more than the sample has."""
        if not len(key):
            return
        own, most = len(self.key), self.size + 1
        every = np.concatenate([self.key, key])
        kept = np.ones(len(every), dtype=bool)
        if len(every) > most:
            kept[np.argpartition(every, most - 1)[most:]] = False
        free, new = np.flatnonzero(~kept[:own]), np.flatnonzero(kept[own:])
        here, more = (
            new[: len(free)],
            new[len(free) :],
        )  # rows take the places of those that go, then new ones
        arrays = {"key": key, "quantity": quantity}
        tensors = {"log_p": log_p, "label": label, "weight": weight}
        if mass is not None:
            self.mass = mass[:0] if self.mass is None else self.mass
            tensors["mass"] = mass
        for name, given in arrays.items():
            held = getattr(self, name)
            held[free] = given[here]
            setattr(self, name, np.concatenate([held, given[more]]) if len(more) else held)
        to, of, rest = (torch.from_numpy(x) for x in (free, here, more))
        for name, values in tensors.items():
            held = getattr(self, name).to(values.dtype)
            held[to] = values[of]
            setattr(self, name, torch.cat([held, values[rest]]) if len(more) else held)
        self._largest = float(self.key.max())


def uniform(rows: np.ndarray) -> np.ndarray:
    """Return a number between 0 and 1 for each row number, (n,) float64."""
    return ((keys(rows) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


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
