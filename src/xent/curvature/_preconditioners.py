"""Approximate inverses of H + I ⊗ diag(ρ) that stay bounded along its null space.

    class blocks    Σ γ·M_cc x̃ x̃ᵀ + diag(ρ), whitened class by class        O(C·D̃²) memory, O(N·C·D̃²) once
    Kronecker       Γ·G ⊗ A + I ⊗ diag(ρ), exactly, by an E that makes      O(C² + D̃²), O(N·(C² + D̃²)) once
                    Eᵀ A E and Eᵀ diag(ρ) E diagonal
    diagonal        of H + I ⊗ diag(ρ)                                      O(C·D̃)

With fewer rows than features, or along directions that only a softcap depends on, there is no curvature. The
exact inverse would scale such directions, and with them the rounding of a residual, by 1/eps. Here they are
scaled like a direction of average curvature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xent.curvature._cg import Map


def from_diagonal(diagonal: Tensor) -> Map:
    """Return the inverse of a diagonal (K, D̃)."""
    _check_finite(diagonal)
    size = diagonal.abs()
    values = torch.where(_above_rounding(size), size, _mean_of_positive(size))
    return lambda r: r / values


def from_blocks(blocks: Tensor) -> Map:
    """Return the inverse of diagonal blocks (K, D̃, D̃)."""
    size = blocks.diagonal(dim1=-2, dim2=-1).abs()
    _check_finite(size)
    # entries at the rounding level of their column count as 0, and get the average instead
    t = whitening(blocks + torch.where(_above_rounding(size), 0.0, _mean_of_positive(size)).diag_embed())
    return lambda r: (t @ (t.mT @ r[..., None]))[..., 0]


def from_factors(g: Tensor, a: Tensor, ridge: Tensor) -> Map:
    """Return the inverse of g ⊗ a + I ⊗ diag(ρ), g (K, K), a (D̃, D̃), ρ (D̃,)."""
    g, u = torch.linalg.eigh(g)
    g = g.clamp(min=0.0)
    average = float(_mean_of_positive(g))  # scales the curvature of an average direction to 1
    t = whitening(a * average + ridge.diag())
    a, q = torch.linalg.eigh(t.mT @ a @ t)
    basis = t @ q
    curved, fixed = torch.outer(g, a.clamp(min=0.0)), (basis.square() * ridge[:, None]).sum(0)
    # below this curvature the residual is mostly rounding; the ridge is exact
    reliable = (curved > torch.finfo(g.dtype).eps ** (1 / 3) * curved.max()) | (fixed > curved)
    values = curved + fixed
    values = torch.where(reliable & (values > _relative_rounding(g) * values.max()), values, 1.0)
    return lambda r: u @ ((u.t() @ r @ basis) / values) @ basis.t()


def whitening(blocks: Tensor) -> Tensor:
    """Return T with Tᵀ M T = 1 on the range of a semidefinite M (..., D̃, D̃), for columns of any unit."""
    diagonal = blocks.diagonal(dim1=-2, dim2=-1)
    _check_finite(diagonal)
    scale = torch.where(diagonal == 0, 1.0, diagonal.abs()).sqrt()
    unit = blocks / scale[..., None] / scale[..., None, :]
    unit.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    lower, failed = torch.linalg.cholesky_ex(unit)
    pivots = lower.diagonal(dim1=-2, dim2=-1).square()
    rounding = _relative_rounding(scale)
    singular = (failed != 0) | ~(pivots > rounding).all(-1)
    eye = torch.eye(unit.shape[-1], dtype=unit.dtype, device=unit.device)
    lower = torch.where(singular[..., None, None], eye, lower)
    t = torch.linalg.solve_triangular(lower, eye, upper=False).mT.contiguous()
    if bool(singular.any()):
        values, vectors = torch.linalg.eigh(unit[singular])
        t[singular] = vectors * torch.where(values > rounding, values, 1.0).rsqrt()[..., None, :]
    return t / scale[..., None]


def _above_rounding(size: Tensor) -> Tensor:
    """Return a mask of the entries of (K, D̃) above the rounding error of the largest in their column."""
    limits = torch.finfo(size.dtype)
    return size >= (limits.eps * size.amax(0, keepdim=True)).clamp_min(limits.tiny)


def _check_finite(diagonal: Tensor) -> None:
    if not bool(diagonal.isfinite().all()):
        raise ValueError(
            "the curvature is not finite: squares of these features leave the range of "
            f"{diagonal.dtype}; scale them"
        )


def _relative_rounding(values: Tensor) -> float:
    """Return the relative rounding error of the eigenvalues of a matrix of this size."""
    return 10 * values.shape[-1] * torch.finfo(values.dtype).eps


def _mean_of_positive(values: Tensor) -> Tensor:
    """Return the mean of the positive entries, 1 without any."""
    positive = values[values > 0]
    return positive.mean() if positive.numel() else torch.ones_like(values.sum())
