"""Entropic assignment in the log domain: P = exp((S + f + g)/ε) with given sums.

    max over P ≥ 0 of  ⟨S, P⟩ − ε·KL(P ‖ r cᵀ)      with P·1 = r, Pᵀ·1 = c,
                       or minus ρ_r·KL(P·1 ‖ r), minus ρ_c·KL(Pᵀ·1 ‖ c), in place of either

    rows     f = ε (log r − φ·L)    L_i = log Σ_j exp((S_ij + g_j)/ε)     φ = ρ_r/(ρ_r + ε), 1 where P·1 = r
    columns  g = ε (log c − ψ·M)    M_j = log Σ_i exp((S_ij + f_i)/ε)     ψ = ρ_c/(ρ_c + ε), 1 where Pᵀ·1 = c

One iteration is the step of columns and then the step of rows, from f = 0, which leaves an error in the
column sums. There are two ways to compute it, equal in exact arithmetic:

- `column_step` and `evaluate`: the two log-sum-exps, in float64, a few rows at a time. The maximum of a row
  is subtracted before the division by ε, so no exponential overflows;
- `iterate`: with f and g absorbed into a kernel P, a step is one product of P with a vector, until a scaling
  leaves ±`REACH`; then the scalings are absorbed anew. Where a column sum over- or underflows, `column_step`
  computes its logarithm, which does not.

`_ascent` iterates to a tolerance.

For a matrix whose rows or columns are distributed over processes, `evaluate` and `matvec` sum over columns,
`column_step`, `evaluate`'s q and `rmatvec` over rows: there, and in the sums of `Problem.dual` and
`column_error`, a reduction over processes would be needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from xent.sinkhorn._coupling import matvec, rmatvec

CHUNK = 1 << 20  # scores at a time: their copy stays in the cache, and threads seldom wait for each other
REACH = 20.0  # of log u and log v: beyond e^±20 an entry that underflowed in the kernel could matter


@dataclass(frozen=True)
class Problem:
    """Scores, marginals and options of a batch of assignments, in one leading dimension."""

    scores: Tensor  # (B, N, K) float32 or float64; −inf forbids mass
    row: Tensor  # (B, N) r, float64; 0 where no mass is allowed
    column: Tensor  # (B, K) c
    epsilon: float
    row_relaxation: float = math.inf  # ρ_r
    column_relaxation: float = math.inf  # ρ_c

    @property
    def row_exponent(self) -> float:
        """The exponent φ of the row step."""
        return 1.0 if math.isinf(self.row_relaxation) else 1 / (1 + self.epsilon / self.row_relaxation)

    @property
    def column_exponent(self) -> float:
        """The exponent ψ of the column step."""
        return 1.0 if math.isinf(self.column_relaxation) else 1 / (1 + self.epsilon / self.column_relaxation)

    def target_column_sums(self, g: Tensor) -> Tensor:
        """Return the column sums at the optimum, (B, K): c, or c·exp(−(g − ε log c)/ρ_c) where relaxed."""
        if math.isinf(self.column_relaxation):
            return self.column
        gap = (self.epsilon * self.column.log() - g) / self.column_relaxation
        return torch.where(self.column > 0, self.column * gap.exp(), 0.0)

    def at(self, epsilon: float) -> Problem:
        """Return the same problem at another ε."""
        return replace(self, epsilon=epsilon)

    def dual(self, f: Tensor, g: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return the dual objective over ε where f is optimal for g, and a bound on its rounding: (B,) each.

        It is concave with one maximum; its gradient in g/ε is `target_column_sums` minus q.
        """
        objective, size = -q.sum(-1), q.sum(-1)
        for t, s, relaxation in (
            (f, self.row, self.row_relaxation),
            (g, self.column, self.column_relaxation),
        ):
            u = torch.where(s > 0, t / self.epsilon - s.log(), 0.0)
            stiff = relaxation / self.epsilon
            gain = u if math.isinf(relaxation) else -stiff * torch.expm1(-u / stiff)
            part = torch.where(s > 0, s * gain, 0.0)
            objective, size = objective + part.sum(-1), size + part.abs().sum(-1)
        return objective, 8 * torch.finfo(size.dtype).eps * size

    def slopes(self, state: State) -> tuple[Tensor, Tensor]:
        """Return the diagonals d (B, N) and e (B, K) of ε times the dual's Hessian."""
        return (
            state.p * (1 + self.epsilon / self.row_relaxation),
            state.q + self.target_column_sums(state.g) * (self.epsilon / self.column_relaxation),
        )


