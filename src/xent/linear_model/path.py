"""A regularisation path: the strengths from strong to weak, each fit begun where the last one ended.

    W(λ₁) → W(λ₂) → ... → W(λ_k)        λ₁ ≥ λ₂ ≥ ... ≥ λ_k

Neighbouring strengths have neighbouring minima, so that a path of 45 costs a few fits, not 45. What does not
depend on the strength (the features' means and variances, the checks) is done once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from xent.linear_model.descent import Descent, Progress
from xent.linear_model.objective import Objective
from xent.linear_model.solvers import choose


@dataclasses.dataclass(frozen=True)
class Point:
    """The minimum at one strength."""

    C: float
    coef: np.ndarray  # (K, D)
    intercept: np.ndarray  # (K,)
    n_iter: int
    converged: bool


def regularisation_path(
    objective: Objective,
    Cs: Iterable[float],
    *,
    solver: str = "auto",
    tol: float = 1e-4,
    max_iter: int = 1000,
    stopping: str = "objective",
    callback: Callable[[Progress], None] | None = None,
) -> Iterator[Point]:
    """Yield the minimum at each strength, in ascending order of C, from strong to weak."""
    coef: np.ndarray | None = None
    intercept: np.ndarray | None = None
    for C in sorted(Cs):
        objective.penalise(C)
        start = None if coef is None or intercept is None else objective.to_solver(coef, intercept)
        chosen, _ = choose(objective, solver, tol, stopping)
        descent = Descent(objective, chosen, tol, max_iter, stopping)
        descent.run(start, callback)
        coef, intercept = descent.coef, descent.intercept
        yield Point(C, coef, intercept, len(descent.curve) - 1, descent.converged)
        if descent.stopped_by_callback:
            return
