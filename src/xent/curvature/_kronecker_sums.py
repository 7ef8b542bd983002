"""Sums over the rows of a head's problem from which the Kronecker approximation is made.

    Σ_n H_n ⊗ x̃_n x̃_nᵀ  ≈  (Σ_n H_n) ⊗ (Σ_n w_n x̃_n x̃_nᵀ) / Σ_n w_n        H_n: Gauss–Newton's, (C, C)

    off the diagonal of Σ H_n: Σ (β − α)·q_i q_j, terms of one sign        on it: Σ h, the diagonal of H_n

and, in an orthonormal basis u_i ⊗ v_j, the diagonal of the exact curvature:

    Λ_ij = Σ_n (u_iᵀ H_n u_i)·(x̃_nᵀ v_j)²        uᵀ H_n u = α·Var_p(s∘u) + β·⟨p, s∘u⟩²
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from xent._core.logits import LinearHead
from xent._core.matmul import multiply_
from xent.curvature._tiles import Curvature, Forms, Visit

HELD = 8  # tensors of (rows of a chunk, C) alive at once in `second_moments`, at most


def logit_sum(curvature: Curvature) -> Tensor:
    """Return Σ_n H_n, (C, C), a chunk of rows at a time."""
    problem = curvature.problem
    logits, classes = problem.logits, problem.targets.n_classes
    total = torch.zeros(classes, classes, dtype=logits.dtype, device=logits.device)
    diagonal = torch.zeros(classes, dtype=logits.dtype, device=logits.device)
    visit = Visit(curvature, curvature.plan(resident=True), crosses=False)
    with problem.products():
        for chunk in visit.plan.row_chunks(problem.targets.count):
            rows = visit.enter(chunk)
            rank_one = (rows.beta - rows.alpha).to(logits.dtype)[:, None]
            for i, at in enumerate(visit.classes):
                tile = visit.seen(i)
                diagonal[at] += curvature.tile_diagonal(tile, rows).sum(0)
                left = (tile.q * rank_one).t()
                for j, other in enumerate(visit.classes[: i + 1]):
                    multiply_(total[at, other], left, visit.seen(j).q, accumulate=True)
    # only one of each pair of tiles was computed: the other is its transpose
    total = total.tril_(-1)
    total = total.add_(total.t().clone())
    total.diagonal().copy_(diagonal)
    return total


def input_sum(curvature: Curvature, weight: Tensor, *, features: bool, one: bool) -> Tensor:
    """Return Σ_n w_n x̃_n x̃_nᵀ, (D̃, D̃), w (M,); x̃ holds the features and a one, each if asked for."""
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
    """Return x̃ of a chunk of rows, (R, D̃)."""
    logits = curvature.problem.logits
    assert isinstance(logits, LinearHead)
    x = logits.load(curvature.problem.targets.pick(chunk)).x.to(logits.dtype)
    if not one:
        return x if features else x[:, :0]
    ones = x.new_ones(x.shape[0], 1)
    return torch.cat([x, ones], dim=1) if features else ones


def second_moments(
    curvature: Curvature,
    u: Tensor,  # (C, K) of orthonormal columns
    v: Tensor,  # (D̃, E) of orthonormal columns
    *,
    features: bool,
    one: bool,
) -> Tensor:
    """Return Λ, (K, E)."""
    problem = curvature.problem
    dtype, classes = problem.logits.dtype, problem.targets.n_classes
    total = torch.zeros(u.shape[1], v.shape[1], dtype=dtype, device=u.device)
    most = max(1, problem.budget // (HELD * max(1, classes) * dtype.itemsize))
    plan = curvature.plan(resident=True)
    visit = Visit(curvature, replace(plan, row_chunk=min(plan.row_chunk, most)), crosses=False)
    with problem.products():
        for chunk in visit.plan.row_chunks(problem.targets.count):
            forms = Forms(curvature, visit.enter(chunk), u)
            for number in range(len(visit.classes)):
                forms.add(visit.seen(number))
            along = (inputs(curvature, chunk, features=features, one=one) @ v).square_()
            multiply_(total, forms.value().t(), along, accumulate=True)
    return total