class State(NamedTuple):
    """Potentials, their plan and its sums, after a row step."""

    f: Tensor  # (B, N)
    g: Tensor  # (B, K)
    plan: Tensor  # (B, N, K), in the type of the scores
    p: Tensor  # (B, N)
    q: Tensor  # (B, K)
    error: Tensor  # (B,)


class Progress(NamedTuple):
    """A state and the number of iterations that led to it."""

    state: State
    iterations: int


def blocks(scores: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield slices of (B, N): several items of a batch where they fit, else some rows of one item."""
    batch, n, k = scores.shape
    items = max(1, CHUNK // max(1, n * k))
    rows = n if items > 1 else max(1, CHUNK // max(1, k))
    for item in range(0, batch, items):
        for row in range(0, n, max(1, rows)):
            yield slice(item, min(item + items, batch)), slice(row, min(row + rows, n))


def column_error(problem: Problem, f: Tensor, g: Tensor, q: Tensor) -> Tensor:
    """Return Σ |q − target| over the larger of Σ c and Σ target, (B,)."""
    column, target = problem.column, problem.target_column_sums(g)
    if not bool((q + target < math.inf).all()):  # each relative to the largest, from logarithms
        log_q, log_target = _log_columns(problem, f, g)
        log_c = column.log()
        largest = torch.maximum(torch.maximum(log_q, log_target), log_c).amax(-1, keepdim=True)
        q, target, column = ((t - largest.nan_to_num(neginf=0.0)).exp() for t in (log_q, log_target, log_c))
    mass = torch.maximum(column.sum(-1), target.sum(-1))
    error = torch.where(mass > 0, (q - target).abs().sum(-1) / mass, 0.0)
    return error.clamp(max=torch.finfo(error.dtype).max)


def _log_columns(problem: Problem, f: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Return log q of the plan of f and g, and log of its target, −inf without mass: (B, K) each."""
    unrelaxed = replace(problem, column_relaxation=math.inf)
    log_c, has_mass = problem.column.log(), problem.column > 0
    log_q = log_c + (g - column_step(unrelaxed, f)) / problem.epsilon
    log_target = log_c + (problem.epsilon * log_c - g) / problem.column_relaxation
    largest = torch.finfo(g.dtype).max / 4  # so that differences of logarithms are finite
    return tuple(torch.where(has_mass, t.clamp(-largest, largest), -math.inf) for t in (log_q, log_target))


def evaluate(problem: Problem, g: Tensor, plan: Tensor) -> State:
    """Take the row step, f from g, and write the resulting plan into `plan`."""
    scores, epsilon, exponent = problem.scores, problem.epsilon, problem.row_exponent
    f, p, q = torch.empty_like(problem.row), torch.empty_like(problem.row), torch.zeros_like(problem.column)
    log_r = problem.row.log()
    buffer = g.new_empty(max((scores[at].numel() for at in blocks(scores)), default=0))
    for items, rows in blocks(scores):
        part = scores[items, rows]
        z = buffer[: part.numel()].view(part.shape)
        torch.add(part, g[items, None, :], out=z)
        m = z.amax(-1).nan_to_num(neginf=0.0)  # for a row of −inf alone
        total = z.sub_(m[..., None]).div_(epsilon).exp_().sum(-1)
        r, log_row = problem.row[items, rows], log_r[items, rows]
        # a row without mass, or that is to have none, becomes 0
        has_mass = (total > 0) & (r > 0)
        u = log_row - exponent * total.log()
        scale = (
            r / total
            if math.isinf(problem.row_relaxation)
            else (u + m / (problem.row_relaxation + epsilon)).exp()
        )
        # an infinite scale overflows plan and sums: what reads these then computes them from logarithms
        scale = torch.where(has_mass, scale, 0.0)
        q[items] += z.mul_(scale[..., None]).sum(-2)
        plan[items, rows] = z
        f[items, rows] = torch.where(has_mass, epsilon * u - exponent * m, -math.inf)
        p[items, rows] = scale * total
    return State(f, g, plan, p, q, column_error(problem, f, g, q))


def plan_as(problem: Problem, state: State, dtype: torch.dtype) -> Tensor:
    """Return the plan (B, N, K) in a type, clamped to its largest number."""
    plan = state.plan
    if plan.numel() > 0 and not bool(plan.amax() < torch.finfo(plan.dtype).max):
        largest = torch.finfo(problem.row.dtype).max
        z = (problem.scores + state.f[..., None] + state.g[..., None, :]) / problem.epsilon
        plan = z.exp_().clamp_(max=largest)
    return plan if plan.dtype == dtype else plan.clamp(max=torch.finfo(dtype).max).to(dtype)


def column_step(problem: Problem, f: Tensor) -> Tensor:
    """Take the column step, g (B, K) from f."""
    scores, epsilon = problem.scores, problem.epsilon
    m = torch.full_like(problem.column, -math.inf)
    total = torch.zeros_like(m)
    for items, rows in blocks(scores):
        z = torch.add(scores[items, rows], f[items, rows, None])
        here = torch.maximum(m[items], z.amax(-2))
        base = here.nan_to_num(neginf=0.0)
        before = total[items] * ((m[items] - base) / epsilon).exp()
        total[items] = before + z.sub_(base[..., None, :]).div_(epsilon).exp_().sum(-2)
        m[items] = here
    has_mass = (total > 0) & (problem.column > 0)
    g = epsilon * (problem.column.log() - problem.column_exponent * total.log()) - problem.column_exponent * m
    return torch.where(has_mass, g, -math.inf)


def columns_from_plan(problem: Problem, state: State) -> Tensor:
    """Take the column step from the plan's column sums, g (B, K)."""
    if has_lost_columns(problem, state):
        return column_step(problem, state.f)
    log_v = _log_scaling(state.q, problem.column, problem.column_exponent, state.g, problem.epsilon)
    return torch.where(problem.column > 0, state.g + problem.epsilon * log_v, -math.inf)


def has_lost_columns(problem: Problem, state: State) -> bool:
    """Return whether the sum of a column with mass over- or underflowed."""
    within = (state.q > 0) & (state.q < math.inf)
    return not bool((within | (problem.column == 0)).all())


def _log_scaling(s: Tensor, mass: Tensor, exponent: float, potential: Tensor, epsilon: float) -> Tensor:
    """Return log u of the row step or log v of the column step, on a kernel that contains the potential.

    s holds the sums of that kernel by the other side's scaling: P·v (B, N), or Pᵀ·u (B, K).
    """
    step = mass.log() - exponent * s.log()
    return step if exponent == 1.0 else step + (exponent - 1) * potential / epsilon


def iterate(problem: Problem, state: State, count: int) -> State:
    """Run `count` more iterations."""
    if count == 0:
        return state
    remaining = count
    while remaining > 1:
        g, done = _iterate_kernel(problem, state, remaining - 1)
        if done == 0:  # the first scaling is out of reach
            g, done = columns_from_plan(problem, state), 1
        # repeat the kernel's last row step in float64
        state, remaining = evaluate(problem, g, state.plan), remaining - done
    return evaluate(problem, columns_from_plan(problem, state), state.plan)


def _iterate_kernel(problem: Problem, state: State, count: int) -> tuple[Tensor, int]:
    """Run up to `count` iterations on the plan as a kernel; return g and the number of iterations."""
    kernel = state.plan[0] if len(state.plan) == 1 else state.plan
    shape, dtype = problem.column.shape, kernel.dtype
    rows, columns = problem.row > 0, problem.column > 0
    q, log_v, done = state.q, torch.zeros_like(state.q), 0
    for _ in range(count):
        ahead = _log_scaling(q, problem.column, problem.column_exponent, state.g, problem.epsilon)
        ahead = torch.where(columns, ahead, 0.0)
        if not bool((ahead.abs() <= REACH).all()):  # nan and inf too
            break
        v = ahead.exp().to(dtype).view(kernel.shape[:-2] + kernel.shape[-1:])
        s = matvec(kernel, v).to(q.dtype).view(problem.row.shape)
        log_u = _log_scaling(s, problem.row, problem.row_exponent, state.f, problem.epsilon)
        log_u = torch.where(rows, log_u, 0.0)
        if not bool((log_u.abs() <= REACH).all()):
            break
        u = log_u.exp().to(dtype).view(kernel.shape[:-1])
        q = rmatvec(kernel, u).to(q.dtype).view(shape)
        log_v, done = ahead, done + 1
    return state.g + problem.epsilon * log_v, done


def run_iterations(problem: Problem, f: Tensor, iterations: int) -> Progress:
    """Run a given number of iterations from f."""
    plan = torch.empty_like(problem.scores)
    state = evaluate(problem, column_step(problem, f), plan)
    return Progress(iterate(problem, state, iterations - 1), iterations)
