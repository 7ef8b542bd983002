"""Of the rows of a head's problem, what a Kronecker approximation of their curvature is made of.

    Σ_n H_n ⊗ x̃_n x̃_nᵀ  ≈  (Σ_n H_n) ⊗ (Σ_n w_n x̃_n x̃_nᵀ) / Σ_n w_n        H_n: Gauss–Newton's, (C, C)

    off the diagonal of Σ H_n: Σ (β − α)·q_i q_j, terms of one sign        on it: Σ h, the diagonal of H_n

and, in an orthonormal basis u_i ⊗ v_j, the diagonal of what is approximated:

    Λ_ij = Σ_n (u_iᵀ H_n u_i)·(x̃_nᵀ v_j)²        uᵀ H_n u = α·Var_p(s∘u) + β·⟨p, s∘u⟩²

A variance as Σ p w² − (Σ p w)² has no digits where a row is sure of its class k. Measured from w_k, with p̂
the other classes' probabilities and m their sum, every term is of the size of m:

    Var_p(w) = ⟨p̂, w²⟩ − 2 w_k ⟨p̂, w⟩ + m w_k² − (⟨p̂, w⟩ − m w_k)²
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from xent.core.curvature import Curvature, Visit
from xent.core.matmul import multiply_
from xent.core.scores import LinearHead

HELD = 8  # tensors of a chunk of rows by all classes, at most, in `second_moments`


def logit_sum(curvature: Curvature) -> Tensor:
    """Σ_n H_n, (C, C), a chunk of rows at a time."""
    problem = curvature.problem
    scores, classes = problem.scores, problem.targets.classes
    total = torch.zeros(classes, classes, dtype=scores.dtype, device=scores.device)
    diagonal = torch.zeros(classes, dtype=scores.dtype, device=scores.device)
    visit = Visit(curvature, curvature.plan(resident=True), crosses=False)
    with problem.products():
        for chunk in visit.plan.row_chunks(problem.targets.count):
            rows = visit.enter(chunk)
            sure = _sure(visit)
            alpha, beta = (v.to(scores.dtype)[:, None] for v in (rows.alpha, rows.beta))
            for i, at in enumerate(visit.classes):
                tile = visit.seen(i)
                here, local = sure.within(at)
                one_less = torch.where(here, sure.others, 1 - tile.p.gather(1, local))
                h = tile.p * (alpha * (1 - tile.p).scatter_(1, local, one_less) + beta * tile.p)
                diagonal[at] += (h if tile.slope is None else h * tile.slope.square()).sum(0)
                left = (tile.q * (beta - alpha)).t()
                for j, other in enumerate(visit.classes[: i + 1]):
                    multiply_(total[at, other], left, visit.seen(j).q, accumulate=True)
    # of each pair of tiles one was visited
    total = total.tril_(-1)
    total = total.add_(total.t().clone())
    total.diagonal().copy_(diagonal)
    return total


def input_sum(curvature: Curvature, weight: Tensor, *, features: bool, one: bool) -> Tensor:
    """Σ_n w_n x̃_n x̃_nᵀ, (D̃, D̃), w (M,); x̃ is the features, then a one, where they are asked for."""
    problem = curvature.problem
    total: Tensor | None = None
    for chunk in curvature.plan(resident=True).row_chunks(problem.targets.count):
        x = inputs(curvature, chunk, features=features, one=one)
        part = (x * weight[chunk].to(x.dtype)[:, None]).t() @ x
        total = part if total is None else total.add_(part)
    if total is None:
        x = inputs(curvature, slice(0, 0), features=features, one=one)
        total = x.t() @ x
    return total


def inputs(curvature: Curvature, chunk: slice, *, features: bool, one: bool) -> Tensor:
    """x̃ of a chunk of rows, (R, D̃)."""
    scores = curvature.problem.scores
    assert isinstance(scores, LinearHead)
    x = scores.load(curvature.problem.targets.pick(chunk)).to(scores.dtype)
    ones = torch.ones_like(x[:, :1]) if one else x[:, :0]
    return torch.cat([x, ones], dim=1) if features and one else x if features else ones


def second_moments(
    curvature: Curvature,
    u: Tensor,  # (C, K) of orthonormal columns
    v: Tensor,  # (D̃, E) of orthonormal columns
    *,
    features: bool,
    one: bool,
) -> Tensor:
    """Λ, (K, E)."""
    problem = curvature.problem
    dtype, classes = problem.scores.dtype, problem.targets.classes
    total = torch.zeros(u.shape[1], v.shape[1], dtype=dtype, device=u.device)
    most = max(1, problem.budget // (HELD * max(1, classes) * dtype.itemsize))
    plan = curvature.plan(resident=True)
    visit = Visit(curvature, replace(plan, row_chunk=min(plan.row_chunk, most)), crosses=False)
    squares = u.square()
    with problem.products():
        for chunk in visit.plan.row_chunks(problem.targets.count):
            forms = _quadratic_forms(curvature, visit, chunk, u, squares)
            along = (inputs(curvature, chunk, features=features, one=one) @ v).square_()
            multiply_(total, forms.t(), along, accumulate=True)
    return total


def _quadratic_forms(curvature: Curvature, visit: Visit, chunk: slice, u: Tensor, squares: Tensor) -> Tensor:
    """uᵀ H_n u of a chunk of rows and each column u, (R, K)."""
    rows = visit.enter(chunk)
    sure = _sure(visit)
    m = sure.others
    first = torch.zeros(len(m), u.shape[1], dtype=u.dtype, device=u.device)
    second, w = torch.zeros_like(first), torch.zeros_like(first)
    for number, at in enumerate(visit.classes):
        tile = visit.seen(number)
        here, local = sure.within(at)
        # not scattered into the tile, which may be kept
        others = tile.p.scatter(1, local, torch.where(here, 0.0, tile.p.gather(1, local)))
        own = u[sure.top] if tile.slope is None else u[sure.top] * tile.slope.gather(1, local)
        w += torch.where(here, own, 0.0)
        weighted = others if tile.slope is None else others * tile.slope
        first.addmm_(weighted, u[at])
        second.addmm_(weighted if tile.slope is None else weighted * tile.slope, squares[at])
    spread = second - 2 * w * first + m * w.square() - (first - m * w).square()
    forms = spread * rows.alpha.to(u.dtype)[:, None]
    if curvature.z_loss:
        forms += (first + (1 - m) * w).square() * rows.beta.to(u.dtype)[:, None]
    return forms


class _Sure(NamedTuple):
    """Of each row of a chunk."""

    top: Tensor  # (R,) the most probable class
    others: Tensor  # (R, 1) Σ of the other classes' probabilities, with the digits of 1 − p

    def within(self, at: slice) -> tuple[Tensor, Tensor]:
        """Whether a tile of classes holds the class, and its column there (else any), (R, 1)."""
        here = (self.top >= at.start) & (self.top < at.stop)
        return here[:, None], (self.top - at.start).clamp(0, at.stop - at.start - 1)[:, None]


def _sure(visit: Visit) -> _Sure:
    found = visit.rows.found
    assert found.k is not None
    others = (found.r / (1 + found.r)).to(visit.of.problem.scores.dtype)
    return _Sure(found.k, others[:, None])
