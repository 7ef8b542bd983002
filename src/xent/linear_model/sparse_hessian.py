"""The Hessian of a head's loss over compressed rows, from the two products of these.

    H v = Σ_n γ_n (p∘u − p pᵀu)_n x̃_nᵀ,  u = v x̃_n      diag H_c = Σ_n γ_n p_nc (1 − p_nc) x̃_n²

    A_w = Σ_n w_n x̃_n x̃_nᵀ      H_cc = A_w, w = γ p_c (1 − p_c)      x̃ = (x, 1),  γ = s·a/total

Squares of rows less a center are x² − 2 x m + m², so that neither product nor diagonal fills a row in. Blocks
(D̃, D̃) do, some rows at a time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from xent.data.batches import slices
from xent.data.sparse_rows import SparseBatch

FILLED = 1 << 21
"""Numbers of rows that are filled in at a time."""


class SparseHessian:
    """The Hessian over compressed rows, with those methods of `HeadHessian` that a fit uses.

    Args:
        x: (n, D).
        weight: (C, D).
        target: (n,) classes or (n, C) masses.
        bias: (C,); None is a head without.
        denominator: the divisor of the sums.
    """

    def __init__(
        self,
        x: SparseBatch,
        weight: Tensor,
        target: Tensor,
        *,
        bias: Tensor | None,
        wrt: tuple[str, ...],
        denominator: float,
        sample_weight: Tensor | None = None,
    ) -> None:
        self.x, self.with_bias, self.shape = x, "bias" in wrt, (len(weight), weight.shape[1])
        z = torch.from_numpy(x.times(weight.numpy()))
        self.p = torch.softmax(z if bias is None else z + bias, 1)  # (n, C)
        mass = torch.ones(len(x), dtype=z.dtype) if target.ndim == 1 else target.sum(1).to(z.dtype)
        gamma = mass if sample_weight is None else mass * sample_weight
        self.gamma = gamma / denominator  # (n,)

    def __matmul__(self, v: Tensor) -> tuple[Tensor, ...]:
        """Return H v of a flat v, a tensor for each parameter."""
        n_classes, n_features = self.shape
        V = v[: n_classes * n_features].view(n_classes, n_features)
        u = torch.from_numpy(self.x.times(V.numpy()))
        if self.with_bias:
            u += v[n_classes * n_features :]
        u.mul_(self.p)
        u.sub_(self.p * u.sum(1, keepdim=True)).mul_(self.gamma[:, None])
        return self._both(self._gathered(self.x, u), u.sum(0))

    def diagonal(self) -> tuple[Tensor, ...]:
        """Return the diagonal, a tensor for each parameter."""
        q = self._curvatures()
        plain = self._gathered(SparseBatch(self.x.x), q)  # (C, D) Σ q x
        squares = self._gathered(self.x.squared(), q)
        if self.x.center is not None:
            m = torch.from_numpy(self.x.center).to(q)
            squares = squares - 2 * plain * m + q.sum(0)[:, None] * m**2
        return self._both(squares.clamp_(min=0), q.sum(0))

    def block(self, index: int) -> Tensor:
        """Return H_cc of a class, (D̃, D̃), with its bias last."""
        return self._second_moment(self._curvatures()[:, index])

    def factor_sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return Σ γ·tr M·x̃ x̃ᵀ (D̃, D̃), Σ γ·M (C, C) and Σ γ, M being diag p − p pᵀ."""
        q = self._curvatures()
        of_classes = -(self.p.t() @ (self.p * self.gamma[:, None])).double()
        of_classes.diagonal().add_((self.p * self.gamma[:, None]).sum(0))
        return self._second_moment(q.sum(1)).double(), of_classes, self.gamma.double().sum()

    def _curvatures(self) -> Tensor:
        """Return γ p (1 − p), (n, C)."""
        return self.p * (1 - self.p) * self.gamma[:, None]

    def _gathered(self, x: SparseBatch, g: Tensor) -> Tensor:
        """Return gᵀ x for g (n, C), (C, D)."""
        return torch.from_numpy(np.ascontiguousarray(x.gathered(g.numpy()).T))

    def _both(self, of_weight: Tensor, of_bias: Tensor) -> tuple[Tensor, ...]:
        return (of_weight, of_bias) if self.with_bias else (of_weight,)

    def _second_moment(self, w: Tensor) -> Tensor:
        n_features = self.shape[1]
        side = n_features + self.with_bias
        total = torch.zeros(side, side, dtype=w.dtype)
        for rows in slices((len(self.x), n_features), FILLED):
            x = self.x[rows]
            if self.with_bias:
                x = torch.cat([x, x.new_ones(len(x), 1)], 1)
            total.addmm_((x * w[rows, None]).t(), x)
        return total
