"""Labels and probabilities for the tests of metrics."""

from __future__ import annotations

import numpy as np


def problem(n=40, c=4, seed=0, dtype=np.float64):
    """Labels (n,), every one of 0..c−1 among them, and probabilities (n, c)."""
    rng = np.random.default_rng(seed)
    p = rng.random((n, c)) + 1e-3
    y = np.concatenate([np.arange(c), rng.integers(c, size=n - c)])
    return rng.permutation(y), (p / p.sum(1, keepdims=True)).astype(dtype)


def objects(values):
    """An array of objects as they are, tuples too."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array
