"""Focal loss, poly loss and a temperature for each row, from logits and from features, in every mode."""

import math
from functools import partial

import mpmath
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import xent
from xent._arguments.options import Options
from xent._core.row_losses import RowLoss, one_minus_exp
from xent.losses._loss import loss_of_logits

N, D, C = 7, 3, 5
F64 = torch.float64
LOSSES = {
    "focal": (xent.focal_loss, xent.linear_focal_loss, {"gamma": 2.0, "alpha": 0.25}),
    "focal, by class": (
        xent.focal_loss,
        xent.linear_focal_loss,
        {"gamma": 0.5, "alpha": torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0], dtype=F64)},
    ),
    "focal without focus": (xent.focal_loss, xent.linear_focal_loss, {"gamma": 0.0}),
    "poly": (xent.poly_loss, xent.linear_poly_loss, {}),
    "poly, negative": (xent.poly_loss, xent.linear_poly_loss, {"epsilon": -0.5}),
}


def plain(z, y, *, gamma=None, alpha=None, epsilon=1.0, reduction="mean"):
    """The loss by torch's operations."""
    rows = F.cross_entropy(z, y, reduction="none")
    p = torch.exp(-rows)
    values = rows + epsilon * (1 - p)
    if gamma is not None:
        a = 1.0 if alpha is None else alpha[y] if isinstance(alpha, torch.Tensor) else alpha
        values = a * (1 - p) ** gamma * rows
    return {"mean": values.mean(), "sum": values.sum(), "none": values}[reduction]


def drawn():
    torch.manual_seed(0)
    x, w, b = (torch.randn(s, dtype=F64, requires_grad=True) for s in ((N, D), (C, D), (C,)))
    return x, w, b, torch.randint(C, (N,))


def assert_same_derivatives(found, expected, leaves):
    """First and second derivatives of what has been computed in two ways."""
    v = torch.rand_like(expected)
    both = [torch.autograd.grad((t * v).sum(), leaves, create_graph=True) for t in (found, expected)]
    torch.testing.assert_close(*both)
    totals = [sum(g.square().sum() for g in gradients) for gradients in both]
    torch.testing.assert_close(*(torch.autograd.grad(total, leaves) for total in totals))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("budget", [None, 700])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_derivatives(name, budget, reduction):
    of_logits, of_head, options = LOSSES[name]
    x, w, b, y = drawn()
    z = x @ w.t() + b
    expected = plain(z, y, reduction=reduction, **options)
    torch.testing.assert_close(of_logits(z, y, reduction=reduction, **options), expected)
    found = of_head(x, w, y, linear_bias=b, reduction=reduction, memory_budget=budget, **options)
    torch.testing.assert_close(found, expected)
    once = [torch.autograd.grad(t.sum(), (x, w, b), retain_graph=True) for t in (found, expected)]
    torch.testing.assert_close(*once)
    assert_same_derivatives(found, expected, (x, w, b))


@pytest.mark.parametrize("name", LOSSES)
def test_every_mode(name):
    of_logits, of_head, options = LOSSES[name]
    x, w, _, y = drawn()
    assert gradcheck(lambda *t: of_head(*t, y, **options), (x, w), check_forward_ad=True)
    assert gradgradcheck(lambda *t: of_head(*t, y, **options), (x, w))
    z = (x @ w.t()).detach()
    hessians = (
        torch.func.hessian(lambda z: of_logits(z, y, **options))(z),
        torch.func.hessian(lambda z: plain(z, y, **options))(z),
    )
    torch.testing.assert_close(*hessians)
    rows = torch.func.vmap(lambda z, y: of_logits(z, y, **options))(z, y)
    torch.testing.assert_close(rows, plain(z, y, reduction="none", **options))
    torch._dynamo.reset()
    compiled = torch.compile(lambda z: of_logits(z, y, **options), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(z), plain(z, y, **options))


