"""Features (N, D) of which only what is not 0 is stored, and their products less a center, never taken off.

    (x − m) Wᵀ = x Wᵀ − m Wᵀ        Gᵀ (x − m) = Gᵀ x − (Gᵀ 1) mᵀ

The products with x are SciPy's, of compressed rows (CSR): they cost what is stored times C. Rows of which so
much is stored that a dense product is sooner are filled in, a batch at a time (`FilledRows`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from xent.data.batches import Batch, DenseBatch, slices
from xent.data.rows import BATCH, RowSource

DENSE = 0.25
"""Share of the numbers that is stored from which on dense products of rows filled in are sooner."""

ENTRIES = 1 << 20
"""Stored numbers of which float64 intermediates are formed at a time."""

SPREAD = 16
"""Stored numbers of a tile, at least, in multiples of D: a product of it writes a whole (C, D)."""


class SparseRows:
    """Compressed rows in memory, of float32 or float64, without duplicate entries."""

    in_memory = True

    def __init__(self, x: sparse.csr_array) -> None:  # (N, D)
        self._batch = SparseBatch(x)
        self.shape, self.dtype = x.shape, x.dtype
        self.width = stored_a_row(x)

    def batches(self) -> Iterator[tuple[slice, Batch]]:
        """Yield the whole."""
        yield slice(0, self.shape[0]), self._batch


class FilledRows:
    """Compressed rows in memory, dense where they are used."""

    in_memory = False

    def __init__(self, x: sparse.csr_array) -> None:  # (N, D)
        self._x = x
        self.shape, self.dtype, self.width = x.shape, x.dtype, x.shape[1]

    def batches(self) -> Iterator[tuple[slice, Batch]]:
        """Yield some rows at a time, dense."""
        for rows in slices(self.shape, BATCH):
            yield rows, DenseBatch(torch.from_numpy(self._x[rows].toarray()))


def sparse_source(X: Any) -> RowSource:
    """Return the rows of a SciPy matrix or array in CSR, of float32 or float64, which is never changed.

    Entries of the same place are added up, in a copy.
    """
    # a matrix of its own, so that what it finds of the order is not noted in the caller's
    x = sparse.csr_array((X.data, X.indices, X.indptr), shape=X.shape)
    x.check_format(full_check=True)
    if not x.has_canonical_format:
        x = x.copy()
        x.sum_duplicates()
    return FilledRows(x) if x.nnz >= DENSE * x.shape[0] * x.shape[1] else SparseRows(x)


def stored_a_row(x: sparse.csr_array) -> int:
    """Return how many numbers a row stores on average, rounded up, and at least 1."""
    return max(1, -(-x.nnz // max(1, x.shape[0])))


class SparseBatch:
    """Compressed rows x (n, D) less a center; None is 0."""

    def __init__(self, x: sparse.csr_array, center: np.ndarray | None = None) -> None:
        self.x, self.center = x, center

    def __len__(self) -> int:
        """Return n."""
        return int(self.x.shape[0])

    def __getitem__(self, here: slice) -> Tensor:
        """Return some of the rows, dense."""
        dense = self.x[here].toarray()
        if self.center is not None:
            dense -= self.center
        return torch.from_numpy(dense)

    def part(self, here: slice) -> SparseBatch:
        """Return some of the rows, themselves where all are meant."""
        return self if here.start == 0 and here.stop >= len(self) else SparseBatch(self.x[here], self.center)

    def parts(self, numbers: int) -> Iterator[slice]:
        """Yield consecutive ranges of the rows, each of about as many stored numbers, or of one row."""
        return slices((len(self), stored_a_row(self.x)), numbers)

    def at(self, positions: np.ndarray) -> SparseBatch:
        """Return the rows at some positions, (n,), a copy."""
        return SparseBatch(self.x[positions], self.center)

    def to(self, device: torch.device) -> SparseBatch:
        """Return the rows: they are computed with on the CPU."""
        assert device.type == "cpu"
        return self

    def joined(self, others: Sequence[Any]) -> SparseBatch:
        """Return these rows, then those of other batches with the same center."""
        if not others:
            return self
        return SparseBatch(sparse.vstack([self.x, *(batch.x for batch in others)], "csr"), self.center)

    def standardised(self, mean: np.ndarray, scale: np.ndarray) -> SparseBatch:
        """Return the rows x as x/scale less mean/scale."""
        assert self.center is None
        x = self.x
        made = sparse.csr_array((x.data / scale[x.indices], x.indices, x.indptr), shape=x.shape)
        return SparseBatch(made.astype(x.dtype), mean / scale)

    def squared(self) -> SparseBatch:
        """Return x², of rows without regard to their center."""
        x = self.x
        return SparseBatch(sparse.csr_array((x.data**2, x.indices, x.indptr), shape=x.shape))

    def moments(self, share: Tensor, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Return Σ s x and Σ s (x − Σ s x)², (D,) each, formed in float64; they do not see the center.

        What is not stored is 0, and deviates by the mean.
        """
        n_features = self.x.shape[1]
        s = share.double().numpy()

        def summed(of: Any) -> np.ndarray:
            total = np.zeros(n_features)
            for rows in self.parts(ENTRIES):
                ends = self.x.indptr[rows.start : rows.stop + 1]
                columns = self.x.indices[ends[0] : ends[-1]]
                of_row = np.repeat(s[rows], np.diff(ends))
                values = of_row * of(self.x.data[ends[0] : ends[-1]].astype(np.float64), columns)
                total += np.bincount(columns, values, n_features)
            return total

        mean = summed(lambda x, _: x)
        squares = summed(lambda x, columns: (x - mean[columns]) ** 2)
        absent = np.clip(1 - summed(lambda x, _: np.ones_like(x)), 0, None)
        return mean, squares + absent * mean**2

    def tiles(
        self,
        rows: int,
        dtype: torch.dtype,
        center: Tensor | None,
    ) -> Iterator[tuple[slice, SparseTile]]:
        """Yield some rows at a time less a center (D,) of all; more than asked for where products ask it."""
        rows = max(rows, SPREAD * self.x.shape[1] // stored_a_row(self.x))
        away = self.center if center is None else center.numpy()
        for start in range(0, len(self), rows):
            here = slice(start, min(start + rows, len(self)))
            yield here, SparseTile(self.part(here).x, away)

    def times(self, W: np.ndarray) -> np.ndarray:
        """Return (x − m) Wᵀ for W (C, D), (n, C)."""
        return SparseTile(self.x, self.center).product(W)

    def gathered(self, g: np.ndarray) -> np.ndarray:
        """Return (x − m)ᵀ g for g (n, C), (D, C)."""
        return SparseTile(self.x, self.center).gathered(g)

    def as_features(self) -> Any:
        """Return the rows, as SciPy has them."""
        return self.x


class SparseTile:
    """Compressed rows x (R, D) less a center."""

    def __init__(self, x: sparse.csr_array, center: np.ndarray | None) -> None:
        self.x, self.center = x, center

    def __len__(self) -> int:
        """Return R."""
        return int(self.x.shape[0])

    def product(self, W: np.ndarray) -> np.ndarray:
        """Return (x − m) Wᵀ for W (C, D), (R, C)."""
        z: np.ndarray = self.x @ W.T
        if self.center is not None:
            z -= (W @ self.center.astype(np.float64)).astype(z.dtype)
        return z

    def gathered(self, g: np.ndarray) -> np.ndarray:
        """Return (x − m)ᵀ g for g (R, C), (D, C)."""
        total: np.ndarray = self.x.T @ g
        if self.center is not None and self.center.any():
            total -= np.outer(self.center, g.sum(0, dtype=np.float64)).astype(total.dtype)
        return total

    def times(self, W: Tensor, axis: int, memory: Tensor) -> Tensor:
        """Return (x − m) Wᵀ for W (C, D): (R, C), or where ``axis`` is 0 (C, R), in a memory."""
        z = torch.from_numpy(self.product(W.numpy()))
        return z if axis == 1 else memory.view(len(W), len(self)).copy_(z.t())

    def add_product(self, g: Tensor, axis: int, total: Tensor) -> None:
        """Add gᵀ (x − m) to a total (C, D), g being (R, C) or (C, R)."""
        of_rows = g if axis == 1 else g.t().contiguous()
        total += torch.from_numpy(self.gathered(of_rows.numpy())).t()
