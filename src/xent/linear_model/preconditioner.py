"""Approximate inverses of the Hessian, with which L-BFGS begins: from the features alone, then from the rows.

At W = 0 every row has p = 1/C, and the Hessian of the mean loss is exactly

    H = (I − 11ᵀ/C)/C ⊗ A + l2/σ²            A = Σ_n m_n x̃_n x̃_nᵀ / Σ_n m_n,   x̃ = ((x − μ)/σ, 1)

(`Whitening`). Away from it a class sees the rows that are in doubt about it, and other classes other rows:

    H_cc = Σ_n m_n p_nc (1 − p_nc) x̃_n x̃_nᵀ / Σ_n m_n + l2/σ²

(`ClassBlocks`: the largest terms of each sum as they are, the rest as their weight times A). Both are formed
from a sample of the rows, in float32: an approximate inverse costs iterations, not digits. Only directions
that the rounding of float32 hides must be seen, for what is left to gain along them would go unnoticed; of
such features both are formed in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from xent.linear_model.objective import Objective

BLOCKS = 1 << 26
"""Numbers of the inverses of all class blocks, at most: 256 MiB of float32."""

SUMMED = 1 << 22
"""Numbers of all class blocks that are summed over ranks, at most: 32 MiB of float64."""

WIDEST = 1 << 12
"""Features up to which a (D, D) inverse is formed."""

WIDEST_SPARSE = 1 << 8
"""As ``WIDEST``, of sparse rows, whose pass is cheap beside a dense (D, D) product."""

ROWS = 16
"""Rows of which the second moment is formed, in multiples of D."""

UNFELT = 1e-7
"""Share of the loss's curvature below which float32 does not feel a ridge."""

RESOLVED = 1e-5
"""Least pivot of a float32 matrix, relative to its diagonal, that is no rounding."""


class Preconditioner(Protocol):
    """A symmetric positive map of (K, D + 1), applied to several at once: (V, K, D + 1), in its type."""

    dtype: torch.dtype

    def __call__(self, gradient: Tensor, /) -> Tensor:
        """Return the map of each of (V, K, D + 1)."""
        ...


class Whitening:
    """The inverse of the Hessian at W = 0."""

    def __init__(self, objective: Objective) -> None:
        h = 1 / 4 if objective.binary else 1 / objective.n_vectors
        self.ridge = ridge(objective)
        most = ROWS * (objective.n_features + 1)
        self.inverse = h * objective.second_moment(most)  # h·A
        if not invert_(self.inverse, self.ridge) and objective.sampled == torch.float32:
            self.inverse = h * objective.second_moment(most, torch.float64)
            invert_(self.inverse, self.ridge)
        self.dtype = self.inverse.dtype

    @staticmethod
    def pays(objective: Objective) -> bool:
        """Return whether it is worth its cost: not of more than half as many features as rows.

        The penalty alone fixes most of W then.
        """
        most = WIDEST_SPARSE if objective.is_sparse else WIDEST
        return objective.n_features <= most and objective.n_rows >= 2 * objective.n_features

    def __call__(self, gradient: Tensor) -> Tensor:
        """Return the inverse times each of (V, K, D + 1)."""
        return apart(gradient, lambda g: g @ self.inverse, self.ridge)


class ClassBlocks:
    """The inverses of the diagonal blocks of the Hessian at θ, one a class."""

    @staticmethod
    def pay(objective: Objective) -> bool:
        """Return whether they are few and small enough to be formed, and on several ranks to be summed."""
        numbers = objective.n_vectors * (objective.n_features + 1) ** 2
        most = BLOCKS if objective.ranks.size == 1 else SUMMED
        return Whitening.pays(objective) and numbers <= most and objective.ranks.slices == 1

    def __init__(self, objective: Objective, theta: np.ndarray) -> None:
        self.workers = objective.workers
        self.ridge = ridge(objective)
        self.inverses = objective.class_blocks(theta)
        self.dtype = self.inverses.dtype
        self.groups = self.workers.shares(len(self.inverses), 0)

        def invert(classes: slice) -> None:
            for block in self.inverses[classes]:
                invert_(block, self.ridge)

        for _ in self.workers.map(invert, self.groups):
            pass

    def __call__(self, gradient: Tensor) -> Tensor:
        """Return the inverse times each of (V, K, D + 1)."""

        def of_classes(group: tuple[Tensor, Tensor]) -> Tensor:
            gradient, inverses = group  # symmetric, and faster with the vectors on the left
            return torch.bmm(gradient, inverses)

        def of_all(gradient: Tensor) -> Tensor:
            by_class = gradient.transpose(0, 1)
            groups = [(by_class[classes], self.inverses[classes]) for classes in self.groups]
            return torch.cat(list(self.workers.map(of_classes, groups))).transpose(0, 1)

        return apart(gradient, of_all, self.ridge)


def apart(gradient: Tensor, inverse: Callable[[Tensor], Tensor], ridges: Tensor) -> Tensor:
    """Return the inverse times (V, K, D + 1), of what all K classes have in common by the ridges alone.

    Adding the same to all classes moves no probability. One vector, of two classes, has no such direction.
    A ridge below rounding of 1/K, the curvature of the loss, would divide nothing but rounding: what all
    classes have in common stays there.
    """
    if gradient.shape[1] == 1:
        return inverse(gradient)
    common = gradient.mean(1, keepdim=True)
    made = inverse(gradient - common)
    felt = torch.where(ridges > UNFELT / gradient.shape[1], ridges, torch.inf)
    return made - made.mean(1, keepdim=True) + common / felt.to(common)


def ridge(objective: Objective) -> Tensor:
    """Return l2/σ² of the weights and 0 of the intercept, 1 where there is none, (D + 1,)."""
    of_weights = torch.from_numpy(objective.penalty / objective.scale**2)
    of_intercept = of_weights.new_full((1,), float(not objective.fit_intercept))
    return torch.cat([of_weights, of_intercept]).to(objective.device)


def invert_(block: Tensor, ridges: Tensor) -> bool:
    """Replace a positive semidefinite block by the inverse of block + diag(ridges + what it takes).

    Return whether float32 resolves it. A block that is not finite is replaced by the identity, from which
    L-BFGS begins as well.
    """
    diagonal = block.diagonal()
    if not block.isfinite().all():
        block.zero_().fill_diagonal_(1.0)
        return True
    least = 8 * torch.finfo(block.dtype).eps * float(diagonal.mean()) + torch.finfo(block.dtype).tiny
    diagonal += ridges
    usual = float(diagonal.median())
    resolved = True
    while True:
        factor, failed = torch.linalg.cholesky_ex(block)
        if not failed:
            resolved &= float(factor.diagonal().min()) ** 2 > RESOLVED * usual
            torch.cholesky_inverse(factor, out=block)
            return resolved
        resolved = False
        diagonal += least
        least *= 10
