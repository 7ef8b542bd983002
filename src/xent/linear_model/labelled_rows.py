"""The rows of a fit: features (N, D) with targets and weights, on the device that computes with them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from xent.data.batches import Batch, as_tensor
from xent.data.rows import RowSource, SelectedRows

HOST = torch.device("cpu")

Chunk: TypeAlias = tuple[Batch, Tensor, Tensor | None]
"""Features (n, D), targets (n,) or (n, C), weights (n,) or None."""


@dataclasses.dataclass(frozen=True)
class LabelledRows:
    """The rows of a source with what they are to be."""

    source: RowSource
    target: np.ndarray  # (N,) class numbers or (N, C) masses
    weight: np.ndarray | None = None  # (N,)
    device: torch.device = HOST  # where they are computed with

    def take(self, rows: np.ndarray) -> LabelledRows:
        """Return some of the rows: (n,) positions, ascending."""
        weight = None if self.weight is None else self.weight[rows]
        return LabelledRows(SelectedRows(self.source, rows), self.target[rows], weight, self.device)

    def mass(self, rows: slice | np.ndarray) -> np.ndarray:
        """Return the weights of some rows times the sums of their targets, (n,)."""
        target, weight = self.target[rows], self.weight
        mass = np.ones(len(target)) if weight is None else weight[rows].astype(np.float64)
        return mass if target.ndim == 1 else mass * target.sum(axis=1, dtype=np.float64)

    def chunks(self, shares: Sequence[slice] | None = None) -> Iterator[Chunk]:
        """Yield the rows a chunk at a time; of rows in memory each chunk is one of ``shares``."""
        if not self.source.in_memory:
            yield from self._read()
            return
        ((x, target, weight),) = self._kept
        for rows in shares or [slice(0, len(x))]:
            yield x.part(rows), target[rows], None if weight is None else weight[rows]

    @functools.cached_property
    def _kept(self) -> list[Chunk]:
        return list(self._read())

    def _read(self) -> Iterator[Chunk]:
        for rows, x in self.source.batches():
            weight = None if self.weight is None else as_tensor(self.weight[rows]).to(self.device)
            yield x.to(self.device), as_tensor(self.target[rows]).to(self.device), weight
