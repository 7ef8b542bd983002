"""Eigenvalues of a semidefinite matrix, accurate whatever the units of its columns.

    M = S U diag(e) Uᵀ S = F Fᵀ        S² = diag M        F = S U √e        F = V diag(σ) Qᵀ

The eigenvalues of M itself are accurate to eps of the largest, so in float32 a feature whose unit is 1e-4 of
another's is lost. Scaled by its diagonal, M is a matrix of correlations, whose eigenvalues below eps are
rounding: they are the null space. The rest is factored as F, whose singular values span half the decades of
M.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xent._core.statistics import statistics_dtype


def eigen(matrix: Tensor, *, semidefinite: bool) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (n,), ascending, 0 where at the level of rounding, and eigenvectors (n, n)."""
    dtype, wide = matrix.dtype, matrix.to(statistics_dtype(matrix.device))
    rounding = len(matrix) * torch.finfo(dtype).eps
    if not semidefinite or not len(matrix):
        values, vectors = torch.linalg.eigh(wide)
        small = values.abs() <= rounding * values.abs().max() if len(matrix) else values.bool()
        return values.masked_fill(small, 0.0).to(dtype), vectors.to(dtype)
    diagonal = wide.diagonal()
    scale = torch.where(diagonal > 0, diagonal, 1.0).sqrt()
    e, u = torch.linalg.eigh(wide / scale[:, None] / scale)
    above_rounding = e > rounding * e[-1]
    factor = scale[:, None] * u * torch.where(above_rounding, e, 0.0).sqrt()
    vectors, sigma, _ = torch.linalg.svd(factor)
    values = torch.where(torch.arange(len(e), device=e.device) < above_rounding.sum(), sigma.square(), 0.0)
    return values.flip(0).to(dtype), vectors.flip(1).to(dtype)
