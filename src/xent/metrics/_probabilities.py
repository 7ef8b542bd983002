"""Rows of probabilities, each checked to be one:

    0 ≤ p_c ≤ 1        |Σ_c p_c − 1| ≤ max(√eps, 1e-6, C·5e-7)

with eps the rounding unit of the type that they are stored in. A row is judged by the digits it has: √eps is
what computing in a type can explain (3.5e-4 in float32, 0.03 in float16, 0.09 in bfloat16), 1e-6 what having
been float32 can, C·5e-7 what writing C numbers to six places can. A row that is off by more, up to 1e-3, is
one that fewer digits may explain: it counts once the caller asks for it, divided by its sum.
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
HAIR = 1 + 1e-4  # 0.333333 three times is off by 1e-6, and by a little more in binary


@dataclass(frozen=True)
class Probabilities:
    """N rows over C labels; or, *single*, the N probabilities of the second of two labels."""

    rows: Rows  # (N, C), or (N,) where single
    single: bool
    renormalize: bool = False  # divide each row by its sum

    @property
    def count(self) -> int:
        return self.rows.shape[0]

    @property
    def classes(self) -> int:
        return 2 if self.single else self.rows.shape[1]

    @property
    def exact(self) -> float:
        """The largest distance of a sum from 1 at which the row counts as it is."""
        return max(math.sqrt(self.rows.eps), CONVERTED, self.classes * SIX_PLACES)

    @property
    def nearly(self) -> float:
        """The largest distance of a sum from 1 at which the row counts once it is divided by it."""
        return max(FEW_DIGITS, self.exact)

    @property
    def tolerance(self) -> float:
        return self.nearly if self.renormalize else self.exact

    def __getitem__(self, part: slice) -> Tensor:  # (R, C) or (R,)
        """Some rows, checked: ValueError names the first that is no distribution, and its value."""
        p = self.rows[part]
        low, high = (bound.item() for bound in p.aminmax())
        good = low >= 0 and high <= 1  # nan compares as neither
        if self.single:
            if not good:
                raise ValueError(self._fault(p, part.start))
            return p
        if self.renormalize:
            p = p.to(statistics_dtype(p.device))
        if good:
            # sums in the type of p err by far less than a hundredth of √eps; half types' are in float32
            sums = p.sum(1, dtype=torch.float32 if p.dtype.itemsize == 2 else None)
            least, most = (bound.item() for bound in sums.aminmax())
            sure = 0.99 * self.tolerance
            good = (0 < least >= 1 - sure and most <= 1 + sure) or not self._off(p).any()
        if not good:
            raise ValueError(self._fault(p, part.start))
        return p / p.sum(1, keepdim=True) if self.renormalize else p

    def _off(self, p: Tensor) -> Tensor:  # (R, C) → (R,) bool
        """Return whether each row's sum is too far off 1, in float64, so that all parts judge a row alike."""
        sums = p.sum(1, dtype=statistics_dtype(p.device))
        return ~((sums - 1).abs() <= self.tolerance * HAIR) | (sums == 0)

    def _fault(self, p: Tensor, start: int) -> str:
        """What is wrong with the first bad row of ``p``, which holds the rows from ``start`` on."""
        p = p[:, None] if self.single else p
        outside = ~((p >= 0) & (p <= 1))  # (R, C)
        bad = outside.any(1)
        if not self.single:
            bad |= self._off(p)
        row = int(bad.nonzero()[0])
        columns = outside[row].nonzero()
        if len(columns):
            column = int(columns[0])
            where = f"row {start + row}" if self.single else f"row {start + row}, column {column}"
            return (
                f"y_pred is {p[row, column].item():.6g} at {where}, and a probability lies in 0..1; "
                f"for logits use xent.cross_entropy"
            )
        found = p[row].sum(dtype=statistics_dtype(p.device)).item()
        dtype = str(self.rows.source.dtype).removeprefix("torch.")
        said = f"y_pred sums to {found:.9g} at row {start + row}, and the probabilities of a row sum to 1"
        if abs(found - 1) <= self.nearly * HAIR:
            return (
                f"{said} (± {self.exact:.2g} for {self.classes} columns of {dtype}); pass renormalize=True "
                f"to divide each row by its sum, or all digits that were computed"
            )
        return f"{said} (± {self.nearly:.2g} at most); divide each row by its sum, or pass what was computed"


def read_probabilities(y_pred: Any, renormalize: Any = False) -> Probabilities:
    """(N, C); or (N,) or (N, 1) of the second label. The shape is checked here, rows when they are read."""
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
