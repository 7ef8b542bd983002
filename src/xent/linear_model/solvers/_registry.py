"""The solvers by name, as ``SoftmaxRegression(solver=...)`` and ``xent fit --solver`` take them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from xent.errors import BadInput

if TYPE_CHECKING:
    from xent.linear_model.objective import Objective


class AfterIteration(Protocol):
    """Called with the point that an iteration has reached; raises ``StopIteration`` to end the fit."""

    def __call__(
        self, theta: np.ndarray, decrement: float | None = None, confirm: Callable[[], float] | None = None, /
    ) -> None:
        """Take theta (P,) and an estimate of F(theta) − F*, as half the Newton decrement ½ gᵀH⁻¹g is one.

        ``confirm`` returns a more careful estimate; it is called where the first one would end the fit.
        """
        ...


Minimize: TypeAlias = Callable[["Objective", np.ndarray, int, AfterIteration], bool]
"""``minimize(objective, theta, max_iter, after_iteration) -> stalled``; see :class:`Solver`."""


@dataclasses.dataclass(frozen=True)
class Solver:
    """A method that minimises the objective of ``SoftmaxRegression``.

    ``minimize`` is called as ``minimize(objective, theta, max_iter, after_iteration)``. ``objective(theta)``
    returns the value and the gradient at theta, (P,), both float64. ``objective.hessian(theta)`` returns the
    Hessian there, an operator as in :mod:`xent.curvature`. The function calls ``after_iteration(theta)``
    after each of at most ``max_iter`` iterations; the ``StopIteration`` that it raises ends the fit and may
    be let through. A second argument of ``after_iteration`` is an estimate of the value's distance from the
    minimum; without it the duality gap alone ends a fit. The function returns True where the arithmetic
    resolves no further decrease, else False.

    Example:
        >>> from xent.linear_model import Solver
        >>> def gradient_descent(objective, theta, max_iter, after_iteration):
        ...     for _ in range(max_iter):
        ...         _, gradient = objective(theta)
        ...         theta = theta - 0.5 * gradient
        ...         after_iteration(theta)
        ...     return False
        >>> Solver("gradient-descent", gradient_descent, class_parallel=False).name
        'gradient-descent'
    """

    name: str  # its name in ``solver=`` and ``--solver``
    minimize: Minimize  # the function that minimises
    class_parallel: bool = True  # whether it works where processes share the classes, without a Hessian
    precise: bool = False  # whether it goes on where values of the objective no longer differ
    summary: str = ""  # a sentence for ``xent fit --help``, or nothing


_SOLVERS: dict[str, Solver] = {}


def register_solver(solver: Solver) -> None:
    """Register a solver, which ``SoftmaxRegression(solver=name)`` and ``xent fit --solver name`` then take.

    Args:
        solver: the solver, with its name.

    Raises:
        TypeError: an object that is not a :class:`Solver`.
        ValueError: a name that another solver has.

    Example:
        >>> register_solver(Solver("lbfgs", lambda objective, theta, max_iter, after_iteration: True))
        Traceback (most recent call last):
            ...
        ValueError: there is a solver called 'lbfgs' already; choose another name
    """
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be a Solver, got {type(solver).__name__}")
    if solver.name in _SOLVERS:
        raise ValueError(f"there is a solver called {solver.name!r} already; choose another name")
    _SOLVERS[solver.name] = solver


def all_solvers() -> list[Solver]:
    """Return the solvers in the order of their registration."""
    return list(_SOLVERS.values())


def solver_named(name: str, class_slices: int = 1) -> Solver:
    """Return the solver of a name, for classes in as many slices.

    Raises ``BadInput`` for one that does not take shared classes, in the words of the command line.
    """
    solver = _SOLVERS[name]
    if class_slices > 1 and not solver.class_parallel:
        others = " or ".join(f"--solver {other.name}" for other in all_solvers() if other.class_parallel)
        raise BadInput(f"--class-parallel does not go with --solver {name}; fit with {others}")
    return solver
