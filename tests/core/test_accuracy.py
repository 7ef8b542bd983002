"""Against mpmath on the same logits, row by row.

    |ℓ − exact| ≤ 4 ulp(exact) + eps·Σ_c |∂ℓ/∂z_c|·|z_c − max z|        ‖g − exact‖ ≤ 4 eps (a‖p‖ + ‖t‖)

The second term of the first bound is what rounding one subtraction a class costs.
"""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

import xent
from xent.core import reference

KINDS = ["normal", "confident", "beyond doubt", "hopeless", "huge offset", "masked", "wide"]


def logits(kind: str, classes: int, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    z = torch.randn(classes, dtype=dtype) * 3
    y = int(torch.randint(classes, ()))
    double = dtype == torch.float64
    if kind == "confident":
        z[y] = z.max() + 30 * torch.rand((), dtype=dtype)
    elif kind == "beyond doubt":  # p_y up to 1 − 1e-30
        z[y] = z.max() + 69
    elif kind == "hopeless":  # p_y down to 1e-300 in float64
        z[y] = z.min() - (680 if double else 80)
    elif kind == "huge offset":
        z += 1e12 if double else 1e6
    elif kind == "masked" and classes > 2:
        z[(y + 1) % classes] = -math.inf
    elif kind == "wide":
        z *= 30
    return z, y


def exact(z: torch.Tensor, t: list) -> tuple:
    """Loss, gradient, probabilities and distances to the maximum, to 700 digits (e^-700 + 1 is exact)."""
    with mpmath.workdps(700):
        values = [mpmath.mpf(v) for v in z.double().tolist()]
        top = max(values)
        weights = [mpmath.e ** (v - top) for v in values]
        total = sum(weights)
        p = [w / total for w in weights]
        a = sum(t)
        loss = sum(c * (mpmath.log(total) - (v - top)) for c, v in zip(t, values, strict=True) if c != 0)
        gradient = [a * q - c for q, c in zip(p, t, strict=True)]
        return loss, gradient, p, [abs(v - top) for v in values]


def targets(z: torch.Tensor, y: int) -> dict:
    """Name -> (what xent is given, the same as exact numbers, options)."""
    classes, dtype = len(z), z.dtype
    q = torch.rand(classes, dtype=dtype) * (z > -math.inf)
    one_hot = torch.nn.functional.one_hot(torch.tensor(y), classes).to(dtype)
    smooth = [(1 - mpmath.mpf(0.1)) * (c == y) + mpmath.mpf(0.1) / classes for c in range(classes)]
    kinds = {
        "index": (torch.tensor([y]), [mpmath.mpf(int(v)) for v in one_hot], {}),
        "one-hot": (one_hot[None], [mpmath.mpf(int(v)) for v in one_hot], {}),
        "soft": (q[None], [mpmath.mpf(v) for v in q.double().tolist()], {}),
    }
    if z.isfinite().all():
        kinds["smoothed"] = (torch.tensor([y]), smooth, {"label_smoothing": 0.1})
    return kinds


def ulp(value: float, dtype: torch.dtype) -> float:
    v = torch.tensor(value, dtype=dtype)
    return float(torch.nextafter(v, torch.tensor(math.inf, dtype=dtype)).double() - v.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [2, 7, 40])
@pytest.mark.parametrize("scores", ["dense", "one class a tile"])
def test_loss_and_gradient_against_mpmath(dtype, kind, classes, scores):
    eps = torch.finfo(dtype).eps
    for _ in range(3):
        z, y = logits(kind, classes, dtype)
        for name, (target, t, options) in targets(z, y).items():
            given = z.clone().requires_grad_()
            if scores == "dense":
                loss = xent.cross_entropy(given[None], target, **options)
            else:
                one = torch.ones(1, 1, dtype=dtype)
                bias = torch.where(z.isfinite(), 0.0, z)  # a product with inf would make nan of 0
                weight = torch.where(z.isfinite(), given, 0.0)[:, None]
                loss = xent.linear_cross_entropy(
                    one, weight, target, linear_bias=bias, memory_budget=40, **options
                )
            loss.backward()
            value, gradient, p, distance = exact(z, t)
            bound = 4 * ulp(float(value), dtype)
            bound += eps * sum(abs(g) * d for g, d in zip(gradient, distance, strict=True) if d != mpmath.inf)
            assert abs(mpmath.mpf(loss.item()) - value) <= bound, name
            errors = [mpmath.mpf(g) - e for g, e in zip(given.grad.double().tolist(), gradient, strict=True)]
            scale = abs(sum(t)) * mpmath.norm(p) + mpmath.norm(t)
            assert mpmath.norm(errors) <= 4 * eps * scale, name


@pytest.mark.parametrize("kind", KINDS)
def test_reference_against_mpmath(kind):
    """The oracle of the other tests: a few units in the last place beyond one subtraction a class pair."""
    for classes in (2, 7):
        z, y = logits(kind, classes, torch.float64)
        for name, (target, t, options) in targets(z, y).items():
            value, gradient, _, distance = exact(z, t)
            bound = 8 * ulp(float(value), torch.float64)
            bound += 2e-16 * sum(
                abs(g) * d for g, d in zip(gradient, distance, strict=True) if d != mpmath.inf
            )
            bound += 2e-16 * classes * sum(abs(c) for c in t)
            assert (
                abs(mpmath.mpf(reference.cross_entropy(z[None], target, **options).item()) - value) <= bound
            ), name
