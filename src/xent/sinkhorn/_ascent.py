"""From potentials to a plan whose columns' error is within a tolerance.

    f is always the best for its g; g goes up the concave dual by the step Δ that solves, damped,

    (diag q − Pᵀ diag(1/p) P) Δ = ε (c − q)

Sinkhorn's own iterations come first, and stay where their rate says that few will do. At a small ε they creep
for thousands of passes where Newton's steps need tens. These creep too where ε is a small part of the scores'
spread, for there the dual is all but piecewise linear: its slope says little about how far to go. So ε is
taken down from where the dual is smooth, by a factor at a time, each plan's potentials the next one's start.
Near a vertex of the polytope they are linear in ε, and the line through the last two is the start.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from xent.sinkhorn import _coupling
from xent.sinkhorn._iterations import (
    Found,
    Problem,
    State,
    blocks,
    column_step,
    columns_from_plan,
    evaluate,
    fixed,
    iterate,
    lost,
)

CHECK = 10  # iterations between two looks at the error
PATIENCE = 60  # iterations that are left to plain Sinkhorn where it will be done by then
SURE = 400  # iterations to rounding that are left to plain Sinkhorn where their number is known
DAMPING = 1e-2  # the first of Newton's steps; 0 in the end
FIRMEST = 1e6  # damping at which no step is left
FORCING = 1e-4  # of the residual of a step: float32 products reach it
SMOOTH = 100  # the spread of scores over ε up to which Newton's steps need no help
FALL = 4.0  # of ε from one plan to the next
COARSE = 1e-3  # the error of a plan on the way
RUNGS = 23  # a smaller ε than the last is beyond the digits of potentials of the spread's size


def converged(problem: Problem, f: Tensor, tolerance: float, max_iterations: int) -> Found:
    """Iterations until the error is within the tolerance: plain ones while they get there, then Newton's."""
    share = problem.row_share * problem.column_share
    # where both sides may give way, an iteration takes potentials at least by this factor closer to the plan
    sure = math.inf if share == 1 else 40 / -math.log(share) if share > 0 else 0.0
    found = fixed(problem, f, 1)
    found = plain(problem, found, tolerance, max_iterations, patience=PATIENCE if sure > SURE else None)
    found = annealed(problem, found, tolerance, max_iterations)
    found = newton(problem, found, tolerance, max_iterations)
    return plain(problem, found, tolerance, max_iterations, patience=None)


def plain(
    problem: Problem, found: Found, tolerance: float, max_iterations: int, patience: int | None
) -> Found:
    """Iterations, while their rate says that no more than `patience` of them will be needed."""
    state, count = found
    while count < max_iterations and not bool((state.error <= tolerance).all()):
        step = min(CHECK, max_iterations - count)
        before, state = state.error, iterate(problem, state, step)
        count += step
        rate = (state.error / before).log() / step
        left = torch.where(state.error > tolerance, (tolerance / state.error).log() / rate, 0.0)
        if patience is not None and not bool(((left >= 0) & (left <= patience)).all()):
            break
    return Found(state, count)


def annealed(problem: Problem, found: Found, tolerance: float, max_iterations: int) -> Found:
    """Return the plan at a small ε, started from the potentials of plans at falling ε."""
    state, count = found
    done = bool((state.error <= tolerance).all())
    rungs = [] if done else _rungs(problem, state.g)
    g, last = state.g, None
    for epsilon, lower in pairwise([*rungs, problem.epsilon]):
        if count + 7 > max_iterations:  # a start, a step of Newton's, and the start at the problem's own ε
            break
        warm = problem.at(epsilon)
        state = _started(warm, g, state.plan)
        state, count = newton(warm, Found(state, count + 2), max(tolerance, COARSE), max_iterations - 2)
        # the line through the last two plans' potentials: FALL·ε, ε, lower
        ahead = 0.0 if last is None else (epsilon - lower) / ((FALL - 1) * epsilon) * (state.g - last)
        g, last = torch.where(problem.column > 0, state.g + ahead, -math.inf), state.g
    return found if last is None else Found(_started(problem, g, state.plan), count + 2)


def _started(problem: Problem, g: Tensor, plan: Tensor) -> State:
    """The plan after an iteration from g, its rows scaled first; none of its columns is without a sum."""
    state = evaluate(problem, g, plan)
    return evaluate(problem, columns_from_plan(problem, state), plan)


def _rungs(problem: Problem, g: Tensor) -> list[float]:
    """The falling ε, from where the dual is smooth to above the problem's own."""
    top = _spread(problem, g) / SMOOTH
    return [top / FALL**k for k in range(RUNGS) if top / FALL**k > problem.epsilon]


def _spread(problem: Problem, g: Tensor) -> float:
    """Return how far the worst allowed pair lies below its row's best, with the columns' potentials added."""
    widest = 0.0
    for items, rows in blocks(problem.scores):
        z = problem.scores[items, rows] + g[items, None, :]
        z = z.sub_(z.amax(-1, keepdim=True).nan_to_num_(neginf=0.0))
        widest = max(widest, -float(z.masked_fill_(z == -math.inf, 0.0).amin()))
    return min(widest, torch.finfo(g.dtype).max)


def newton(problem: Problem, found: Found, tolerance: float, max_iterations: int) -> Found:
    """Up the dual to its maximum; each evaluation and each pair of products counts as an iteration."""
    state, count = found
    dual, _ = problem.dual(state.f, state.g, state.q)
    damping, patience = torch.full_like(state.error, DAMPING), _coupling.PATIENCE
    while count + 3 <= max_iterations:  # a step of either kind of solution, and what it led to
        late = (state.error > tolerance) & (damping < FIRMEST)
        if not bool(late.any()):
            break
        if lost(problem, state):  # a step of columns always goes up, and leaves none without a sum
            state = evaluate(problem, column_step(problem, state.f), state.plan)
            (dual, _), count = problem.dual(state.f, state.g, state.q), count + 1
            continue
        d, e = problem.slopes(state)
        wanted = problem.wanted_columns(state.g)
        off = wanted - state.q
        _, y, steps = _coupling.solve(
            state.plan,
            d,
            # of a column that has less than it should the curvature is small, and the way not far
            e + damping[:, None] * torch.maximum(e, wanted),
            torch.zeros_like(d),
            off,
            tolerance=state.error.clamp(FORCING, 0.1),
            max_steps=min(300, max_iterations - count - 2),
            patience=patience,
        )
        if steps > patience:  # conjugate gradients gave up, and would again
            patience = 0
        y = torch.where(late[:, None] & y.isfinite(), y, 0.0)
        trial = evaluate(problem, state.g + problem.epsilon * y, state.plan)
        higher, rounding = problem.dual(trial.f, trial.g, trial.q)
        count += steps + 1
        # the dual's slope along the step, before and after; where it has not turned, the dual has risen
        slope, after = ((t * y).sum(-1) for t in (off, problem.wanted_columns(trial.g) - trial.q))
        much, short = trial.error < 0.5 * state.error, after > 0.5 * slope
        # near the maximum the dual's own rounding hides what it gains: there the error decides
        rises = (after >= 0) | (higher - dual > 0.05 * slope) | (much & (higher - dual > -rounding))
        good = late & rises
        eased = torch.where(good, damping / torch.where(much | short, 10.0, 3.0), damping * 5)
        damping = torch.where(late, eased, damping)
        if bool((good | ~late).all()):
            state, dual = trial, higher
        else:  # the plan has been overwritten
            state = evaluate(problem, torch.where(good[:, None], trial.g, state.g), state.plan)
            dual, _ = problem.dual(state.f, state.g, state.q)
    return Found(state, count)
