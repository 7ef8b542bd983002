"""Half types: what float64 makes of the same inputs, rounded once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from table import OTHERS, ROWS, mapped, problem

DOUBLE = torch.float64


def in_double(p):
    options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in p.options.items()}
    target = mapped(p.target, lambda t: t.double() if t.is_floating_point() else t)
    return replace(p, x=p.x.double(), w=p.w.double(), b=p.b.double(), target=target, options=options)


CASES = [
    pytest.param(row, scores, id=f"{row.name}-{scores}")
    for row in ROWS + OTHERS
    for scores in ("dense", "linear", "tiled")
    if "half" not in row.exempt and (scores == "dense" or "half_linear" not in row.exempt)
]


@pytest.mark.parametrize(("row", "scores"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_half_types_are_rounded_once(row, dtype, reduction, scores):
    p = problem(row, dtype)
    exact = in_double(p).differentiable()
    p = p.differentiable()
    if scores == "dense":
        z = p.logits.detach().requires_grad_()
        leaves, double = [z], [z.detach().double().requires_grad_()]
        loss, right = p.dense(z, reduction=reduction), exact.dense(double[0], reduction=reduction)
    else:
        budget = 1500 if scores == "tiled" else None
        leaves, double = [p.x, p.w, p.b], [exact.x, exact.w, exact.b]
        # elsewhere products of half types round their factors unless others are named
        loss = p.linear(reduction=reduction, memory_budget=budget, product_dtype=torch.float32)
        right = exact.linear(reduction=reduction)
    assert loss.dtype == dtype
    upstream = torch.rand(loss.shape).to(dtype)
    found = [loss, *torch.autograd.grad(loss, leaves, upstream)]
    expected = [right, *torch.autograd.grad(right, double, upstream.double())]
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        inside = 64 * torch.finfo(torch.float32).eps * b.abs().max()  # float32 sums
        assert ((a.double() - b).abs() <= torch.finfo(dtype).eps / 2 * b.abs() + inside + tiny).all()
