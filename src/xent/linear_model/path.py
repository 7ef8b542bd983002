"""A regularisation path: the strengths from strong to weak, each fit begun where the last one ended.

    W(l2₁) → W(l2₂) → ... → W(l2_k)        l2₁ ≥ l2₂ ≥ ... ≥ l2_k

Neighbouring strengths have neighbouring minima, so that a path of 45 costs a few fits, not 45. What does not
depend on the strength (the features' means and variances, the checks) is done once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from xent.linear_model.descent import Descent, Progress
from xent.linear_model.objective import Objective
from xent.linear_model.solvers import choose

COMPARED = 10.0
"""Times ``tol`` within which the strengths of a path are fitted to be compared; the best is fitted again.

Bounds are ten times what is estimated, so that losses along the path are off by about ``tol``."""


@dataclasses.dataclass(frozen=True)
class Point:
    """The minimum at one strength."""

    C: float
    coef: np.ndarray  # (K, D)
    intercept: np.ndarray  # (K,)
    n_iter: int
    converged: bool
    loss: float = np.nan  # of the rows, without the penalty


def regularisation_path(
    objective: Objective,
    Cs: Iterable[float],
    *,
    solver: str = "auto",
    tol: float = 1e-4,
    max_iter: int = 1000,
    stopping: str = "objective",
    callback: Callable[[Progress], None] | None = None,
    after: Sequence[Point] = (),
    start: tuple[np.ndarray, np.ndarray] | None = None,
) -> Iterator[Point]:
    """Yield the minimum at each strength, in ascending order of C, from strong to weak.

    ``after`` are minima at stronger penalties, from the last two of which it goes on; ``start``, (W, b), is
    the point where the first fit begins, if it has begun before.
    """
    done = []
    for point in after[-2:]:
        W, b = objective.unscaled(objective.to_solver(point.coef, point.intercept))
        done.append(dataclasses.replace(point, coef=W, intercept=b))
    for C in sorted(Cs):
        objective.penalise(C)
        chosen, _ = choose(objective, solver, tol, stopping)
        descent = Descent(objective, chosen, tol, max_iter, stopping)
        begin = _start(objective, done, C) if start is None else objective.to_solver(*start)
        descent.run(begin, callback)
        start = None
        model, ended = objective.unscaled(descent.theta), (len(descent.curve) - 1, descent.converged)
        done = [*done[-1:], Point(C, *model, *ended, objective.last_loss)]
        yield dataclasses.replace(done[-1], coef=descent.coef, intercept=descent.intercept)
        if descent.stopped_by_callback:
            return


def _start(objective: Objective, done: list[Point], C: float) -> np.ndarray | None:
    """Return the point to begin at: the last minimum, or where the last two lead, whichever lies lower.

    The minimum moves smoothly with log C:  W(C) ≈ W₁ + (W₁ − W₀)·log(C/C₁)/log(C₁/C₀).
    """
    if not done:
        return None
    last = objective.scaled(done[-1].coef, done[-1].intercept).ravel()
    if len(done) == 1 or not np.isfinite(C) or done[0].C == done[1].C:
        return last
    before = objective.scaled(done[0].coef, done[0].intercept).ravel()
    share = np.log(C / done[1].C) / np.log(done[1].C / done[0].C)
    ahead, here = last + share * (last - before), objective(last)[0]  # which is known
    return ahead if objective(ahead)[0] < here else last
