"""Features brought to mean 0 and deviation 1: (x − μ)/σ, μ and σ those of all ranks' training rows."""

from __future__ import annotations

import numpy as np

from xent._processes.group import Ranks
from xent._util.text import quoted
from xent.data.rows import BLOCK, slices
from xent.data.table import Table
from xent.errors import BadInput


def check_range(table: Table, ranks: Ranks) -> None:
    """Raise ``BadInput`` for a column whose squares, or their sum over rows, would be infinite or 0."""
    x = table.features
    limit = 1e150 if x.dtype == np.float64 else 1e30
    peaks = ranks.maximum(np.maximum(x.max(axis=0, initial=0.0), -x.min(axis=0, initial=0.0)))
    beyond = np.flatnonzero((peaks > limit) | ((peaks > 0) & (peaks < 1 / limit)))
    if len(beyond):
        raise BadInput(
            f"{table.source}: the numbers in column {quoted(table.feature_names[beyond[0]])} reach "
            f"{peaks[beyond[0]]:.3g}, outside {1 / limit:g} to {limit:g}; rescale or exclude the column"
        )


def standardisation(x: np.ndarray, wanted: bool, ranks: Ranks) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and scale, (D,) each, of the columns of all ranks' x (n, D)."""
    if not wanted:
        return np.zeros(x.shape[1], x.dtype), np.ones(x.shape[1], x.dtype)
    rows = float(ranks.sum(len(x)))
    mean = ranks.sum(x.sum(axis=0, dtype=np.float64)) / rows
    squares = np.zeros(x.shape[1])
    for part in slices(x.shape, BLOCK):
        squares += np.square(x[part] - mean).sum(axis=0)
    scale = np.sqrt(ranks.sum(squares) / rows)
    # a constant feature's deviation is rounding; dividing by it would make noise of size 1
    constant = scale <= 10 * np.finfo(x.dtype).eps * np.abs(mean)
    return mean.astype(x.dtype), np.where(constant, 1.0, scale).astype(x.dtype)
