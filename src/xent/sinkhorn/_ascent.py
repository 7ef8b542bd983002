"""A solver that iterates until the error of a plan's column sums is within a tolerance.

    f is always optimal for its g; g climbs the concave dual by the step Δ of the damped system

    (diag q − Pᵀ diag(1/p) P) Δ = ε (c − q)

Sinkhorn's own iterations come first, and go on where their rate predicts that few are needed. At a small ε
they take thousands of passes where Newton's method takes tens of steps. Newton's method is slow too where ε
is small beside the range of the scores: there the dual is nearly piecewise linear, and its slope says little
about the length of a step. So ε is lowered to its value by a constant factor at a time, from one at which the
dual is smooth, and the potentials at each ε start the next. Near a vertex of the polytope the potentials are
linear in ε, so the start is extrapolated from the last two.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from xent.sinkhorn import _coupling
from xent.sinkhorn._iterations import (
    Problem,
    Progress,
    State,
    blocks,
    column_step,
    columns_from_plan,
    evaluate,
    has_lost_columns,
    iterate,
    run_iterations,
)

CHECK = 10  # iterations between two evaluations of the error
PATIENCE = 60  # predicted iterations up to which Sinkhorn's method is used
PREDICTED = 400  # the same, where the number of iterations down to rounding is known
DAMPING = 1e-2  # of the first Newton step; it falls towards 0
MAX_DAMPING = 1e6  # damping at which steps are negligible
FORCING = 1e-4  # tolerance of a step's residual; float32 products reach it
SMOOTH = 100  # the range of scores over ε up to which Newton's method needs no annealing
FALL = 4.0  # factor of ε from one plan to the next
COARSE = 1e-3  # tolerance of the plans before the last
MAX_EPSILONS = 23  # below the last ε, potentials of the range's size have no digits left


def solve_to_tolerance(problem: Problem, f: Tensor, tolerance: float, max_iterations: int) -> Progress:
    """Iterate until the error is within the tolerance: Sinkhorn's method while it is fast, then Newton's."""
    contraction = problem.row_exponent * problem.column_exponent
    # where both sides are relaxed, an iteration shrinks the potentials' error at least by this factor
    predicted = math.inf if contraction == 1 else 40 / -math.log(contraction) if contraction > 0 else 0.0
    progress = run_iterations(problem, f, 1)
    progress = iterate_sinkhorn(
        problem, progress, tolerance, max_iterations, patience=PATIENCE if predicted > PREDICTED else None
    )
    progress = anneal_epsilon(problem, progress, tolerance, max_iterations)
    progress = newton_ascent(problem, progress, tolerance, max_iterations)
    return iterate_sinkhorn(problem, progress, tolerance, max_iterations, patience=None)


def iterate_sinkhorn(
    problem: Problem, progress: Progress, tolerance: float, max_iterations: int, patience: int | None
) -> Progress:
    """Iterate while the rate of convergence predicts at most `patience` more iterations."""
    state, count = progress
    while count < max_iterations and not bool((state.error <= tolerance).all()):
        step = min(CHECK, max_iterations - count)
        before, state = state.error, iterate(problem, state, step)
        count += step
        rate = (state.error / before).log() / step
        left = torch.where(state.error > tolerance, (tolerance / state.error).log() / rate, 0.0)
        if patience is not None and not bool(((left >= 0) & (left <= patience)).all()):
            break
    return Progress(state, count)


def anneal_epsilon(problem: Problem, progress: Progress, tolerance: float, max_iterations: int) -> Progress:
    """Start the plan at a small ε from the potentials of plans at larger, falling ε."""
    state, count = progress
    done = bool((state.error <= tolerance).all())
    schedule = [] if done else _epsilon_schedule(problem, state.g)
    g, last = state.g, None
    for epsilon, lower in pairwise([*schedule, problem.epsilon]):
        if count + 7 > max_iterations:  # a start, a Newton step, and the start at the problem's own ε
            break
        warm = problem.at(epsilon)
        state = _restart(warm, g, state.plan)
        state, count = newton_ascent(
            warm, Progress(state, count + 2), max(tolerance, COARSE), max_iterations - 2
        )
        # the line through the last two plans' potentials: FALL·ε, ε, lower
        ahead = 0.0 if last is None else (epsilon - lower) / ((FALL - 1) * epsilon) * (state.g - last)
        g, last = torch.where(problem.column > 0, state.g + ahead, -math.inf), state.g
    return progress if last is None else Progress(_restart(problem, g, state.plan), count + 2)


def _restart(problem: Problem, g: Tensor, plan: Tensor) -> State:
    """Return the state after one iteration from g, rows first, so that no column sum is 0."""
    state = evaluate(problem, g, plan)
    return evaluate(problem, columns_from_plan(problem, state), plan)


def _epsilon_schedule(problem: Problem, g: Tensor) -> list[float]:
    """Return the falling values of ε, from one at which the dual is smooth to above the problem's own."""
    top = _score_range(problem, g) / SMOOTH
    return [top / FALL**k for k in range(MAX_EPSILONS) if top / FALL**k > problem.epsilon]


