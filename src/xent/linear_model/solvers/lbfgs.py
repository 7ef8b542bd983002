"""L-BFGS, as SciPy has it, on the objective of ``SoftmaxRegression``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from xent.errors import needs
from xent.linear_model.solvers._registry import Solver

if TYPE_CHECKING:
    from xent.linear_model.objective import Objective


def lbfgs(
    objective: Objective, theta: np.ndarray, max_iter: int, after_iteration: Callable[[np.ndarray], None]
) -> bool:
    """Minimise from theta; return True where the arithmetic resolves no further decrease."""
    with needs("probe"):
        from scipy.optimize import minimize
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
    return bool(result.status != 1)  # 1: a limit of iterations or evaluations is reached


LBFGS = Solver("lbfgs", lbfgs)
