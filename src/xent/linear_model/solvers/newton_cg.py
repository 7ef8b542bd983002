"""Newton's method with conjugate gradients on the objective of ``SoftmaxRegression``.

    (H + l2/σ²) s = −∇,   ‖residual‖ ≤ η·‖∇‖,   η = min(½, √(‖∇‖/‖∇₀‖))        θ ← θ + α·s

in the solver's variables θ = (V | c), on standardised features. The forcing term η makes early
steps cheap and late ones exact, so that the gradient falls superlinearly. Near the minimum two objectives no
longer differ by a resolved number, and the line search goes by slopes alone (`_line_search`). Where rows are
so sure that H hardly sees them, far from the minimum, a step that does not lead down is taken again with
H + μ, μ as large as it must be.

Of several classes nothing but the penalty fixes what is added to all; steps leave it alone where there is
none. Two classes are one vector: the first class is pinned, and its block is the whole Hessian. Otherwise
Kronecker factors precondition: they see which features go together, in all classes alike.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from xent.linear_model.preconditioner import Whitening
from xent.linear_model.solvers._line_search import line_search
from xent.linear_model.solvers._newton_step import newton_step
from xent.linear_model.solvers._registry import AfterIteration, Solver

if TYPE_CHECKING:
    from xent.linear_model.objective import Objective

LEAST_DAMPING, MOST_DAMPING = 1e-8, 1e4  # of features of deviation 1, whose Hessian is at most ½·D


def newton_cg(
    objective: Objective, theta: np.ndarray, max_iter: int, after_iteration: AfterIteration
) -> bool:
    """Minimise from theta (K·(D + 1),); return True where the arithmetic resolves no further decrease."""
    value, gradient = objective(theta)
    start, slow, damping = float(np.linalg.norm(gradient)), 0, 0.0
    if not np.isfinite(start):
        return True
    for _ in range(max_iter):
        size = float(np.abs(gradient).max())
        forcing = min(0.5, np.sqrt(np.linalg.norm(gradient) / start))
        while True:
            step = newton_step(objective, theta, gradient, float(forcing), damping)
            resolved = -float(gradient @ step) > 64 * np.finfo(objective.dtype).eps * abs(value)
            found = line_search(objective, theta, step, value, gradient)
            if found is not None or (not resolved and step.any()) or damping > MOST_DAMPING:
                break
            damping = max(LEAST_DAMPING, 100 * damping)
        if found is None:
            return True
        if not resolved:
            # Newton's steps shrink the gradient manyfold, or what is left is rounding
            left = float(np.abs(objective(found[0])[1]).max())
            slow = slow + 1 if left > size / 2 else 0
            if left >= size or slow == 3:
                return True
        theta, length = found
        decrement = -0.5 * float(gradient @ step)
        if length < 0.01:
            damping = max(LEAST_DAMPING, 10 * damping)
        elif length == 1.0:
            damping = damping / 10 if damping > LEAST_DAMPING else 0.0
        value, gradient = objective(theta)
        careful = partial(_whitened, objective, gradient) if Whitening.pays(objective) else None
        after_iteration(
            theta, decrement, careful
        )  # of the point before: the next is no farther from the minimum
    return False


def _whitened(objective: Objective, gradient: np.ndarray) -> float:
    """Return half the decrement by the Hessian at W = 0, whose precision is that which the features ask for.

    Products with features whose mean is a million deviations, in their own type, say that nothing is left.
    """
    whitening = Whitening(objective)
    shape = 1, objective.n_vectors, objective.n_features + 1
    slope = torch.from_numpy(gradient).to(objective.device)
    size = slope.abs().max().clamp(min=torch.finfo(slope.dtype).tiny)
    made = whitening((slope / size).view(shape).to(whitening.dtype))
    return 0.5 * float(slope @ made.to(slope).ravel()) * float(size)


NEWTON_CG = Solver(
    "newton-cg",
    newton_cg,
    class_parallel=False,  # Hessian products are sums over rows, not over slices of the classes
    precise=True,
    summary="newton-cg goes on to gradients of 1e-10, and costs more until then.",
)