@pytest.mark.parametrize("distance", [0.0, 1.0, 20.0, 40.0, 300.0, 600.0])
@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0, 2.0, 5.0])
def test_focal_loss_of_sure_rows_to_their_last_digits(gamma, distance):
    z = torch.tensor([[distance, 0.0]], dtype=F64, requires_grad=True)
    loss = xent.focal_loss(z, torch.tensor([0]), gamma=gamma)
    (g,) = torch.autograd.grad(loss, z, create_graph=True)
    (h,) = torch.autograd.grad(g[0, 0], z)
    with mpmath.workdps(400):
        power = mpmath.mpf(gamma)

        def f(d):
            ell = mpmath.log1p(mpmath.exp(-d))
            return (-mpmath.expm1(-ell)) ** power * ell

        value, slope, second = (mpmath.diff(f, mpmath.mpf(distance), n) for n in range(3))
    assert loss.item() == pytest.approx(float(value), rel=1e-13, abs=1e-300)
    assert g[0, 0].item() == pytest.approx(float(slope), rel=1e-12, abs=1e-300)
    assert h[0, 0].item() == pytest.approx(float(second), rel=1e-9, abs=1e-290)


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_without_doubt_or_hope_is_finite(name):
    of_logits, _, options = LOSSES[name]
    z = torch.tensor([[0.0, -2e3, -2e3, -2e3, -2e3]] * 2, dtype=F64, requires_grad=True)
    loss = of_logits(z, torch.tensor([0, 1]), reduction="sum", **options)
    (g,) = torch.autograd.grad(loss, z, create_graph=True)
    (h,) = torch.autograd.grad((g * torch.rand_like(g)).sum(), z)
    assert math.isfinite(loss.item())
    assert g.isfinite().all()
    assert h.isfinite().all()
    assert not g[0].any()


def test_the_mean_divides_by_the_rows():
    z, y, alpha = torch.randn(4, 3), torch.tensor([0, 1, -100, 2]), torch.tensor([0.1, 2.0, 5.0])
    rows = xent.focal_loss(z, y, alpha=alpha, reduction="none")
    assert rows[2] == 0
    torch.testing.assert_close(xent.focal_loss(z, y, alpha=alpha), rows.sum() / 3)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda z, y: xent.focal_loss(z, y, label_smoothing=0.1), ValueError, "label_smoothing must be 0"),
        (lambda z, y: xent.poly_loss(z, y, label_smoothing=0.1), ValueError, "label_smoothing must be 0"),
        (lambda z, y: xent.focal_loss(z, z.softmax(1)), ValueError, "class indices"),
        (lambda z, y: xent.focal_loss(z, y, gamma=-1.0), ValueError, "gamma"),
        (lambda z, y: xent.focal_loss(z, y, alpha=-1.0), ValueError, "alpha"),
        (lambda z, y: xent.focal_loss(z, y, alpha=torch.ones(2)), ValueError, "alpha"),
        (lambda z, y: xent.poly_loss(z, y, epsilon=math.inf), ValueError, "epsilon"),
        (lambda z, y: xent.focal_loss(z, torch.tensor([0, 9])), IndexError, "target 9 at row 1"),
        (lambda z, y: xent.poly_loss(z, None), TypeError, "target"),
    ],
)
def test_bad_input_is_named(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.randn(2, 3), torch.tensor([0, 1]))


@pytest.mark.parametrize("budget", [None, 700])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_temperature_for_each_row(softcap, reduction, budget):
    x, w, b, y = drawn()
    t = torch.rand(N, dtype=F64) + 0.5
    z = x @ w.t() + b
    capped = z if softcap is None else softcap * torch.tanh(z / softcap)
    expected = F.cross_entropy(capped / t[:, None], y, reduction=reduction, label_smoothing=0.1)
    options = {"temperature": t, "softcap": softcap, "reduction": reduction, "label_smoothing": 0.1}
    torch.testing.assert_close(xent.cross_entropy(z, y, **options), expected)
    found = xent.linear_cross_entropy(x, w, y, linear_bias=b, memory_budget=budget, **options)
    torch.testing.assert_close(found, expected)
    assert_same_derivatives(found, expected, (x, w, b))


def test_a_temperature_for_each_row_in_every_mode():
    x, w, _, y = drawn()
    t = torch.rand(N, dtype=F64) + 0.5
    assert gradcheck(
        lambda *h: xent.linear_cross_entropy(*h, y, temperature=t), (x, w), check_forward_ad=True
    )
    z = (x @ w.t()).detach()
    expected = F.cross_entropy(z / t[:, None], y, reduction="none")
    rows = torch.func.vmap(lambda z, y, t: xent.cross_entropy(z, y, temperature=t))(z, y, t)
    torch.testing.assert_close(rows, expected)
    torch._dynamo.reset()
    compiled = torch.compile(lambda z, t: xent.cross_entropy(z, y, temperature=t), backend="aot_eager")
    torch.testing.assert_close(compiled(z, t), expected.mean())
    found = xent.row_statistics(z, y, temperature=t)
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(xent.entropy(z, temperature=t), found.entropy)
    p, _ = xent.top_k(z, 2, temperature=t)
    torch.testing.assert_close(p, (z / t[:, None]).softmax(1).topk(2).values)
    margin = xent.cross_entropy(z, y, temperature=t, margin=0.2)
    torch.testing.assert_close(margin, F.cross_entropy((z - 0.2 * F.one_hot(y, C)) / t[:, None], y))


