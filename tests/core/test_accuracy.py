"""Against mpmath on the same logits, row by row.

The bounds, and exact arithmetic itself, lie in benchmarks/exact.py, whose table beside other libraries
benchmarks/accuracy.py prints.
"""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

import xent
from exact import exact, gradient_bound, loss_bound, norm
from xent._core import reference

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [2, 7, 40])
@pytest.mark.parametrize("scores", ["dense", "one class a tile"])
def test_loss_and_gradient_against_mpmath(dtype, kind, classes, scores):
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
            row = exact(z, t)
            assert abs(mpmath.mpf(loss.item()) - row.loss) <= loss_bound(row, dtype), name
            found = given.grad.double().tolist()
            errors = [mpmath.mpf(g) - e for g, e in zip(found, row.gradient, strict=True)]
            assert norm(errors) <= gradient_bound(row, dtype), name


def test_targets_of_either_sign_keep_the_bound():
    """The worst of 60 million random rows: Σ t (z − m) in float32 errs by 1.36 and 1.19 of the bound."""
    three = [1.1073777675628662, 1.1231297254562378, -1.10298752784729]
    six = [-2.542226, 3.208993, 3.1024032, 2.7602534, 0.009799836, 3.2047147]
    rows = [
        (three, [0.7406612634658813, 1.2247309684753418, -0.4846576452255249]),
        (six, [0.43073764, -1.6024979, -0.03783127, -0.9082844, 0.0020716752, 0.68959844]),
    ]
    for z, t in (map(torch.tensor, row) for row in rows):
        for copies in (1, 40_000):  # few rows at once, and many
            losses = xent.cross_entropy(z.expand(copies, -1), t.expand(copies, -1), reduction="none")
            row = exact(z, t.tolist())
            for loss in losses.unique().tolist():
                assert abs(mpmath.mpf(loss) - row.loss) <= loss_bound(row, torch.float32)


def test_rounding_does_not_add_up_from_tile_to_tile():
    """2,000 tiles of one class: float64 has no wider type to hide their sum's rounding in."""
    one, classes = torch.ones(1, 1, dtype=torch.float64), 2000
    for _ in range(3):
        z = torch.randn(classes, dtype=torch.float64) * 3
        t = z.softmax(0)
        loss = xent.linear_cross_entropy(one, z[:, None], t[None], memory_budget=40)
        row = exact(z, t.tolist())
        assert abs(mpmath.mpf(loss.item()) - row.loss) <= loss_bound(row, torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_against_mpmath(kind):
    """The oracle of the other tests: a few units in the last place beyond one subtraction a class pair."""
    for classes in (2, 7):
        z, y = logits(kind, classes, torch.float64)
        for name, (target, t, options) in targets(z, y).items():
            row = exact(z, t)
            bound = loss_bound(row, torch.float64) + 2e-16 * classes * sum(abs(c) for c in t)
            loss = reference.cross_entropy(z[None], target, **options).item()
            assert abs(mpmath.mpf(loss) - row.loss) <= bound, name
