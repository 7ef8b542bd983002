"""Entropic assignment in the log domain: P = exp((S + f + g)/ε), whose sums are what they should be.

    max over P ≥ 0 of  ⟨S, P⟩ − ε·KL(P ‖ r cᵀ)      with P·1 = r, Pᵀ·1 = c,
                       or less λ·KL(P·1 ‖ r), less μ·KL(Pᵀ·1 ‖ c), in place of either condition

    rows     f = ε (log r − φ·L)    L_i = log Σ_j exp((S_ij + g_j)/ε)     φ = λ/(λ + ε), 1 where P·1 = r
    columns  g = ε (log c − ψ·M)    M_j = log Σ_i exp((S_ij + f_i)/ε)     ψ = μ/(μ + ε), 1 where Pᵀ·1 = c

One iteration is the step of columns and then the step of rows, from f = 0; what is left is the columns'
error. Two ways of taking it, the same in exact arithmetic:

- `column_step` and `evaluate`: the two logarithms of sums, in float64, a few rows at a time. A row's own
  maximum is taken off before ε divides, so that no exponent leaves the range of numbers above;
- `iterate`: with f and g taken up into a kernel P, a step is one product of P with a vector, until a scaling
  leaves ±`REACH`: then they are taken up anew. Where a column's sum has left the range of numbers, its
  logarithm has not, and `column_step` takes it.

`ascent` goes from here to a plan that meets a tolerance.

Of a matrix whose rows or columns are spread over processes, `evaluate` and `times` sum over columns,
`column_step`, `evaluate`'s q and `transposed` over rows: there, and in the sums of `Problem.dual` and
`error_of`, a reduction would stand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from xent.sinkhorn._coupling import times, transposed

CHUNK = 1 << 20  # scores at a time: the copy of them stays in the cache, and threads seldom wait
REACH = 20.0  # of log u and log v: beyond e^±20 an entry that the kernel has lost could count


@dataclass(frozen=True)
class Problem:
    """Scores and marginals; batches in one leading dimension."""

    scores: Tensor  # (B, N, K) float32 or float64; −inf: no mass may lie there
    row: Tensor  # (B, N) r, in float64; 0 where nothing can lie
    column: Tensor  # (B, K) c
    epsilon: float
    row_relaxation: float = math.inf  # λ
    column_relaxation: float = math.inf  # μ

    @property
    def row_share(self) -> float:
        return 1.0 if math.isinf(self.row_relaxation) else 1 / (1 + self.epsilon / self.row_relaxation)

    @property
    def column_share(self) -> float:
        return 1.0 if math.isinf(self.column_relaxation) else 1 / (1 + self.epsilon / self.column_relaxation)

    def wanted_columns(self, g: Tensor) -> Tensor:
        """What the columns' sums are to be: c, or c·exp(−(g − ε log c)/μ) where they may give way: (B, K)."""
        if math.isinf(self.column_relaxation):
            return self.column
        gap = (self.epsilon * self.column.log() - g) / self.column_relaxation
        return torch.where(self.column > 0, self.column * gap.exp(), 0.0)

    def at(self, epsilon: float) -> Problem:
        """Return the same problem at another ε."""
        return replace(self, epsilon=epsilon)

    def dual(self, f: Tensor, g: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """The dual objective over ε where f is the best for g, and what rounding may make of it: (B,) each.

        It is concave and rises to its one maximum; its slopes in g/ε are `wanted_columns` less q.
        """
        total, size = -q.sum(-1), q.sum(-1)
        for t, s, relaxation in (
            (f, self.row, self.row_relaxation),
            (g, self.column, self.column_relaxation),
        ):
            u = torch.where(s > 0, t / self.epsilon - s.log(), 0.0)
            stiff = relaxation / self.epsilon
            gain = u if math.isinf(relaxation) else -stiff * torch.expm1(-u / stiff)
            part = torch.where(s > 0, s * gain, 0.0)
            total, size = total + part.sum(-1), size + part.abs().sum(-1)
        return total, 8 * torch.finfo(size.dtype).eps * size

    def slopes(self, state: State) -> tuple[Tensor, Tensor]:
        """The diagonals d (B, N) and e (B, K) of ε times the dual's curvature."""
        return (
            state.p * (1 + self.epsilon / self.row_relaxation),
            state.q + self.wanted_columns(state.g) * (self.epsilon / self.column_relaxation),
        )


class State(NamedTuple):
    """Potentials, their plan and its sums, just after a step of rows."""

    f: Tensor  # (B, N)
    g: Tensor  # (B, K)
    plan: Tensor  # (B, N, K), in the type of the scores
    p: Tensor  # (B, N)
    q: Tensor  # (B, K)
    error: Tensor  # (B,)


class Found(NamedTuple):
    state: State
    iterations: int


def blocks(scores: Tensor) -> Iterator[tuple[slice, slice]]:
    """Parts of (B, N): whole items of a batch where several fit, else rows of one."""
    batch, n, k = scores.shape
    items = max(1, CHUNK // max(1, n * k))
    rows = n if items > 1 else max(1, CHUNK // max(1, k))
    for item in range(0, batch, items):
        for row in range(0, n, max(1, rows)):
            yield slice(item, min(item + items, batch)), slice(row, min(row + rows, n))


def error_of(problem: Problem, f: Tensor, g: Tensor, q: Tensor) -> Tensor:
    """Σ |q − wanted| over the mass of all columns, given or wanted: (B,)."""
    column, wanted = problem.column, problem.wanted_columns(g)
    if not bool((q + wanted < math.inf).all()):  # each over the largest of them, by logarithms
        log_q, log_wanted = _log_columns(problem, f, g)
        log_c = column.log()
        most = torch.maximum(torch.maximum(log_q, log_wanted), log_c).amax(-1, keepdim=True)
        q, wanted, column = ((t - most.nan_to_num(neginf=0.0)).exp() for t in (log_q, log_wanted, log_c))
    mass = torch.maximum(column.sum(-1), wanted.sum(-1))
    error = torch.where(mass > 0, (q - wanted).abs().sum(-1) / mass, 0.0)
    return error.clamp(max=torch.finfo(error.dtype).max)


def _log_columns(problem: Problem, f: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """log q of the plan of f and g, and log of what q is to be, −inf where there is no mass: (B, K) each."""
    held = replace(problem, column_relaxation=math.inf)
    log_c, open_ = problem.column.log(), problem.column > 0
    log_q = log_c + (g - column_step(held, f)) / problem.epsilon
    log_wanted = log_c + (problem.epsilon * log_c - g) / problem.column_relaxation
    most = torch.finfo(g.dtype).max / 4  # differences of logarithms are finite
    return tuple(torch.where(open_, t.clamp(-most, most), -math.inf) for t in (log_q, log_wanted))


def evaluate(problem: Problem, g: Tensor, plan: Tensor) -> State:
    """The step of rows, f from g, and the plan that it makes, written into `plan`."""
    scores, epsilon, lam, share = problem.scores, problem.epsilon, problem.row_relaxation, problem.row_share
    f, p, q = torch.empty_like(problem.row), torch.empty_like(problem.row), torch.zeros_like(problem.column)
    log_r = problem.row.log()
    room = g.new_empty(max((_size(scores[at]) for at in blocks(scores)), default=0))
    for items, rows in blocks(scores):
        part = scores[items, rows]
        z = room[: part.numel()].view(part.shape)
        torch.add(part, g[items, None, :], out=z)
        m = z.amax(-1).nan_to_num(neginf=0.0)  # of a row of nothing but −inf
        total = z.sub_(m[..., None]).div_(epsilon).exp_().sum(-1)
        r, log_row = problem.row[items, rows], log_r[items, rows]
        # of a row without mass, or that is to have none, nothing is left
        open_ = (total > 0) & (r > 0)
        u = log_row - share * total.log()
        scale = r / total if math.isinf(problem.row_relaxation) else (u + m / (lam + epsilon)).exp()
        # an infinite one makes plan and sums that `lost`, `error_of` and `plan_of` see and take by logarithms
        scale = torch.where(open_, scale, 0.0)
        q[items] += z.mul_(scale[..., None]).sum(-2)
        plan[items, rows] = z
        f[items, rows] = torch.where(open_, epsilon * u - share * m, -math.inf)
        p[items, rows] = scale * total
    return State(f, g, plan, p, q, error_of(problem, f, g, q))


def _size(part: Tensor) -> int:
    return part.numel()


def plan_of(problem: Problem, state: State, dtype: torch.dtype) -> Tensor:
    """The plan in a type; what that cannot hold, is its largest number: (B, N, K)."""
    plan = state.plan
    if plan.numel() > 0 and not bool(plan.amax() < torch.finfo(plan.dtype).max):
        most = torch.finfo(problem.row.dtype).max
        z = (problem.scores + state.f[..., None] + state.g[..., None, :]) / problem.epsilon
        plan = z.exp_().clamp_(max=most)
    return plan if plan.dtype == dtype else plan.clamp(max=torch.finfo(dtype).max).to(dtype)


def column_step(problem: Problem, f: Tensor) -> Tensor:
    """The step of columns, g from f: (B, K)."""
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
    open_ = (total > 0) & (problem.column > 0)
    g = epsilon * (problem.column.log() - problem.column_share * total.log()) - problem.column_share * m
    return torch.where(open_, g, -math.inf)


def columns_from_plan(problem: Problem, state: State) -> Tensor:
    """The step of columns, from the sums that the plan has already: (B, K)."""
    if lost(problem, state):
        return column_step(problem, state.f)
    step = problem.epsilon * _log_v(problem, state.g, state.q)
    return torch.where(problem.column > 0, state.g + step, -math.inf)


def lost(problem: Problem, state: State) -> bool:
    """Return whether the sum of a column with mass has left the range of numbers, above or below."""
    within = (state.q > 0) & (state.q < math.inf)
    return not bool((within | (problem.column == 0)).all())


def _log_v(problem: Problem, g: Tensor, s: Tensor) -> Tensor:
    """log v of the step of columns on a kernel with g in it; s = Pᵀ·u: (B, K)."""
    share = problem.column_share
    step = problem.column.log() - share * s.log()
    return step if share == 1.0 else step + (share - 1) * g / problem.epsilon


def _log_u(problem: Problem, f: Tensor, s: Tensor) -> Tensor:
    """log u of the step of rows on a kernel with f in it; s = P·v: (B, N)."""
    share = problem.row_share
    step = problem.row.log() - share * s.log()
    return step if share == 1.0 else step + (share - 1) * f / problem.epsilon


def iterate(problem: Problem, state: State, count: int) -> State:
    """`count` iterations more."""
    if count == 0:
        return state
    left = count
    while left > 1:
        g, done = _on_kernel(problem, state, left - 1)
        if done == 0:  # a scaling is out of reach at once
            g, done = columns_from_plan(problem, state), 1
        # the kernel's last step of rows once more, in float64
        state, left = evaluate(problem, g, state.plan), left - done
    return evaluate(problem, columns_from_plan(problem, state), state.plan)


def _on_kernel(problem: Problem, state: State, count: int) -> tuple[Tensor, int]:
    """g after up to `count` iterations on the plan as a kernel, and how many they were."""
    kernel = state.plan[0] if len(state.plan) == 1 else state.plan
    shape, dtype = problem.column.shape, kernel.dtype
    rows, columns = problem.row > 0, problem.column > 0
    q, log_v, done = state.q, torch.zeros_like(state.q), 0
    for _ in range(count):
        ahead = torch.where(columns, _log_v(problem, state.g, q), 0.0)
        if not bool((ahead.abs() <= REACH).all()):  # nan and inf too
            break
        v = ahead.exp().to(dtype).view(kernel.shape[:-2] + kernel.shape[-1:])
        s = times(kernel, v).to(q.dtype).view(problem.row.shape)
        log_u = torch.where(rows, _log_u(problem, state.f, s), 0.0)
        if not bool((log_u.abs() <= REACH).all()):
            break
        u = log_u.exp().to(dtype).view(kernel.shape[:-1])
        q = transposed(kernel, u).to(q.dtype).view(shape)
        log_v, done = ahead, done + 1
    return state.g + problem.epsilon * log_v, done


def fixed(problem: Problem, f: Tensor, iterations: int) -> Found:
    """A stated number of iterations."""
    plan = torch.empty_like(problem.scores)
    state = evaluate(problem, column_step(problem, f), plan)
    return Found(iterate(problem, state, iterations - 1), iterations)
