"""The pass of a fit is `linear_cross_entropy`: value and gradient, against float64, to the last digits."""

from __future__ import annotations

import pytest
import torch

import xent
from xent.linear_model import row_pass
from xent.linear_model.row_pass import RowPass

CLASSES = [2, 3, row_pass.FEW - 1, row_pass.FEW, 40]


def problem(n_classes, dtype, scale=1.0, n_rows=300, n_features=7):
    torch.manual_seed(0)
    x = torch.randn(n_rows, n_features).to(dtype)
    W, b = scale * torch.randn(n_classes, n_features), scale * torch.randn(n_classes)
    return x, W, b, torch.randint(n_classes, (n_rows,)), torch.rand(n_rows)


def reference(x, W, b, y, weight):
    W, b = (v.double().clone().requires_grad_() for v in (W, b))
    weight = None if weight is None else weight.double()
    loss = xent.linear_cross_entropy(x.double(), W, y, linear_bias=b, sample_weight=weight, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss, (W, b))


@pytest.mark.parametrize("n_classes", CLASSES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0], ids=["spread", "usual", "sure"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_loss(n_classes, scale, weighted, dtype, monkeypatch):
    monkeypatch.setattr(row_pass, "TILE", 1)  # tiles of the fewest rows: several, the last one shorter
    x, W, b, y, weight = problem(n_classes, dtype, scale)
    W, b, weight = W.to(dtype), b.to(dtype), weight.to(dtype) if weighted else None
    passed = RowPass(W, b)
    assert passed.rows < len(x)
    loss, to_W, to_b = passed.loss_and_gradient(x, y, weight)
    eps = 200 * scale * torch.finfo(dtype).eps
    for found, right in zip((loss, to_W, to_b), reference(x, W, b, y, weight), strict=True):
        torch.testing.assert_close(found.double(), right, rtol=eps, atol=float(eps * right.abs().max()))
    assert loss == passed.loss(x, y, weight)


@pytest.mark.parametrize("n_classes", CLASSES)
@pytest.mark.parametrize("nats", [1, 20, 28, 80, 700, 5000])
def test_rows_that_are_sure_keep_their_digits(n_classes, nats):
    """One row of one feature: −log p_y and p_y − 1 where the class is nats above or below the others."""
    for sign in (1, -1):
        W = torch.zeros(n_classes, 1, dtype=torch.float64)
        W[0] = sign * nats
        found = RowPass(W, None).loss_and_gradient(torch.ones(1, 1).double(), torch.tensor([0]), None)
        right = reference(torch.ones(1, 1), W, torch.zeros(n_classes), torch.tensor([0]), None)
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n_classes", [3, 40])
def test_half_features_are_converted_a_tile_at_a_time(dtype, n_classes):
    x, W, b, y, weight = problem(n_classes, dtype)
    found = RowPass(W, b).loss_and_gradient(x, y, weight)
    for a, right in zip(found, reference(x, W, b, y, weight), strict=True):
        torch.testing.assert_close(a.double(), right, rtol=1e-5, atol=1e-5 * float(right.abs().max()))


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("n_classes", [3, 40])
def test_logits_that_are_no_numbers_are_no_silent_loss(bad, n_classes):
    x, W, b, y, _ = problem(n_classes, torch.float32)
    b[1] = bad
    loss = RowPass(W, b).loss(x, y, None)
    expected = xent.linear_cross_entropy(x, W, y, linear_bias=b, reduction="sum")
    assert loss.isnan() == expected.isnan()
    assert loss.isinf() == expected.isinf()
