"""The derivatives of an assignment, by the implicit function theorem, as autograd Functions.

The conditions P·1 = r, Pᵀ·1 = c on P = exp((S + f + g)/ε) hold along every change of S, r and c. So with

    ⎡diag d    P   ⎤ ⎡x⎤   ⎡G∘P·1  + ε f̄⎤        d = P·1 (1 + ε/ρ_r),  e = Pᵀ·1 (1 + ε/ρ_c)
    ⎣  Pᵀ    diag e⎦ ⎣y⎦ = ⎣(G∘P)ᵀ1 + ε ḡ⎦

a gradient (G, f̄, ḡ) on the plan and its potentials becomes

    ∂S = P∘(G − x − y)/ε        ∂r = x·(1 or d/r)        ∂c = y·(1 or e/c)

with 1 where the sums are fixed, d/r and e/c where they are relaxed. The backward is made of torch's
operations and of one more Function, the solution of the linear system, whose derivative solves the same
system. So there are derivatives of every order, and none is silently zero.
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
from xent.sinkhorn._marginals import validate_marginals, validate_start

UNSOLVED = 1e-2  # relative residual; rounding leaves far less, a system without a solution more


class Settings(NamedTuple):
    """The options of an assignment that are not tensors."""

    epsilon: float
    row_relaxation: float
    column_relaxation: float
    max_iterations: int
    tolerance: float | None
    eps: float = 0.0  # of the types of the given marginals

    @property
    def balanced(self) -> bool:
        """True where neither side is relaxed; then a constant may move between f and g."""
        return math.isinf(self.row_relaxation) and math.isinf(self.column_relaxation)

    @property
    def relaxed(self) -> bool:
        """True where both sides are relaxed."""
        return not math.isinf(self.row_relaxation) and not math.isinf(self.column_relaxation)


class Solution(NamedTuple):
    """A plan, its potentials, and how far it converged."""

    plan: Tensor  # (..., N, K)
    f: Tensor  # (..., N)
    g: Tensor  # (..., K)
    error: Tensor  # (...)
    iterations: Tensor  # (...), int64


def solution(settings: Settings, scores: Tensor, row: Tensor, column: Tensor, start: Tensor) -> Solution:
    """Return the plan and its potentials, differentiable in scores, row and column."""
    return Solution(*_Plan.apply(settings, scores, row, column, start))


def validated_marginals(
    settings: Settings, scores: Tensor, row: Tensor, column: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the marginals; raise a ValueError that says why there is no plan for them."""
    validate_start(start, row)
    return validate_marginals(
        scores.detach(),
        row,
        column,
        row_relaxed=not math.isinf(settings.row_relaxation),
        column_relaxed=not math.isinf(settings.column_relaxation),
        eps=settings.eps,
    )


def problem_of(settings: Settings, scores: Tensor, row: Tensor, column: Tensor) -> Problem:
    """Return the problem without derivatives, its leading dimensions flattened to one."""
    s, r, c = (flatten_batch(t, scores.ndim - 2) for t in (scores, row, column))
    return Problem(s, r, c, settings.epsilon, settings.row_relaxation, settings.column_relaxation)


def _solve(settings: Settings, scores: Tensor, row: Tensor, column: Tensor, start: Tensor) -> Solution:
    batch = scores.shape[:-2]
    f = flatten_batch(start, len(batch))
    problem = problem_of(settings, scores, row, column)
    f = torch.where(problem.row > 0, f, -math.inf)  # rows left out take no part in the first step either
    masses = torch.maximum(problem.row.sum(-1), problem.column.sum(-1))
    if not bool((masses < torch.finfo(scores.dtype).max).all()):  # they would overflow a kernel of that type
        problem = replace(problem, scores=problem.scores.to(row.dtype))
    if settings.tolerance is None:
        progress = _iterations.run_iterations(problem, f, settings.max_iterations)
    else:
        progress = _ascent.solve_to_tolerance(problem, f, settings.tolerance, settings.max_iterations)
    state = progress.state
    iterations = torch.full(batch, progress.iterations, dtype=torch.int64, device=scores.device)
    return Solution(
        _iterations.plan_as(problem, state, scores.dtype).reshape(scores.shape),
        state.f.reshape(row.shape),
        state.g.reshape(column.shape),
        state.error.reshape(batch),
        iterations,
    )


