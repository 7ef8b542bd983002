"""Laws of every gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from table import TOLERANCE, dtypes, problem, rows

REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "sum", "mean"])


@rows("gradient_sum")
@dtypes()
@REDUCTIONS
def test_gradient_rows_sum_to_zero(row, dtype, reduction):
    """Σ_c (a·p − t)_c = 0."""
    p = problem(row, dtype)
    z = p.logits.requires_grad_()
    p.dense(z, reduction=reduction).sum().backward()
    size = z.grad.abs().sum(1)
    assert (z.grad.sum(1).abs() <= 4 * torch.finfo(dtype).eps * size).all()


@rows("finite_differences")
@REDUCTIONS
@pytest.mark.parametrize("scores", ["dense", "linear"])
def test_gradient_equals_finite_differences(row, reduction, scores):
    """Central differences of fourth order, float64, in every input that takes a gradient."""
    p = problem(row).differentiable()
    if row.target == "probabilities":
        p = replace(p, target=p.target.clone().requires_grad_())
    z = p.logits.detach().requires_grad_()
    leaves = [z] if scores == "dense" else [p.x, p.w, p.b]
    if row.target == "probabilities":
        leaves.append(p.target)

    def loss():
        return p.dense(z, reduction=reduction) if scores == "dense" else p.linear(reduction=reduction)

    value = loss()
    upstream = torch.rand_like(value)
    for leaf, gradient in zip(leaves, torch.autograd.grad(value, leaves, upstream), strict=True):
        direction = torch.randn_like(leaf)
        here = leaf.detach().clone()
        slope, h = 0.0, 1e-3
        with torch.no_grad():
            for step, share in ((-2, 1 / 12), (-1, -2 / 3), (1, 2 / 3), (2, -1 / 12)):
                leaf.copy_(here + step * h * direction)
                slope += share / h * (loss() * upstream).sum()
            leaf.copy_(here)
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-7, atol=1e-8)


@rows("convex")
@dtypes()
def test_convexity_along_segments(row, dtype):
    """ℓ at a point between never exceeds the chord, in logits and in the head's weight."""
    p, q = problem(row, dtype), problem(row, dtype)
    q = replace(q, x=p.x, target=p.target, options=p.options)
    for share in (0.1, 0.5, 0.8):
        between = replace(p, w=share * p.w + (1 - share) * q.w, b=share * p.b + (1 - share) * q.b)
        chord = share * p.linear(reduction="none") + (1 - share) * q.linear(reduction="none")
        loss = between.linear(reduction="none")
        assert (loss <= chord + TOLERANCE[dtype] * (1 + chord.abs())).all()


@rows("learnt_weights")
@REDUCTIONS
def test_sample_weight_gradient(row, reduction):
    """A learnt sample weight: ∂L/∂s is the row's own term, through the divisor too."""
    p = problem(replace(row, sample_weight=False))
    s = torch.rand(len(p.x), dtype=torch.float64).requires_grad_()
    s.data[2] = 0.0

    def loss(s):
        return p.linear(reduction=reduction, sample_weight=s).sum()

    assert torch.autograd.gradcheck(loss, s, eps=1e-6, atol=1e-7)
