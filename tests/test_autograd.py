"""Which ways of differentiating are there, and that the others raise instead of answering zero."""

from __future__ import annotations

import pytest
import torch

import xent


def head(**options):
    x, w = torch.randn(6, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    return x, w, lambda x, w: xent.linear_cross_entropy(x, w, target, **options)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0}])
def test_gradcheck(reduction, options):
    x, w, loss = head(reduction=reduction, **options)
    assert torch.autograd.gradcheck(loss, (x.requires_grad_(), w.requires_grad_()))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_of_a_probability_target(reduction):
    z, q = (torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda z, q: xent.cross_entropy(z, q, reduction=reduction), (z, q))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_double_backward_raises(reduction):
    """Also as part of a larger graph, where a constant gradient would be a silent zero."""
    x, w, loss = head(reduction=reduction)
    (g,) = torch.autograd.grad(loss(x.requires_grad_(), w).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        g.sum().backward()
    value = loss(x, w).sum()
    (g,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        (value + g.square().sum()).backward()


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.grad(f)(x),
        lambda f, x: torch.func.vmap(f)(x[:, None]),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.hessian(f)(x),
    ],
    ids=["grad", "vmap", "jvp", "hessian"],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_torch_func_raises(transform, frozen):
    x, w, _ = head()
    w.requires_grad_(not frozen)
    target = torch.zeros((), dtype=torch.int64)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        transform(lambda x: xent.linear_cross_entropy(x, w, target.expand(x.shape[:-1])), x)


def test_forward_mode_raises():
    x, w, loss = head()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            loss(dual, w)


def test_compilation_is_refused_in_whole_graphs():
    x, w, loss = head()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="do not compile yet"):
        compiled(x, w)


def test_compilation_falls_back_to_the_same_answer():
    x, w, loss = head()
    x.requires_grad_()
    expected = torch.autograd.grad(loss(x, w), x)
    torch.testing.assert_close(torch.autograd.grad(torch.compile(loss, backend="eager")(x, w), x), expected)


def test_no_grad_keeps_nothing():
    x, w, loss = head()
    with torch.no_grad():
        assert not loss(x.requires_grad_(), w).requires_grad
    assert loss(x, w).requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_weight_changed_before_backward_is_noticed(reduction):
    """Saved tensors are checked, early gradient or not."""
    x, w, loss = head(reduction=reduction)
    value = loss(x.requires_grad_(), w).sum()
    w += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_tied_weights_and_hooks(reduction):
    """The same tensor as features and classifier: both gradients add up."""
    w = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    target = torch.arange(5)
    xent.linear_cross_entropy(w, w, target, reduction=reduction).sum().backward()
    (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(w @ w.T, target, reduction="sum"), w)
    torch.testing.assert_close(w.grad, expected)


def test_checkpointing():
    from torch.utils.checkpoint import checkpoint

    x, w, loss = head()
    x.requires_grad_()
    (expected,) = torch.autograd.grad(loss(x, w), x)
    (got,) = torch.autograd.grad(checkpoint(loss, x, w, use_reentrant=False), x)
    assert torch.equal(got, expected)
