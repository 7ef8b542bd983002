"""The linear system of a plan P ≥ 0 with diagonals d and e: its response to small changes.

    ⎡diag d    P   ⎤ ⎡x⎤   ⎡a⎤        d ≥ P·1,  e ≥ Pᵀ·1
    ⎣  Pᵀ    diag e⎦ ⎣y⎦ = ⎣b⎦

With ξ = √d∘x, η = √e∘y and B = P / √(d eᵀ), whose singular values lie in 0..1, the larger side is eliminated:

    (I − BᵀB) η = β − Bᵀα        ξ = α − B η        α = a/√d, β = b/√e

Where d and e are the sums of P, the matrix is singular along x = 1, y = −1, once for every connected part of
P. The right-hand sides of a plan's derivatives have no component there, and at most √μ of one along an
eigenvector of a tiny eigenvalue μ, so a ridge below rounding does not change the result. Up to `DIRECT`
unknowns the solver is a Cholesky factorisation of the Schur complement, with that ridge and iterative
refinement. Above it is conjugate gradients, one product with P and one with Pᵀ a step; where these need more
than `PATIENCE` steps, it is Cholesky again, up to `LARGEST` unknowns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

DIRECT = 512  # unknowns of the smaller side: N·K² costs about as much as a few passes
LARGEST = 4096  # unknowns up to which a square matrix is stored
PATIENCE = 150  # steps of conjugate gradients that cost about as much as the factorisation
RIDGE = 1e-12
REFINEMENTS = 4  # leave an error of (RIDGE / μ)⁵ along an eigenvalue μ
CHUNK = 1 << 22  # elements of P in float64 at a time
STALLED = 50  # steps without a smaller residual after which conjugate gradients stop


def matvec(P: Tensor, y: Tensor) -> Tensor:
    """Return P·y: (..., N) from (..., N, K) and (..., K)."""
    return torch.mv(P, y) if P.ndim == 2 else torch.matmul(P, y[..., None])[..., 0]


def rmatvec(P: Tensor, x: Tensor) -> Tensor:
    """Return Pᵀ·x: (..., K) from (..., N, K) and (..., N)."""
    return torch.mv(P.t(), x) if P.ndim == 2 else torch.matmul(x[..., None, :], P)[..., 0, :]


def solve(
    P: Tensor,  # (..., N, K)
    d: Tensor,  # (..., N); 0 where a row is empty
    e: Tensor,  # (..., K)
    a: Tensor,  # (..., N)
    b: Tensor,  # (..., K)
    *,
    tolerance: float | Tensor | None = None,  # of the relative residual; None: the rounding of P's type
    max_steps: int = 5000,
    patience: int = PATIENCE,
) -> tuple[Tensor, Tensor, int]:
    """Return x, y and the number of steps (a factorisation counts as one); 0 in empty rows and columns."""
    if P.shape[-2] < P.shape[-1]:
        y, x, steps = solve(P.mT, e, d, b, a, tolerance=tolerance, max_steps=max_steps, patience=patience)
        return x, y, steps
    if 0 in P.shape:
        return torch.zeros_like(a), torch.zeros_like(b), 0
    row_scale, column_scale = (torch.where(t > 0, t.rsqrt(), 0.0) for t in (d, e))
    alpha, beta = row_scale * a, column_scale * b
    small, steps, done = P.shape[-1] <= LARGEST, 0, False
    if P.shape[-1] > DIRECT and (patience > 0 or not small):
        limit = min(max_steps, patience) if small else max_steps
        xi, eta, steps, done = _conjugate_gradients(P, row_scale, column_scale, alpha, beta, tolerance, limit)
    if small and not done:
        xi, eta = _direct(P, row_scale, column_scale, alpha, beta)
        steps += 1
    return row_scale * xi, column_scale * eta, steps


def residual(P: Tensor, d: Tensor, e: Tensor, a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return the norm of the residual over that of the right-hand side, (...)."""
    row_scale, column_scale = (torch.where(t > 0, t.rsqrt(), 0.0) for t in (d, e))
    dtype = P.dtype
    first = row_scale * (a - d * x - matvec(P, y.to(dtype)))
    second = column_scale * (b - e * y - rmatvec(P, x.to(dtype)))
    squared_residual = first.square().sum(-1) + second.square().sum(-1)
    squared_size = (row_scale * a).square().sum(-1) + (column_scale * b).square().sum(-1)
    return torch.where(squared_size > 0, (squared_residual / squared_size).sqrt(), 0.0)


