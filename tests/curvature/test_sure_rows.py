"""Confident rows: a curvature as small as 1 − p is accurate, against arithmetic in 60 digits."""

from __future__ import annotations

import mpmath as mp
import pytest
import torch
from torch.testing import assert_close

from xent.curvature import HeadFisher, HeadGGN, HeadHessian, HeadKronecker

BUDGETS = pytest.mark.parametrize("budget", [None, 2000])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def exact(x, w):
    """J ⊗ x xᵀ and Wᵀ J W of one row, rounded to float64 at the end."""
    with mp.workdps(60):
        x = mp.matrix([mp.mpf(float(v)) for v in x])
        w = mp.matrix([[mp.mpf(float(v)) for v in row] for row in w])
        z = w * x
        e = [mp.exp(v) for v in z]
        p = mp.matrix([v / mp.fsum(e) for v in e])
        jacobian = mp.diag(list(p)) - p * p.T
        features = w.T * jacobian * w
        outer = x * x.T
        weight = [
            [jacobian[i, j] * outer[a, b] for j in range(w.rows) for b in range(w.cols)]
            for i in range(w.rows)
            for a in range(w.cols)
        ]
        return as_tensor(weight), as_tensor(features.tolist())


def as_tensor(rows):
    return torch.tensor([[float(v) for v in row] for row in rows], dtype=torch.float64)


def sure_rows(n, d, c, by, dtype):
    """Return features (N, D), weight (C, D) and the rows' most probable classes."""
    x, w = torch.randn(n, d, dtype=dtype), torch.randn(c, d, dtype=dtype) / d**0.5
    w[:n] += by * x / x.norm(dim=1, keepdim=True) ** 2
    return x, w, torch.arange(n)


@DTYPES
@BUDGETS
def test_the_most_probable_class_is_stored_as_an_index(dtype, budget):
    """A comparison of probabilities would fail: their last digits depend on the shape of the product."""
    x, w, y = sure_rows(9, 300, 40, 30, dtype)
    operator = HeadHessian(x, w, y, memory_budget=budget)
    z = x.double() @ w.double().t()
    r = torch.exp(z - z.amax(1, keepdim=True)).scatter(1, y[:, None], 0.0).sum(1)
    p = z.softmax(1)
    one_less = (1 - p).scatter(1, y[:, None], (r / (1 + r))[:, None])
    right = (p * one_less / 9).t() @ x.double().square()
    tolerance = 3000 * torch.finfo(dtype).eps  # logits of 30 are rounded
    assert_close(operator.diagonal().double(), right, rtol=tolerance, atol=0.0)
    assert_close(operator.trace().double(), right.sum(), rtol=tolerance, atol=0.0)
    for c in (0, 8, 39):
        assert_close(operator.block(c).diagonal().double(), right[c], rtol=tolerance, atol=0.0)
        assert torch.linalg.eigvalsh(operator.block(c).double()).min() >= -1e-6 * right[c].max()


@DTYPES
@BUDGETS
@pytest.mark.parametrize("operator", [HeadHessian, HeadGGN])
@pytest.mark.parametrize("by", [9.0, 30.0, 60.0])
@pytest.mark.parametrize("target", [0, 1])
def test_products_keep_the_digits_that_the_diagonal_has(dtype, budget, operator, by, target):
    """Right and wrong, in the weight and in the features."""
    x, w, _ = sure_rows(1, 4, 5, by, dtype)
    weight, features = exact(x[0], w)
    y = torch.tensor([target])
    tolerance = 40 * by * torch.finfo(dtype).eps
    given = {"memory_budget": budget}
    of_weight = operator(x, w, y, **given)
    of_features = operator(x, w, y, wrt="features", **given)
    for found, right in ((of_weight, weight), (of_features, features)):
        assert_close(found.to_dense().double(), right, rtol=tolerance, atol=tolerance * right.abs().max())
        diagonal = found.diagonal().reshape(-1).double()
        assert_close(diagonal, right.diagonal(), rtol=tolerance, atol=0.0)
        assert_close(found.trace().double(), right.trace(), rtol=tolerance, atol=0.0)
    # each entry of its own size
    rough = 20 * tolerance
    assert_close(of_weight.to_dense().double(), weight, rtol=rough, atol=1e-37)
    assert_close(of_features.block(0).double(), features, rtol=tolerance, atol=tolerance * features.max())
    assert torch.linalg.eigvalsh(of_features.block(0).double()).min() > -1e-6 * features.max()


OPTIONS = [
    {"softcap": 20.0},
    {"z_loss": 1e-3},
    {"temperature": 0.7, "label_smoothing": 0.1},
    {"softcap": 15.0, "z_loss": 1e-3, "class_weight": torch.arange(1.0, 7.0)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options))
@pytest.mark.parametrize("wrt", ["weight", "features", "bias"])
@BUDGETS
def test_single_precision_is_as_good_as_double_of_its_inputs(options, wrt, budget):
    """1 − p about 1e-4, of which float64 has twelve digits: Gauss–Newton with every option."""
    x, w, y = sure_rows(5, 8, 6, 9, torch.float32)
    b = torch.randn(6) / 10
    given = {"wrt": wrt, "memory_budget": budget}
    found = HeadGGN(x, w, y, bias=b, **given, **options)
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    right = HeadGGN(x.double(), w.double(), y, bias=b.double(), **given, **wide)
    size = right.to_dense().abs().max()
    assert ((found.to_dense() - right.to_dense()).abs().max() / size) < 5e-6
    assert_close(found.diagonal().double(), right.diagonal(), rtol=3e-5, atol=0.0)


@pytest.mark.parametrize("wrt", ["weight", "features"])
def test_a_common_part_of_all_classes_weights_is_not_squared(wrt):
    x, w = torch.randn(6, 5) / 10, torch.randn(7, 5)
    y = torch.randint(7, (6,))
    near, far = (HeadHessian(x, w + offset, y, wrt=wrt) for offset in (0.0, 100.0))
    assert_close(far.diagonal(), near.diagonal(), rtol=1e-3, atol=1e-6)
    if wrt == "features":
        for n in range(6):
            size = near.block(n).abs().max()
            assert (far.block(n) - near.block(n)).abs().max() < 1e-3 * size
            assert torch.linalg.eigvalsh(far.block(n)).min() > -1e-6 * size


@DTYPES
def test_the_kronecker_factors_and_the_fisher_see_the_same_class(dtype):
    x, w, y = sure_rows(1, 4, 5, 30, dtype)
    weight, _ = exact(x[0], w)
    tolerance = 2000 * torch.finfo(dtype).eps
    K = HeadKronecker(x, w, y)
    assert_close(K.trace().double(), weight.trace(), rtol=tolerance, atol=0.0)
    assert_close(K.corrected().trace().double(), weight.trace(), rtol=tolerance, atol=0.0)
    F = HeadFisher(x, w, y)
    assert_close(F.to_dense().double(), weight, rtol=20 * tolerance, atol=0.0)