def flatten_batch(t: Tensor, batch: int) -> Tensor:
    """Flatten the leading dimensions to one; (0, ...) where they are empty."""
    return t.detach().reshape(math.prod(t.shape[:batch]), *t.shape[batch:])


def _batch_first(info: Any, in_dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Move the dimension that `vmap` batches to the front; expand tensors that it does not batch."""
    return [
        t.expand(info.batch_size, *t.shape) if at is None else t.movedim(at, 0)
        for t, at in zip(tensors, in_dims, strict=True)
    ]


def _where_mass(P: Tensor, G: Tensor) -> Tensor:
    """Return G where P > 0, else 0: there it may be infinite."""
    return torch.where(P == 0, 0.0, G)


class _Plan(torch.autograd.Function):
    """The solved plan, differentiated by the implicit function theorem."""

    @staticmethod
    def forward(
        settings: Settings, scores: Tensor, row: Tensor, column: Tensor, start: Tensor
    ) -> tuple[Tensor, ...]:
        # inside a Function no transform hides the data that the checks read
        with plain(scores.device):
            row, column = validated_marginals(settings, scores, row, column, start)
            return tuple(_solve(settings, scores, row, column, start))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.settings, _, row, column, _ = inputs
        plan, _, _, *others = output
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(plan, row, column)
        ctx.save_for_forward(plan, row, column)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], settings: Settings, *tensors: Tensor) -> Any:
        return _Plan.apply(settings, *_batch_first(info, in_dims[1:], tensors)), (0,) * 5

    @staticmethod
    def backward(ctx: Any, G: Tensor | None, on_f: Tensor | None, on_g: Tensor | None, *_: Any) -> Any:
        plan, row, column = ctx.saved_tensors
        settings = ctx.settings
        if G is None and on_f is None and on_g is None:
            return (None,) * 5
        a, b = torch.zeros_like(row), torch.zeros_like(column)
        # G − x − y cancels and is divided by ε, so float32 would leave its rounding over ε
        P = plan.to(row.dtype)
        if G is not None:
            G = _where_mass(P, G.to(row.dtype))
            a, b = (G * P).sum(-1), (G * P).sum(-2)
        d, e = _diagonals(settings, plan, row.dtype)
        # a potential of −inf stays −inf: its gradient is 0
        if on_f is not None:
            a = a + torch.where(d > 0, settings.epsilon * on_f, 0.0)
        if on_g is not None:
            b = b + torch.where(e > 0, settings.epsilon * on_g, 0.0)
        x, y = _solve_system(settings, plan, d, e, a, b)
        on_scores = on_row = on_column = None
        if ctx.needs_input_grad[1]:
            change = x[..., None] + y[..., None, :]
            on_scores = (P * ((-change if G is None else G - change) / settings.epsilon)).to(plan.dtype)
        if ctx.needs_input_grad[2]:
            on_row = x * _marginal_factor(settings.row_relaxation, d, row)
        if ctx.needs_input_grad[3]:
            on_column = y * _marginal_factor(settings.column_relaxation, e, column)
        return None, on_scores, on_row, on_column, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        _, on_scores, on_row, on_column, _ = tangents
        plan, row, column = ctx.saved_tensors
        plan, settings = _ForwardOnce.apply(plan), ctx.settings
        P = plan.to(row.dtype)
        d, e = _diagonals(settings, plan, row.dtype)
        a, b = torch.zeros_like(row), torch.zeros_like(column)
        if on_scores is not None:
            on_scores = _where_mass(P, on_scores.to(row.dtype)) / settings.epsilon
            a, b = a - (P * on_scores).sum(-1), b - (P * on_scores).sum(-2)
        if on_row is not None:
            a = a + on_row * _marginal_factor(settings.row_relaxation, d, row)
        if on_column is not None:
            b = b + on_column * _marginal_factor(settings.column_relaxation, e, column)
        x, y = _solve_system(settings, plan, d, e, a, b)
        change = x[..., None] + y[..., None, :]
        on_plan = (P * (change if on_scores is None else change + on_scores)).to(plan.dtype)
        return on_plan, settings.epsilon * x, settings.epsilon * y, None, None


def _diagonals(settings: Settings, plan: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    p, q = plan.sum(-1, dtype=dtype), plan.sum(-2, dtype=dtype)
    d = p * (1 + settings.epsilon / settings.row_relaxation)
    e = q * (1 + settings.epsilon / settings.column_relaxation)
    return d, e


def _marginal_factor(relaxation: float, d: Tensor, mass: Tensor) -> Tensor:
    """Return 1 where the sums are fixed, d/mass where they are relaxed; nan for a mass of 0."""
    divisor = torch.where(mass > 0, mass, 1.0)
    return torch.where(mass > 0, torch.ones_like(mass) if math.isinf(relaxation) else d / divisor, math.nan)


def _solve_system(
    settings: Settings, plan: Tensor, d: Tensor, e: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    x, y = _Solve.apply(plan, d, e, a, b)
    if not settings.balanced:
        return x, y
    # 1 in x and −1 in y changes no plan; without that part a second derivative needs nothing along it
    rows, columns = d > 0, e > 0
    count = rows.sum(-1, keepdim=True).clamp(min=1)
    constant = torch.where(rows, x, 0.0).sum(-1, keepdim=True) / count
    return torch.where(rows, x - constant, 0.0), torch.where(columns, y + constant, 0.0)


class _ForwardOnce(torch.autograd.Function):
    """The identity, which refuses a second forward mode.

    Tensors computed inside a `jvp` have no tangents of an outer forward mode: these would be silently zero.
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
    """The solution x, y of the system of `_coupling`; its derivative solves the same system."""

    @staticmethod
    def forward(P: Tensor, d: Tensor, e: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if is_batched(a) or is_batched(b):
            raise NotImplementedError(
                "sinkhorn.assign takes no is_grads_batched: use torch.func.jacrev or torch.func.vmap"
            )
        with plain(P.device):
            x, y, _ = _coupling.solve(P, d, e, a, b)
            relative = _coupling.residual(P, d, e, a, b, x, y)
            if bool((relative > UNSOLVED).any()):
                raise RuntimeError(
                    "the assignment has no derivative here: its linear system is left with "
                    f"{float(relative.max()):.1e} of its right-hand side. Potentials are not determined "
                    "where masked scores fall into parts that nothing connects (differentiate the plan "
                    "instead); at a very small epsilon a plan hardly moves (raise epsilon)"
                )
            return x, y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:3], *output)
        ctx.save_for_forward(*inputs[:3], *output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> Any:
        return _Solve.apply(*_batch_first(info, in_dims, tensors)), (0, 0)

    @staticmethod
    def backward(ctx: Any, on_x: Tensor, on_y: Tensor) -> Any:
        P, d, e, x, y = ctx.saved_tensors
        w, z = _Solve.apply(P, d, e, on_x, on_y)
        on_P = -(w[..., None] * y[..., None, :] + x[..., None] * z[..., None, :])
        return on_P.to(P.dtype), -w * x, -z * y, w, z

    @staticmethod
    def jvp(ctx: Any, on_P: Tensor, on_d: Tensor, on_e: Tensor, on_a: Tensor, on_b: Tensor) -> Any:
        P, d, e, x, y = ctx.saved_tensors
        x = _ForwardOnce.apply(x)
        moved = on_P.to(d.dtype)
        a = on_a - on_d * x - _coupling.matvec(moved, y)
        b = on_b - on_e * y - _coupling.rmatvec(moved, x)
        return _Solve.apply(P, d, e, a, b)
