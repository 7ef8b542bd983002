"""Laws of invariance: changes that must not change a loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from table import close, dtypes, problem, rows

# a sum is a mean times a number: of these laws one of both is enough, which test_values.py has
REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "mean"])


@rows("shift")
@dtypes()
@REDUCTIONS
def test_shift_invariance(row, dtype, reduction):
    """One number added to all logits of a row changes neither loss nor gradient."""
    p = problem(row, dtype)
    # a shift that adds exactly: multiples of a power of two on a grid of logits
    z = (p.logits * 1024).round() / 1024
    shift = torch.randint(-512, 512, (len(z), 1)).to(dtype)
    assert torch.equal((z + shift) - shift, z)
    plain, moved = z.clone().requires_grad_(), (z + shift).requires_grad_()
    a = p.dense(plain, reduction=reduction)
    b = p.dense(moved, reduction=reduction)
    close(b, a)
    upstream = torch.rand_like(a)
    close(*(torch.autograd.grad(v, u, upstream)[0] for v, u in ((b, moved), (a, plain))))


@rows("permutation")
@dtypes()
@REDUCTIONS
def test_class_permutation_equivariance(row, dtype, reduction):
    """Renaming the classes changes the loss nowhere and moves the gradient with the classes."""
    p = problem(row, dtype)
    order = torch.randperm(p.w.shape[0])
    options = dict(p.options)
    options |= {k: options[k][order] for k in ("weight", "log_q") if k in options}
    if row.target in ("index", "classes"):
        name = torch.argsort(order)
        target = torch.where(p.target == -100, -100, name[p.target.clamp(min=0)])
    elif row.target == "top_k":
        target = replace(p.target, indices=torch.argsort(order)[p.target.indices])
    else:
        target = p.target[:, order]
    q = replace(p, w=p.w[order], b=p.b[order], target=target, options=options).differentiable()
    p = p.differentiable()
    a, b = p.linear(reduction=reduction), q.linear(reduction=reduction)
    close(b, a)
    a.sum().backward()
    b.sum().backward()
    close(q.w.grad, p.w.grad[order])
    close(q.x.grad, p.x.grad)


@rows("tiling")
@dtypes()
@REDUCTIONS
@pytest.mark.parametrize("gradient", ["early", "recomputed"])
def test_tiling_changes_nothing(row, dtype, reduction, gradient):
    """Loss and gradients are the same through any tile that a budget allows."""
    p = problem(row, dtype, n=7, d=3, c=10).differentiable()
    leaves = [p.x, p.w, p.b]

    def run(budget):
        loss = p.linear(reduction=reduction, memory_budget=budget)
        upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=dtype).reshape(loss.shape)
        if gradient == "recomputed":
            torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
        return loss, torch.autograd.grad(loss, leaves, upstream)

    whole_loss, whole = run(None)
    for budget in (500, 3_000):
        loss, gradients = run(budget)
        close(loss, whole_loss)
        for a, b in zip(gradients, whole, strict=True):
            close(a, b)


@rows("dense_equals_linear")
@dtypes()
@REDUCTIONS
def test_dense_equals_linear_head(row, dtype, reduction):
    """From features × weight or from the logits they make: the same loss and the same gradients."""
    p = problem(row, dtype).differentiable()
    a, b = p.dense(reduction=reduction), p.linear(reduction=reduction)
    close(a, b)
    upstream = torch.rand_like(a)
    for g, h in zip(
        torch.autograd.grad(a, [p.x, p.w, p.b], upstream),
        torch.autograd.grad(b, [p.x, p.w, p.b], upstream),
        strict=True,
    ):
        close(g, h)


@rows("untouched")
@dtypes()
@REDUCTIONS
def test_inputs_left_untouched(row, dtype, reduction):
    """No tensor of the caller's changes, forward or backward, twice."""
    p = problem(row, dtype).differentiable()
    z = p.logits.detach().requires_grad_()
    seen = {"x": p.x, "w": p.w, "b": p.b, "z": z}
    parts = ("indices", "probabilities") if row.target == "top_k" else ()
    seen |= {k: getattr(p.target, k) for k in parts} or {"target": p.target}
    seen |= {k: v for k, v in p.options.items() if isinstance(v, torch.Tensor)}
    before = {k: (v.detach().clone(), v._version) for k, v in seen.items()}
    for loss in (p.linear(reduction=reduction), p.dense(z, reduction=reduction)):
        loss.sum().backward(retain_graph=True)
        loss.sum().backward()
    for k, (value, version) in before.items():
        assert torch.equal(seen[k].detach(), value), k
        assert seen[k]._version == version, k