def _score_range(problem: Problem, g: Tensor) -> float:
    """Return the largest difference within a row of the allowed scores plus the columns' potentials."""
    widest = 0.0
    for items, rows in blocks(problem.scores):
        z = problem.scores[items, rows] + g[items, None, :]
        z = z.sub_(z.amax(-1, keepdim=True).nan_to_num_(neginf=0.0))
        widest = max(widest, -float(z.masked_fill_(z == -math.inf, 0.0).amin()))
    return min(widest, torch.finfo(g.dtype).max)


def newton_ascent(problem: Problem, progress: Progress, tolerance: float, max_iterations: int) -> Progress:
    """Maximise the dual by Newton's method; an evaluation or a pair of products counts as an iteration."""
    state, count = progress
    dual, _ = problem.dual(state.f, state.g, state.q)
    damping, patience = torch.full_like(state.error, DAMPING), _coupling.PATIENCE
    while count + 3 <= max_iterations:  # a step by either solver, and its evaluation
        unconverged = (state.error > tolerance) & (damping < MAX_DAMPING)
        if not bool(unconverged.any()):
            break
        if has_lost_columns(problem, state):
            # a column step always raises the dual, and leaves no column sum out of range
            state = evaluate(problem, column_step(problem, state.f), state.plan)
            (dual, _), count = problem.dual(state.f, state.g, state.q), count + 1
            continue
        d, e = problem.slopes(state)
        target_sums = problem.target_column_sums(state.g)
        off = target_sums - state.q
        _, y, steps = _coupling.solve(
            state.plan,
            d,
            # a column with too little mass has little curvature, but needs no long step
            e + damping[:, None] * torch.maximum(e, target_sums),
            torch.zeros_like(d),
            off,
            tolerance=state.error.clamp(FORCING, 0.1),
            max_steps=min(300, max_iterations - count - 2),
            patience=patience,
        )
        if steps > patience:  # conjugate gradients stopped early, and would again
            patience = 0
        y = torch.where(unconverged[:, None] & y.isfinite(), y, 0.0)
        trial = evaluate(problem, state.g + problem.epsilon * y, state.plan)
        higher, rounding = problem.dual(trial.f, trial.g, trial.q)
        count += steps + 1
        # the dual's slope along the step, at its start and end; where its sign is the same, the dual rose
        slope, after = ((t * y).sum(-1) for t in (off, problem.target_column_sums(trial.g) - trial.q))
        halved, too_short = trial.error < 0.5 * state.error, after > 0.5 * slope
        # near the maximum the gain drowns in the dual's rounding, so the error decides
        rises = (after >= 0) | (higher - dual > 0.05 * slope) | (halved & (higher - dual > -rounding))
        accepted = unconverged & rises
        relaxed_damping = torch.where(
            accepted, damping / torch.where(halved | too_short, 10.0, 3.0), damping * 5
        )
        damping = torch.where(unconverged, relaxed_damping, damping)
        if bool((accepted | ~unconverged).all()):
            state, dual = trial, higher
        else:  # the plan was overwritten by the rejected step
            state = evaluate(problem, torch.where(accepted[:, None], trial.g, state.g), state.plan)
            dual, _ = problem.dual(state.f, state.g, state.q)
    return Progress(state, count)
