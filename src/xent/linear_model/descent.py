"""From an objective to its minimum: which solver, when it stops, and what it has reached until then.

``tol`` bounds the largest component of the gradient in (W, b), tested after each iteration; a solver may end
earlier, where the arithmetic resolves no further decrease.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from xent.linear_model.hessian import Curvature
from xent.linear_model.objective import Objective
from xent.linear_model.solvers.newton_cg import newton_cg

SMALL = 1 << 25
"""Multiplications in one product of an evaluation, N·D·C, below which one thread computes everything.

Some 10 ms of work. Below it, threads that wait for each other cost more than they save: on a machine whose
two cores are also wanted by others the digits (to tol 1e-8) take 0.3 s on one thread and 13 s on two.
"""


def threads(rows: int, columns: int, classes: int) -> contextlib.AbstractContextManager[object]:
    """One thread for a small problem, else as many as there are."""
    limits: contextlib.AbstractContextManager[object] = threadpool_limits(
        1 if rows * columns * classes < SMALL else None
    )
    return limits


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where the solver stands after an iteration; what ``SoftmaxRegression.fit`` hands to its callback."""

    iteration: int
    objective: float  # mean loss in nats + λ/2 ‖W‖²
    gradient_norm: float  # its gradient's largest component; the solver stops at tol
    coef: np.ndarray  # (K, D), K = C or, for two classes, 1
    intercept: np.ndarray  # (K,)


class Descent:
    """A solver's way down an objective; what it has reached stays readable when ``run`` is interrupted.

    Every rank makes one; ``run`` is for the first.
    """

    def __init__(self, objective: Objective, solver: str, tol: float, max_iter: int) -> None:
        self.objective, self.solver, self.tol, self.max_iter = objective, solver, tol, max_iter
        self.curve: list[float] = []  # the objective, at the start and after each iteration
        self.gradient_norm = np.inf
        self.asked_to_stop = False
        self.stalled = False  # ended for want of digits
        # made on every rank, as it says how these answer
        self._curvature = Curvature(objective) if solver == "newton-cg" else None
        self._theta = np.zeros(objective.rows * (objective.columns + 1))

    @property
    def coef(self) -> np.ndarray:  # (K, D)
        return self.objective.to_model(self._theta)[0]

    @property
    def intercept(self) -> np.ndarray:  # (K,)
        return self.objective.to_model(self._theta)[1]

    @property
    def converged(self) -> bool:
        return bool(self.gradient_norm <= self.tol)

    def run(
        self, start: np.ndarray | None = None, callback: Callable[[Progress], None] | None = None
    ) -> None:
        """Go down from θ = start, or 0; ``callback`` may end it by raising ``StopIteration``."""
        objective = self.objective
        if start is not None:
            self._theta = start.ravel()
        value, _ = objective(self._theta)
        self.curve.append(value)
        self.gradient_norm = objective.gradient_norm

        def after_iteration(now: np.ndarray) -> None:
            now = np.array(now)
            value, _ = objective(now)
            self._theta, self.gradient_norm = now, objective.gradient_norm
            self.curve.append(value)
            if callback is not None:
                try:
                    callback(
                        Progress(
                            len(self.curve) - 1, value, self.gradient_norm, *objective.to_model(self._theta)
                        )
                    )
                except StopIteration:
                    self.asked_to_stop = True
                    raise
            if self.converged:
                raise StopIteration

        if self.converged or not self.max_iter:
            return
        if self._curvature is not None:
            self.stalled = newton_cg(self._curvature, self._theta, self.max_iter, after_iteration)
        else:
            self.stalled = _lbfgs(objective, self._theta, self.max_iter, after_iteration)


def _lbfgs(
    objective: Objective, theta: np.ndarray, max_iter: int, after_iteration: Callable[[np.ndarray], None]
) -> bool:
    """Minimise from theta; whether it ended for want of digits."""
    result = minimize(
        objective,
        theta,
        jac=True,
        method="L-BFGS-B",
        callback=lambda intermediate_result: after_iteration(intermediate_result.x),
        # gtol 0: the gradient that tol is about is the one in (W, b), tested after each iteration; ftol is
        # scikit-learn's, for float32 too: the sum over rows resolves more than one number does,
        # and a float32 epsilon here ended fits a few percent above the minimum
        options={
            "maxiter": max_iter,
            "maxfun": 50 * max_iter,
            "maxls": 50,
            "gtol": 0.0,
            "ftol": 64 * np.finfo(np.float64).eps,
        },
    )
    reached_a_limit: bool = result.status == 1  # of iterations or evaluations
    return not reached_a_limit
