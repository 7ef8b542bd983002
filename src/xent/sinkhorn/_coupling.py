"""The linear system of a coupling: what a plan P ≥ 0 with diagonals d and e answers to small changes.

    ⎡diag d    P   ⎤ ⎡x⎤   ⎡a⎤        d ≥ P·1,  e ≥ Pᵀ·1
    ⎣  Pᵀ    diag e⎦ ⎣y⎦ = ⎣b⎦

With ξ = √d∘x, η = √e∘y and B = P / √(d eᵀ), whose singular values lie in 0..1, the larger side is eliminated:

    (I − BᵀB) η = β − Bᵀα        ξ = α − B η        α = a/√d, β = b/√e

Where d and e are P's own sums, the direction x = 1, y = −1 is free, and so is one for every further part that
no entry connects. The right-hand sides that a plan's derivatives make have no component there; nor do they
have more than √λ of one along a direction whose eigenvalue λ is tiny, so that a ridge below rounding changes
nothing that shows. Up to `DIRECT` unknowns Cholesky's factors of the Schur complement, with that ridge,
refined; beyond them conjugate gradients, each step one product with P and one with Pᵀ, and where these need
more than `PATIENCE` steps, Cholesky again, up to `LARGEST` unknowns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

DIRECT = 512  # unknowns of the smaller side: N·K² stays near the cost of a few passes
LARGEST = 4096  # of which a square matrix is kept
PATIENCE = 150  # steps of conjugate gradients that take about as long as the factors
RIDGE = 1e-12
REFINEMENTS = 4  # an eigenvalue λ is answered to (RIDGE / λ)⁵
CHUNK = 1 << 22  # elements of P in float64 at a time
STALLED = 50  # steps of conjugate gradients without a smaller residual


def times(P: Tensor, y: Tensor) -> Tensor:
    """P·y, the sum over columns: (..., N) from (..., N, K) and (..., K)."""
    return torch.mv(P, y) if P.ndim == 2 else torch.matmul(P, y[..., None])[..., 0]


def transposed(P: Tensor, x: Tensor) -> Tensor:
    """Pᵀ·x, the sum over rows: (..., K) from (..., N, K) and (..., N)."""
    return torch.mv(P.t(), x) if P.ndim == 2 else torch.matmul(x[..., None, :], P)[..., 0, :]


def solve(
    P: Tensor,  # (..., N, K)
    d: Tensor,  # (..., N); 0 where a row is empty
    e: Tensor,  # (..., K)
    a: Tensor,  # (..., N)
    b: Tensor,  # (..., K)
    *,
    tolerance: float | Tensor | None = None,  # of the residual of conjugate gradients; None: as far as P goes
    max_steps: int = 5000,
    patience: int = PATIENCE,
) -> tuple[Tensor, Tensor, int]:
    """x, y and the number of steps, 1 of which is none; x and y are 0 in rows and columns that are empty."""
    if P.shape[-2] < P.shape[-1]:
        y, x, steps = solve(P.mT, e, d, b, a, tolerance=tolerance, max_steps=max_steps, patience=patience)
        return x, y, steps
    if 0 in P.shape:
        return torch.zeros_like(a), torch.zeros_like(b), 0
    left, right = (torch.where(t > 0, t.rsqrt(), 0.0) for t in (d, e))
    alpha, beta = left * a, right * b
    small, steps, done = P.shape[-1] <= LARGEST, 0, False
    if P.shape[-1] > DIRECT and (patience > 0 or not small):
        limit = min(max_steps, patience) if small else max_steps
        xi, eta, steps, done = _conjugate_gradients(P, left, right, alpha, beta, tolerance, limit)
    if small and not done:
        xi, eta = _direct(P, left, right, alpha, beta)
        steps += 1
    return left * xi, right * eta, steps


def residual(P: Tensor, d: Tensor, e: Tensor, a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """How much of the right-hand side x and y leave, as a share of it: (...)."""
    left, right = (torch.where(t > 0, t.rsqrt(), 0.0) for t in (d, e))
    dtype = P.dtype
    first = left * (a - d * x - times(P, y.to(dtype)))
    second = right * (b - e * y - transposed(P, x.to(dtype)))
    left_over = first.square().sum(-1) + second.square().sum(-1)
    whole = (left * a).square().sum(-1) + (right * b).square().sum(-1)
    return torch.where(whole > 0, (left_over / whole).sqrt(), 0.0)


def _blocks(P: Tensor, left: Tensor, right: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """B in float64, some rows at a time."""
    rows = max(1, CHUNK * P.shape[-2] // max(1, P.numel()))
    for start in range(0, P.shape[-2], rows):
        at = slice(start, start + rows)
        yield at, P[..., at, :].to(left.dtype) * left[..., at, None] * right[..., None, :]


def _direct(P: Tensor, left: Tensor, right: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    whole = list(_blocks(P, left, right)) if P.numel() <= CHUNK else None

    def blocks() -> Iterator[tuple[slice, Tensor]]:
        yield from (_blocks(P, left, right) if whole is None else whole)

    def correct(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """ξ and η of a right-hand side, with the ridge."""
        rhs = second - sum((transposed(B, first[..., at]) for at, B in blocks()), torch.zeros_like(second))
        eta = torch.cholesky_solve(rhs[..., None], factor)[..., 0]
        return torch.cat([first[..., at] - times(B, eta) for at, B in blocks()], -1), eta

    gram = sum((B.mT @ B for _, B in blocks()), right.new_zeros(*right.shape, right.shape[-1]))
    identity = torch.eye(right.shape[-1], dtype=right.dtype, device=right.device)
    ridge = RIDGE
    while True:
        factor, failed = torch.linalg.cholesky_ex((1 + ridge) * identity - gram)
        if ridge > 1 or not failed.any():
            break
        ridge *= 100
    xi, eta = correct(alpha, beta)
    for _ in range(REFINEMENTS):
        first = alpha - xi - torch.cat([times(B, eta) for _, B in blocks()], -1)
        second = beta - eta
        for at, B in blocks():
            second = second - transposed(B, xi[..., at])
        more_xi, more_eta = correct(first, second)
        xi, eta = xi + more_xi, eta + more_eta
    return xi, eta


def _conjugate_gradients(
    P: Tensor,
    left: Tensor,
    right: Tensor,
    alpha: Tensor,
    beta: Tensor,
    tolerance: float | Tensor | None,
    max_steps: int,
) -> tuple[Tensor, Tensor, int, bool]:
    """ξ, η, the number of steps, and whether they have got there."""
    dtype = P.dtype
    if tolerance is None:
        tolerance = 8 * torch.finfo(dtype).eps

    def forth(eta: Tensor) -> Tensor:
        return left * times(P, (right * eta).to(dtype))

    def back(xi: Tensor) -> Tensor:
        return right * transposed(P, (left * xi).to(dtype))

    def dot(s: Tensor, t: Tensor) -> Tensor:
        return (s * t).sum(-1, keepdim=True)

    r = beta - back(alpha)
    eta = torch.zeros_like(r)
    best, best_eta, since = dot(r, r), eta, 0
    size, way, goal = best, r, best * torch.as_tensor(tolerance, device=r.device)[..., None] ** 2
    steps = 0
    # an item of a batch may be done before the others: its 0/0 is selected away
    while steps < max_steps and since < STALLED and bool((best > goal).any()):
        image = way - back(forth(way))
        steps += 1
        bend = dot(way, image)
        length = torch.where((bend > 0) & (best > goal), size / bend, 0.0)
        eta, r = eta + length * way, r - length * image
        after = dot(r, r)
        way = r + torch.where(size > 0, after / size, 0.0) * way
        size = after
        better = size < best
        since = 0 if bool(better.any()) else since + 1
        best, best_eta = torch.where(better, size, best), torch.where(better, eta, best_eta)
    return alpha - forth(best_eta), best_eta, steps, not bool((best > goal).any())