def _blocks(P: Tensor, row_scale: Tensor, column_scale: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield B in float64, some rows at a time."""
    rows = max(1, CHUNK * P.shape[-2] // max(1, P.numel()))
    for start in range(0, P.shape[-2], rows):
        at = slice(start, start + rows)
        yield at, P[..., at, :].to(row_scale.dtype) * row_scale[..., at, None] * column_scale[..., None, :]


def _direct(
    P: Tensor, row_scale: Tensor, column_scale: Tensor, alpha: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    stored = list(_blocks(P, row_scale, column_scale)) if P.numel() <= CHUNK else None

    def blocks() -> Iterator[tuple[slice, Tensor]]:
        yield from (_blocks(P, row_scale, column_scale) if stored is None else stored)

    def apply_B(eta: Tensor) -> Tensor:
        return torch.cat([matvec(B, eta) for _, B in blocks()], -1)

    def apply_Bt(xi: Tensor) -> Tensor:
        return sum((rmatvec(B, xi[..., at]) for at, B in blocks()), torch.zeros_like(beta))

    def correct(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Return ξ and η for a right-hand side, with the ridge."""
        eta = torch.cholesky_solve((second - apply_Bt(first))[..., None], factor)[..., 0]
        return first - apply_B(eta), eta

    identity = torch.eye(beta.shape[-1], dtype=beta.dtype, device=beta.device)
    gram = sum((B.mT @ B for _, B in blocks()), torch.zeros_like(identity))
    ridge = RIDGE
    while True:
        factor, failed = torch.linalg.cholesky_ex((1 + ridge) * identity - gram)
        if ridge > 1 or not failed.any():
            break
        ridge *= 100
    xi, eta = correct(alpha, beta)
    for _ in range(REFINEMENTS):
        more_xi, more_eta = correct(alpha - xi - apply_B(eta), beta - eta - apply_Bt(xi))
        xi, eta = xi + more_xi, eta + more_eta
    return xi, eta


def _conjugate_gradients(
    P: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    alpha: Tensor,
    beta: Tensor,
    tolerance: float | Tensor | None,
    max_steps: int,
) -> tuple[Tensor, Tensor, int, bool]:
    """Return ξ, η, the number of steps, and whether the tolerance was reached."""
    dtype = P.dtype
    if tolerance is None:
        tolerance = 8 * torch.finfo(dtype).eps

    def apply_B(eta: Tensor) -> Tensor:
        return row_scale * matvec(P, (column_scale * eta).to(dtype))

    def apply_Bt(xi: Tensor) -> Tensor:
        return column_scale * rmatvec(P, (row_scale * xi).to(dtype))

    def dot(s: Tensor, t: Tensor) -> Tensor:
        return (s * t).sum(-1, keepdim=True)

    r = beta - apply_Bt(alpha)
    eta = torch.zeros_like(r)
    best, best_eta, since = dot(r, r), eta, 0
    size, direction, goal = best, r, best * torch.as_tensor(tolerance, device=r.device)[..., None] ** 2
    steps = 0
    # an item of a batch may converge before the others: its 0/0 is discarded
    while steps < max_steps and since < STALLED and bool((best > goal).any()):
        image = direction - apply_Bt(apply_B(direction))
        steps += 1
        curvature = dot(direction, image)
        step = torch.where((curvature > 0) & (best > goal), size / curvature, 0.0)
        eta, r = eta + step * direction, r - step * image
        after = dot(r, r)
        direction = r + torch.where(size > 0, after / size, 0.0) * direction
        size = after
        better = size < best
        since = 0 if bool(better.any()) else since + 1
        best, best_eta = torch.where(better, size, best), torch.where(better, eta, best_eta)
    return alpha - apply_B(best_eta), best_eta, steps, not bool((best > goal).any())
