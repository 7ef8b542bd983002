"""Features brought to mean 0 and deviation 1: (x − μ)/σ, μ and σ those of all ranks' training rows.

    μ = Σ_n m_n x_n / Σ_n m_n       σ² = Σ_n m_n (x_n − μ)² / Σ_n m_n

One pass over the rows: means and squares of two parts give those of both (Chan, Golub and LeVeque, 1979).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from xent._processes.group import ALONE, Ranks
from xent._util.text import quoted
from xent.data.batches import Batch, DenseBatch
from xent.data.rows import RowSource, blocks
from xent.data.table import Table
from xent.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mass, means and mean squares of the columns of some rows, (D,) each, in float64."""

    mass: float
    mean: np.ndarray
    squares: np.ndarray  # of deviations from the mean

    def about(self, center: np.ndarray) -> np.ndarray:
        """Return the mean squares of deviations from another point."""
        return self.squares + (self.mean - center) ** 2

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of both parts."""
        mass = self.mass + other.mass
        share = other.mass / mass if mass else 0.0
        mean = self.mean + share * (other.mean - self.mean)
        both = (1 - share) * self.about(mean) + share * other.about(mean)
        return Moments(mass, mean, both)


def moments(
    parts: Iterable[tuple[Tensor, Batch]], n_features: int, dtype: np.dtype, ranks: Ranks = ALONE
) -> Moments:
    """Return the moments of all ranks' rows, handed over as masses (n,) and features (n, D) of a few each.

    Those of a part are formed in a type, or a wider one. Columns whose mean is beyond the largest number
    have mean 0.
    """
    zero = np.zeros(n_features)
    found = Moments(0.0, zero, zero)
    with np.errstate(all="ignore"):  # numbers whose squares leave the range are the caller's to judge
        for mass, x in parts:
            total = float(mass.sum(dtype=torch.float64))
            if not total:
                continue
            found += Moments(total, *x.moments(mass.double() / total, getattr(torch, dtype.name)))
        if ranks.size > 1 and (total := float(ranks.sum(found.mass))):
            of_all = ranks.sum(found.mean * found.mass) / total
            found = Moments(total, of_all, ranks.sum(found.about(of_all) * found.mass) / total)
    return dataclasses.replace(found, mean=np.where(np.isfinite(found.mean), found.mean, 0.0))


def check_range(table: Table, ranks: Ranks) -> None:
    """Raise ``BadInput`` for a column whose squares, or their sum over rows, would be infinite or 0."""
    source = table.rows
    limit = 1e150 if source.dtype == np.float64 else 1e30
    peaks = np.zeros(source.shape[1])
    for _, x in blocks(source):
        np.maximum(peaks, x.abs().amax(0).double().numpy(), out=peaks)
    peaks = ranks.maximum(peaks)
    beyond = np.flatnonzero((peaks > limit) | ((peaks > 0) & (peaks < 1 / limit)))
    if len(beyond):
        raise BadInput(
            f"{table.source}: the numbers in column {quoted(table.feature_names[beyond[0]])} reach "
            f"{peaks[beyond[0]]:.3g}, outside {1 / limit:g} to {limit:g}; rescale or exclude the column"
        )


def standardisation(
    source: RowSource, wanted: bool, ranks: Ranks, weight: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and scale, (D,) each, of the columns of all ranks' rows (n, D) with weights (n,).

    A whole weight counts as that many rows, and 0 as none.
    """
    n_features, dtype = source.shape[1], source.dtype
    if not wanted:
        return np.zeros(n_features, dtype), np.ones(n_features, dtype)
    weights = torch.ones(source.shape[0]) if weight is None else torch.from_numpy(weight)
    parts = ((weights[here], DenseBatch(x)) for here, x in blocks(source))
    found = moments(parts, n_features, np.dtype(np.float64), ranks)
    scale = np.sqrt(found.squares)
    # a constant feature's deviation is rounding; dividing by it would make noise of size 1
    constant = scale <= 10 * np.finfo(dtype).eps * np.abs(found.mean)
    return found.mean.astype(dtype), np.where(constant, 1.0, scale).astype(dtype)