@pytest.mark.parametrize(
    ("temperature", "error", "match"),
    [
        (torch.ones(3), ValueError, "shape of the unreduced loss"),
        (torch.tensor([1.0, 0.0]), ValueError, "for row 1"),
        (torch.tensor([1.0, math.nan]), ValueError, "for row 1"),
        (torch.tensor([1, 2]), TypeError, "floating"),
        (torch.ones(2, requires_grad=True), ValueError, "no gradient"),
    ],
)
def test_a_bad_temperature_of_a_row_is_named(temperature, error, match):
    with pytest.raises(error, match=match):
        xent.cross_entropy(torch.randn(2, 3), torch.tensor([0, 1]), temperature=temperature)


def test_the_temperature_of_a_row_that_is_left_out_does_not_matter():
    z, t = torch.randn(2, 3), torch.tensor([2.0, -1.0])
    found = xent.cross_entropy(z, torch.tensor([0, -100]), temperature=t)
    torch.testing.assert_close(found, F.cross_entropy(z[:1] / 2, torch.tensor([0])))


def test_modules():
    z, y, t = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.rand(4) + 0.5
    alpha = torch.tensor([0.5, 1.0, 2.0])
    focal = xent.nn.FocalLoss(1.0, alpha)
    assert list(focal.state_dict()) == ["alpha"]
    torch.testing.assert_close(focal(z, y), xent.focal_loss(z, y, gamma=1.0, alpha=alpha))
    poly = xent.nn.PolyLoss(0.5, reduction="sum")
    torch.testing.assert_close(
        poly(z, y, temperature=t), xent.poly_loss(z, y, epsilon=0.5, reduction="sum", temperature=t)
    )
    found = xent.nn.CrossEntropyLoss()(z, y, temperature=t)
    torch.testing.assert_close(found, F.cross_entropy(z / t[:, None], y))
    head = xent.nn.LinearCrossEntropyLoss(3, 5, bias=True)
    torch.testing.assert_close(head(z, y, temperature=t), F.cross_entropy(head.linear(z) / t[:, None], y))
    assert "gamma=1.0" in repr(focal)
    assert "epsilon=0.5" in repr(poly)


@pytest.mark.parametrize("bias", [False, True])
def test_modules_with_a_classifier(bias):
    x, y, t = torch.randn(4, 3), torch.tensor([0, 1, 4, 0]), torch.rand(4) + 0.5
    alpha = torch.rand(5) + 0.5
    focal = xent.nn.LinearFocalLoss(3, 5, 1.0, alpha, bias=bias, reduction="none", memory_budget=4096)
    expected = xent.focal_loss(focal.linear(x), y, gamma=1.0, alpha=alpha, reduction="none", temperature=t)
    torch.testing.assert_close(focal(x, y, temperature=t), expected)
    poly = xent.nn.LinearPolyLoss(3, 5, 0.5, bias=bias)
    s = torch.rand(4)
    loss, expected = (
        poly(x, y, sample_weight=s),
        xent.poly_loss(poly.linear(x), y, epsilon=0.5, sample_weight=s),
    )
    torch.testing.assert_close(loss, expected)
    parameters = list(poly.parameters())
    assert len(parameters) == 1 + bias
    torch.testing.assert_close(*(torch.autograd.grad(value, parameters) for value in (loss, expected)))
    assert "memory_budget" not in repr(poly)
    assert "reduction='none'" in repr(focal)


def test_a_classifier_that_computes_more_is_refused():
    head = xent.nn.LinearFocalLoss(3, 5)
    head.linear = torch.nn.Sequential(head.linear)
    with pytest.raises(TypeError, match="linear"):
        head(torch.randn(2, 3), torch.tensor([0, 1]))


