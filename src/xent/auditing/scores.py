"""Scores of binary events as they are, while there are few; beyond, the cells of `calibration` serve.

score = log p − log (1 − p), in whose order the rows of equal scores make a cell
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MOST = 1 << 18
"""Scores that are kept."""


class Scores:
    """The scores of K events in each row, and their weights."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor, Tensor]] | None = []
        self._count = 0

    @property
    def kept(self) -> bool:
        """True while there are few enough."""
        return self._parts is not None

    def add(self, score: Tensor, hits: Tensor, weight: Tensor) -> None:
        """Add rows: scores (n, K), the weight of the event in each (n, K), the weight of the row (n,)."""
        self._count += score.numel()
        if self._parts is None or self._count > MOST:
            self._parts = None
        else:
            self._parts.append((score, hits, weight))

    def merge(self, other: Scores) -> None:
        """Add the rows of another."""
        self._count += other._count
        if self._parts is None or other._parts is None or self._count > MOST:
            self._parts = None
        else:
            self._parts += other._parts

    def cells(self, event: int = 0) -> tuple[np.ndarray, np.ndarray] | None:
        """Return weight and hits of each score of an event, ascending; None where the scores are not kept."""
        if not self._parts:
            return None
        score, hits, weight = (torch.cat(each).numpy() for each in zip(*self._parts, strict=True))
        values, at = np.unique(score[:, event], return_inverse=True)
        return np.bincount(at, weight, len(values)), np.bincount(at, hits[:, event], len(values))
