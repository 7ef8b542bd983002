"""The backend of one tile says what the tiles say."""

import gc
import weakref

import pytest
import torch

import xent
from xent._core.backends import registered

DTYPES = (torch.float64, torch.float32)


def rows(kind: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (6, 5) of one kind, and classes."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(6, 5, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.tensor([0, 4, 2, 2, 1, 3])
    if kind == "confident":
        z = z.scatter(1, y[:, None], 45.0)
    elif kind == "hopeless":
        z = z.scatter(1, y[:, None], -600.0)
    elif kind == "offset":
        z = z * 16 + 1e6
    elif kind == "masked":
        z[:, 0] = -torch.inf
        y = y.clamp_min(1)
    elif kind == "masked target":
        z[2, 2] = -torch.inf
    elif kind == "tied":
        z = torch.full_like(z, 7.0)
    return z, y


def loss_and_gradients(loss, tensors):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    value = loss(*tensors)
    return value.detach(), *torch.autograd.grad(value, tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "kind", ["normal", "confident", "hopeless", "offset", "masked", "masked target", "tied"]
)
def test_one_tile_is_the_tiles(kind, reduction, dtype, monkeypatch):
    z, y = rows(kind, dtype)
    taken = []
    (one_tile,) = (backend for backend in registered() if backend.name == "one_tile")
    fused = one_tile.fused
    monkeypatch.setattr(one_tile, "fused", lambda *a: (taken.append(1), fused(*a))[1])
    eye = torch.eye(5, dtype=dtype)
    bias = torch.zeros(5, dtype=dtype)
    finite = z.masked_fill(z == -torch.inf, -1e4)  # 0·(−inf) in a product is nan

    def of_logits(z, **how):
        return xent.cross_entropy(z, y, reduction=reduction, **how)

    def of_features(x, w, b, **how):
        return xent.linear_cross_entropy(x, w, y, linear_bias=b, reduction=reduction, **how)

    for loss, tensors in ((of_logits, (z,)), (of_features, (finite, eye, bias))):
        short = loss_and_gradients(loss, tensors)
        assert taken.pop()
        with monkeypatch.context() as without:
            without.setattr(one_tile, "supports", lambda problem: "not now")
            long = loss_and_gradients(loss, tensors)
        assert not taken
        eps = torch.finfo(dtype).eps
        for a, b in zip(short, long, strict=True):
            # sums over rows or classes err by their largest terms; single entries do not
            atol = 1e-300 if loss is of_logits else 32 * eps * b.abs().max().item()
            torch.testing.assert_close(a, b, rtol=8 * eps, atol=atol, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_beyond_doubt_keeps_its_digits(dtype):
    z = torch.tensor([[0.0, -40.0]], dtype=dtype, requires_grad=True)
    loss = xent.cross_entropy(z, torch.tensor([0]))
    loss.backward()
    assert loss.item() == pytest.approx(4.248354255291589e-18, rel=4 * torch.finfo(dtype).eps)
    assert z.grad[0, 0].item() == pytest.approx(-4.248354255291589e-18, rel=8 * torch.finfo(dtype).eps)


def head():
    generator = torch.Generator().manual_seed(5)
    x, w = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (7, 4))
    return x.requires_grad_(), w.requires_grad_(), torch.tensor([0, 1, 2, 3, 0, 1, 2])


def unfused(x, w, y):
    return torch.nn.functional.cross_entropy(x @ w.t(), y)


def test_second_backward_adds_and_frees():
    x, w, y = head()
    loss = xent.linear_cross_entropy(x, w, y)
    loss.backward(retain_graph=True)
    once = w.grad.clone()
    loss.backward()
    torch.testing.assert_close(w.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_upstream_scales():
    x, w, y = head()
    (g,) = torch.autograd.grad(xent.linear_cross_entropy(x, w, y) * -3.0, w)
    (expected,) = torch.autograd.grad(unfused(x, w, y) * -3.0, w)
    torch.testing.assert_close(g, expected)


def test_second_derivatives():
    x, w, y = head()

    def penalty(loss):
        (g,) = torch.autograd.grad(loss(x, w, y), w, create_graph=True)
        return torch.autograd.grad(g.square().sum(), (x, w))

    for a, b in zip(penalty(xent.linear_cross_entropy), penalty(unfused), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("batch", ["is_grads_batched", "vmap"])
def test_batched_upstream(batch):
    x, w, y = head()
    scales = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def gradients(loss):
        value = loss(x, w, y)
        if batch == "vmap":
            return torch.func.vmap(lambda v: torch.autograd.grad(value, w, v, retain_graph=True)[0])(scales)
        return torch.autograd.grad(value, w, scales, is_grads_batched=True)[0]

    torch.testing.assert_close(gradients(xent.linear_cross_entropy), gradients(unfused))


def test_a_tensor_changed_in_place_is_noticed():
    x, w, y = head()
    loss = xent.linear_cross_entropy(x, w, y)
    with torch.no_grad():
        w.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_kept_loss_keeps_no_features():
    _, w, y = head()
    x = torch.randn(7, 3, dtype=torch.float64)
    seen = weakref.ref(x)
    loss = xent.linear_cross_entropy(x, w, y)
    loss.backward()
    del x
    gc.collect()
    assert loss.requires_grad
    assert seen() is None


def test_frozen_factors_cost_nothing():
    x, w, y = head()
    xent.linear_cross_entropy(x, w.detach(), y).backward()
    assert w.grad is None
    (expected,) = torch.autograd.grad(unfused(x, w, y), x)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("target", [torch.tensor([0, 1, 9]), torch.tensor([0, -1, 1])])
def test_a_bad_target_is_named(target):
    z = torch.zeros(3, 4, requires_grad=True)
    with pytest.raises(IndexError, match="at row"):
        xent.cross_entropy(z, target)


def test_ignored_rows():
    z = torch.randn(3, 4, requires_grad=True)
    for ignored in (-100, 2):
        y = torch.tensor([1, ignored, 3])
        value = xent.cross_entropy(z, y, ignore_index=ignored)
        torch.testing.assert_close(value, torch.nn.functional.cross_entropy(z, y, ignore_index=ignored))


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_and_hooks_see_an_ordinary_graph():
    x, w, y = head()
    seen = []
    hidden = x * 2
    hidden.register_hook(lambda g: seen.append(g.shape))
    with torch.autograd.detect_anomaly(check_nan=True):
        xent.linear_cross_entropy(hidden, w, y).backward()
    assert seen == [(7, 3)]


def test_a_second_backward_under_autocast_is_the_first():
    x, w, y = (t.float().detach().requires_grad_() if t.is_floating_point() else t for t in head())
    loss = xent.linear_cross_entropy(x, w, y)
    first = torch.autograd.grad(loss, w, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        second = torch.autograd.grad(loss, w)
    torch.testing.assert_close(second, first)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_nothing_costs_plus_zero(requires_grad):
    z = torch.zeros(2, 1, requires_grad=requires_grad)
    loss = xent.cross_entropy(z, torch.tensor([0, 0]))
    assert not torch.signbit(loss)
