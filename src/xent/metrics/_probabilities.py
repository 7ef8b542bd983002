"""Rows of probabilities, each checked to be a distribution:

    0 ≤ p_c ≤ 1        |Σ_c p_c − 1| ≤ max(√eps, 1e-6, C·5e-7)

with eps the rounding unit of the type in which the row is stored. √eps covers rows computed in that type
(3.5e-4 in float32, 0.03 in float16, 0.09 in bfloat16), 1e-6 rows that were float32 once, C·5e-7 rows written
to six places. A sum that is off by more, up to 1e-3, may come from fewer digits: such a row is accepted with
``renormalize``, which divides it by its sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xent._core.statistics import statistics_dtype
from xent._core.validators import valid
from xent.metrics._arrays import Rows, read_numbers

CONVERTED, SIX_PLACES, FEW_DIGITS = 1e-6, 5e-7, 1e-3
SLACK = 1 + 1e-4  # 3·0.333333 is off by 1e-6, and by a little more in binary


@dataclass(frozen=True)
class Probabilities:
    """N rows of probabilities over C labels; if *single*, those of the second of two labels."""

    rows: Rows  # (N, C), or (N,) where single
    single: bool
    renormalize: bool = False  # divide each row by its sum

    @property
    def count(self) -> int:
        """The number of rows, N."""
        return self.rows.shape[0]

    @property
    def classes(self) -> int:
        return 2 if self.single else self.rows.shape[1]

    @property
    def unscaled_tolerance(self) -> float:
        """The largest distance of a sum from 1 at which a row is accepted as it is."""
        return max(math.sqrt(self.rows.eps), CONVERTED, self.classes * SIX_PLACES)

    @property
    def scaled_tolerance(self) -> float:
        """The largest distance of a sum from 1 at which a row is accepted once it is divided by the sum."""
        return max(FEW_DIGITS, self.unscaled_tolerance)

    @property
    def tolerance(self) -> float:
        return self.scaled_tolerance if self.renormalize else self.unscaled_tolerance

    def __getitem__(self, part: slice) -> Tensor:  # (R, C) or (R,)
        """Return some rows; raise a ValueError that names the first which is no distribution."""
        p = self.rows[part]
        low, high = (bound.item() for bound in p.aminmax())
        good = low >= 0 and high <= 1  # nan compares as neither
        if self.single:
            if not good:
                raise ValueError(self._error_message(p, part.start))
            return p
        if self.renormalize:
            p = p.to(statistics_dtype(p.device))
        if good:
            # rounding a sum in the type of p costs far less than √eps/100; half types are summed in float32
            sums = p.sum(1, dtype=torch.float32 if p.dtype.itemsize == 2 else None)
            least, most = (bound.item() for bound in sums.aminmax())
            within = 0.99 * self.tolerance
            good = (0 < least >= 1 - within and most <= 1 + within) or not self.bad_sums(p).any()
        if not good:
            raise ValueError(self._error_message(p, part.start))
        return p / p.sum(1, keepdim=True) if self.renormalize else p

    def bad_sums(self, p: Tensor) -> Tensor:  # (R, C) → (R,) bool
        """Return whether each row's sum is too far off 1, summed in float64 so that no other row matters."""
        sums = p.sum(1, dtype=statistics_dtype(p.device))
        return ~((sums - 1).abs() <= self.tolerance * SLACK) | (sums == 0)

    def _error_message(self, p: Tensor, start: int) -> str:
        """Describe the fault of the first bad row of ``p``, which holds the rows from ``start`` on."""
        p = p[:, None] if self.single else p
        outside = ~((p >= 0) & (p <= 1))  # (R, C)
        bad = outside.any(1)
        if not self.single:
            bad |= self.bad_sums(p)
        row = int(bad.nonzero()[0])
        columns = outside[row].nonzero()
        if len(columns):
            column = int(columns[0])
            where = f"row {start + row}" if self.single else f"row {start + row}, column {column}"
            return (
                f"y_pred is {p[row, column].item():.6g} at {where}, and a probability lies in 0..1; "
                f"for logits use xent.cross_entropy"
            )
        row_sum = p[row].sum(dtype=statistics_dtype(p.device)).item()
        dtype = str(self.rows.source.dtype).removeprefix("torch.")
        message = (
            f"y_pred sums to {row_sum:.9g} at row {start + row}, and the probabilities of a row sum to 1"
        )
        if abs(row_sum - 1) <= self.scaled_tolerance * SLACK:
            return (
                f"{message} (± {self.unscaled_tolerance:.2g} for {self.classes} columns of {dtype}); "
                "pass renormalize=True to divide each row by its sum, or all digits that were computed"
            )
        return (
            f"{message} (± {self.scaled_tolerance:.2g} at most); "
            "divide each row by its sum, or pass what was computed"
        )


def read_probabilities(y_pred: Any, renormalize: Any = False) -> Probabilities:
    """Read (N, C), or (N,) or (N, 1) for the second label; only the shape is checked yet."""
    renormalize = valid("renormalize", renormalize)
    rows = read_numbers(y_pred, "y_pred")
    shape = rows.shape
    if len(shape) not in (1, 2) or 0 in shape[1:]:
        raise ValueError(
            f"y_pred must be (N, C), one column for each label, or (N,), the probabilities of the second of "
            f"two labels; got shape {shape}"
        )
    if len(shape) == 2 and shape[1] == 1:
        rows = Rows(rows.source[:, 0])
    return Probabilities(rows, len(rows.shape) == 1, renormalize)
