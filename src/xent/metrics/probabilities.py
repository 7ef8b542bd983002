"""Rows of probabilities, each checked to be one:

    0 ≤ p_c ≤ 1        |Σ_c p_c − 1| ≤ √eps

with eps the rounding unit of the type that they are stored in: a row may err by what rounding can explain
(1.5e-8 in float64, 3.5e-4 in float32, 0.03 in float16, 0.09 in bfloat16), and by no more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xent.metrics.arrays import Rows, read_numbers


@dataclass(frozen=True)
class Probabilities:
    """N rows over C labels; or, *single*, the N probabilities of the second of two labels."""

    rows: Rows  # (N, C), or (N,) where single
    single: bool

    @property
    def count(self) -> int:
        return self.rows.shape[0]

    @property
    def classes(self) -> int:
        return 2 if self.single else self.rows.shape[1]

    @property
    def tolerance(self) -> float:
        return math.sqrt(self.rows.eps)

    def __getitem__(self, part: slice) -> Tensor:  # (R, C) or (R,)
        """Some rows, checked: ValueError names the first that is no distribution, and its value."""
        p = self.rows[part]
        low, high = (bound.item() for bound in p.aminmax())
        good = low >= 0 and high <= 1  # nan compares as neither
        if good and not self.single:
            least, most = (bound.item() for bound in _sums(p).aminmax())
            good = 1 - self.tolerance <= least and most <= 1 + self.tolerance
        if not good:
            raise ValueError(self._fault(p, part.start))
        return p

    def _fault(self, p: Tensor, start: int) -> str:
        """What is wrong with the first bad row of ``p``, which holds the rows from ``start`` on."""
        p = p[:, None] if self.single else p
        outside = ~((p >= 0) & (p <= 1))  # (R, C)
        bad = outside.any(1)
        if not self.single:
            bad |= ~((_sums(p) - 1).abs() <= self.tolerance)
        row = int(bad.nonzero()[0])
        columns = outside[row].nonzero()
        if len(columns):
            column = int(columns[0])
            where = f"row {start + row}" if self.single else f"row {start + row}, column {column}"
            return (
                f"y_pred is {p[row, column].item():.6g} at {where}, and a probability lies in 0..1; "
                f"for logits use xent.cross_entropy"
            )
        dtype = str(self.rows.source.dtype).removeprefix("torch.")
        return (
            f"y_pred sums to {_sums(p)[row].item():.9g} at row {start + row}, and the probabilities of a row "
            f"sum to 1 (± {self.tolerance:.2g} for {dtype}); divide each row by its sum, or pass "
            f"the type that they were computed in"
        )


def read_probabilities(y_pred: Any) -> Probabilities:
    """(N, C); or (N,) or (N, 1) of the second label. The shape is checked here, rows when they are read."""
    rows = read_numbers(y_pred, "y_pred")
    shape = rows.shape
    if len(shape) not in (1, 2) or 0 in shape[1:]:
        raise ValueError(
            f"y_pred must be (N, C), one column for each label, or (N,), the probabilities of the second of "
            f"two labels; got shape {shape}"
        )
    if len(shape) == 2 and shape[1] == 1:
        rows = Rows(rows.source[:, 0])
    return Probabilities(rows, len(rows.shape) == 1)


def _sums(p: Tensor) -> Tensor:  # (R, C) → (R,)
    """Row sums in the type of p, whose pairwise sum errs by far less than √eps; half types in float32."""
    return p.sum(1, dtype=torch.float32 if p.dtype.itemsize == 2 else None)
