"""The solvers of ``SoftmaxRegression``: a file each, and a line here."""

from xent.linear_model.solvers._choice import AUTO, choose, solver_names
from xent.linear_model.solvers._registry import Solver, all_solvers, register_solver, solver_named
from xent.linear_model.solvers.lbfgs import LBFGS
from xent.linear_model.solvers.newton_cg import NEWTON_CG

__all__ = ["AUTO", "Solver", "all_solvers", "choose", "register_solver", "solver_named", "solver_names"]

register_solver(LBFGS)
register_solver(NEWTON_CG)
