"""The step from the rows' outputs to a loss, L = Σ s·v / divisor, and its derivatives in them.

    bucket  →  target shift  →  v = row loss(ℓ) + λ·lse²  →  × s  →  Σ / divisor

    ∂L/∂ℓ = s / divisor        ∂L/∂lse = 2λ·lse·s / divisor        of cross-entropy itself, without a shift

Where the target's logit is shifted (`margin`), ℓ and lse are those after the shift; the derivatives of a
shift and of another row loss come from autograd, of a few numbers a row. Where rows are spread over processes
the divisor is the average of theirs, so that the average of their losses, and of their gradients, is the mean
over all rows. z-loss shares the divisor of `mean`: Σ s·w[y] (index targets) or Σ s (probabilities), unless a
denominator replaces it. The mean over no rows is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from xent._core.coefficients import Coefficients
from xent._core.problem import Problem, RowTerms
from xent._core.record import record
from xent._core.statistics import Statistics, statistics_dtype
from xent._core.validators import ReductionName

Scale: TypeAlias = float | Tensor


class RowValues(NamedTuple):
    """The outputs of rows that a loss is made of, (M,)."""

    loss: Tensor
    logsumexp: Tensor
    log_prob: Tensor | None  # (M, K) where the target is shifted, or has a bucket
    log_rest: Tensor | None  # where it has a bucket

    @classmethod
    def of(cls, found: Statistics) -> RowValues:
        log_prob = None if found.own is None else found.own_log_prob
        log_rest = None if found.lse_others is None else found.log_rest
        return cls(found.loss, found.logsumexp, log_prob, log_rest)

    def mapped(self, f: Callable[[Tensor], Tensor]) -> RowValues:
        return RowValues(*(None if t is None else f(t) for t in self))  # type: ignore[arg-type]


@record
class Reduction:
    kind: ReductionName = "mean"
    z_loss: float = 0.0
    denominator: float | Tensor | None = None
    average: Callable[[Tensor], Tensor] | None = None  # of divisors, over the processes that hold other rows
    count_rows: bool = False  # of a denominator of 0, whether the number of rows that count may be read here

    def is_linear(self, terms: RowTerms) -> bool:
        """Return whether a row's derivatives in its outputs are constant."""
        shaped = terms.shift is not None or terms.row_loss is not None or terms.bucket is not None
        return self.z_loss == 0.0 and not shaped

    def values(self, terms: RowTerms, found: RowValues) -> Tensor:
        """Return what each row adds, before the divisor: (M,)."""
        loss, logsumexp, log_prob, log_rest = found
        if terms.bucket is not None:
            assert log_prob is not None
            assert log_rest is not None
            loss = loss + terms.bucket(log_prob, log_rest)  # to 0, or nan where there is no softmax
        if terms.shift is not None:
            assert log_prob is not None
            loss, logsumexp = terms.shift(loss, logsumexp, log_prob[:, 0])
        values = loss if terms.row_loss is None else terms.row_loss(loss)
        if self.z_loss != 0.0:
            values = values + self.z_loss * logsumexp.square()
        return values if terms.row_weight is None else values * terms.row_weight

    def total(self, values: Tensor, scale: Scale) -> Tensor:
        """Return the loss: 0 where the weights leave nothing to count, whatever the rows would have cost."""
        total = values.sum() * scale
        if isinstance(scale, Tensor):
            return total.masked_fill(scale == 0, 0.0)
        return total if scale != 0 else torch.zeros_like(total)

    def scale(self, problems: Sequence[Problem], *, read: bool = False) -> Scale:
        """Return one over the divisor of all problems together.

        It is a number where the divisor is known, or where ``read`` says that data may be read. Elsewhere it
        is a float64 scalar.
        """
        if self.kind != "mean":
            return 1.0
        if self.denominator is not None:
            return self._over(self.denominator, problems)
        if self.average is None:
            count = 0
            for problem in problems:
                if problem.row_weight is not None or problem.targets.mean_weight is not None:
                    break
                count += problem.targets.selection.count
            else:
                return 1.0 / max(1, count)
        first, *others = map(_divisor, problems) if problems else (_one(problems) * 0,)
        divisor = sum(others, start=first)
        if self.average is not None:
            divisor = self.average(divisor)
        if read:  # on a CPU this is cheaper than the operations below
            number = divisor.item()
            if not number:
                return 0.0
            return 1.0 / number if math.isfinite(number) else math.nan  # a share of infinity is no number
        nothing = divisor == 0
        share = (1.0 / divisor.masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0)
        return share.masked_fill(divisor.isinf(), math.nan)

    def _over(self, denominator: float | Tensor, problems: Sequence[Problem]) -> Scale:
        """Return 1/denominator; of a denominator of 0, 0 if no row counts."""
        if not isinstance(denominator, Tensor) and denominator > 0:
            return 1.0 / denominator
        one = _one(problems)
        count = sum((_count(problem) * one for problem in problems), start=one * 0)
        if not isinstance(denominator, Tensor) and self.count_rows and count > 0:
            raise ValueError(
                f"denominator must be positive where rows count, got {denominator} for {int(count)} of them"
            )
        d = one * denominator
        of_nothing = torch.where(count == 0, 0.0, torch.inf)
        return torch.where(d > 0, 1.0 / d, torch.where(d == 0, of_nothing, torch.nan))

    def coefficients(self, terms: RowTerms, found: Statistics, scale: Scale) -> Coefficients:
        """Return ∂L/∂(ℓ, lse, log p_y) of rows from their statistics `found`."""
        if terms.shift is not None or terms.row_loss is not None or terms.bucket is not None:
            return self._by_autograd(terms, found, scale)
        if terms.row_weight is not None:
            loss = terms.row_weight * scale
        elif isinstance(scale, Tensor):
            loss = scale.expand(found.m.shape)
        else:
            loss = torch.full_like(found.m, scale)
        return Coefficients(loss, 2 * self.z_loss * found.logsumexp * loss if self.z_loss != 0.0 else None)

    def _by_autograd(self, terms: RowTerms, found: Statistics, scale: Scale) -> Coefficients:
        with torch.enable_grad():
            inputs = RowValues.of(found).mapped(lambda t: t.detach().requires_grad_())
            total = self.values(terms, inputs).sum()
            if not total.requires_grad:  # a row loss that is constant
                return Coefficients(torch.zeros_like(found.m))
            present = [t for t in inputs if t is not None]
            answers = iter(torch.autograd.grad(total, present, allow_unused=True))
        of_loss, of_lse, of_own, of_rest = (None if t is None else next(answers) for t in inputs)
        of_loss = torch.zeros_like(found.m) if of_loss is None else of_loss
        return Coefficients(of_loss, of_lse, None, of_rest, of_own).scaled(scale)


def _one(problems: Sequence[Problem]) -> Tensor:
    """Return 1, (), in the type and on the device of the rows' statistics."""
    if not problems:
        return torch.ones((), dtype=torch.float64, device="cpu")
    targets = problems[0].targets
    like = targets.index if targets.index is not None else targets.probabilities
    assert like is not None
    return like.new_ones((), dtype=statistics_dtype(like.device))


def _count(problem: Problem) -> int | Tensor:
    """Return how many rows count; in a graph, those that do not have a weight of 0."""
    weight = problem.row_weight
    return problem.targets.count if weight is None else (weight != 0).sum()


def _divisor(problem: Problem) -> Tensor:
    s, w = problem.row_weight, problem.targets.mean_weight
    if w is None:
        return _one((problem,)) * problem.targets.count if s is None else s.sum()
    return w.sum() if s is None else (s * w).sum()
