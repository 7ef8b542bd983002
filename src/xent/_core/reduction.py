"""The reduction of the rows' losses: L = Σ s·(ℓ + λ·lse²) / divisor, and its derivatives in ℓ and lse.

    ∂L/∂ℓ = s / divisor        ∂L/∂lse = 2λ·lse·s / divisor

Where the own score moves (`margin`), ℓ and lse are what the move makes of them.
Where rows are spread over processes the divisor is the average of theirs, so that the average of their
losses, and of their gradients, is the mean over all rows. z-loss shares the divisor of
`mean`: Σ s·w[y] (index targets) or Σ s (probabilities), unless a denominator replaces it. The mean over no
rows is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from xent._core.coefficients import Coefficients
from xent._core.margin import TargetShift
from xent._core.statistics import Statistics, statistics_dtype
from xent._core.targets import Targets

Kind = Literal["none", "sum", "mean"]
Scale: TypeAlias = float | Tensor


@dataclass(frozen=True)
class Reduction:
    kind: Kind = "mean"
    z_loss: float = 0.0
    denominator: float | Tensor | None = None
    average: Callable[[Tensor], Tensor] | None = None  # of divisors, over the processes that hold other rows
    asks: bool = False  # of a denominator of 0, whether it may be asked here how many rows count

    def values(
        self,
        nll: Tensor,
        logsumexp: Tensor,
        log_prob: Tensor | None,
        row_weight: Tensor | None,
        move: TargetShift | None = None,
    ) -> Tensor:
        """Return what each row adds, before the divisor: (M,). Only a shift of the target needs log_prob."""
        if move is not None:
            assert log_prob is not None
            nll, logsumexp = move(nll, logsumexp, log_prob)
        values = nll if self.z_loss == 0.0 else nll + self.z_loss * logsumexp.square()
        return values if row_weight is None else values * row_weight

    def total(self, values: Tensor, scale: Scale) -> Tensor:
        """Return the loss: 0 where the weights leave nothing to count, whatever the rows would have cost."""
        total = values.sum() * scale
        return total.masked_fill(scale == 0, 0.0) if isinstance(scale, Tensor) else total

    def scale(self, parts: Sequence[tuple[Targets, Tensor | None]]) -> Scale:
        """One over the divisor of all parts (targets and row weights) together: a number, or a float64
        scalar where data decides."""
        if self.kind != "mean":
            return 1.0
        if self.denominator is not None:
            return self._over(self.denominator, parts)
        if self.average is None and not _weighted(parts):
            return 1.0 / max(1, sum(targets.count for targets, _ in parts))
        one = _one(parts)
        divisor = sum((_divisor(targets, weight, one) for targets, weight in parts), start=one * 0)
        if self.average is not None:
            divisor = self.average(divisor)
        nothing = divisor == 0
        return (1.0 / divisor.masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0)

    def _over(self, denominator: float | Tensor, parts: Sequence[tuple[Targets, Tensor | None]]) -> Scale:
        """Return 1/denominator; of a denominator of 0, 0 if no row counts."""
        if not isinstance(denominator, Tensor) and denominator > 0:
            return 1.0 / denominator
        one = _one(parts)
        count = sum((_count(targets, weight) * one for targets, weight in parts), start=one * 0)
        if not isinstance(denominator, Tensor) and self.asks and count > 0:
            raise ValueError(
                f"denominator must be positive where rows count, got {denominator} for {int(count)} of them"
            )
        d = one * denominator
        of_nothing = torch.where(count == 0, 0.0, torch.inf)
        return torch.where(d > 0, 1.0 / d, torch.where(d == 0, of_nothing, torch.nan))

    def coefficients(
        self,
        found: Statistics,
        row_weight: Tensor | None,
        scale: Scale,
        chunk: slice,
        move: TargetShift | None = None,
    ) -> Coefficients:
        """Return ∂L/∂(ℓ, lse, log p_y) of a chunk of rows from their statistics `found`."""
        if move is not None:
            return self._moved_coefficients(found, row_weight, scale, chunk, move)
        if row_weight is not None:
            loss = row_weight[chunk] * scale
        elif isinstance(scale, Tensor):
            loss = scale.expand(found.m.shape)
        else:
            loss = torch.full_like(found.m, scale)
        return Coefficients(loss, 2 * self.z_loss * found.logsumexp * loss if self.z_loss != 0.0 else None)

    def _moved_coefficients(
        self, found: Statistics, row_weight: Tensor | None, scale: Scale, chunk: slice, move: TargetShift
    ) -> Coefficients:
        """Return the coefficients by autograd, of a few numbers a row."""
        rows = tuple(t.detach() for t in (found.loss, found.logsumexp, found.target_log_prob))
        with torch.enable_grad():
            loss, logsumexp, log_prob = (t.requires_grad_() for t in rows)
            s = None if row_weight is None else row_weight.detach()[chunk]
            total = self.values(loss, logsumexp, log_prob, s, move.rows(chunk)).sum()
            of_loss, of_lse, of_own = torch.autograd.grad(total, rows, allow_unused=True)
        loss = torch.zeros_like(found.m) if of_loss is None else of_loss
        return Coefficients(loss, of_lse, None, of_own).scaled(scale)


def _weighted(parts: Sequence[tuple[Targets, Tensor | None]]) -> bool:
    """Return whether anything but the number of rows decides the divisor."""
    return any(weight is not None or targets.mean_weight is not None for targets, weight in parts)


def _one(parts: Sequence[tuple[Targets, Tensor | None]]) -> Tensor:
    """Return 1, (), in the type and on the device of the rows' statistics."""
    if not parts:
        return torch.ones((), dtype=torch.float64, device="cpu")
    (targets, _), *_ = parts
    like = targets.own if targets.own is not None else targets.probabilities
    assert like is not None
    return like.new_ones((), dtype=statistics_dtype(like.device))


def _count(targets: Targets, row_weight: Tensor | None) -> int | Tensor:
    """Return how many rows count; in a graph, those that do not have a weight of 0."""
    return targets.count if row_weight is None else (row_weight != 0).sum()


def _divisor(targets: Targets, row_weight: Tensor | None, one: Tensor) -> Tensor:
    if targets.mean_weight is None:
        return one * targets.count if row_weight is None else row_weight.sum()
    return targets.mean_weight.sum() if row_weight is None else (row_weight * targets.mean_weight).sum()
