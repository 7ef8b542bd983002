"""The choice that ``solver="auto"`` makes, and its reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xent.linear_model.preconditioner import ClassBlocks, Whitening
from xent.linear_model.solvers._registry import Solver, all_solvers, solver_named

if TYPE_CHECKING:
    from xent.linear_model.objective import Objective

AUTO = "auto"

PRECISE = {"objective": 1e-12, "gradient": 1e-10}
"""Tolerances below which L-BFGS may end before them (`benchmarks/newton.py`)."""


def solver_names() -> tuple[str, ...]:
    """Return what ``solver=`` and ``--solver`` take: "auto" and the name of each solver."""
    return AUTO, *(solver.name for solver in all_solvers())


def choose(objective: Objective, name: str, tol: float, stopping: str) -> tuple[Solver, str]:
    """Return the solver of a name, and the reason for it, a clause; "auto" goes by the shape and ``tol``."""
    if name != AUTO:
        return solver_named(name, objective.ranks.slices), "asked for"
    if tol < PRECISE[stopping] and objective.ranks.slices == 1:
        return solver_named("newton-cg"), f"tol {tol:g} is finer than what L-BFGS resolves"
    return solver_named("lbfgs"), f"first-order passes, {_preconditioner(objective)}"


def _preconditioner(objective: Objective) -> str:
    if not Whitening.pays(objective):
        return "scaled feature by feature"
    if not ClassBlocks.pay(objective):
        return "features decorrelated"
    return "features decorrelated, then the Hessian's block of each class"
