"""Balanced assignment of rows to columns: Sinkhorn and Knopp's scaling, in the log domain.

    Q = diag(u) exp(S/ε) diag(v)        Q·1 = r,  Qᵀ·1 = c        S scores: the larger, the likelier

By default r = 1 for every row and c = N/K for every column. Such plans are the soft targets of swapped
assignments, where a softmax alone lets all rows fall onto one prototype. The plan maximises ⟨S, Q⟩ + ε·H(Q)
under these sums. Overflow in exp(S/ε), where it is clipped, can lead to another plan with the same sums; the
potentials f = ε log u and g = ε log v do not overflow.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xent._autograd.transforms import batched, is_opaque
from xent._core.logits import compute_dtype
from xent._core.statistics import statistics_dtype
from xent._core.validators import DifferentiateName, Whole, valid
from xent._util import html
from xent._util.text import counted
from xent.sinkhorn._autograd import (
    Settings,
    Solution,
    flatten_batch,
    problem_of,
    solution,
    validated_marginals,
)
from xent.sinkhorn._iterations import column_error

__all__ = ["Assignment", "assign"]

TOLERANCE = 1e-6


class Assignment(NamedTuple):
    """A plan between rows and columns, its potentials f and g, and its convergence.

    ``plan = exp((scores + f[..., None] + g[..., None, :]) / epsilon)`` with ``f, g = potentials``.

    Example:
        >>> import torch, xent
        >>> found = xent.sinkhorn.assign(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> found.plan.round(decimals=3).tolist(), found.converged.item()
        ([[1.0, 0.0], [0.0, 1.0]], True)
    """

    plan: Tensor  # Q, (..., N, K), of the type of the scores; values beyond its range are clamped
    potentials: tuple[Tensor, Tensor]  # f (..., N) and g (..., K), float64; −inf where there is no mass
    error: Tensor  # (...) Σ|column sums − c| over Σ c; the row sums are exact
    iterations: Tensor  # (...) int64, the number of iterations
    converged: Tensor  # (...) bool, whether error ≤ tolerance and the type of the scores holds the plan

    def _repr_html_(self) -> str:
        """Return the columns that the first rows are assigned to as a table for a notebook.

        >>> "<td>0: 1</td>" in assign(torch.tensor([[9.0, 0.0], [0.0, 9.0]]))._repr_html_()
        True
        """
        return html.shown(self, (self.plan, *self.potentials, *self[2:]), self._table)

    def _table(self) -> str:
        plan = html.first_rows(self.plan)
        names = ("largest", "second", "third")[: plan.shape[1]]
        mass, columns = (each.T.tolist() for each in plan.topk(len(names)))
        cells: dict[str, list[object]] = {
            name: [
                f"{column}: {html.cell(part)}" if part > 0 else None
                for column, part in zip(columns[k], mass[k], strict=True)
            ]
            for k, name in enumerate(names)
        }
        caption = (
            f"Assignment of {self.plan.shape[-2]:,} rows to {self.plan.shape[-1]:,} columns: "
            "the columns of the largest mass of each row, and that mass"
        )
        return "\n".join(
            [
                html.table_by_row(caption, self.plan.shape[:-1], cells),
                html.paragraph(self._convergence()),
            ]
        )

    def _convergence(self) -> str:
        count, converged = self.converged.numel(), int(self.converged.sum())
        if not count:
            return "0 assignments."
        said = "Converged" if converged == count else "Not converged"
        if count > 1:
            said = f"{converged:,} of {count:,} assignments converged"
        iterations, error = int(self.iterations.max()), self.error.detach().max().item()
        most = "at most " if count > 1 else ""
        return (
            f"{said}, after {most}{counted(iterations, 'iteration')}; error of the column sums "
            f"{most}{html.cell(error)} of all mass."
        )


def assign(
    scores: Tensor,
    *,
    epsilon: float = 0.05,
    row_marginal: Tensor | None = None,
    column_marginal: Tensor | None = None,
    mask: Tensor | None = None,
    max_iterations: int = 1000,
    tolerance: float | None = TOLERANCE,
    row_relaxation: float | None = None,
    column_relaxation: float | None = None,
    start: tuple[Tensor, Tensor] | None = None,
    differentiate: DifferentiateName = "implicit",
) -> Assignment:
    r"""Return a balanced assignment of rows to columns, the plan of entropic optimal transport.

    With scores S (larger is likelier) and the entropy weight ε, the plan ``Q = diag(u) exp(S/ε) diag(v)`` has
    the row sums r (by default 1) and the column sums c (by default N/K). It maximises ``⟨S, Q⟩ + ε·H(Q)``
    under these sums. The last step always scales the rows, so the row sums are exact; ``error`` is that of
    the column sums.

    With ``tolerance=None`` the method is Sinkhorn's, for ``max_iterations`` iterations: columns, then rows,
    from u = 1. With a tolerance the method is Sinkhorn's where that converges soon, and otherwise Newton's on
    the dual problem, with ε lowered step by step to its value. Both reach the same plan. At a small ε
    Newton's method takes tens of iterations instead of thousands. Sources: Cuturi, "Sinkhorn distances",
    2013; Chizat et al., "Scaling algorithms for unbalanced optimal transport problems", 2018.

    Args:
        scores: S, (..., N, K), floating; each (N, K) is a separate assignment. A score of −inf forbids a
            pair. For costs, pass their negatives. Half types are computed in float32; sums and potentials are
            float64.
        epsilon: ε > 0, the entropy weight, in the unit of the scores. No gradient.
        row_marginal: r, (N,) or (..., N), not negative; 1 by default.
        column_marginal: c, (K,) or (..., K), with the same sum as r; Σ r / K by default. Rows and columns of
            mass 0 are left out; their potentials are −inf.
        mask: bool, of a shape that broadcasts to the scores. False forbids a pair, whatever its score, even
            nan.
        max_iterations: the largest number of iterations; without a tolerance, the exact number. One iteration
            is a sum over columns and a sum over rows. A step of conjugate gradients counts as one too.
        tolerance: the ``error`` to reach, or None. Newton's method reaches 1e-12 too.
        row_relaxation: ρ > 0 replaces the condition on the row sums by the penalty ρ·KL(row sums ‖ r); None
            and infinity keep the condition. With a relaxation the plan maximises ⟨S, Q⟩ − ε·KL(Q ‖ r cᵀ) less
            the penalty (POT's ``reg_m`` with ``reg_type="kl"``), and r and c may differ in their sums. No
            gradient.
        column_relaxation: the same for the column sums.
        start: potentials to start from, those of an earlier assignment; only f is used.
        differentiate: ``"implicit"`` gives the derivative of the solution by the implicit function theorem,
            of any order, from one linear system. If the plan has not converged, it is that of the converged
            plan with the same column sums. ``"unroll"`` gives the derivative of Sinkhorn's iterations, which
            are all kept in memory.

    Returns:
        An :class:`Assignment`. It is differentiable in ``scores`` and the marginals, along changes that keep
        Σ r = Σ c (nan for a mass of 0). As a target, use ``plan.detach()``. Plan and error are always finite.
        If the tolerance is not reached, or the type of the scores cannot hold the plan, which is then
        clamped, ``converged`` is False, with a ``UserWarning``; without a tolerance the first case gives no
        warning.

    Raises:
        ValueError: scores that are nan or +inf; marginals that are negative, do not fit, or differ in their
            sums; a row or column with mass whose every pair is forbidden. The message names the place. Also
            an option out of its range.
        TypeError: scores that are not a floating tensor; an option of the wrong kind.
        NotImplementedError: a call in a graph that is being compiled, or on tensors without data.

    Example:
        >>> import torch, xent
        >>> scores = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 1.0], [2.0, 1.0]])  # all like the first best
        >>> found = xent.sinkhorn.assign(scores, epsilon=0.05)
        >>> found.plan.round(decimals=3).tolist()
        [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
        >>> found.plan.sum(0).round(decimals=5).tolist(), found.converged.item()
        ([2.0, 2.0], True)
    """
    valid("scores", scores)
    if is_opaque(scores):
        raise NotImplementedError(
            "sinkhorn.assign asks its data when to stop: call it outside the graph (torch.compiler.disable), "
            "on tensors that have data"
        )
    mask, row_marginal = valid("mask", mask), valid("row_marginal", row_marginal)
    column_marginal, start = valid("column_marginal", column_marginal), valid("start", start)
    given = [t for t in (row_marginal, column_marginal) if t is not None and t.is_floating_point()]
    settings = Settings(
        valid("epsilon", epsilon),
        math.inf if row_relaxation is None else valid("row_relaxation", row_relaxation),
        math.inf if column_relaxation is None else valid("column_relaxation", column_relaxation),
        Whole("at least 1", 1)("max_iterations", max_iterations) or 1,
        None if tolerance is None else valid("tolerance", tolerance),
        eps=max((torch.finfo(t.dtype).eps for t in given), default=0.0),
    )
    row, column = _marginals(scores, row_marginal, column_marginal)
    # where both sides are relaxed, the plan may exceed every marginal
    z = scores.to(row.dtype if settings.relaxed else compute_dtype(scores.dtype))
    if mask is not None:
        if not _broadcasts(mask, scores.shape):
            raise ValueError(f"mask {tuple(mask.shape)} does not fit scores {tuple(scores.shape)}")
        z = z.masked_fill(~mask, -math.inf)
    f = torch.zeros_like(row).detach() if start is None else start[0].detach().to(row)
    if f.shape != row.shape:
        raise ValueError(f"start[0] is {tuple(f.shape)}; the rows' potentials are {tuple(row.shape)}")
    if valid("differentiate", differentiate) == "unroll":
        solved = _unroll(settings, z, row, column, f)
    else:
        solved = solution(settings, z, row, column, f)
    plan, fits = _cast_plan(solved.plan, scores.dtype)
    f, g = solved.f, solved.g
    if settings.balanced:
        f, g = _centre(f, g)
    within = solved.error <= (TOLERANCE if settings.tolerance is None else settings.tolerance)
    if not batched(within):
        _warn(settings, solved, within, fits, scores.dtype)
    return Assignment(plan, (f, g), solved.error, solved.iterations, within & fits)


def _cast_plan(plan: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the plan in a type, clamped to its largest number, and whether nothing was clamped (...)."""
    largest = torch.finfo(dtype).max
    fits = (plan < largest).flatten(-2).all(-1)
    return plan if plan.dtype == dtype else plan.clamp(max=largest).to(dtype), fits


def _warn(settings: Settings, solved: Solution, within: Tensor, fits: Tensor, dtype: torch.dtype) -> None:
    """Warn of a plan that its type cannot hold, or that has not converged."""
    if not bool(fits.all()):
        way = (
            "raise epsilon, row_relaxation or column_relaxation"
            if settings.relaxed
            else "scale the marginals"
        )
        if torch.finfo(dtype).max < torch.finfo(torch.float64).max:
            way = f"pass the scores as float64, or {way}"
        warnings.warn(
            f"the plan holds values beyond the range of {dtype}, given as its largest number: {way}",
            UserWarning,
            stacklevel=3,
        )
    if settings.tolerance is not None and not bool(within.all()):
        warnings.warn(
            f"the assignment has not converged: its column sums are off by {float(solved.error.max()):.1e} "
            f"of their mass after {int(solved.iterations.max())} iterations, where tolerance asks for "
            f"{settings.tolerance:.1e}. Raise max_iterations, epsilon or tolerance; masked scores may leave "
            "no plan with these sums at all",
            UserWarning,
            stacklevel=3,
        )


def _marginals(scores: Tensor, row: Tensor | None, column: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return r (..., N) and c (..., K), or their defaults; raise where they do not fit the scores."""
    if scores.ndim < 2:
        raise ValueError(f"scores must be (..., N, K), not {tuple(scores.shape)}")
    if scores.shape[-1] == 0 and scores.shape[-2] > 0:
        raise ValueError(f"scores of shape {tuple(scores.shape)} have no column to assign rows to")
    *batch, n, k = scores.shape
    dtype = statistics_dtype(scores.device)
    given = []
    for name, t, count in (("row_marginal", row, n), ("column_marginal", column, k)):
        if t is not None:
            if t.ndim == 0 or t.shape[-1] != count or not _broadcasts(t, (*batch, count)):
                raise ValueError(
                    f"{name} {tuple(t.shape)} does not fit scores {tuple(scores.shape)}: "
                    f"it must be ({count},) or {(*batch, count)}"
                )
            t = t.to(device=scores.device, dtype=dtype).expand(*batch, count)
        given.append(t)
    row, column = given
    if row is None:
        row = torch.ones(*batch, n, dtype=dtype, device=scores.device)
    if column is None:
        column = (row.sum(-1, keepdim=True) / max(k, 1)).expand(*batch, k)
    return row, column


def _broadcasts(t: Tensor, shape: Sequence[int]) -> bool:
    """Return whether a tensor broadcasts to a shape."""
    sizes = shape[len(shape) - t.ndim :]
    return t.ndim <= len(shape) and all(have in (1, size) for have, size in zip(t.shape, sizes, strict=True))


def _centre(f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Shift a constant from f to g so that g has the mean 0; the plan stays the same."""
    finite = g > -math.inf
    mean = torch.where(finite, g, 0.0).sum(-1, keepdim=True) / finite.sum(-1, keepdim=True).clamp(min=1)
    return f + mean, g - mean


def _unroll(settings: Settings, scores: Tensor, row: Tensor, column: Tensor, f: Tensor) -> Solution:
    """Run Sinkhorn's iterations as torch's operations, which torch differentiates."""
    if batched(scores, row, column):
        raise NotImplementedError(
            "differentiate='unroll' has no rule for vmap: pass the batch as leading dimensions of scores, "
            "or differentiate implicitly"
        )
    row, column = validated_marginals(settings, scores, row, column, f)
    problem = problem_of(settings, scores, row, column)
    z, log_r, log_c = scores.to(row.dtype), _log(row), _log(column)
    f = torch.where(row > 0, f, -math.inf)
    count, error = 0, row.new_zeros(row.shape[:-1])
    while count < settings.max_iterations:
        g = _step(z + f[..., None], log_c, problem.column_exponent, settings.epsilon, -2)
        f = _step(z + g[..., None, :], log_r, problem.row_exponent, settings.epsilon, -1)
        count += 1
        if count < settings.max_iterations and settings.tolerance is None:
            continue
        with torch.no_grad():
            q = _plan(z, f, g, settings.epsilon).sum(-2)
            error = column_error(problem, *(flatten_batch(t, row.ndim - 1) for t in (f, g, q))).view_as(error)
        if settings.tolerance is not None and bool((error <= settings.tolerance).all()):
            break
    plan = _plan(z, f, g, settings.epsilon)
    return Solution(plan, f, g, error, torch.full_like(error, count, dtype=torch.int64))


def _plan(z: Tensor, f: Tensor, g: Tensor, epsilon: float) -> Tensor:
    """Return exp((S + f + g)/ε), clamped to the largest number, with derivative 0 where clamped."""
    largest = torch.finfo(z.dtype).max
    power = (z + f[..., None] + g[..., None, :]) / epsilon
    within = power < math.log(largest)
    return torch.where(within, torch.where(within, power, 0.0).exp(), largest)


def _log(t: Tensor) -> Tensor:
    """Return log t; where t = 0 it is −inf with derivative 0."""
    return torch.where(t > 0, torch.where(t > 0, t, 1.0).log(), -math.inf)


def _step(z: Tensor, log_mass: Tensor, exponent: float, epsilon: float, dim: int) -> Tensor:
    """Return ε·(log mass − exponent·log Σ exp(z/ε)) along a dimension; −inf where no mass is allowed."""
    allowed = (z > -math.inf).any(dim) & (log_mass > -math.inf)
    z = torch.where(allowed.unsqueeze(dim), z, 0.0)
    m = z.detach().amax(dim, keepdim=True)
    log_sum = ((z - m) / epsilon).exp().sum(dim).log()
    return torch.where(
        allowed, epsilon * (log_mass - exponent * log_sum) - exponent * m.squeeze(dim), -math.inf
    )
