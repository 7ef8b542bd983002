"""Inputs that broke libraries (cases.md, end-to-end), again in every way of differentiating.

Each case gives a loss and its gradient in the logits; from features the classifier is the identity, so the
features' gradient is the same, and what is −inf comes from the bias.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacfwd, vmap

import xent
from xent._core import reference

NAN, INF = math.nan, math.inf
DOUBLE = torch.float64


class Case(NamedTuple):
    z: Tensor  # (N, C)
    target: Tensor
    options: dict
    loss: float
    gradient: Tensor  # (N, C)


def plain(z, target, **options):
    """A case whose loss the float64 reference gives, and its gradient (a·p − t)/divisor."""
    z = z.double()
    t = reference.target_rows(target, z.shape[1], **options)
    kept = torch.ones(len(z)) if target.is_floating_point() else target != -100
    share = kept.double()
    if "weight" in options:
        share = torch.where(kept, options["weight"][target.clamp(min=0)], 0.0)
    gradient = (t.sum(1, keepdim=True) * z.softmax(1) - t) / share.sum()
    return Case(z, target, options, reference.cross_entropy(z, target, **options).item(), gradient)


def of_tiny(z, dtype):
    z = torch.tensor([z], dtype=dtype)
    tail = math.exp(-40.0)
    return Case(z, torch.tensor([0]), {}, 4.248354255291589e-18, torch.tensor([[-tail, tail]], dtype=DOUBLE))


def all_ignored():
    return Case(torch.randn(3, 4), torch.full((3,), -100), {}, 0.0, torch.zeros(3, 4, dtype=DOUBLE))


def ignored_row(spoil):
    """A nan row that is ignored, or rows that share a class at −inf."""
    z, target = torch.randn(3, 4, dtype=DOUBLE), torch.tensor([1, -100, 2])
    if spoil == INF:
        z[:, 0] = -INF
    case = plain(z, target)
    return case._replace(z=case.z.index_fill(0, torch.tensor([1]), NAN) if spoil != INF else case.z)


CASES = {
    "equal_large_logits": lambda: Case(
        torch.full((1, 2), 1e8),
        torch.tensor([0]),
        {},
        math.log(2),
        torch.tensor([[-0.5, 0.5]], dtype=DOUBLE),
    ),
    "large_soft_target": lambda: Case(
        torch.tensor([[1e8, 1e8 + 24]]),
        torch.tensor([[0.3, 0.7]]),
        {},
        7.2,
        torch.tensor([[-0.3, 0.3]], dtype=DOUBLE),
    ),
    "confident_row": lambda: of_tiny([0.0, -40.0], DOUBLE),
    "confident_row_float32": lambda: of_tiny([0.0, -40.0], torch.float32),
    "masked_class_soft_target": lambda: plain(
        torch.tensor([[-INF, 1.0, 2.0]], dtype=DOUBLE), torch.tensor([[0.0, 1.0, 0.0]], dtype=DOUBLE)
    ),
    "all_ignored_mean": all_ignored,
    "ignored_row_nan_features": lambda: ignored_row(NAN),
    "ignored_row_inf_bias": lambda: ignored_row(INF),
    "smoothing_weight_ignore": lambda: plain(
        torch.randn(4, 5, dtype=DOUBLE),
        torch.tensor([0, -100, 4, 4]),
        label_smoothing=0.1,
        weight=torch.rand(5, dtype=DOUBLE),
    ),
    "smoothed_zero_row": lambda: plain(
        torch.zeros(1, 4, dtype=DOUBLE), torch.zeros(1, 4, dtype=DOUBLE), label_smoothing=0.1
    ),
    "padding_is_masked": lambda: plain(torch.zeros(1, 100, dtype=DOUBLE), torch.tensor([7])),
    "one_class": lambda: plain(torch.randn(3, 1, dtype=DOUBLE), torch.tensor([0, 0, 0])),
    "no_rows": lambda: Case(
        torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), {}, 0.0, torch.zeros(0, 4, dtype=DOUBLE)
    ),
}


def again(f, z):
    loss = f(z)
    torch.autograd.grad(loss, z, retain_graph=True)
    return torch.autograd.grad(loss, z)[0]


def compiled(f, z):
    torch._dynamo.reset()
    return torch.autograd.grad(torch.compile(f, backend="aot_eager", fullgraph=True)(z), z)[0]


MODES = {
    "backward": lambda f, z: torch.autograd.grad(f(z), z)[0],
    "second backward": again,
    "create_graph": lambda f, z: torch.autograd.grad(f(z), z, create_graph=True)[0].detach(),
    "func.grad": lambda f, z: grad(f)(z.detach()),
    "vmap of func.grad": lambda f, z: vmap(grad(f))(z.detach()[None])[0],
    "forward mode": lambda f, z: jacfwd(f)(z.detach()),
    "compiled": compiled,
}


@pytest.mark.parametrize("scores", ["dense", "linear"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_case(name, mode, scores):
    torch.manual_seed(0)
    case = CASES[name]()
    classes = case.z.shape[1]
    masked = case.z[:1].eq(-INF).all(0) if len(case.z) else torch.zeros(classes, dtype=torch.bool)
    bias = torch.where(masked, -INF, 0.0).to(case.z.dtype)
    z = case.z
    if scores == "linear":
        z = torch.where(masked, 0.0, z)

    def f(z):
        if scores == "dense":
            return xent.cross_entropy(z, case.target, **case.options)
        eye = torch.eye(classes, dtype=z.dtype)
        return xent.linear_cross_entropy(z, eye, case.target, linear_bias=bias, **case.options)

    if mode == "forward mode" and len(z) == 0:
        pytest.skip("jacfwd has no direction to go in")
    leaf = z.clone().requires_grad_()
    eps = torch.finfo(z.dtype).eps
    assert f(leaf).item() == pytest.approx(case.loss, rel=16 * eps, abs=0.0)
    found = MODES[mode](f, leaf)
    assert found.dtype == z.dtype
    size = case.gradient.abs().max().item() if case.gradient.numel() else 0.0
    # of a row that is sure the gradient is tiny, and is held to its own size
    torch.testing.assert_close(found.double(), case.gradient, rtol=32 * eps, atol=4 * eps * size)
