"""The log-free surrogate: its own value, cross-entropy's derivatives."""

import pytest
import torch
from torch.func import grad, hessian, jvp
from torch.testing import assert_close

import xent


def targets(kind, n=4, c=5):
    if kind == "index":
        return torch.tensor([0, 4, 2, -100])
    if kind == "probabilities":
        return torch.rand(n, c, dtype=torch.float64) + 0.1  # of any mass
    q = torch.tensor([[0.5, 0.2]], dtype=torch.float64).expand(n, 2)
    return xent.TopKTarget(torch.tensor([[0, 1], [4, 2], [1, 3], [3, 0]]), q, kind)


def rows(target, c=5):
    if isinstance(target, xent.TopKTarget):
        return target.to_dense(c)
    if target.is_floating_point():
        return target
    kept = (target >= 0)[:, None]
    return torch.where(kept, torch.nn.functional.one_hot(target.clamp(min=0), c).double(), 0.0)


KINDS = pytest.mark.parametrize("kind", ["index", "probabilities", "drop", "spread"])
REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "sum", "mean"])


@KINDS
@REDUCTIONS
def test_value_is_the_product_without_a_logarithm(kind, reduction):
    z, target = torch.randn(4, 5, dtype=torch.float64), targets(kind)
    t = rows(target)
    plain = ((t.sum(1, keepdim=True) * z.softmax(1) - t) * z).sum(1)
    count = 3 if kind == "index" else 4
    plain = {"none": plain, "sum": plain.sum(), "mean": plain.sum() / count}[reduction]
    assert_close(xent.surrogate_cross_entropy(z, target, reduction=reduction), plain)


@KINDS
@REDUCTIONS
def test_derivatives_are_those_of_cross_entropy(kind, reduction):
    """Exactly the gradient a·p − t, and a·J where autograd of the value would say 0."""
    z, target = torch.randn(4, 5, dtype=torch.float64), targets(kind)

    def scalar(f):
        return lambda z: f(z, target, reduction=reduction).sum()

    pair = (scalar(xent.surrogate_cross_entropy), scalar(xent.cross_entropy))
    first, expected = (grad(f)(z) for f in pair)
    torch.testing.assert_close(first, expected, rtol=1e-14, atol=1e-16)
    second, expected = (hessian(f)(z) for f in pair)
    torch.testing.assert_close(second, expected, rtol=1e-14, atol=1e-17)
    assert second.abs().max() > 0.01
    v = torch.randn_like(z)
    assert_close(*(jvp(f, (z,), (v,))[1] for f in pair))
    leaf = z.clone().requires_grad_()
    assert_close(*(torch.autograd.grad(f(leaf), leaf)[0] for f in pair))


@KINDS
def test_the_difference_from_cross_entropy_is_entropy(kind):
    z, target = torch.randn(4, 5, dtype=torch.float64) * 3, targets(kind)
    mass = rows(target).sum(1)
    gap = xent.cross_entropy(z, target, reduction="none") - xent.surrogate_cross_entropy(
        z, target, reduction="none"
    )
    assert_close(gap, mass * xent.entropy(z))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_logarithm_of_zero(dtype):
    z = torch.tensor([[0.0, 200.0], [0.0, -torch.inf]], dtype=dtype, requires_grad=True)
    loss = xent.surrogate_cross_entropy(z, torch.tensor([0, 0]), reduction="none")
    assert loss.tolist() == [200.0, 0.0]
    (g,) = torch.autograd.grad(loss.sum(), z)
    assert g.tolist() == [[-1.0, 1.0], [0.0, 0.0]]
    assert xent.surrogate_cross_entropy(z[1:], torch.tensor([1])).item() == torch.inf


def test_it_is_no_measure_of_fit():
    """Negative where cross-entropy is not; 0 for a model that is sure of nothing."""
    assert xent.surrogate_cross_entropy(torch.zeros(1, 7), torch.tensor([3])).item() == 0
    assert xent.surrogate_cross_entropy(torch.tensor([[1.0, 0.0]]), torch.tensor([0])).item() < 0


def test_positions_and_a_single_row():
    z, target = torch.randn(2, 5, 3), torch.randint(5, (2, 3))
    flat = xent.surrogate_cross_entropy(z.movedim(1, 2).reshape(6, 5), target.reshape(6))
    assert_close(xent.surrogate_cross_entropy(z, target), flat)
    soft = torch.rand(2, 5, 3)
    flat = xent.surrogate_cross_entropy(z.movedim(1, 2).reshape(6, 5), soft.movedim(1, 2).reshape(6, 5))
    assert_close(xent.surrogate_cross_entropy(z, soft), flat)
    one = torch.tensor([1.0, 2.0, 0.5])
    assert_close(
        xent.surrogate_cross_entropy(one, torch.tensor(2)),
        xent.surrogate_cross_entropy(one[None], torch.tensor([2])),
    )


def test_compiled():
    z, target = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 4, 2, -100])
    compiled = torch.compile(xent.surrogate_cross_entropy, backend="aot_eager", fullgraph=True)
    a, b = compiled(z, target), xent.surrogate_cross_entropy(z, target)
    assert_close(a, b)
    assert_close(torch.autograd.grad(a, z), torch.autograd.grad(b, z))


def test_the_target_is_constant():
    q = torch.full((2, 3), 1 / 3, requires_grad=True)
    with pytest.raises(ValueError, match="held constant"):
        xent.surrogate_cross_entropy(torch.zeros(2, 3), q)


def test_the_gradient_is_supplied_and_not_the_values_own():
    """A difference of values finds a·p − t + a·J·z, as the docstring says; backward gives a·p − t."""
    z, t = torch.randn(1, 5, dtype=torch.float64), torch.rand(1, 5, dtype=torch.float64)
    a, p, h = t.sum(), z.softmax(1)[0], 1e-6
    J = p.diag() - torch.outer(p, p)

    def slope(way):
        return (
            xent.surrogate_cross_entropy(z + h * way, t) - xent.surrogate_cross_entropy(z - h * way, t)
        ) / (2 * h)

    own = torch.stack([slope(way) for way in torch.eye(5, dtype=torch.float64)])
    supplied = grad(lambda z: xent.surrogate_cross_entropy(z, t))(z)[0]
    assert_close(supplied, a * p - t[0])
    assert_close(own, supplied + a * (J @ z[0]), rtol=0, atol=1e-8)
    assert (own - supplied).abs().max() > 0.01
