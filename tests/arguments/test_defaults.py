"""torch's default device and type are the caller's: tensors made inside follow those that they are beside."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import xent
from arguments.test_narrow_indices import FUNCTIONS, problem
from xent import sinkhorn, triplets
from xent._core import matmul
from xent.losses import _binary

SETTINGS = {
    "device": (torch.set_default_device, "meta", None),
    "dtype": (torch.set_default_dtype, torch.float64, torch.float32),
    "half": (torch.set_default_dtype, torch.float16, torch.float32),
}


def sparse_gradient(x, w, y, *_):
    w = w.detach().requires_grad_()
    classes = torch.arange(len(w), device="cpu")
    loss = xent.linear_cross_entropy(x, w, y, classes=classes, sparse_grad=True)
    return torch.autograd.grad(loss, w)[0].to_dense()


OTHERS = {
    "linear_kl_divergence": lambda x, w, *_: xent.linear_kl_divergence(student=(x, w), teacher=(x, 2 * w)),
    "kl_divergence": lambda x, w, *_: xent.kl_divergence(target=(x @ w.T).softmax(1), input=x @ w.T),
    "entropy": lambda x, w, *_: xent.entropy(x @ w.T, bits=True),
    "top_k": lambda x, w, *_: xent.top_k(x @ w.T, 3),
    "linear_top_k": lambda x, w, *_: xent.linear_top_k(x, w, 3),
    "binary": lambda x, *_: _binary.binary_cross_entropy_with_logits(x, x.sigmoid().detach()),
    "assign": lambda x, *_: sinkhorn.assign(x).plan,
    "implicit": lambda x, *_: sinkhorn.assign(x, row_relaxation=1.0).plan,
    "triplet_margin_loss": lambda x, *_: triplets.triplet_margin_loss(x, x + 1, x - 1, smooth=True),
    "denominator": lambda x, w, y, *_: xent.cross_entropy(x @ w.T, y, denominator=3, reduction="mean"),
    "weights": lambda x, w, y, *_: xent.linear_cross_entropy(x, w, y, sample_weight=x[:, 0].exp()),
    "sparse gradient": sparse_gradient,
    "budget": lambda x, w, y, *_: xent.linear_cross_entropy(x, w, y, memory_budget=2000, label_smoothing=0.1),
}


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS)
def setting(request):
    change, to, back = request.param

    def run(function):
        change(to)
        try:
            return function()
        finally:
            change(back)

    return run


def answers(function, x, w, y, n):
    x = x.detach().requires_grad_()
    found = function(x, w, y, n, -100)
    values = [v for v in (found if isinstance(found, tuple) else (found,)) if v is not None]
    values = [v if isinstance(v, torch.Tensor) else torch.tensor(v, device="cpu") for v in values]
    graded = [v.sum() for v in values if v.requires_grad]
    return [*values, *(torch.autograd.grad(sum(graded[1:], graded[0]), x) if graded else ())]


@pytest.mark.parametrize("function", [*FUNCTIONS.values(), *OTHERS.values()], ids=[*FUNCTIONS, *OTHERS])
def test_defaults_change_nothing(function, setting, request):
    name = request.node.callspec.id
    if "fit_temperature" in name or "sample_classes" in name:
        pytest.skip("draws or makes its input by the defaults; tested below")
    given = problem()
    right = answers(function, *given)
    for found, expected in zip(setting(lambda: answers(function, *given)), right, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_fit_temperature(setting):
    logits, target = torch.tensor([[10.0, 0.0]]).expand(4, 2), torch.tensor([0, 0, 0, 1])
    assert setting(lambda: xent.fit_temperature(logits, target)) == xent.fit_temperature(logits, target)


def test_sampled_classes(setting):
    target = torch.tensor([3, 5])

    def draw():
        return xent.sample_classes(target, 100, 10, generator=torch.Generator("cpu").manual_seed(0))

    (classes, log_q), (expected, of_expected) = setting(draw), draw()
    assert torch.equal(classes, expected)
    torch.testing.assert_close(log_q.float(), of_expected, rtol=1e-3, atol=1e-3)


def test_the_probe_of_fast_products_tests_float32(setting, monkeypatch):
    seen = []
    multiply = matmul.multiply_

    def spy(out, a, b, *, accumulate):
        seen.append((out.dtype, a.dtype, b.dtype, out.device.type))
        multiply(out, a, b, accumulate=accumulate)

    monkeypatch.setattr(matmul, "multiply_", spy)
    setting(matmul._probe)
    assert set(seen) == {(torch.float32, torch.float32, torch.float32, "cpu")}


@pytest.mark.parametrize("solver", ["lbfgs", "newton-cg"])
def test_an_estimator(setting, solver):
    x = problem()[0].numpy()
    y = np.array([0, 1, 2, 0, 1, 2])

    def fitted():
        return xent.SoftmaxRegression(solver=solver).fit(x, y).coef_

    np.testing.assert_allclose(setting(fitted), fitted(), rtol=1e-12)
