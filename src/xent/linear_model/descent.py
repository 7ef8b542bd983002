"""From an objective to its minimum with a solver: when it stops, and the point that it has reached.

    F(θ) − F* ≤ tol · max(F(θ), 10⁻³·log C)      stopping="objective"
    ‖∇F(θ)‖_∞ ≤ tol                              stopping="gradient", of (W, b)

F* is not known. The smaller of two bounds takes its place: the duality gap (`Objective.duality_gap`), and
``SAFETY`` times half the Newton decrement, ½ gᵀH⁻¹g, as the solver estimates it. A solver may also end where
the arithmetic resolves no further decrease.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np

from xent.linear_model.objective import Objective
from xent.linear_model.solvers import Solver

SAFETY = 10.0
"""Times the estimated decrement. On the problems of `benchmarks/fit.py` the truth is 1 to 10 times the
estimate, 2 to 5 mostly, while it is above 1e-5 of the objective (`tests/linear_model/test_descent.py`)."""

FLOOR = 1e-3
"""Share of log C, the loss of knowing nothing; an objective below it counts as this large."""

STOPPING = ("objective", "gradient")


@dataclasses.dataclass(frozen=True)
class Certificate:
    """A bound on F(θ) − F*, in nats, and the reason for it."""

    bound: float = np.inf
    kind: str = "none"  # "duality gap", or "Newton decrement", which is an estimate with a safety factor


@dataclasses.dataclass(frozen=True)
class Progress:
    """The state of a solver after an iteration; ``SoftmaxRegression.fit`` hands it to its callback."""

    iteration: int
    objective: float  # mean loss in nats + l2/2·‖W‖²
    gradient_norm: float  # its gradient's largest component
    coef: np.ndarray  # (K, D), K = C or, for two classes, 1
    intercept: np.ndarray  # (K,)
    above: float = np.inf  # nats by which the objective is above its minimum, at most
    remaining: float = np.inf  # what ``stopping`` compares with ``tol``: the solver stops at tol


class Descent:
    """A solver at work on an objective.

    The point that it has reached stays readable when ``run`` is interrupted. Rank 0 runs it.
    """

    def __init__(
        self, objective: Objective, solver: Solver, tol: float, max_iter: int, stopping: str = "objective"
    ) -> None:
        self.objective, self.solver, self.tol, self.max_iter = objective, solver, tol, max_iter
        self.stopping = stopping
        self.certificate = Certificate()
        self.curve: list[float] = []  # the objective, at the start and after each iteration
        self.stopped_by_callback = False
        self.stalled = False  # the arithmetic resolved no further decrease
        self._short = 1.0  # how many times the estimated decrements were too small, where that was seen
        self._confirm: Callable[[], None] | None = None  # brings a more careful certificate of the last point
        self._norm: float | None = np.inf
        self._theta = np.zeros(objective.n_vectors * (objective.n_features + 1))

    @property
    def theta(self) -> np.ndarray:
        """The point reached, (P,)."""
        return self._theta

    @property
    def coef(self) -> np.ndarray:
        """The weights W reached, (K, D)."""
        return self.objective.to_model(self._theta)[0]

    @property
    def intercept(self) -> np.ndarray:
        """The biases b reached, (K,)."""
        return self.objective.to_model(self._theta)[1]

    @property
    def gradient_norm(self) -> float:
        """The largest component of the gradient in (W, b) at the point reached."""
        if self._norm is None:
            self.objective(self._theta)
            self._norm = self.objective.gradient_norm
        return self._norm

    @property
    def remaining(self) -> float:
        """The number that ``tol`` bounds: the relative distance from the minimum, or the gradient's norm."""
        if self.stopping == "gradient" or not self.curve:
            return self.gradient_norm
        return self.certificate.bound / self.yardstick

    @property
    def reached(self) -> str:
        """The number that ``tol`` bounds, with its name."""
        if self.stopping == "gradient":
            return f"gradient {self.gradient_norm:.3g}"
        return f"objective at most {self.remaining:.3g} (relative) above its minimum,"

    @property
    def yardstick(self) -> float:
        """The objective, to which a distance from the minimum is relative, or its floor."""
        return max(self.curve[-1], FLOOR * float(np.log(self.objective.n_classes)))

    @property
    def converged(self) -> bool:
        """True once ``remaining`` is at most ``tol``."""
        return bool(self.remaining <= self.tol)

    def run(
        self, start: np.ndarray | None = None, callback: Callable[[Progress], None] | None = None
    ) -> None:
        """Minimise from θ = start, or 0; ``callback`` may end it by raising ``StopIteration``."""
        if start is not None:
            self._theta = start.ravel()
        self._arrive(self._theta)

        def after_iteration(
            theta: np.ndarray, decrement: float | None = None, confirm: Callable[[], float] | None = None, /
        ) -> None:
            self._arrive(np.array(theta), None if decrement is None else decrement * self._short)
            self._confirm = partial(self._confirmed, decrement, confirm) if decrement and confirm else None
            if self._confirm and self.stopping == "objective" and self.converged:
                self._confirm()
            if callback is not None:
                state = len(self.curve) - 1, self.curve[-1], self.gradient_norm
                model, above = self.objective.to_model(self._theta), self.certificate.bound
                try:
                    callback(Progress(*state, *model, above, self.remaining))
                except StopIteration:
                    self.stopped_by_callback = True
                    raise
            if self.converged:
                raise StopIteration

        if self.converged or not self.max_iter:
            return
        with contextlib.suppress(StopIteration):
            self.stalled = self.solver.minimize(self.objective, self._theta, self.max_iter, after_iteration)
        if self._confirm and not self.converged:
            self._confirm()

    def _confirmed(self, decrement: float, confirm: Callable[[], float]) -> None:
        """Replace an estimate of the decrement by a more careful one, if that is larger."""
        self._short = max(self._short, confirm() / decrement)
        self._certify(decrement * self._short)

    def _arrive(self, theta: np.ndarray, decrement: float | None = None) -> None:
        """Take a point as the one reached, with all that is known of it."""
        value, _ = self.objective(theta)
        self._theta, self._norm = theta, None
        self.curve.append(value)
        self._certify(decrement)

    def _certify(self, decrement: float | None) -> None:
        bounds = [Certificate(self.objective.duality_gap, "duality gap")]
        if decrement is not None and decrement >= 0:
            bounds.append(Certificate(SAFETY * decrement, "Newton decrement"))
        self.certificate = min(bounds, key=lambda bound: bound.bound)