@pytest.mark.parametrize("gap", [0.0, 1e-9, 0.5, 0.7, 3.0, 30.0, 35.0, 40.0, 55.0, 100.0, 600.0])
def test_derivatives_of_one_minus_exp_keep_their_digits(gap):
    """The derivative of expm1 in torch is its result plus 1, which at −40 has no digit left."""
    x = torch.tensor(gap, dtype=torch.float64, requires_grad=True)
    value = one_minus_exp(x)
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    exact = mpmath.exp(-mpmath.mpf(gap))
    assert float(value.detach()) == pytest.approx(float(-mpmath.expm1(-mpmath.mpf(gap))), rel=4e-16, abs=0)
    assert float(first.detach()) == pytest.approx(float(exact), rel=4e-16, abs=0)
    assert float(second) == pytest.approx(-float(exact), rel=4e-16, abs=0)


@pytest.mark.parametrize("gap", [30.0, 35.0, 40.0, 60.0])
def test_second_derivatives_of_hard_rows(gap):
    z = torch.tensor([[0.0, -gap, -90.0]], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([[0.3, -1.0, 0.5]], dtype=torch.float64)
    for loss in (
        xent.focal_loss,
        partial(xent.poly_loss, epsilon=0.5),
    ):  # of epsilon 1 it is 0 to first order in p
        (g,) = torch.autograd.grad(loss(z, torch.tensor([1])), z, create_graph=True)
        (found,) = torch.autograd.grad(g, z, v)
        with mpmath.workdps(120):
            expected = _second(loss is xent.focal_loss, [0.0, -gap, -90.0], v[0].tolist())
        torch.testing.assert_close(
            found[0, 1], torch.tensor(float(expected), dtype=torch.float64), rtol=1e-13, atol=0
        )


def _second(focal, z, v):
    """Return (H v) at the target's class, 1, by differences in 120 digits."""

    def cost(a):
        total = mpmath.fsum(mpmath.exp(x) for x in a)
        p = mpmath.exp(a[1]) / total
        return -((1 - p) ** 2) * mpmath.log(p) if focal else -mpmath.log(p) + (1 - p) / 2

    def slope(t):
        h = mpmath.mpf(10) ** -20
        at = [mpmath.mpf(x) + t * mpmath.mpf(y) for x, y in zip(z, v, strict=True)]
        return (cost([at[0], at[1] + h, at[2]]) - cost([at[0], at[1] - h, at[2]])) / (2 * h)

    t = mpmath.mpf(10) ** -20
    return (slope(t) - slope(-t)) / (2 * t)


@pytest.mark.parametrize("alpha", [0.0, torch.tensor([0.0, 1.0, 1.0])], ids=["number", "tensor"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_a_masked_target_of_weight_0_costs_nothing(alpha, gamma):
    z = torch.tensor([[-math.inf, 0.0, 1.0], [0.0, 1.0, 2.0]], requires_grad=True)
    rows = xent.focal_loss(z, torch.tensor([0, 1]), alpha=alpha, gamma=gamma, reduction="none")
    assert rows[0] == 0
    assert rows.isfinite().all()
    assert torch.autograd.grad(rows.sum(), z)[0][0].eq(0).all()


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_alpha_of_a_class_is_validated_as_a_number_is(value):
    alpha = torch.tensor([1.0, value, 1.0])
    with pytest.raises(ValueError, match=r"alpha must be finite and not negative, got .* for class 1"):
        xent.focal_loss(torch.zeros(2, 3), torch.tensor([0, 2]), alpha=alpha)


def test_a_constant_row_loss_has_no_slope():
    class Constant(RowLoss):
        def __call__(self, loss):
            return torch.ones_like(loss)

    z = torch.randn(3, 4, requires_grad=True)
    loss = loss_of_logits(Options(), z, torch.tensor([0, 1, 2]), Constant())
    assert loss == 1
    assert torch.autograd.grad(loss, z)[0].eq(0).all()
    with pytest.raises(TypeError, match="a row loss must be a RowLoss, got function"):
        loss_of_logits(Options(), z, torch.tensor([0, 1, 2]), lambda loss: loss)


def test_the_repr_of_a_focal_loss():
    assert repr(xent.nn.FocalLoss(alpha=0.3)) == "FocalLoss(gamma=2.0, alpha=0.3)"
    assert repr(xent.nn.FocalLoss()) == "FocalLoss(gamma=2.0)"


@pytest.mark.parametrize("weights", ["weight", "sample_weight"])
def test_the_mean_of_infinite_weights_is_no_number(weights):
    given = torch.ones(4).index_fill(0, torch.tensor([0]), math.inf)
    loss = xent.cross_entropy(torch.randn(4, 4), torch.arange(4), **{weights: given})
    assert loss.isnan()
