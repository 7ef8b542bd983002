"""Sums by cell, however few rows come at a time."""

from __future__ import annotations

import numpy as np


def add_at(sums: np.ndarray, cells: np.ndarray, values: np.ndarray | None = None) -> None:
    """Add numbers (n,), or 1 for each, to the sums (K,) of their cells.

    >>> sums = np.zeros(3)
    >>> add_at(sums, np.array([0, 2, 2]), np.array([1.0, 2.0, 3.0]))
    >>> sums.tolist()
    [1.0, 0.0, 5.0]
    """
    if 4 * len(cells) < len(sums):  # counting goes through all cells
        np.add.at(sums, cells, 1 if values is None else values)
    else:
        sums += np.bincount(cells, values, len(sums)).astype(sums.dtype, copy=False)
