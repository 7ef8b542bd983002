"""Balanced assignment of rows to columns: Sinkhorn and Knopp's scaling, in the log domain.

    Q = diag(u) exp(S/ε) diag(v)        Q·1 = r,  Qᵀ·1 = c        S scores: the larger, the likelier

Every row is given out whole (r = 1) and every column gets its share (c = N/K), unless told otherwise: the
soft targets of swapped assignments, where a softmax alone lets all rows fall onto one prototype. The plan
maximises ⟨S, Q⟩ + ε·H(Q) under these sums. Patched infinities in exp(S/ε) can end at another plan with the
same sums; potentials f = ε log u and g = ε log v know no infinities.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from xent._autograd.transforms import batched, is_opaque
from xent._core.logits import compute_dtype
from xent._core.statistics import statistics_dtype
from xent._core.validators import Whole, valid
from xent.sinkhorn._autograd import Recipe, Solution, checked, flat, problem_of, solution
from xent.sinkhorn._iterations import error_of

__all__ = ["Assignment", "assign"]

TOLERANCE = 1e-6


class Assignment(NamedTuple):
    """A plan and how far it got.

    ``plan = exp((scores + f[..., None] + g[..., None, :]) / epsilon)`` with ``f, g = potentials``.
    """

    plan: Tensor  # (..., N, K), in the type of the scores; its largest number where a value lies beyond
    potentials: tuple[Tensor, Tensor]  # f (..., N) and g (..., K), float64; −inf where nothing lies
    error: Tensor  # (...): Σ|column sums − what they should be| over their mass; the rows' sums are exact
    iterations: Tensor  # (...), int64
    converged: Tensor  # (...), bool: error ≤ tolerance, and the type of the scores holds the plan


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
    differentiate: Literal["implicit", "unroll"] = "implicit",
) -> Assignment:
    r"""The plan Q = diag(u) exp(S/ε) diag(v) whose rows sum to 1 and whose columns sum to N/K.

    With a number of iterations (``tolerance=None``) they are Sinkhorn's: columns, then rows, from u = 1. With
    a tolerance they are Sinkhorn's where these get there soon, otherwise Newton's steps on the dual, with ε
    taken down to its value, which reach the same plan: at a small ε in tens of iterations instead of
    thousands. Either way the last step is one of rows, whose sums are exact; ``error`` is that of the
    columns. Formula: mathematics page, §7; Cuturi (2013), *Sinkhorn distances*; Chizat et al. (2018),
    *Scaling algorithms for unbalanced optimal transport*.

    Args:
        scores: S, (..., N, K), float; each (N, K) is an assignment of its own. −inf forbids a pair. Costs
            enter with a minus. Half types are computed with in float32; sums and potentials are float64.
        epsilon: ε > 0, the temperature of the plan. A constant, as the relaxations are.
        row_marginal: r, (N,) or (..., N), not negative; 1 by default.
        column_marginal: c, (K,) or (..., K), of the same sum; by default Σ r / K. Rows and columns of mass 0
            are left out, their potentials are −inf.
        mask: bool, broadcast to the scores; False forbids a pair, whatever its score is (nan too).
        max_iterations: how many iterations there are at most, or, without a tolerance, in all. Each is a sum
            over columns and a sum over rows; a step of conjugate gradients within Newton's counts as one.
        tolerance: the error that is good enough, or None. Newton's steps reach 1e-12 as well.
        row_relaxation, column_relaxation: λ > 0, which puts a price λ·KL(sums ‖ marginal) in place of the
            condition on that side; None or infinity keeps the condition. The plan then maximises
            ⟨S, Q⟩ − ε·KL(Q ‖ r cᵀ) less that price (POT's ``reg_m``, ``reg_type="kl"``); sums may differ.
        start: potentials to start from, as an earlier assignment gave them; the rows' are what counts.
        differentiate: ``"implicit"``: the derivative of the solution by the implicit function theorem, one
            linear system, of any order; of a plan that has not converged it is that of the plan with the
            column sums it has. ``"unroll"``: the derivative of the plain iterations, all of them kept.

    Returns:
        :class:`Assignment`. Differentiable in ``scores`` and the marginals (along changes that leave
        Σ r = Σ c; nan for a mass of 0); as a target, ``plan.detach()``. Plan and error are always finite.
        What has not converged says so: ``converged`` is False, with a ``UserWarning`` where a tolerance was
        asked for. So does a plan that the type of the scores cannot hold, with its largest number there.

    Raises:
        ValueError: scores that are nan or +inf; marginals that are negative, do not fit, or differ in their
            sums; a row or column with mass whose every pair is forbidden; each names the place. An option out
            of its range.
        TypeError: scores that are no floating-point tensor, an option of the wrong kind; by name.
        NotImplementedError: in a graph that is being compiled, and on tensors without data.

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
    given = (
        scores,
        valid("mask", mask),
        valid("row_marginal", row_marginal),
        valid("column_marginal", column_marginal),
        valid("start", start),
    )
    types = [t.dtype for t in given[2:4] if t is not None and t.is_floating_point()]
    recipe = Recipe(
        valid("epsilon", epsilon),
        math.inf if row_relaxation is None else valid("row_relaxation", row_relaxation),
        math.inf if column_relaxation is None else valid("column_relaxation", column_relaxation),
        Whole("at least 1", 1)("max_iterations", max_iterations) or 1,
        None if tolerance is None else valid("tolerance", tolerance),
        eps=max((torch.finfo(t).eps for t in types), default=0.0),
    )
    z, row, column, f = _Door(recipe, *given).tensors()
    if valid("differentiate", differentiate) == "unroll":
        found = _unrolled(recipe, z, row, column, f)
    else:
        found = solution(recipe, z, row, column, f)
    plan, fits = _narrowed(found.plan, scores.dtype)
    f, g = found.f, found.g
    if recipe.balanced:
        f, g = _centred(f, g)
    near = found.error <= (TOLERANCE if recipe.tolerance is None else recipe.tolerance)
    if not batched(near):
        _warn(recipe, found, near, fits, scores.dtype)
    return Assignment(plan, (f, g), found.error, found.iterations, near & fits)


def _narrowed(plan: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The plan in a type, its largest number where a value lies beyond; and whether none does: (...)."""
    most = torch.finfo(dtype).max
    fits = (plan < most).flatten(-2).all(-1)
    return plan if plan.dtype == dtype else plan.clamp(max=most).to(dtype), fits


def _warn(recipe: Recipe, found: Solution, near: Tensor, fits: Tensor, dtype: torch.dtype) -> None:
    """Say what a plan is not."""
    if not bool(fits.all()):
        way = (
            "raise epsilon, row_relaxation or column_relaxation" if recipe.relaxed else "scale the marginals"
        )
        if torch.finfo(dtype).max < torch.finfo(torch.float64).max:
            way = f"pass the scores as float64, or {way}"
        warnings.warn(
            f"the plan holds values beyond the range of {dtype}, given as its largest number: {way}",
            UserWarning,
            stacklevel=3,
        )
    if recipe.tolerance is not None and not bool(near.all()):
        warnings.warn(
            f"the assignment has not converged: its column sums are off by {float(found.error.max()):.1e} of "
            f"their mass after {int(found.iterations.max())} iterations, where tolerance asks for "
            f"{recipe.tolerance:.1e}. Raise max_iterations, epsilon or tolerance; masked scores may leave no "
            "plan with these sums at all",
            UserWarning,
            stacklevel=3,
        )


class _Door(NamedTuple):
    """Arguments on their way to tensors that fit each other."""

    recipe: Recipe
    scores: Tensor
    mask: Tensor | None
    row_marginal: Tensor | None
    column_marginal: Tensor | None
    start: tuple[Tensor, Tensor] | None

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """S (..., N, K), r (..., N), c (..., K) and f (..., N) to start from."""
        scores = self.scores
        if scores.ndim < 2:
            raise ValueError(f"scores must be (..., N, K), not {tuple(scores.shape)}")
        if scores.shape[-1] == 0 and scores.shape[-2] > 0:
            raise ValueError(f"scores of shape {tuple(scores.shape)} have no column to assign rows to")
        row, column = self._marginals()
        # where both sides may give way, the plan may be larger than any marginal
        z = scores.to(row.dtype if self.recipe.relaxed else compute_dtype(scores.dtype))
        if self.mask is not None:
            if not _broadcasts(self.mask, scores.shape):
                raise ValueError(f"mask {tuple(self.mask.shape)} does not fit scores {tuple(scores.shape)}")
            z = z.masked_fill(~self.mask, -math.inf)
        f = torch.zeros_like(row).detach()
        if self.start is not None:
            f = self.start[0].detach().to(row)
            if f.shape != row.shape:
                raise ValueError(f"start[0] is {tuple(f.shape)}; the rows' potentials are {tuple(row.shape)}")
        return z, row, column, f

    def _marginals(self) -> tuple[Tensor, Tensor]:
        scores = self.scores
        *batch, n, k = scores.shape
        dtype = statistics_dtype(scores.device)
        given = []
        for name, t, count in (
            ("row_marginal", self.row_marginal, n),
            ("column_marginal", self.column_marginal, k),
        ):
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
    """Return whether a tensor expands to a shape."""
    sizes = shape[len(shape) - t.ndim :]
    return t.ndim <= len(shape) and all(have in (1, size) for have, size in zip(t.shape, sizes, strict=True))


def _centred(f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A constant may go from f to g: that with which g has the mean 0."""
    has = g > -math.inf
    mean = torch.where(has, g, 0.0).sum(-1, keepdim=True) / has.sum(-1, keepdim=True).clamp(min=1)
    return f + mean, g - mean


def _unrolled(recipe: Recipe, scores: Tensor, row: Tensor, column: Tensor, f: Tensor) -> Solution:
    """The plain iterations as torch's operations, each differentiated by torch."""
    if batched(scores, row, column):
        raise NotImplementedError(
            "differentiate='unroll' has no rule for vmap: pass the batch as leading dimensions of scores, "
            "or differentiate implicitly"
        )
    row, column = checked(recipe, scores, row, column, f)
    problem = problem_of(recipe, scores, row, column)
    z, log_r, log_c = scores.to(row.dtype), _log(row), _log(column)
    f = torch.where(row > 0, f, -math.inf)
    count, error = 0, row.new_zeros(row.shape[:-1])
    while count < recipe.max_iterations:
        g = _step(z + f[..., None], log_c, problem.column_share, recipe.epsilon, -2)
        f = _step(z + g[..., None, :], log_r, problem.row_share, recipe.epsilon, -1)
        count += 1
        if count < recipe.max_iterations and recipe.tolerance is None:
            continue
        with torch.no_grad():
            q = _plan(z, f, g, recipe.epsilon).sum(-2)
            error = error_of(problem, *(flat(t, row.ndim - 1) for t in (f, g, q))).view_as(error)
        if recipe.tolerance is not None and bool((error <= recipe.tolerance).all()):
            break
    plan = _plan(z, f, g, recipe.epsilon)
    return Solution(plan, f, g, error, torch.full_like(error, count, dtype=torch.int64))


def _plan(z: Tensor, f: Tensor, g: Tensor, epsilon: float) -> Tensor:
    """exp((S + f + g)/ε), the largest number where that is beyond the range; its derivative there is 0."""
    most = torch.finfo(z.dtype).max
    power = (z + f[..., None] + g[..., None, :]) / epsilon
    within = power < math.log(most)
    return torch.where(within, torch.where(within, power, 0.0).exp(), most)


def _log(t: Tensor) -> Tensor:
    """log t; the −inf of no mass is a constant."""
    return torch.where(t > 0, torch.where(t > 0, t, 1.0).log(), -math.inf)


def _step(z: Tensor, log_mass: Tensor, share: float, epsilon: float, dim: int) -> Tensor:
    """ε (log mass − share · log Σ exp z/ε), of which nothing is left where nothing may lie."""
    some = (z > -math.inf).any(dim) & (log_mass > -math.inf)
    z = torch.where(some.unsqueeze(dim), z, 0.0)
    m = z.detach().amax(dim, keepdim=True)
    total = ((z - m) / epsilon).exp().sum(dim).log()
    return torch.where(some, epsilon * (log_mass - share * total) - share * m.squeeze(dim), -math.inf)
