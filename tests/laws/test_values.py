"""Every loss is the formula that it names."""

from __future__ import annotations

import pytest
import torch

from table import close, dtypes, problem, rows

REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "sum", "mean"])


@rows("plain_formula")
@dtypes()
@REDUCTIONS
@pytest.mark.parametrize("scores", ["dense", "linear"])
def test_value_and_gradient_are_those_of_the_plain_formula(row, dtype, reduction, scores):
    """Written out in float64, by operations of torch, and differentiated by autograd."""
    p = problem(row, dtype).differentiable()
    if scores == "dense":
        z = p.logits.detach().requires_grad_()
        leaves, loss, right = [z], p.dense(z, reduction=reduction), p.plain(z, reduction)
    else:
        leaves, loss = [p.x, p.w, p.b], p.linear(reduction=reduction)
        right = p.plain(torch.nn.functional.linear(p.x.double(), p.w.double(), p.b.double()), reduction)
    close(loss, right, dtype)
    upstream = torch.rand_like(right)
    found = torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))
    for g, e in zip(found, torch.autograd.grad(right, leaves, upstream), strict=True):
        close(g, e, dtype)
