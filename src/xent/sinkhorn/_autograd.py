"""Where the assignment meets torch's differentiation: the implicit function theorem, wiring only.

The conditions P·1 = r, Pᵀ·1 = c on P = exp((S + f + g)/ε) hold along every change of S, r and c, so that with

    ⎡diag d    P   ⎤ ⎡x⎤   ⎡G∘P·1  + ε f̄⎤        d = P·1 (1 + ε/λ),  e = Pᵀ·1 (1 + ε/μ)
    ⎣  Pᵀ    diag e⎦ ⎣y⎦ = ⎣(G∘P)ᵀ1 + ε ḡ⎦

a gradient (G, f̄, ḡ) on the plan and its potentials becomes

    ∂S = P∘(G − x − y)/ε        ∂r = x·(1 or d/r)        ∂c = y·(1 or e/c)

with 1 where the sums are held, d/r and e/c where they may give way. The backward is made of operations that
torch differentiates and of one Function more, the solution of the system, whose derivative is itself: so
there are derivatives of every order, and none is silently zero.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xent._autograd.transforms import plain
from xent._core.ops import is_batched
from xent.sinkhorn import _ascent, _coupling, _iterations
from xent.sinkhorn._iterations import Problem
from xent.sinkhorn._marginals import agreed, usable

UNSOLVED = 1e-2  # of the right-hand side; what rounding leaves is far below, what has no solution above


class Recipe(NamedTuple):
    """All that is not a tensor."""

    epsilon: float
    row_relaxation: float
    column_relaxation: float
    max_iterations: int
    tolerance: float | None
    eps: float = 0.0  # of the types that the marginals were given in

    @property
    def balanced(self) -> bool:
        """Whether a constant may go from f to g."""
        return math.isinf(self.row_relaxation) and math.isinf(self.column_relaxation)

    @property
    def relaxed(self) -> bool:
        """True where both sides may give way."""
        return not math.isinf(self.row_relaxation) and not math.isinf(self.column_relaxation)


class Solution(NamedTuple):
    plan: Tensor  # (..., N, K)
    f: Tensor  # (..., N)
    g: Tensor  # (..., K)
    error: Tensor  # (...)
    iterations: Tensor  # (...), int64


def solution(recipe: Recipe, scores: Tensor, row: Tensor, column: Tensor, start: Tensor) -> Solution:
    """The plan and its potentials, differentiable in scores, row and column."""
    return Solution(*_Plan.apply(recipe, scores, row, column, start))


def checked(
    recipe: Recipe, scores: Tensor, row: Tensor, column: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """The marginals that there is a plan for, or an error that says why there is none."""
    usable(start, row)
    return agreed(
        scores.detach(),
        row,
        column,
        row_may_give=not math.isinf(recipe.row_relaxation),
        column_may_give=not math.isinf(recipe.column_relaxation),
        eps=recipe.eps,
    )


def problem_of(recipe: Recipe, scores: Tensor, row: Tensor, column: Tensor) -> Problem:
    """Return the problem without derivatives, its leading dimensions as one."""
    s, r, c = (flat(t, scores.ndim - 2) for t in (scores, row, column))
    return Problem(s, r, c, recipe.epsilon, recipe.row_relaxation, recipe.column_relaxation)


def _run(recipe: Recipe, scores: Tensor, row: Tensor, column: Tensor, start: Tensor) -> Solution:
    batch = scores.shape[:-2]
    f = flat(start, len(batch))
    problem = problem_of(recipe, scores, row, column)
    f = torch.where(problem.row > 0, f, -math.inf)  # what is left out takes no part in the first step either
    masses = torch.maximum(problem.row.sum(-1), problem.column.sum(-1))
    if not bool((masses < torch.finfo(scores.dtype).max).all()):  # a kernel of that type would not hold them
        problem = replace(problem, scores=problem.scores.to(row.dtype))
    if recipe.tolerance is None:
        found = _iterations.fixed(problem, f, recipe.max_iterations)
    else:
        found = _ascent.converged(problem, f, recipe.tolerance, recipe.max_iterations)
    state = found.state
    iterations = torch.full(batch, found.iterations, dtype=torch.int64, device=scores.device)
    return Solution(
        _iterations.plan_of(problem, state, scores.dtype).reshape(scores.shape),
        state.f.reshape(row.shape),
        state.g.reshape(column.shape),
        state.error.reshape(batch),
        iterations,
    )


def flat(t: Tensor, batch: int) -> Tensor:
    """Leading dimensions as one; (0, ...) where there is nothing in them."""
    return t.detach().reshape(math.prod(t.shape[:batch]), *t.shape[batch:])


def _in_front(info: Any, in_dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """What `vmap` batches has its dimension in front; what it does not, is repeated there."""
    return [
        t.expand(info.batch_size, *t.shape) if at is None else t.movedim(at, 0)
        for t, at in zip(tensors, in_dims, strict=True)
    ]


def _weighed(P: Tensor, G: Tensor) -> Tensor:
    """G where there is mass: elsewhere it may be infinite."""
    return torch.where(P == 0, 0.0, G)


class _Plan(torch.autograd.Function):
    @staticmethod
    def forward(
        recipe: Recipe, scores: Tensor, row: Tensor, column: Tensor, start: Tensor
    ) -> tuple[Tensor, ...]:
        # here, where no transform is in the way of a question about the data
        with plain(scores.device):
            row, column = checked(recipe, scores, row, column, start)
            return tuple(_run(recipe, scores, row, column, start))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.recipe, _, row, column, _ = inputs
        plan, _, _, *others = output
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(plan, row, column)
        ctx.save_for_forward(plan, row, column)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], recipe: Recipe, *tensors: Tensor) -> Any:
        return _Plan.apply(recipe, *_in_front(info, in_dims[1:], tensors)), (0,) * 5

    @staticmethod
    def backward(ctx: Any, G: Tensor | None, on_f: Tensor | None, on_g: Tensor | None, *_: Any) -> Any:
        plan, row, column = ctx.saved_tensors
        recipe = ctx.recipe
        if G is None and on_f is None and on_g is None:
            return (None,) * 5
        a, b = torch.zeros_like(row), torch.zeros_like(column)
        # what G, x and y leave of each other is divided by ε: float32 would leave its rounding over ε
        P = plan.to(row.dtype)
        if G is not None:
            G = _weighed(P, G.to(row.dtype))
            a, b = (G * P).sum(-1), (G * P).sum(-2)
        d, e = _diagonals(recipe, plan, row.dtype)
        # a potential of −inf is so whatever happens nearby
        if on_f is not None:
            a = a + torch.where(d > 0, recipe.epsilon * on_f, 0.0)
        if on_g is not None:
            b = b + torch.where(e > 0, recipe.epsilon * on_g, 0.0)
        x, y = _solved(recipe, plan, d, e, a, b)
        on_scores = on_row = on_column = None
        if ctx.needs_input_grad[1]:
            change = x[..., None] + y[..., None, :]
            on_scores = (P * ((-change if G is None else G - change) / recipe.epsilon)).to(plan.dtype)
        if ctx.needs_input_grad[2]:
            on_row = x * _share(recipe.row_relaxation, d, row)
        if ctx.needs_input_grad[3]:
            on_column = y * _share(recipe.column_relaxation, e, column)
        return None, on_scores, on_row, on_column, None

    @staticmethod
    def jvp(
        ctx: Any,
        _recipe: None,
        on_scores: Tensor | None,
        on_row: Tensor | None,
        on_column: Tensor | None,
        _: Any,
    ) -> Any:
        plan, row, column = ctx.saved_tensors
        plan, recipe = _Once.apply(plan), ctx.recipe
        P = plan.to(row.dtype)
        d, e = _diagonals(recipe, plan, row.dtype)
        a, b = torch.zeros_like(row), torch.zeros_like(column)
        if on_scores is not None:
            on_scores = _weighed(P, on_scores.to(row.dtype)) / recipe.epsilon
            a, b = a - (P * on_scores).sum(-1), b - (P * on_scores).sum(-2)
        if on_row is not None:
            a = a + on_row * _share(recipe.row_relaxation, d, row)
        if on_column is not None:
            b = b + on_column * _share(recipe.column_relaxation, e, column)
        x, y = _solved(recipe, plan, d, e, a, b)
        change = x[..., None] + y[..., None, :]
        on_plan = (P * (change if on_scores is None else change + on_scores)).to(plan.dtype)
        return on_plan, recipe.epsilon * x, recipe.epsilon * y, None, None


def _diagonals(recipe: Recipe, plan: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    p, q = plan.sum(-1, dtype=dtype), plan.sum(-2, dtype=dtype)
    d = p * (1 + recipe.epsilon / recipe.row_relaxation)
    e = q * (1 + recipe.epsilon / recipe.column_relaxation)
    return d, e


def _share(relaxation: float, d: Tensor, mass: Tensor) -> Tensor:
    """How much of a change of the mass the sums have to follow; of a mass of 0 the plan does not say."""
    known = torch.where(mass > 0, mass, 1.0)
    return torch.where(mass > 0, torch.ones_like(mass) if math.isinf(relaxation) else d / known, math.nan)


def _solved(
    recipe: Recipe, plan: Tensor, d: Tensor, e: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    x, y = _Solve.apply(plan, d, e, a, b)
    if not recipe.balanced:
        return x, y
    # 1 in x and −1 in y changes no plan: without it, so that its derivative asks nothing of that direction
    carries, has = d > 0, e > 0
    count = carries.sum(-1, keepdim=True).clamp(min=1)
    constant = torch.where(carries, x, 0.0).sum(-1, keepdim=True) / count
    return torch.where(carries, x - constant, 0.0), torch.where(has, y + constant, 0.0)


class _Once(torch.autograd.Function):
    """The tensor itself, for a `jvp` that is not to be differentiated forward again.

    What torch computes inside one has no tangents of an outer forward mode: they would be silently zero.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor) -> Tensor:
        return t.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return upstream

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        raise NotImplementedError("forward mode over forward mode is not supported: put reverse mode inside")


