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
    """A way to the minimum of the objective of ``SoftmaxRegression``.

    Args:
        name: what ``solver=`` and ``--solver`` call it.
        minimize: called as ``minimize(objective, theta, max_iter, after_iteration)``. ``objective(theta)`` is
            the value and the gradient at theta (P,), both float64; ``objective.hessian(theta)`` is the
            Hessian there, an operator as in ``xent.curvature``. ``after_iteration(theta)`` is to be called
            after each of at most ``max_iter`` iterations; the ``StopIteration`` that it raises ends the fit,
            and may be let through. Its second argument, where a solver has one, is an estimate of how far
            the value is above its minimum; without it the duality gap alone ends a fit. Returns True
            where the arithmetic resolves no further decrease, False otherwise.
        class_parallel: whether it works where processes share the classes, which have no Hessian.
        precise: whether it goes on where values of the objective no longer differ; a fit that stalls with
            another solver is then advised to try this one.
        summary: a sentence for ``xent fit --help``, or nothing.
    """

    name: str
    minimize: Minimize
    class_parallel: bool = True
    precise: bool = False
    summary: str = ""


_SOLVERS: dict[str, Solver] = {}


def register_solver(solver: Solver) -> None:
    """Make a solver known by its name.

    Raises:
        TypeError: what is no :class:`Solver`.
        ValueError: the name is another solver's.

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
