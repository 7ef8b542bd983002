"""Second derivatives of rows that are sure, of their target or of another class, against mpmath."""

from __future__ import annotations

import mpmath
import pytest
import torch
from torch import Tensor

import xent


def exact_hessian(z: Tensor, mass: float) -> list[list[mpmath.mpf]]:
    """a·(diag(p) − p pᵀ) of logits (C,), 1 − p as the sum of the others."""
    e = [mpmath.exp(mpmath.mpf(float(value))) for value in z]
    p = [value / sum(e) for value in e]
    n = range(len(p))
    return [[mass * p[i] * (sum(p[k] for k in n if k != i) if i == j else -p[j]) for j in n] for i in n]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("ahead", [2.0, 10.0, 30.0])
@pytest.mark.parametrize("target", ["right", "wrong", "soft", "sparse", "smoothed"])
@pytest.mark.parametrize("budget", [None, 600], ids=["one-tile", "tiles"])
def test_hessian_of_a_sure_row(dtype, ahead, target, budget):
    classes = 9
    z = torch.randn(1, classes, dtype=dtype)
    z[0, 6] = z.max() + ahead
    options = {"label_smoothing": 0.1} if target == "smoothed" else {}
    y: object = torch.tensor([6 if target == "right" else 3])
    if target == "soft":
        y = torch.full((1, classes), 1 / classes, dtype=dtype)
    elif target == "sparse":
        y = xent.TopKTarget(torch.tensor([[2, 5]]), torch.tensor([[0.5, 0.5]], dtype=dtype))
    x = torch.ones(1, 1, dtype=dtype)

    def loss(w: Tensor) -> Tensor:
        return xent.linear_cross_entropy(x, w[:, None], y, memory_budget=budget, **options)

    with mpmath.workdps(60):
        expected = exact_hessian(z[0], 1.0)
        found = {
            "double backward": torch.autograd.functional.hessian(loss, z[0]),
            "from logits": torch.autograd.functional.hessian(
                lambda z: xent.cross_entropy(z[None], y, **options), z[0]
            ),
        }
        if budget is None:
            found["forward over reverse"] = torch.func.jacfwd(torch.func.grad(loss))(z[0])
        for way, hessian in found.items():
            for i in range(classes):
                for j in range(classes):
                    error = abs(mpmath.mpf(hessian[i, j].item()) / expected[i][j] - 1)
                    assert error < 100 * torch.finfo(dtype).eps, (way, i, j, float(error))
