"""The check that scores and marginals have a plan, and the marginals that the plan is made for.

r, c ≥ 0    Σ r = Σ c where neither side is relaxed    an allowed pair for every row and column with mass
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDING = 1e-15  # its root is the relative difference between sums that counts as rounding


def validate_marginals(
    scores: Tensor,  # (..., N, K)
    row: Tensor,  # (..., N)
    column: Tensor,  # (..., K)
    *,
    row_relaxed: bool,
    column_relaxed: bool,
    eps: float,  # of the type of the given marginals
) -> tuple[Tensor, Tensor]:
    """Return r and c, 0 where no mass is allowed, c scaled to the exact sum of r where neither is relaxed."""
    for name, t in (("row_marginal", row), ("column_marginal", column)):
        bad = ~((t >= 0) & (t < math.inf))
        if bool(bad.any()):
            raise ValueError(f"{name} is {_value_at(t, bad)}; masses are finite and not negative")
        if not bool((t.sum(-1) < math.inf).all()):
            raise ValueError(f"{name} has a sum beyond {t.dtype}; scale the masses down")
    blocked_rows, blocked_columns = _blocked(scores, row, column)
    for name, mass, blocked, relaxed in (
        ("row", row, blocked_rows, row_relaxed),
        ("column", column, blocked_columns, column_relaxed),
    ):
        if not relaxed and bool(blocked.any()):
            raise ValueError(
                f"{name} {_index_of(blocked)} has a mass of {float(mass[blocked][0]):g}, and every pair that "
                f"it could lie on is forbidden: allow one, or give the {name} no mass"
            )
    if row_relaxed or column_relaxed:
        return torch.where(blocked_rows, 0.0, row), torch.where(blocked_columns, 0.0, column)
    rows, columns = row.sum(-1, keepdim=True), column.sum(-1, keepdim=True)
    differ = (rows - columns).abs() > max(eps, ROUNDING) ** 0.5 * rows
    if bool(differ.any()):
        raise ValueError(
            f"the marginals differ in their sums: rows {float(rows[differ][0]):g}, columns "
            f"{float(columns[differ][0]):g}{_item_of(differ)}; no plan has both. Scale one of them, or let "
            "one give way (row_relaxation, column_relaxation)"
        )
    # sums that differ by rounding would leave an error that no plan can remove
    return row, column * torch.where(columns > 0, rows / torch.where(columns > 0, columns, 1.0), 1.0)


def validate_start(
    start: Tensor,  # (..., N)
    row: Tensor,  # (..., N)
) -> None:
    """Raise a ValueError unless the potential of every row with mass is finite."""
    bad = ~start.isfinite() & ~((start == -math.inf) & (row == 0))
    if bool(bad.any()):
        raise ValueError(
            f"start[0] is {_value_at(start, bad)}; the potential of a row with mass is finite, and −inf is "
            "that of a row without"
        )


def _blocked(scores: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Return masks of the rows (..., N) and columns (..., K) with mass whose every pair is forbidden."""
    if scores.numel() == 0:
        return row > 0, column > 0
    best = scores.amax(-1)
    if bool((best.isnan() | (best == math.inf)).any()):
        bad = scores.isnan() | (scores == math.inf)
        raise ValueError(
            f"scores hold {_value_at(scores, bad)}; only −inf, which forbids a pair, is not finite in them"
        )
    empty_rows, empty_columns = row == 0, column == 0
    if bool(empty_rows.any()) or bool(empty_columns.any()):
        # a pair counts only if both its row and its column have mass
        scores = scores.masked_fill(empty_rows[..., None] | empty_columns[..., None, :], -math.inf)
        best = scores.amax(-1)
    return (best == -math.inf) & ~empty_rows, (scores.amax(-2) == -math.inf) & ~empty_columns


def _value_at(t: Tensor, bad: Tensor) -> str:
    return f"{float(t[bad][0]):g} at {_index_of(bad)}"


def _index_of(bad: Tensor) -> int | tuple[int, ...]:
    place = tuple(bad.nonzero()[0].tolist())
    return place[0] if len(place) == 1 else place


def _item_of(bad: Tensor) -> str:
    return "" if bad.numel() == 1 else f" (item {bad[..., 0].nonzero()[0].tolist()})"
