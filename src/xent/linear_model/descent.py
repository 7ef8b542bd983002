"""From an objective to its minimum with a solver: when it stops, and the point that it has reached.

``tol`` bounds the largest component of the gradient in (W, b), tested after each iteration; a solver may end
earlier, where the arithmetic resolves no further decrease.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import numpy as np

from xent.linear_model.objective import Objective
from xent.linear_model.solvers import Solver


@dataclasses.dataclass(frozen=True)
class Progress:
    """The state of a solver after an iteration; ``SoftmaxRegression.fit`` hands it to its callback."""

    iteration: int
    objective: float  # mean loss in nats + λ/2 ‖W‖²
    gradient_norm: float  # its gradient's largest component; the solver stops at tol
    coef: np.ndarray  # (K, D), K = C or, for two classes, 1
    intercept: np.ndarray  # (K,)


class Descent:
    """A solver at work on an objective.

    The point that it has reached stays readable when ``run`` is interrupted. Rank 0 runs it.
    """

    def __init__(self, objective: Objective, solver: Solver, tol: float, max_iter: int) -> None:
        self.objective, self.solver, self.tol, self.max_iter = objective, solver, tol, max_iter
        self.curve: list[float] = []  # the objective, at the start and after each iteration
        self.gradient_norm = np.inf
        self.stopped_by_callback = False
        self.stalled = False  # the arithmetic resolved no further decrease
        self._theta = np.zeros(objective.n_vectors * (objective.n_features + 1))

    @property
    def coef(self) -> np.ndarray:
        """The weights W reached, (K, D)."""
        return self.objective.to_model(self._theta)[0]

    @property
    def intercept(self) -> np.ndarray:
        """The biases b reached, (K,)."""
        return self.objective.to_model(self._theta)[1]

    @property
    def converged(self) -> bool:
        """True once no component of the gradient exceeds ``tol``."""
        return bool(self.gradient_norm <= self.tol)

    def run(
        self, start: np.ndarray | None = None, callback: Callable[[Progress], None] | None = None
    ) -> None:
        """Minimise from θ = start, or 0; ``callback`` may end it by raising ``StopIteration``."""
        objective = self.objective
        if start is not None:
            self._theta = start.ravel()
        value, _ = objective(self._theta)
        self.curve.append(value)
        self.gradient_norm = objective.gradient_norm

        def after_iteration(theta: np.ndarray) -> None:
            theta = np.array(theta)
            value, _ = objective(theta)
            self._theta, self.gradient_norm = theta, objective.gradient_norm
            self.curve.append(value)
            if callback is not None:
                model = objective.to_model(theta)
                try:
                    callback(Progress(len(self.curve) - 1, value, self.gradient_norm, *model))
                except StopIteration:
                    self.stopped_by_callback = True
                    raise
            if self.converged:
                raise StopIteration

        if self.converged or not self.max_iter:
            return
        with contextlib.suppress(StopIteration):
            self.stalled = self.solver.minimize(objective, self._theta, self.max_iter, after_iteration)
