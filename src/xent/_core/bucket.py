"""The loss of a row whose target has masses for k classes, and one for all others together, the bucket.

    ℓ = −Σ_K q_j·log p_j − Q̄·log P̄        P̄ = Σ_{j∉K} p_j, summed from its own exponentials

The cross-entropy of k + 1 classes: numbers of a row made from numbers of a row. No tile knows of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xent._core.ops import cut

SLACK = 1e-6  # how far rounding may carry the bucket's mass below 0


class Bucket(NamedTuple):
    """The target masses of M rows."""

    mass: Tensor  # (M, K) float64
    rest: Tensor  # (M,) of the other classes together

    def __call__(self, log_prob: Tensor, log_rest: Tensor) -> Tensor:
        """Return ℓ (M,) from log p of the K classes (M, K) and log P̄ (M,)."""
        return -(_weighed(self.mass, log_prob).sum(1) + _weighed(self.rest, log_rest))

    def rows(self, rows: slice) -> Bucket:
        return Bucket(cut(self.mass, rows), cut(self.rest, rows))


def bucket_mass(mass: Tensor, rest: Tensor | None, others: int) -> Tensor:
    """Return the mass of `others` further classes together, (...), from those of K, (..., K).

    One below 0 by no more than `SLACK` is 0, by more nan; so is one above 0 where there is no other class.
    """
    found = 1 - mass.sum(-1) if rest is None else rest
    small = found.abs() <= SLACK
    found = torch.where((found < 0) & small, 0.0, found)
    if others == 0:
        found = torch.where(small, 0.0, torch.nan)
    return torch.where(found >= 0, found, torch.nan)


def _weighed(mass: Tensor, log_p: Tensor) -> Tensor:
    """Return mass·log p with 0·(−inf) = 0."""
    none = mass == 0
    return torch.where(none, 0.0, mass * torch.where(none, 0.0, log_p))
