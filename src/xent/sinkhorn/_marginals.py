"""Whether scores and marginals have a plan at all, and the marginals that it is made for.

r, c ≥ 0    Σ r = Σ c where neither may give way    an allowed pair for every row and column with mass
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDING = 1e-15  # whose root is the relative difference between sums that is taken for rounding


def agreed(
    scores: Tensor,  # (..., N, K)
    row: Tensor,  # (..., N)
    column: Tensor,  # (..., K)
    *,
    row_may_give: bool,
    column_may_give: bool,
    eps: float,  # of the type that the marginals were given in
) -> tuple[Tensor, Tensor]:
    """r and c; 0 where nothing can lie and nothing has to; c with exactly the sum of r where that must be."""
    for name, t in (("row_marginal", row), ("column_marginal", column)):
        bad = ~((t >= 0) & (t < math.inf))
        if bool(bad.any()):
            raise ValueError(f"{name} is {_at(t, bad)}; masses are finite and not negative")
        if not bool((t.sum(-1) < math.inf).all()):
            raise ValueError(f"{name} has a sum beyond {t.dtype}; scale the masses down")
    shut_rows, shut_columns = _shut(scores, row, column)
    for name, mass, shut, may_give in (
        ("row", row, shut_rows, row_may_give),
        ("column", column, shut_columns, column_may_give),
    ):
        if not may_give and bool(shut.any()):
            raise ValueError(
                f"{name} {_place(shut)} has a mass of {float(mass[shut][0]):g}, and every pair that it could "
                f"lie on is forbidden: allow one, or give the {name} no mass"
            )
    if row_may_give or column_may_give:
        return torch.where(shut_rows, 0.0, row), torch.where(shut_columns, 0.0, column)
    rows, columns = row.sum(-1, keepdim=True), column.sum(-1, keepdim=True)
    differ = (rows - columns).abs() > max(eps, ROUNDING) ** 0.5 * rows
    if bool(differ.any()):
        raise ValueError(
            f"the marginals differ in their sums: rows {float(rows[differ][0]):g}, columns "
            f"{float(columns[differ][0]):g}{_item(differ)}; no plan has both. Scale one of them, or let one "
            "give way (row_relaxation, column_relaxation)"
        )
    # sums that differ by rounding alone would be an error that no plan can go below
    return row, column * torch.where(columns > 0, rows / torch.where(columns > 0, columns, 1.0), 1.0)


def usable(
    start: Tensor,  # (..., N)
    row: Tensor,  # (..., N)
) -> None:
    """Raise an error for potentials that say nothing about a row with mass."""
    bad = ~start.isfinite() & ~((start == -math.inf) & (row == 0))
    if bool(bad.any()):
        raise ValueError(
            f"start[0] is {_at(start, bad)}; the potential of a row with mass is finite, and −inf is that of "
            "a row without"
        )


def _shut(scores: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (..., N) and columns (..., K) that have mass and no place for it."""
    if scores.numel() == 0:
        return row > 0, column > 0
    best = scores.amax(-1)
    if bool((best.isnan() | (best == math.inf)).any()):
        bad = scores.isnan() | (scores == math.inf)
        raise ValueError(
            f"scores hold {_at(scores, bad)}; only −inf, which forbids a pair, is not finite in them"
        )
    empty_rows, empty_columns = row == 0, column == 0
    if bool(empty_rows.any()) or bool(empty_columns.any()):
        # a row lies on columns that have mass, and the other way round
        scores = scores.masked_fill(empty_rows[..., None] | empty_columns[..., None, :], -math.inf)
        best = scores.amax(-1)
    return (best == -math.inf) & ~empty_rows, (scores.amax(-2) == -math.inf) & ~empty_columns


def _at(t: Tensor, bad: Tensor) -> str:
    return f"{float(t[bad][0]):g} at {_place(bad)}"


def _place(bad: Tensor) -> int | tuple[int, ...]:
    place = tuple(bad.nonzero()[0].tolist())
    return place[0] if len(place) == 1 else place


def _item(bad: Tensor) -> str:
    return "" if bad.numel() == 1 else f" (item {bad[..., 0].nonzero()[0].tolist()})"
