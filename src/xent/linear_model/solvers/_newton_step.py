"""Newton's step by conjugate gradients from 0, and with it a bound from below on what is left to gain.

    (H + l2/σ² + δ) s = −∇,   ‖residual‖ ≤ η·‖∇‖        −½ ∇ᵀs ≤ ½ ∇ᵀ(H + l2/σ² + δ)⁻¹∇

With each product −½ ∇ᵀs grows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from xent._core.validators import PreconditionerName
from xent.curvature import _cg
from xent.curvature._kronecker import HeadKronecker
from xent.curvature._newton import NewtonSystem

if TYPE_CHECKING:
    from xent.linear_model.objective import Objective

FACTOR = 1 << 12  # rows of a Kronecker factor up to which these precondition
SPARSE_FACTOR = 1 << 10  # of sparse rows, whose products with H are cheap beside the factor
MOST_PRODUCTS = 1000  # with the Hessian, in one step


def newton_step(
    objective: Objective,
    theta: np.ndarray,
    gradient: np.ndarray,
    forcing: float,
    damping: float = 0.0,
    most_products: int = MOST_PRODUCTS,
    preconditioner: PreconditionerName | None = None,
) -> np.ndarray:
    """Return Newton's step at theta, of its shape; its residual is at most ``forcing`` times the gradient."""
    hessian = objective.hessian(theta)
    dtype, columns = hessian.dtype, objective.n_features + objective.fit_intercept  # the intercept last
    slope = torch.from_numpy(gradient.reshape(objective.n_vectors, -1)).to(objective.device, dtype)
    ridge = torch.zeros(columns, dtype=dtype, device=slope.device)
    ridge[: objective.n_features] = torch.from_numpy(objective.penalty / objective.scale**2)
    ridge += damping
    # of the factors it reads A, G and total
    kronecker = cast(Callable[[], HeadKronecker], hessian.kronecker)
    system = NewtonSystem(hessian, ridge, kronecker=kronecker, pinned=objective.binary)
    with torch.no_grad():
        size = slope.abs().max()  # squares of a small gradient leave the range of float32
        right = -slope[:, :columns] / size
        preconditioner = preconditioner or _preconditioner(objective, columns)
        found = _cg.solve(*system.for_cg(right, preconditioner, forcing, most_products))
    step = np.zeros((objective.n_vectors, objective.n_features + 1))
    step[:, :columns] = (found.solution * size).cpu().numpy()
    return step.ravel()


def _preconditioner(objective: Objective, columns: int) -> PreconditionerName:
    """Return the best one that is small beside the data."""
    classes, widest = objective.n_vectors, SPARSE_FACTOR if objective.is_sparse else FACTOR
    if classes == 1:
        return "class-blocks" if columns <= widest else "diagonal"  # the Hessian itself
    return "kronecker" if max(classes, columns) <= widest else "diagonal"
