"""L-BFGS on the objective of ``SoftmaxRegression``, from an approximate inverse of its Hessian.

    s = −B g        B: γ·M, corrected by the last pairs (Δθ, Δg)        γ = ΔθᵀΔg / ΔgᵀMΔg

(Nocedal, "Updating quasi-Newton matrices with limited storage", 1980.) M is a preconditioner: features that
go together, and classes in doubt about different rows, need no pairs to be learnt. Near the minimum ½ gᵀB g
is an estimate of what is left to gain.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from xent.linear_model.preconditioner import ClassBlocks, Preconditioner, Whitening
from xent.linear_model.solvers._line_search import line_search
from xent.linear_model.solvers._newton_step import newton_step
from xent.linear_model.solvers._registry import AfterIteration, Solver

if TYPE_CHECKING:
    from xent.linear_model.objective import Objective

PAIRS = 10
"""Pairs that are kept. 20 need as many iterations on every problem of `benchmarks/fit.py`."""

FIRST_BLOCKS, LATER = 8, 2
"""Iterations before class blocks are formed, and how many times as many before they are formed again."""


LONG = 24
"""Iterations after which an end is confirmed: on a plateau the pairs say that the minimum is reached."""

RECENT = 5
"""Estimates of the decrement of which the largest counts: one alone is too low where a step goes astray."""

RESIDUAL, PRODUCTS = 0.1, 30
"""Residual, relative to the gradient, and most products of the system that confirms an end on sparse rows."""

UNRESOLVED = 10
"""Iterations without a smaller gradient, where the values of the objective no longer tell a decrease."""


def lbfgs(objective: Objective, theta: np.ndarray, max_iter: int, after_iteration: AfterIteration) -> bool:
    """Minimise from theta (K·(D + 1),); return True where the arithmetic resolves no further decrease."""
    value, gradient = objective(theta)
    if not np.isfinite(value):
        return True
    whitening = Whitening(objective) if Whitening.pays(objective) else None
    shape = objective.n_vectors, objective.n_features + 1
    inverse = InverseHessian(shape, whitening, objective.device)
    blocks_at = FIRST_BLOCKS if ClassBlocks.pay(objective) else 0
    best, lowest, since = _size(gradient), value, 0
    recent: deque[float] = deque(maxlen=RECENT)
    step = -inverse(gradient)
    for iteration in range(1, max_iter + 1):
        found = line_search(objective, theta, step, value, gradient)
        if found is None and inverse.pairs:  # which may lead astray where the objective is not quadratic
            inverse.pairs.clear()
            found = line_search(objective, theta, -inverse(gradient), value, gradient)
        if found is None or since > UNRESOLVED:
            return True
        before, slope = theta, gradient
        theta, _ = found
        value, gradient = objective(theta)
        inverse.learn(theta - before, gradient - slope)
        if iteration == blocks_at:
            inverse.base = ClassBlocks(objective, theta)
            blocks_at *= LATER
        step = -inverse(gradient)
        decrement = -0.5 * float(gradient @ step)
        unit = float(np.finfo(objective.dtype).eps) * abs(value)
        fallen = decrement > 64 * unit or value < lowest - 8 * unit or _size(gradient) < 0.9 * best
        best, lowest, since = (
            min(best, _size(gradient)),
            min(lowest, value),
            0 if fallen else since + 1,
        )
        recent.append(decrement)

        base = inverse.base
        careful, newton = None, list[np.ndarray]()
        if iteration > LONG and blocks_at:
            careful = partial(_confirmed, objective, inverse, theta, gradient)
        elif iteration > LONG and objective.is_sparse and objective.ranks.size == 1:
            careful = partial(_by_products, objective, theta, gradient, newton)
        after_iteration(theta, max(recent), careful)
        if inverse.base is not base:
            step = -inverse(gradient)
        if newton:
            step = newton[0]
    return False


def _confirmed(
    objective: Objective, inverse: InverseHessian, theta: np.ndarray, gradient: np.ndarray
) -> float:
    """Return half the Newton decrement by the class blocks at theta alone, with which B begins now."""
    inverse.base = ClassBlocks(objective, theta)
    return 0.5 * float(gradient @ inverse.alone(gradient))


def _by_products(
    objective: Objective, theta: np.ndarray, gradient: np.ndarray, found: list[np.ndarray]
) -> float:
    """Return half the Newton decrement by products with the Hessian, which of sparse rows are cheap.

    Newton's step is added to ``found``: where the end is not confirmed, it is the next.
    """
    step = newton_step(
        objective, theta, gradient, RESIDUAL, most_products=PRODUCTS, preconditioner="diagonal"
    )
    found.append(step)
    return -0.5 * float(gradient @ step)


def _size(gradient: np.ndarray) -> float:
    return float(np.abs(gradient).max())


class InverseHessian:
    """B, as the product with a vector (P,), P = K·(D + 1); pairs are kept where the rows are computed with.

    Args:
        shape: (K, D + 1) of theta.
        base: M; None is the identity.
        device: where M is.
    """

    def __init__(self, shape: tuple[int, int], base: Preconditioner | None, device: torch.device) -> None:
        self.shape, self.base, self.device = shape, base, device
        self.pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=PAIRS)  # Δθ, Δg, ΔθᵀΔg

    def learn(self, moved: np.ndarray, bent: np.ndarray) -> None:
        """Add Δθ and Δg, where the gradient resolves the curvature between the two points."""
        curvature = float(moved @ bent)
        if curvature > 1e-12 * float(np.linalg.norm(moved) * np.linalg.norm(bent)):
            self.pairs.append((self._tensor(moved), self._tensor(bent), curvature))

    def __call__(self, gradient: np.ndarray) -> np.ndarray:
        """Return B·gradient, by the two loops over the pairs."""
        left, shares = self._tensor(gradient).clone(), []
        for moved, bent, curvature in reversed(self.pairs):
            shares.append(float(moved @ left) / curvature)
            left.sub_(bent, alpha=shares[-1])
        if self.pairs:
            _, bent, curvature = self.pairs[-1]
            made, of_bent = self._of_base(left, bent)
            made *= curvature / float(bent @ of_bent)
        else:
            (made,) = self._of_base(left)
        for (moved, bent, curvature), share in zip(self.pairs, reversed(shares), strict=True):
            made.add_(moved, alpha=share - float(bent @ made) / curvature)
        return made.cpu().numpy()

    def alone(self, gradient: np.ndarray) -> np.ndarray:
        """Return M·gradient."""
        return self._of_base(self._tensor(gradient))[0].cpu().numpy()

    def _tensor(self, vector: np.ndarray) -> Tensor:
        return torch.from_numpy(vector).to(self.device)

    def _of_base(self, *vectors: Tensor) -> Tensor:
        """Return M times each of the vectors, (V, P)."""
        stacked = torch.stack(vectors)
        if self.base is None:
            return stacked
        size = stacked.abs().amax(1, keepdim=True)  # a small gradient may leave the range of M's type
        size = torch.where(size > 0, size, 1.0)
        made = self.base((stacked / size).view(-1, *self.shape).to(self.base.dtype))
        return made.reshape(len(vectors), -1).double() * size


LBFGS = Solver("lbfgs", lbfgs)
