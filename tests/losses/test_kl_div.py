"""The divergence of given log-probabilities: values, corners, accuracy, modes, messages."""

from __future__ import annotations

import math
import warnings
from functools import partial

import mpmath
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, hessian, jacfwd, jvp, vmap
from torch.testing import assert_close

import xent
from xent.losses import _elementwise

INF = math.inf
REDUCTIONS = ["none", "batchmean", "mean", "sum"]
LOG_TARGET = pytest.mark.parametrize("log_target", [False, True])
ALL = pytest.mark.parametrize("reduction", REDUCTIONS)
unreduced = partial(xent.kl_div, reduction="none")


@pytest.fixture(autouse=True, scope="module", params=["composition", "pieces"])
def way(request):
    """Run every test as a composition of torch's operations, and in pieces of at most five elements."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "pieces":
            patch.setattr(_elementwise, "PIECE", 5)
        yield request.param


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def gradients(f, *tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    value = f(*leaves)
    return value.detach(), *torch.autograd.grad(value.sum(), leaves)


def theirs(x, t, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that `mean` is no divergence
        return F.kl_div(x, t, **options)


def problem(log_target, shape=(3, 4)):
    x, t = (torch.randn(shape, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    return x, t if log_target else t.exp()


# ------------------------------------------------------------------------------------- values and corners


def test_worked_values():
    q, p = double(0.6, 0.4)[None], double(0.5, 0.5)[None]
    for value in (
        xent.kl_div(p.log(), q, reduction="batchmean"),
        xent.kl_div(p.log(), q.log(), reduction="batchmean", log_target=True),
        xent.nn.KLDivLoss(reduction="batchmean")(p.log(), q),
    ):
        assert value.item() == pytest.approx(0.020136, abs=5e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_smallest_masses_keep_their_logarithms(dtype):
    """t·(log t − x) to a few units in the last place, down to subnormal masses."""
    tiny = torch.finfo(dtype)
    t = torch.tensor(
        [tiny.smallest_normal * 2**-9, tiny.tiny, 1e-30, 1e-12, 1e-6, 1e-3, 0.5, 0.0], dtype=dtype
    )
    x = torch.linspace(-90, -0.1, len(t), dtype=dtype)
    value, slope = gradients(lambda x: xent.kl_div(x, t, reduction="none"), x)
    for i in range(len(t)):
        mass, logarithm = mpmath.mpf(t[i].item()), mpmath.mpf(x[i].item())
        exact = mass * (mpmath.log(mass) - logarithm) if mass else mpmath.mpf(0)
        bound = 4 * tiny.eps * mass * (abs(mpmath.log(mass)) + abs(logarithm)) if mass else 0
        step = tiny.smallest_normal * tiny.eps  # of subnormal numbers
        assert abs(value[i].item() - exact) <= bound + 100 * step
    assert (slope == -t).all()


@LOG_TARGET
def test_cross_entropy_minus_entropy(log_target):
    """KL(q ‖ p) = CE(q, p) − H(q) ≥ 0, 0 for q = p, and not symmetric."""
    z = torch.randn(5, 7, dtype=torch.float64)
    x, t = problem(log_target, (5, 7))
    q = t.exp() if log_target else t
    divergence = xent.kl_div(z.log_softmax(1), t, reduction="batchmean", log_target=log_target)
    assert_close(divergence, xent.cross_entropy(z, q) + (q * q.log()).sum(1).mean())
    assert divergence > 0
    assert abs(xent.kl_div(q.log(), t, reduction="sum", log_target=log_target)) < 1e-15
    assert not torch.allclose(
        xent.kl_div(x, t, reduction="sum", log_target=log_target),
        xent.kl_div(q.log(), x if log_target else x.exp(), reduction="sum", log_target=log_target),
    )


@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (2, 3, 4)])
@ALL
@LOG_TARGET
def test_reductions_divide_as_torch(shape, reduction, log_target):
    x, t = torch.randn(shape), -torch.rand(shape) if log_target else torch.rand(shape)
    options = dict(reduction=reduction, log_target=log_target)
    ours = gradients(partial(xent.kl_div, **options), x, t)
    assert_close(ours, gradients(partial(theirs, **options), x, t))


@ALL
@LOG_TARGET
@pytest.mark.parametrize("shapes", [((1, 4), (3, 1)), ((3, 4), ()), ((4,), (3, 4))])
def test_broadcasts_as_torch(shapes, reduction, log_target):
    x, t = (-torch.rand(shape) - 0.1 for shape in shapes)
    t = t if log_target else t.exp()
    options = dict(reduction=reduction, log_target=log_target)
    ours = gradients(partial(xent.kl_div, **options), x, t)
    assert_close(ours, gradients(partial(theirs, **options), x, t))
    with_zero = t.clone().flatten()
    with_zero[0] = -INF if log_target else 0
    found = gradients(partial(xent.kl_div, **options), x, with_zero.reshape(t.shape))
    assert all(v.isfinite().all() for v in found)


@LOG_TARGET
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_has_no_probability_costs_nothing(log_target, dtype):
    x = torch.tensor([-INF, -1.0, -INF, -1.0], dtype=dtype)
    t = torch.tensor([0.0, 0.0, 0.5, 0.5], dtype=dtype)
    t = t.log() if log_target else t
    value, of_x, of_t = gradients(partial(unreduced, log_target=log_target), x, t)
    assert value[:3].tolist() == [0, 0, INF]
    assert value[3].item() == pytest.approx(0.5 * (math.log(0.5) + 1), rel=4 * torch.finfo(dtype).eps)
    assert of_x[:2].tolist() == [0, 0]
    assert of_x[2:].tolist() == pytest.approx([-0.5, -0.5], rel=4 * torch.finfo(dtype).eps)
    assert of_t[:2].tolist() == ([0, 0] if log_target else [0, 1])  # that of t·log t, −∞, counts as 0
    assert of_t[2] == INF


@LOG_TARGET
def test_corners_in_every_mode(log_target):
    x, t = double(-INF, -1, -1), double(0, 0, 0.5)
    t = t.log() if log_target else t
    f = partial(xent.kl_div, log_target=log_target, reduction="sum")
    torch._dynamo.reset()
    for function in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        value, of_x, of_t = gradients(function, x, t)
        assert value.item() == pytest.approx(0.5 * (math.log(0.5) + 1))
        assert of_x.tolist() == pytest.approx([0, 0, -0.5])
        assert of_t.isfinite().all()
    assert vmap(f)(x, t).sum().item() == pytest.approx(value.item())
    assert vmap(grad(f))(x, t).tolist() == pytest.approx([0, 0, -0.5])
    assert all(h.isfinite().all() for row in hessian(f, (0, 1))(x, t) for h in row)
    assert jvp(lambda x: f(x, t), (x,), (torch.ones(3).double(),))[1].item() == pytest.approx(-0.5)


def test_gradient_through_a_masked_student_and_teacher():
    """A class masked on both sides: finite gradients in the logits of both."""
    mask = double(0, -INF, 0)

    def loss(a, b):
        x, t = (a + mask).log_softmax(0), (b + mask).softmax(0)
        return xent.kl_div(x, t, reduction="sum")

    a, b = double(1, 2, 3), double(3, 2, 0)
    _, of_a, of_b = gradients(loss, a, b)
    assert of_a[1] == of_b[1] == 0
    kept = torch.tensor([0, 2])
    expected = gradients(
        lambda a, b: theirs(a.log_softmax(0), b.softmax(0), reduction="sum"), a[kept], b[kept]
    )
    assert_close((of_a[kept], of_b[kept]), expected[1:])


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_mean_over_nothing(reduction):
    value, g, _ = gradients(partial(xent.kl_div, reduction=reduction), torch.zeros(0, 3), torch.zeros(0, 3))
    assert value == 0
    assert g.shape == (0, 3)


# -------------------------------------------------------------------------------------------- accuracy


def ulp(value, dtype):
    v = torch.tensor(float(abs(value)), dtype=dtype)
    return float(torch.nextafter(v, torch.tensor(INF, dtype=dtype)).double() - v.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@LOG_TARGET
def test_against_mpmath(dtype, log_target):
    """|KL − exact| ≤ 4 ulp + eps·t·(|log t| + |x|), the cost of rounding one subtraction."""
    deep = 600 if dtype == torch.float64 else 80
    t = torch.cat([-torch.rand(100, dtype=torch.float64) * deep, -torch.logspace(-20, 0, 50).double()])
    x = torch.cat([-torch.rand(50, dtype=torch.float64) * 700, t[50:]])  # the latter: near equality
    x, t = x.to(dtype), t.to(dtype)
    x[100:] *= 1 + 1e-3
    t = t if log_target else t.exp()
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    found = gradients(partial(unreduced, log_target=log_target), x, t)
    with mpmath.workdps(60):
        for a, b, value, of_x, of_t in zip(x.tolist(), t.tolist(), *(v.tolist() for v in found), strict=True):
            a, b = mpmath.mpf(a), mpmath.mpf(b)
            mass, logarithm = (mpmath.e**b, b) if log_target else (b, mpmath.log(b))
            exact, scale = mass * (logarithm - a), abs(logarithm) + abs(a)
            assert abs(value - exact) <= 4 * ulp(exact, dtype) + eps * mass * scale + tiny
            assert abs(of_x + mass) <= 4 * eps * mass + tiny
            right = exact + mass if log_target else logarithm - a + 1
            factor = mass if log_target else 1
            assert abs(of_t - right) <= 4 * eps * factor * (scale + 1) + tiny


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@ALL
@LOG_TARGET
def test_half_types_are_rounded_once(dtype, reduction, log_target):
    x, t = (v.to(dtype) for v in problem(log_target))
    f = partial(xent.kl_div, reduction=reduction, log_target=log_target)
    for a, b in zip(gradients(f, x, t), gradients(f, x.float(), t.float()), strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b.to(dtype))


@given(st.floats(0, 5), st.floats(-50, 5))
def test_both_forms_of_a_target_agree(t, x):
    a = unreduced(double(x), double(t))
    b = unreduced(double(x), double(t).log(), log_target=True)
    assert_close(a, b, rtol=1e-12, atol=1e-13)


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=6), st.data())
def test_never_negative(z, data):
    """Gibbs: of two distributions, up to rounding."""
    other = data.draw(st.lists(st.floats(-30, 30), min_size=len(z), max_size=len(z)))
    value = xent.kl_div(double(*z).log_softmax(0), double(*other).softmax(0), reduction="sum")
    assert value >= -1e-13


# ----------------------------------------------------------------------------------------------- modes


near = partial(assert_close, rtol=1e-11, atol=1e-12)


def scalar(f):
    def loss(x, t):
        out = f(x, t)
        return out.square().sum() if out.dim() else out

    return loss


@ALL
@LOG_TARGET
def test_every_derivative(reduction, log_target):
    options = dict(reduction=reduction, log_target=log_target)
    ours = scalar(partial(xent.kl_div, **options))

    def expected(x, t):
        terms = t.exp() * (t - x) if log_target else t * (t.log() - x)
        sums = {"none": terms.square().sum(), "batchmean": terms.sum() / 3, "mean": terms.mean()}
        return sums.get(reduction, terms.sum())

    both = problem(log_target)
    near(gradients(ours, *both), gradients(expected, *both))
    near(grad(ours, (0, 1))(*both), grad(expected, (0, 1))(*both))
    tangents = tuple(torch.randn_like(t) for t in both)
    near(jvp(ours, both, tangents), jvp(expected, both, tangents))
    near(hessian(ours, (0, 1))(*both), hessian(expected, (0, 1))(*both))
    near(jacfwd(jacfwd(ours, (0, 1)), (0, 1))(*both), hessian(expected, (0, 1))(*both))
    x, t = both
    several = torch.stack([x, 2 * x, 3 * x])
    near(vmap(ours, (0, None))(several, t), torch.stack([expected(a, t) for a in several]))
    near(vmap(grad(ours, 1), (0, None))(several, t), torch.stack([grad(expected, 1)(a, t) for a in several]))
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    near(gradients(compiled, *both), gradients(expected, *both))


@ALL
@LOG_TARGET
def test_gradcheck_and_gradgradcheck(reduction, log_target):
    both = [t.requires_grad_() for t in problem(log_target)]
    f = partial(xent.kl_div, reduction=reduction, log_target=log_target)
    assert torch.autograd.gradcheck(f, both, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, both, check_fwd_over_rev=True)


@pytest.mark.parametrize("dynamic", [False, True])
@LOG_TARGET
def test_export(dynamic, log_target):
    x, t = problem(log_target)
    module = xent.nn.KLDivLoss(reduction="batchmean", log_target=log_target)
    rows = torch.export.Dim("rows", min=2)
    shapes = ({0: rows}, {0: rows}) if dynamic else None
    exported = torch.export.export(module, (x, t), dynamic_shapes=shapes).module()
    near(exported(x, t), module(x, t))
    if dynamic:
        near(exported(x[:2], t[:2]), module(x[:2], t[:2]))


@ALL
@LOG_TARGET
def test_meta_and_fake_tensors(reduction, log_target):
    from torch._subclasses.fake_tensor import FakeTensorMode

    both, mode = problem(log_target), FakeTensorMode()
    for x, t in ([v.to("meta") for v in both], [mode.from_tensor(v) for v in both]):
        leaf = x.detach().requires_grad_()
        loss = xent.kl_div(leaf, t, reduction=reduction, log_target=log_target)
        assert loss.shape == ((3, 4) if reduction == "none" else ())
        assert torch.autograd.grad(loss.sum(), leaf)[0].shape == (3, 4)


def test_types():
    x, t = problem(False)
    assert xent.kl_div(x.bfloat16(), t.float()).dtype == torch.float32
    assert xent.kl_div(x.float(), t).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert xent.kl_div(x.bfloat16(), t.bfloat16()).dtype == torch.float32
        assert xent.kl_div(x, t).dtype == torch.float64


# ------------------------------------------------------------------------------------ module, messages


def test_module():
    x, t = problem(True)
    module = xent.nn.KLDivLoss(reduction="sum", log_target=True)
    assert_close(module(x, t), torch.nn.KLDivLoss(reduction="sum", log_target=True)(x, t))
    assert repr(module) == "KLDivLoss(reduction='sum', log_target=True)"
    assert not module.state_dict()


def test_mean_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        xent.kl_div(*problem(False))


def test_messages():
    x, t = problem(False)
    with pytest.raises(ValueError, match=r"'none', 'batchmean', 'mean' or 'sum', got 'average'"):
        xent.kl_div(x, t, reduction="average")
    with pytest.raises(TypeError, match=r"target must be of a floating type.*got torch.int64"):
        xent.kl_div(x, t.long())
    bad = t.clone()
    bad[2, 1] = -0.25
    with pytest.raises(ValueError, match=r"target -0\.25 at position \(2, 1\) is negative; pass log_target"):
        xent.kl_div(x, bad)
    bad[2, 1] = torch.nan
    for log_target in (False, True):
        with pytest.raises(ValueError, match=r"target nan at position \(2, 1\) is not a number"):
            xent.kl_div(x, bad, log_target=log_target)


def test_a_bad_target_costs_nan_where_it_cannot_be_asked():
    x, t = double(-1, -1, -INF, -1), double(-0.5, torch.nan, -2, 0.5)
    torch._dynamo.reset()
    compiled = torch.compile(unreduced, fullgraph=True, backend="aot_eager")
    for losses in (vmap(xent.kl_div)(x, t), compiled(x, t)):
        assert losses.isnan().tolist() == [True, True, True, False]