class _Solve(torch.autograd.Function):
    """x, y of P, d, e, a, b (`coupling`); the matrix is symmetric, so its derivative is itself."""

    @staticmethod
    def forward(P: Tensor, d: Tensor, e: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if is_batched(a) or is_batched(b):
            raise NotImplementedError(
                "sinkhorn.assign takes no is_grads_batched: use torch.func.jacrev or torch.func.vmap"
            )
        with plain(P.device):
            x, y, _ = _coupling.solve(P, d, e, a, b)
            left = _coupling.residual(P, d, e, a, b, x, y)
            if bool((left > UNSOLVED).any()):
                raise RuntimeError(
                    "the assignment has no derivative here: its linear system is left with "
                    f"{float(left.max()):.1e} of its right-hand side. Potentials are not determined where "
                    "masked scores fall into parts that nothing connects (differentiate the plan instead); "
                    "at a very small epsilon a plan hardly moves (raise epsilon)"
                )
            return x, y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:3], *output)
        ctx.save_for_forward(*inputs[:3], *output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> Any:
        return _Solve.apply(*_in_front(info, in_dims, tensors)), (0, 0)

    @staticmethod
    def backward(ctx: Any, on_x: Tensor, on_y: Tensor) -> Any:
        P, d, e, x, y = ctx.saved_tensors
        w, z = _Solve.apply(P, d, e, on_x, on_y)
        on_P = -(w[..., None] * y[..., None, :] + x[..., None] * z[..., None, :])
        return on_P.to(P.dtype), -w * x, -z * y, w, z

    @staticmethod
    def jvp(ctx: Any, on_P: Tensor, on_d: Tensor, on_e: Tensor, on_a: Tensor, on_b: Tensor) -> Any:
        P, d, e, x, y = ctx.saved_tensors
        x = _Once.apply(x)
        moved = on_P.to(d.dtype)
        a = on_a - on_d * x - _coupling.times(moved, y)
        b = on_b - on_e * y - _coupling.transposed(moved, x)
        return _Solve.apply(P, d, e, a, b)
