"""What comes near the inverse of H + I ⊗ diag(ρ), and stays bounded where that sees nothing.

    class blocks    Σ γ·M_cc x̃ x̃ᵀ + diag(ρ), whitened class by class        O(C·D̃²) memory, O(N·C·D̃²) once
    Kronecker       Γ·G ⊗ A + I ⊗ diag(ρ), exactly, by an E that makes      O(C² + D̃²), O(N·(C² + D̃²)) once
                    Eᵀ A E and Eᵀ diag(ρ) E diagonal
    diagonal        of H + I ⊗ diag(ρ)                                      O(C·D̃)

Fewer rows than features, or a gauge that only a softcap sees, leave directions without curvature. An inverse
would make them 1/eps long, and the rounding of a residual with them; here they are as long as directions are
on average.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xent.curvature._cg import Map


def of_diagonal(diagonal: Tensor) -> Map:
    """diagonal (K, D̃)."""
    _check_finite(diagonal)
    size = diagonal.abs()
    values = torch.where(_seen(size), size, _mean(size))
    return lambda r: r / values


def of_blocks(blocks: Tensor) -> Map:
    """blocks (K, D̃, D̃)."""
    size = blocks.diagonal(dim1=-2, dim2=-1).abs()
    _check_finite(size)
    # beside the other classes' curvature in the same column this one's is none
    t = whitening(blocks + torch.where(_seen(size), 0.0, _mean(size)).diag_embed())
    return lambda r: (t @ (t.mT @ r[..., None]))[..., 0]


def of_factors(g: Tensor, a: Tensor, ridge: Tensor) -> Map:
    """g ⊗ a + I ⊗ diag(ρ), g (K, K), a (D̃, D̃), ρ (D̃,)."""
    g, u = torch.linalg.eigh(g)
    g = g.clamp(min=0.0)
    average = float(_mean(g))  # so that an average direction's curvature is 1
    t = whitening(a * average + ridge.diag())
    a, q = torch.linalg.eigh(t.mT @ a @ t)
    basis = t @ q
    curved, fixed = torch.outer(g, a.clamp(min=0.0)), (basis.square() * ridge[:, None]).sum(0)
    # with a curvature of less than this a residual's rounding would decide; a ridge is known
    seen = (curved > torch.finfo(g.dtype).eps ** (1 / 3) * curved.max()) | (fixed > curved)
    values = curved + fixed
    values = torch.where(seen & (values > _rounding(g) * values.max()), values, 1.0)
    return lambda r: u @ ((u.t() @ r @ basis) / values) @ basis.t()


def whitening(blocks: Tensor) -> Tensor:
    """T with Tᵀ M T = 1 on what a semidefinite M (..., D̃, D̃) sees, whatever the units of its columns."""
    diagonal = blocks.diagonal(dim1=-2, dim2=-1)
    _check_finite(diagonal)
    scale = torch.where(diagonal == 0, 1.0, diagonal.abs()).sqrt()
    unit = blocks / scale[..., None] / scale[..., None, :]
    unit.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    lower, failed = torch.linalg.cholesky_ex(unit)
    pivots = lower.diagonal(dim1=-2, dim2=-1).square()
    rounding = _rounding(scale)
    singular = (failed != 0) | ~(pivots > rounding).all(-1)
    eye = torch.eye(unit.shape[-1], dtype=unit.dtype, device=unit.device)
    lower = torch.where(singular[..., None, None], eye, lower)
    t = torch.linalg.solve_triangular(lower, eye, upper=False).mT.contiguous()
    if bool(singular.any()):
        values, vectors = torch.linalg.eigh(unit[singular])
        t[singular] = vectors * torch.where(values > rounding, values, 1.0).rsqrt()[..., None, :]
    return t / scale[..., None]


def _seen(size: Tensor) -> Tensor:
    """Which of (K, D̃) are more than the rounding of the largest in their column, whose unit is theirs."""
    limits = torch.finfo(size.dtype)
    return size >= (limits.eps * size.amax(0, keepdim=True)).clamp_min(limits.tiny)


def _check_finite(diagonal: Tensor) -> None:
    if not bool(diagonal.isfinite().all()):
        raise ValueError(
            "the curvature is not finite: squares of these features leave the range of "
            f"{diagonal.dtype}; scale them"
        )


def _rounding(values: Tensor) -> float:
    """What eigenvalues of a matrix of this size keep of the largest by rounding alone."""
    return 10 * values.shape[-1] * torch.finfo(values.dtype).eps


def _mean(values: Tensor) -> Tensor:
    """Of what is not 0; 1 where nothing is."""
    some = values[values > 0]
    return some.mean() if some.numel() else torch.ones_like(values.sum())
