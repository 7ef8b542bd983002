"""The selection of the rows that count: all N, some by their index, or some by a mask.

    scatter: (M, ...) → (N, ...)        M = N, or as many as the index has

A row that does not count is left out, never multiplied by zero: 0·nan is nan. Where data may decide, the rows
that count are an index, and no others are read. Where it may not (in a graph, under ``vmap``, on a CUDA
device, which would have to wait), all N rows are computed, with harmless contents in those that do not count,
and a mask takes these out of the results.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from xent._core.record import record


@record
class Selection:
    """The rows that count, of N; M of them are computed."""

    masked_on: ClassVar[frozenset[str]] = frozenset({"cuda"})
    """Types of devices on which data may not choose rows: a CUDA device would wait for the host."""

    n_rows: int  # N
    index: Tensor | None = None  # (M,) int64, ascending
    mask: Tensor | None = None  # (M,) bool

    @property
    def count(self) -> int:
        """M."""
        return self.n_rows if self.index is None else self.index.numel()

    def pick(self, chunk: slice) -> slice | Tensor:
        """Return a chunk of the M rows as something that indexes the N rows of the caller's tensors."""
        return chunk if self.index is None else self.index[chunk]

    def gather(self, values: Tensor) -> Tensor:
        """Return (M, ...) from (N, ...)."""
        return values if self.index is None else values[self.index]

    def masked(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Return (M, ...) with `fill` in the rows that the mask takes out."""
        if self.mask is None:
            return values
        return values.masked_fill(~self.mask.reshape(-1, *(1,) * (values.dim() - 1)), fill)

    def scatter(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Return (N, ...) from (M, ...), with `fill` in the rows that do not count."""
        values = self.masked(values, fill)
        if self.index is None:
            return values
        return values.new_full((self.n_rows, *values.shape[1:]), fill).index_copy(0, self.index, values)

    def resolved(self) -> Selection:
        """Return the same rows by index, for code that may look at data."""
        if self.mask is None or bool(self.mask.all()):
            return Selection(self.n_rows, self.index)
        return Selection(self.n_rows, self.mask.nonzero().squeeze(1))
