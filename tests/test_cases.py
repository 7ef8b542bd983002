"""Inputs that broke other libraries, each under its own name, with what is right."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import xent

MODES = pytest.mark.parametrize("mode", ["dense", "linear", "tiled"])
INF = math.inf


def loss_of(mode, z, target, **options):
    """A loss of logits z (N, C): given, or as the product of features I and weight zᵀ, whole or in tiles."""
    if mode == "dense":
        return xent.cross_entropy(z, target, **options)
    # row n of I zᵀ… is z[n]: the product adds zeros to one term, so it is exact for finite logits
    budget = {"linear": None, "tiled": 4 * 8 * z.shape[1]}[mode]
    eye = torch.eye(z.shape[0], dtype=z.dtype)
    return xent.linear_cross_entropy(eye, z.t(), target, memory_budget=budget, **options)


def one_class_a_tile(z, target, **options):
    """The logits z (1, C) through a head of one feature, in tiles of one class."""
    size = max(4, z.element_size())
    budget = (4 * size + 1 if target.is_floating_point() else size) + (8 if z.element_size() == 2 else 0)
    return xent.linear_cross_entropy(
        torch.ones(1, 1, dtype=z.dtype), z.t(), target, memory_budget=budget, **options
    )


def gradient(z, target, **options):
    z = z.clone().requires_grad_()
    loss = xent.cross_entropy(z, target, **options)
    loss.sum().backward()
    return loss.detach(), z.grad


@MODES
def test_equal_large_logits(mode):
    z = torch.full((1, 2), 1e8)
    assert loss_of(mode, z, torch.tensor([0])).item() == pytest.approx(math.log(2), rel=1e-7)


@MODES
def test_large_soft_target(mode):
    z, t = torch.tensor([[1e8, 1e8 + 24]]), torch.tensor([[0.3, 0.7]])
    assert z[0, 1] - z[0, 0] == 24
    assert loss_of(mode, z, t).item() == pytest.approx(7.2, rel=2e-7)


@pytest.mark.parametrize(
    ("dtype", "right"),
    [
        (torch.float64, 4.248354255291589e-18),
        (torch.float32, 4.2483541e-18),
        (torch.bfloat16, 4.2554935e-18),
        (torch.float16, 0.0),
    ],
)
@pytest.mark.parametrize("mode", ["dense", "linear", "tiled", "one class a tile"])
def test_confident_row(dtype, right, mode):
    """Index, one-hot and smoothed-by-nothing alike; also when the two classes lie in different tiles."""
    z = torch.tensor([[0.0, -40.0]], dtype=dtype)
    for target in (torch.tensor([0]), torch.tensor([[1.0, 0.0]], dtype=dtype)):
        loss = one_class_a_tile(z, target) if mode == "one class a tile" else loss_of(mode, z, target)
        assert loss.dtype == dtype
        assert loss.item() == pytest.approx(right, rel=1e-15 if dtype == torch.float64 else 1e-7, abs=0)


def test_confident_row_gradient():
    """The target's entry is −Σ_{j≠y} p_j, not p_y − 1."""
    _, g = gradient(torch.tensor([[0.0, -40.0]]), torch.tensor([0]))
    assert g[0, 0].item() == pytest.approx(-4.2483541e-18, rel=1e-6, abs=0)
    assert g[0, 1].item() == pytest.approx(4.2483541e-18, rel=1e-6, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_class_soft_target(dtype):
    z, t = torch.tensor([[-INF, 1.0, 2.0]], dtype=dtype), torch.tensor([[0.0, 1.0, 0.0]], dtype=dtype)
    loss, g = gradient(z, t)
    assert loss.item() == pytest.approx(1.3132616875, rel=1e-7)
    assert g[0, 0] == 0
    assert g.isfinite().all()
    assert xent.cross_entropy(z, torch.tensor([[0.1, 0.9, 0.0]], dtype=dtype)).item() == INF
    everything = torch.full_like(z, -INF)
    assert xent.cross_entropy(everything, t).isnan()
    assert xent.cross_entropy(everything, torch.tensor([-100])) == 0


def test_masked_class_in_every_tile():
    z = torch.tensor([[-INF, -INF, 1.0, 2.0, -INF]])
    for target in (torch.tensor([2]), torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0]])):
        bias = torch.tensor([-INF, -INF, 0.0, 0.0, -INF])
        weight = torch.tensor([[0.0], [0.0], [1.0], [2.0], [0.0]])
        loss = xent.linear_cross_entropy(torch.ones(1, 1), weight, target, linear_bias=bias, memory_budget=60)
        torch.testing.assert_close(loss, xent.cross_entropy(z, target))
        assert loss.item() == pytest.approx(1.3132616875, rel=1e-6)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_all_ignored_mean(reduction):
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    target = torch.full((3,), -100)
    loss = xent.linear_cross_entropy(x, w, target, reduction=reduction)
    assert not loss.any()
    loss.sum().backward()
    assert not x.grad.any()
    assert not w.grad.any()
    loss, g = gradient(torch.randn(3, 5), target, reduction=reduction)
    assert not loss.any()
    assert not g.any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ignored_row_nan_features(smoothing):
    x, w = torch.randn(4, 3), torch.randn(5, 3)
    target = torch.tensor([1, -100, 0, 4])
    x[1] = torch.nan
    x.requires_grad_()
    w.requires_grad_()
    loss = xent.linear_cross_entropy(x, w, target, label_smoothing=smoothing)
    keep = torch.tensor([0, 2, 3])
    expected = F.cross_entropy(F.linear(x[keep], w), target[keep], label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert w.grad.isfinite().all()
    assert not x.grad[1].any()
    torch.testing.assert_close(w.grad, torch.autograd.grad(expected, w)[0])


def test_ignored_row_inf_bias():
    x, w = torch.randn(4, 3), torch.randn(5, 3).requires_grad_()
    bias = torch.zeros(5)
    bias[0] = -INF
    target = torch.tensor([1, -100, 2, 4])
    loss = xent.linear_cross_entropy(x, w, target, linear_bias=bias)
    expected = F.cross_entropy(F.linear(x, w, bias), target)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert w.grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_smoothing_weight_ignore(reduction):
    from xent._core import reference

    z, weight = torch.randn(6, 5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    target = torch.tensor([0, -100, 4, 2, -100, 1])
    options = {"weight": weight, "label_smoothing": 0.1, "reduction": reduction}
    ours = xent.cross_entropy(z, target, **options)
    torch.testing.assert_close(ours, reference.cross_entropy(z, target, **options), rtol=1e-14, atol=0)
    torch.testing.assert_close(ours, F.cross_entropy(z, target, **options), rtol=1e-13, atol=1e-15)


def test_smoothed_zero_row():
    loss = xent.cross_entropy(torch.ones(1, 4), torch.zeros(1, 4), label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.1 * math.log(4), rel=1e-6)


@MODES
def test_none_upstream_gradient(mode):
    z = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    target, upstream = torch.tensor([0, 1, 2, 3, 0]), torch.randn(5, dtype=torch.float64)
    (g,) = torch.autograd.grad(loss_of(mode, z, target, reduction="none"), z, upstream)
    (expected,) = torch.autograd.grad(F.cross_entropy(z, target, reduction="none"), z, upstream)
    torch.testing.assert_close(g, expected)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_second_backward(reduction):
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((4, 3), (5, 3), (5,)))
    loss = xent.linear_cross_entropy(
        x, w, torch.tensor([0, 1, 2, 3]), linear_bias=b, reduction=reduction
    ).sum()
    loss.backward(retain_graph=True)
    first = [t.grad.clone() for t in (x, w, b)]
    loss.backward()
    for tensor, once in zip((x, w, b), first, strict=True):
        torch.testing.assert_close(tensor.grad, 2 * once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_frozen_features():
    x, w = torch.randn(4, 3), torch.randn(5, 3, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3])
    xent.linear_cross_entropy(x, w, target).backward()
    torch.testing.assert_close(w.grad, torch.autograd.grad(F.cross_entropy(F.linear(x, w), target), w)[0])


def test_frozen_weight(monkeypatch):
    """The (C, D) gradient of a frozen weight is not allocated."""
    from xent._core import ops

    made = []
    plain = torch.empty
    monkeypatch.setattr(ops.torch, "empty", lambda *s, **k: (made.append(s[0]), plain(*s, **k))[1])
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(500, 3)
    # of a budget that one tile of everything exceeds: of one tile a product makes what is wanted, and no more
    xent.linear_cross_entropy(x, w, torch.tensor([0, 1, 2, 3]), memory_budget=6000).backward()
    assert x.grad is not None
    assert (4, 3) in made
    assert (500, 3) not in made


def test_caller_logits_untouched():
    z = torch.randn(4, 5)
    before = z.clone()
    gradient_of = z.requires_grad_()
    xent.cross_entropy(gradient_of, torch.tensor([0, 1, 2, 3])).backward()
    assert torch.equal(z.detach(), before)


@MODES
@pytest.mark.parametrize("bad", [5, -1, 2**40])
def test_target_out_of_range(mode, bad):
    z = torch.zeros(4, 5)
    target = torch.tensor([0, 4, bad, 1])
    with pytest.raises(
        IndexError, match=rf"target {bad} at row 2 is outside 0\.\.4; mark rows to skip with ignore"
    ):
        loss_of(mode, z, target)
    unchecked = loss_of(mode, z, target, reduction="none", check_targets=False)
    assert unchecked.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("classes", [100, 2049, 151936])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_padding_is_masked(classes, smoothing):
    x, w = torch.randn(2, 4), torch.zeros(classes, 4)
    target = torch.tensor([0, classes - 1])
    loss = xent.linear_cross_entropy(x, w, target, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(loss, torch.full((2,), math.log(classes)), rtol=2e-7, atol=0)


def test_empty_and_tiny():
    w = torch.randn(5, 3, requires_grad=True)
    x = torch.zeros(0, 3, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    for reduction, shape in (("none", (0,)), ("sum", ()), ("mean", ())):
        loss = xent.linear_cross_entropy(x, w, none, reduction=reduction)
        assert loss.shape == shape
        assert not loss.any()
        loss.sum().backward()
        assert not w.grad.any()
        assert xent.cross_entropy(torch.zeros(0, 5), none, reduction=reduction).shape == shape
    for target in (torch.tensor([0, 0]), torch.ones(2, 1)):
        loss, g = gradient(torch.tensor([[3.0], [-7.0]]), target)
        assert loss == 0
        assert not g.any()
    z = torch.randn(3, 4, requires_grad=True)
    target = torch.tensor([0, 1, 2])
    for options in ({"reduction": "none"}, {"reduction": "sum"}):
        loss = xent.cross_entropy(z, target, **options)
        upstream = torch.ones(()).expand(loss.shape)
        (g,) = torch.autograd.grad(loss, z, upstream)
        torch.testing.assert_close(g, torch.softmax(z, 1) - F.one_hot(target, 4))


def test_bf16_round_trip_loss():
    z = torch.full((1, 100), 3.0, dtype=torch.bfloat16)
    loss = xent.cross_entropy(z, torch.tensor([7]))
    assert loss.dtype == torch.bfloat16
    assert loss == torch.tensor(math.log(100)).bfloat16()


@pytest.mark.parametrize("classes", [2, 1000])
def test_bf16_confident_target(classes):
    """p_y = 0.999: the target's entry of the gradient, −0.001, to half a percent."""
    z = torch.full((1, classes), -8.0, dtype=torch.bfloat16)
    z[0, 1:] -= torch.tensor(classes - 1.0).log().item()
    z[0, 0] = z[0, 1].float() + math.log(classes - 1) + math.log(999)
    exact = torch.softmax(z.double(), 1)[0, 0] - 1
    assert 0.998 < 1 + exact < 0.9995
    _, g = gradient(z, torch.tensor([0]))
    assert g[0, 0].item() == pytest.approx(exact.item(), rel=5e-3)
    bias = z[0].clone().requires_grad_()
    zero = torch.zeros(1, 1, dtype=torch.bfloat16)
    head = torch.zeros(classes, 1, dtype=torch.bfloat16)
    xent.linear_cross_entropy(zero, head, torch.tensor([0]), linear_bias=bias).backward()
    assert bias.grad[0].item() == pytest.approx(exact.item(), rel=5e-3)


@pytest.mark.parametrize("budget", [None, 1 << 20, 1 << 16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bf16_many_chunks(budget, reduction):
    """The weight gradient of many row chunks errs like the exact one rounded once, not chunk by chunk."""
    n, d, c = 4096, 32, 256
    x, w = torch.randn(n, d).bfloat16(), (torch.randn(c, d) * 0.1).bfloat16().requires_grad_()
    target = torch.randint(c, (n,))
    xent.linear_cross_entropy(
        x, w, target, reduction=reduction, memory_budget=budget
    ).float().mean().backward()
    double = w.detach().double().requires_grad_()
    F.cross_entropy(x.double() @ double.T, target).backward()
    floor = (double.grad.bfloat16().double() - double.grad).norm()
    assert (w.grad.double() - double.grad).norm() <= 1.2 * floor
