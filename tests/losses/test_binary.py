"""Binary cross-entropy, of logits and of probabilities: values, cases, laws, accuracy, modes, messages."""

from __future__ import annotations

import math
from functools import partial

import mpmath
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close

import xent
from xent.losses import _elementwise

INF = math.inf
FORMS = pytest.mark.parametrize("form", ["logits", "probabilities"])
REDUCTIONS = ["mean", "sum", "none"]

of_logits = xent.binary_cross_entropy_with_logits
of_probabilities = xent.binary_cross_entropy
unreduced = partial(of_logits, reduction="none")
unreduced_p = partial(of_probabilities, reduction="none")


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


def ours_and_torch(form):
    """(our function, torch's, an input of its domain)."""
    s = torch.randn(3, 4, dtype=torch.float64) * 2
    if form == "logits":
        return of_logits, F.binary_cross_entropy_with_logits, s
    return of_probabilities, F.binary_cross_entropy, s.sigmoid()


# ----------------------------------------------------------------------------------------- worked values


def test_worked_values():
    p, y = double(0.7, 0.2), double(1, 0)
    for terms in (unreduced_p(p, y), unreduced(p.logit(), y)):
        assert terms.tolist() == pytest.approx([0.356675, 0.223144], abs=5e-7)
        assert terms.mean().item() == pytest.approx(0.2899092476264711, rel=1e-15)
    for value in (
        of_probabilities(p, y),
        of_logits(p.logit(), y),
        xent.nn.BCELoss()(p, y),
        xent.nn.BCEWithLogitsLoss()(p.logit(), y),
    ):
        assert value.item() == pytest.approx(0.2899092476264711, rel=1e-15)


def test_bernoulli_maximum():
    """Six white balls of ten: the loss of a constant p is least at p = 0.6, and 0.673012 there."""
    y = double(*[1] * 6, *[0] * 4)
    loss, slope = gradients(lambda p: of_probabilities(p.expand(10), y), double(0.6))
    assert loss.item() == pytest.approx(0.673012, abs=5e-7)
    assert slope.item() == pytest.approx(0, abs=1e-15)


# ----------------------------------------------------------------------------------------------- cases


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bce_infinite_logit(dtype):
    """What is certain and true costs 0, with gradient 0; what is certain and false costs +inf."""
    s, y = torch.tensor([-INF, INF, -INF, INF], dtype=dtype), torch.tensor([0.0, 1, 1, 0], dtype=dtype)
    value, of_s, of_y = gradients(unreduced, s, y)
    assert value.tolist() == [0, 0, INF, INF]
    assert of_s.tolist() == [0, 0, -1, 1]
    assert of_y.tolist() == [0, 0, INF, -INF]
    assert of_logits(s[:2], y[:2]) == 0
    soft = gradients(unreduced, s[:2], torch.full_like(s[:2], 0.25))
    assert soft[0].tolist() == [INF, INF]
    assert soft[1].tolist() == [-0.25, 0.75]


@pytest.mark.parametrize("pos_weight", [0.0, 3.0])
def test_infinite_logit_with_pos_weight(pos_weight):
    w = torch.tensor(pos_weight)
    value, of_s = gradients(
        lambda s: unreduced(s, torch.tensor([1.0, 0, 1]), pos_weight=w), torch.tensor([INF, -INF, -INF])
    )
    assert value.tolist() == [0, 0, INF if pos_weight else 0]
    assert of_s.tolist() == [0, 0, -pos_weight]
    s, y = torch.tensor([INF, -INF, -INF, INF]), torch.tensor([1.0, 0, 1, 0])
    _, _, of_y = gradients(lambda s, y: unreduced(s, y, pos_weight=w), s, y)
    assert of_y.tolist() == [0, 0, INF if pos_weight else 0, -INF]  # the limits, as without a weight


def test_bce_tail_gradient():
    s = double(37.42994775023705)
    _, g = gradients(of_logits, s, double(1))[:2]
    assert g.item() == pytest.approx(-5.55e-17, rel=1e-3, abs=0)
    value = unreduced(double(40, -40), double(1, 0))
    assert value.tolist() == pytest.approx([4.248354255291589e-18] * 2, rel=1e-15, abs=0)
    assert unreduced(torch.tensor(40.0), torch.tensor(1.0)).item() == pytest.approx(4.2483541e-18, rel=1e-7)


def test_tail_curvature():
    """p(1 − p) keeps its digits too, in both tails and at 0."""
    for y in (0.0, 1.0):
        for s, right in ((40.0, 4.248354255291589e-18), (-40.0, 4.248354255291589e-18), (0.0, 0.25)):
            h = hessian(lambda s, y=y: of_logits(s, torch.tensor(y, dtype=torch.float64)))(double(s)[0])
            assert h.item() == pytest.approx(right, rel=1e-15, abs=0)


def test_zero_is_a_logit_like_any_other():
    """The branch changes at 0; no derivative does, up to the fourth (−1/8)."""
    for s in (0.0, -0.0):
        f, derivatives = lambda s: of_logits(s, torch.tensor(0.3, dtype=torch.float64)), []
        for _ in range(4):
            f = grad(f)
            derivatives.append(f(torch.tensor(s, dtype=torch.float64)).item())
        assert derivatives == pytest.approx([0.2, 0.25, 0, -0.125], abs=1e-15)


def test_gradient_of_a_hard_target():
    """∂ℓ/∂y = −s at y exactly 0 and 1, on every side of 0; with pos_weight −s + (w − 1)·log1p(e^−s)."""
    s = double(-700, -3, -1e-3, 0, 1e-3, 3, 700)
    for y in (0.0, 1.0):
        _, _, g = gradients(unreduced, s, torch.full_like(s, y))
        assert_close(g, -s, rtol=1e-15, atol=0)
        _, g = gradients(lambda y: unreduced(s, y, pos_weight=double(3)), torch.full_like(s, y))
        # (1 − y)·log(1 + e^s) + 3y·log(1 + e^−s)
        softplus = torch.logaddexp(torch.zeros_like(s), -s)
        assert_close(g, 3 * softplus - (s + softplus), rtol=1e-14, atol=1e-15)
    p = double(1e-300, 0.2, 0.9)
    for y in (0.0, 1.0):
        _, _, g = gradients(unreduced_p, p, torch.full_like(p, y))
        assert_close(g, (-p).log1p() - p.log(), rtol=1e-15, atol=0)


def test_certain_probabilities():
    """At 0 and 1 what is false costs +inf, with an infinite gradient; what is true keeps a slope of 1."""
    p, y = double(0, 1, 0, 1), double(0, 1, 1, 0)
    value, of_p, of_y = gradients(unreduced_p, p, y)
    assert value.tolist() == [0, 0, INF, INF]
    assert of_p.tolist() == [1, -1, -INF, INF]  # (p − y)/(p(1 − p)) in the limit
    assert not of_y.isnan().any()
    value, of_p = gradients(lambda p: unreduced_p(p, y, clamp=True), p)
    assert value.tolist() == [0, 0, 100, 100]
    assert of_p.tolist() == pytest.approx([0, 0, -1e12, 1e12], rel=1e-8)


def test_gradient_of_small_probabilities_is_the_true_one():
    p = double(1e-300, 1e-20, 1e-13, 0.5)
    _, g, _ = gradients(unreduced_p, p, torch.ones_like(p))
    assert_close(g, -1 / p, rtol=1e-15, atol=0)
    _, g, _ = gradients(partial(unreduced_p, clamp=True), p, torch.ones_like(p))
    assert g[0].item() == pytest.approx(-1e12, rel=1e-8)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_clamp_is_torch(weighted, reduction):
    p, y = torch.rand(3, 4), torch.rand(3, 4)
    p[0], y[0] = torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 1.0, 0.0])
    w = torch.rand(3, 4) if weighted else None
    ours = gradients(lambda p, y: of_probabilities(p, y, w, reduction=reduction, clamp=True), p, y)
    theirs = gradients(lambda p, y: F.binary_cross_entropy(p, y, w, reduction=reduction), p, y)
    assert_close(ours, theirs)


@FORMS
def test_weight_zero_leaves_out(form):
    """Whatever the element holds, in value and gradients, eager and under vmap."""
    f, _, x = ours_and_torch(form)
    y, w = torch.rand_like(x), torch.rand_like(x)
    w[0], w[1, 1] = 0, 0
    dirty, soiled = x.clone(), y.clone()
    for t in (dirty, soiled):
        t[0] = torch.tensor([torch.nan, 7.0, INF, -INF])
    clean = gradients(lambda x, y: f(x, y, w), x, y)
    found = gradients(lambda x, y: f(x, y, w), dirty, soiled)
    assert_close(found, clean)
    assert (found[1][0] == 0).all()
    assert_close(vmap(partial(f, reduction="sum"))(dirty, soiled, w).sum() / 12, clean[0])


@FORMS
def test_mean_over_nothing(form):
    f = {"logits": of_logits, "probabilities": of_probabilities}[form]
    value, g, _ = gradients(f, torch.zeros(0, 3), torch.zeros(0, 3))
    assert value == 0
    assert g.shape == (0, 3)


# -------------------------------------------------------------------------------------------- accuracy


def ulp(value, dtype):
    v = torch.tensor(float(value), dtype=dtype)
    return float(torch.nextafter(v, torch.tensor(INF, dtype=dtype)).double() - v.double())


def spread(dtype):
    """Logits in every region: near 0, moderate, tails to ±700, subnormal results."""
    s = torch.cat(
        [
            torch.randn(60, dtype=torch.float64) * 3,
            torch.linspace(-700, 700, 57, dtype=torch.float64),
            torch.logspace(-300, 2, 60, dtype=torch.float64),
            -torch.logspace(-300, 2, 60, dtype=torch.float64),
            double(0.0, 20.1, -20.1, 37.42994775023705, -37.42994775023705),
        ]
    )
    return s.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("y", [0.0, 1.0, 0.3, 1e-20, 1 - 2**-20])
@pytest.mark.parametrize("w", [None, 3.7, 1e-10])
def test_logits_against_mpmath(dtype, y, w):
    """|ℓ − exact| ≤ 4 ulp: nothing is subtracted; |g − exact| ≤ 4 eps·(|positive| + |negative part|)."""
    s, eps, tiny = spread(dtype), torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    target = torch.full_like(s, y)
    pos_weight = None if w is None else torch.tensor(w, dtype=dtype)
    value, of_s, of_y = gradients(lambda s, y: unreduced(s, y, pos_weight=pos_weight), s, target)
    with mpmath.workdps(650):
        t1 = mpmath.mpf(target[0].item()) * (1 if w is None else mpmath.mpf(pos_weight.item()))
        t0 = 1 - mpmath.mpf(target[0].item())
        positive = 1 if w is None else mpmath.mpf(pos_weight.item())
        for x, ℓ, g, h in zip(s.tolist(), value.tolist(), of_s.tolist(), of_y.tolist(), strict=True):
            e = mpmath.e ** (-abs(mpmath.mpf(x)))
            rest = mpmath.log1p(e)
            up, down = rest + max(0, mpmath.mpf(x)), rest + max(0, -mpmath.mpf(x))
            exact = t0 * up + t1 * down
            assert abs(ℓ - exact) <= 4 * (
                ulp(exact, dtype) + eps * tiny
            )  # a subnormal e^u rounds by eps·tiny
            σ = 1 / (1 + e) if x >= 0 else e / (1 + e)
            other = e / (1 + e) if x >= 0 else 1 / (1 + e)
            assert abs(g - (t0 * σ - t1 * other)) <= 4 * eps * (t0 * σ + t1 * other) + tiny
            assert abs(h - (positive * down - up)) <= 4 * eps * (positive * down + up) + tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("y", [0.0, 1.0, 0.3])
def test_probabilities_against_mpmath(dtype, y):
    low = torch.logspace(-300 if dtype == torch.float64 else -37, 0, 100, dtype=torch.float64).to(dtype)
    p = torch.cat([low[:-1], torch.rand(50, dtype=dtype), 1 - low[low > torch.finfo(dtype).eps]])
    p = p[(p > 0) & (p < 1)]
    eps, target = torch.finfo(dtype).eps, torch.full_like(p, y)
    value, of_p, of_y = gradients(unreduced_p, p, target)
    with mpmath.workdps(350):
        t = mpmath.mpf(target[0].item())
        for x, ℓ, g, h in zip(p.tolist(), value.tolist(), of_p.tolist(), of_y.tolist(), strict=True):
            x = mpmath.mpf(x)
            up, down = -mpmath.log1p(-x), -mpmath.log(x)
            exact = (1 - t) * up + t * down
            assert abs(ℓ - exact) <= 4 * ulp(exact, dtype)
            right, scale = (1 - t) / (1 - x) - t / x, (1 - t) / (1 - x) + t / x
            assert abs(g - right) <= 4 * eps * scale
            assert abs(h - (down - up)) <= 4 * eps * (down + up)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@FORMS
def test_half_types_are_rounded_once(form, dtype):
    """The float32 answer on the same numbers, rounded; gradients too."""
    f, _, x = ours_and_torch(form)
    x, y, w = x.to(dtype), torch.rand(3, 4).to(dtype), torch.rand(4).to(dtype)
    for reduction in REDUCTIONS:
        found = gradients(lambda x, y, r=reduction: f(x, y, w, reduction=r), x, y)
        wide = gradients(lambda x, y, r=reduction: f(x, y, w, reduction=r), x.float(), y.float())
        for a, b in zip(found, wide, strict=True):
            assert a.dtype == dtype
            assert torch.equal(a, b.to(dtype))


# ------------------------------------------------------------------------------------------------ laws


@given(st.floats(-800, 800), st.floats(-2, 3))
def test_two_classes_of_softmax(s, y):
    """K = 2 softmax cross-entropy, at logits that differ by s, is the same loss and gradient."""
    z = double(0, s)[None]
    value, g = gradients(lambda s: unreduced(s, double(y)), double(s))
    expected, g2 = gradients(lambda z: xent.cross_entropy(z, double(1 - y, y)[None]), z)
    assert_close(value[0], expected, rtol=1e-14, atol=1e-15 * (1 + abs(y)) * abs(s))
    assert_close(g[0], g2[0, 1], rtol=1e-14, atol=4e-16 * (1 + abs(y)))


@given(st.floats(-INF, INF), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_symmetric(s, y):
    """(s, y) → (−s, 1 − y) changes nothing, to the last bit."""
    assert torch.equal(unreduced(double(s), double(y)), unreduced(double(-s), double(1 - y)))


@given(st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_symmetric_in_probability(p, y):
    q = 1 - p  # exact only sometimes: then the two differ by what rounding q did
    if 1 - q == p:
        assert_close(
            unreduced_p(double(p), double(y)), unreduced_p(double(q), double(1 - y)), rtol=1e-15, atol=0
        )


@given(st.floats(-50, 50), st.floats(0, 1))
def test_logits_and_probabilities_agree(s, y):
    p = double(s).sigmoid()
    if 0 < p < 1:
        # one ulp of p is eps/(1 − p) of its odds
        rounding = 4e-16 * (1 + 1 / (1 - p.item()))
        assert_close(unreduced(double(s), double(y)), unreduced_p(p, double(y)), rtol=0, atol=8 * rounding)


@given(st.floats(-800, 800), st.floats(0, 1))
def test_gradient_is_probability_minus_target(s, y):
    _, g, _ = gradients(unreduced, double(s), double(y))
    assert_close(g, double(s).sigmoid() - y, rtol=0, atol=4e-16)


@given(st.floats(-800, 800), st.floats(-1, 2))
def test_curvature_is_bounded(s, y):
    """0 ≤ ∂²ℓ/∂s² = p(1 − p) ≤ ¼, whatever the target."""
    h = hessian(lambda s: of_logits(s, torch.tensor(y, dtype=torch.float64)))(
        torch.tensor(s, dtype=torch.float64)
    )
    with mpmath.workdps(50):
        e = mpmath.e ** (-abs(mpmath.mpf(s)))
        exact = e / (1 + e) ** 2
        assert abs(h.item() - exact) <= 1e-15 * exact + 1e-300
    assert 0 <= h <= 0.25


@given(st.floats(-100, 100), st.floats(-100, 100), st.floats(0, 1), st.floats(0, 1))
def test_convex(a, b, λ, y):
    def f(s):
        return unreduced(double(s), double(y)).item()

    between = f(λ * a + (1 - λ) * b)
    assert between <= λ * f(a) + (1 - λ) * f(b) + 1e-13


def test_pos_weight_and_weight_multiply():
    s, y = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    w, pw = torch.rand(3, 1, dtype=torch.float64), torch.rand(4, dtype=torch.float64) * 3
    plain = -pw * y * F.logsigmoid(s) - (1 - y) * F.logsigmoid(-s)
    assert_close(of_logits(s, y, w, pos_weight=pw, reduction="none"), w * plain)
    assert_close(of_logits(s, y, w, pos_weight=pw), (w * plain).mean())  # by elements, not by weights
    assert_close(of_logits(s, y, w, pos_weight=pw, reduction="sum"), (w * plain).sum())


# ----------------------------------------------------------------------------------------------- modes


def naive(form, x, y, w, pw, reduction):
    """The formula of the books, in float64, for moderate numbers."""
    if form == "logits":
        terms = -pw * y * F.logsigmoid(x) - (1 - y) * F.logsigmoid(-x)
    else:
        terms = -y * x.log() - (1 - y) * (1 - x).log()
    terms = w * terms
    return {"mean": terms.mean, "sum": terms.sum, "none": lambda: terms.square().sum()}[reduction]()


def modes(form, reduction):
    """(ours, the formula, (input, target)): scalar functions."""
    _, _, x = ours_and_torch(form)
    y, w = torch.rand_like(x), torch.rand(4, dtype=torch.float64)
    pw = torch.rand(3, 1, dtype=torch.float64) + 0.5

    def ours(x, y):
        if form == "logits":
            out = of_logits(x, y, w, pos_weight=pw, reduction=reduction)
        else:
            out = of_probabilities(x, y, w, reduction=reduction)
        return out.square().sum() if reduction == "none" else out

    return ours, partial(naive, form, w=w, pw=pw, reduction=reduction), (x, y)


near = partial(assert_close, rtol=1e-11, atol=1e-12)
ALL_MODES = pytest.mark.parametrize("reduction", REDUCTIONS)


@FORMS
@ALL_MODES
def test_every_derivative(form, reduction):
    ours, theirs, both = modes(form, reduction)
    near(gradients(ours, *both), gradients(theirs, *both))
    near(grad(ours, (0, 1))(*both), grad(theirs, (0, 1))(*both))
    tangents = tuple(torch.randn_like(t) for t in both)
    near(jvp(ours, both, tangents), jvp(theirs, both, tangents))
    near(jacfwd(ours, (0, 1))(*both), jacfwd(theirs, (0, 1))(*both))
    near(hessian(ours, (0, 1))(*both), hessian(theirs, (0, 1))(*both))
    near(jacrev(jacrev(ours, (0, 1)), (0, 1))(*both), hessian(theirs, (0, 1))(*both))
    near(jacfwd(jacfwd(ours, (0, 1)), (0, 1))(*both), hessian(theirs, (0, 1))(*both))
    third = jacfwd(hessian(ours))(*both)
    near(third, jacfwd(hessian(theirs))(*both), rtol=1e-9)


@FORMS
@ALL_MODES
@pytest.mark.parametrize("clamp", [False, True])
def test_gradcheck_and_gradgradcheck(form, reduction, clamp):
    f, _, x = ours_and_torch(form)
    if form == "logits":
        if clamp:
            pytest.skip("logits are not clamped")
        f = partial(f, pos_weight=double(0.5, 2, 1, 3))
    else:
        f = partial(f, clamp=clamp)
    both = [t.requires_grad_() for t in (x, torch.rand_like(x) * 0.8 + 0.1)]

    def loss(x, y):
        return f(x, y, double(1, 2, 0.5, 0.1), reduction=reduction)

    assert torch.autograd.gradcheck(loss, both, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, both, check_fwd_over_rev=True)


@FORMS
@ALL_MODES
def test_vmap(form, reduction):
    ours, theirs, (x, y) = modes(form, reduction)
    several = torch.stack([x, 0.5 * x, 0.25 * x])
    near(vmap(ours, (0, None))(several, y), torch.stack([theirs(a, y) for a in several]))
    near(vmap(ours, (None, 0))(x, torch.stack([y, 1 - y])), torch.stack([theirs(x, y), theirs(x, 1 - y)]))
    near(vmap(grad(ours), (0, None))(several, y), torch.stack([grad(theirs)(a, y) for a in several]))


@FORMS
@ALL_MODES
def test_compiled_in_one_graph(form, reduction):
    torch._dynamo.reset()
    ours, _, both = modes(form, reduction)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    near(gradients(compiled, *both), gradients(ours, *both))


@FORMS
@pytest.mark.parametrize("dynamic", [False, True])
def test_export(form, dynamic):
    _, _, x = ours_and_torch(form)
    module = xent.nn.BCELoss() if form == "probabilities" else xent.nn.BCEWithLogitsLoss(pos_weight=double(3))
    y, rows = torch.rand_like(x), torch.export.Dim("rows", min=2)
    shapes = ({0: rows}, {0: rows}) if dynamic else None
    exported = torch.export.export(module, (x, y), dynamic_shapes=shapes).module()
    near(exported(x, y), module(x, y))
    if dynamic:
        near(exported(x[:2], y[:2]), module(x[:2], y[:2]))


def test_infinite_logits_in_every_mode():
    s, y = double(-INF, INF, 2), double(0, 1, 1)
    right = [0, 0, -0.11920292202211755]
    torch._dynamo.reset()
    compiled = torch.compile(of_logits, fullgraph=True, backend="aot_eager")
    for f in (of_logits, compiled):
        _, g, _ = gradients(lambda s, y, f=f: f(s, y, reduction="sum"), s, y)
        assert g.tolist() == pytest.approx(right, rel=1e-15)
    assert vmap(grad(of_logits))(s, y).tolist() == pytest.approx(right, rel=1e-15)
    assert hessian(partial(of_logits, target=y, reduction="sum"))(s).isfinite().all()
    _, tangent = jvp(lambda s: unreduced(s, y), (s,), (torch.ones_like(s),))
    assert tangent.tolist() == pytest.approx(right, rel=1e-15)


@FORMS
@ALL_MODES
def test_meta_and_fake_tensors(form, reduction):
    from torch._subclasses.fake_tensor import FakeTensorMode

    f, _, x = ours_and_torch(form)
    x, y = x.float(), torch.rand(3, 4)
    mode = FakeTensorMode()
    fake = (mode.from_tensor(x), mode.from_tensor(y))
    for tensors in ((x.to("meta"), y.to("meta")), fake):
        leaf = tensors[0].detach().requires_grad_()
        loss = f(leaf, tensors[1], reduction=reduction)
        assert loss.shape == ((3, 4) if reduction == "none" else ())
        assert loss.dtype == torch.float32
        assert torch.autograd.grad(loss.sum(), leaf)[0].shape == (3, 4)


@FORMS
@pytest.mark.parametrize("clamp", [False, True])
def test_autocast(form, clamp):
    """float32, whatever half type comes in, where torch refuses probabilities on a GPU."""
    f, _, x = ours_and_torch(form)
    if form == "probabilities":
        f = partial(f, clamp=clamp)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
            loss = f(x.to(dtype), torch.ones(3, 4, dtype=dtype))
            assert loss.dtype == expected
            assert_close(loss, f(x.to(dtype).to(expected), torch.ones(3, 4, dtype=expected)))


@FORMS
def test_types_are_promoted(form):
    f, _, x = ours_and_torch(form)
    y = torch.rand(3, 4)
    w = torch.rand(3, 4, dtype=torch.float64)
    assert f(x.bfloat16(), y).dtype == torch.float32
    assert f(x, y.bfloat16()).dtype == torch.float64
    assert f(x.float(), y, w).dtype == torch.float32
    assert f(x.bfloat16(), y.half()).dtype == torch.float32


# ---------------------------------------------------------------------------------------------- pieces


@pytest.fixture
def counted(monkeypatch):
    """How often the gradient was formed in the forward pass."""
    calls = []
    apply = _elementwise._Formed.apply
    monkeypatch.setattr(_elementwise, "PIECE", 5)
    monkeypatch.setattr(_elementwise._Formed, "apply", lambda *args: calls.append(1) or apply(*args))
    return calls


def losses_of_three(dtype=torch.float32):
    """(our function, input, target) of each loss that goes in pieces."""
    s, y = torch.randn(7, 3, dtype=dtype) * 3, torch.rand(7, 3, dtype=dtype)
    s[2, 1], y[0, 0], y[6, 2] = -0.0, 0.0, 1.0
    w, pw = torch.rand(3, dtype=dtype) + 0.5, torch.rand(7, 1, dtype=dtype) + 0.5
    return {
        "logits": (of_logits, s, y),
        "weighted logits": (partial(of_logits, weight=w, pos_weight=pw), s, y),
        "probabilities": (of_probabilities, s.sigmoid(), y),
        "weighted probabilities": (partial(of_probabilities, weight=w), s.sigmoid(), y),
        "masses": (xent.kl_div, F.logsigmoid(s), y),
        "logarithms": (partial(xent.kl_div, log_target=True), F.logsigmoid(s), y.clamp(min=1e-3).log()),
    }


@pytest.mark.parametrize("name", losses_of_three())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@ALL_MODES
def test_pieces_are_the_composition(name, dtype, reduction, counted, monkeypatch):
    """Values and gradients agree to rounding, contiguous or not, whatever the upstream gradient."""
    f, x, t = losses_of_three(dtype)[name]
    f = partial(f, reduction=reduction)
    upstream = torch.randn(x.shape if reduction == "none" else (), dtype=dtype)

    def both(x, t):
        leaf = x.detach().requires_grad_()
        loss = f(leaf, t)
        with torch.no_grad():
            assert torch.equal(f(leaf, t), loss)
        return loss.detach(), *torch.autograd.grad(loss, leaf, upstream.reshape(loss.shape))

    layouts = {"plain": lambda v: v, "transposed": lambda v: v.t().contiguous().t()}
    found = {layout: both(change(x), change(t)) for layout, change in layouts.items()}
    assert len(counted) == 2
    monkeypatch.setattr(_elementwise, "PIECE", 100)
    expected = both(x, t)
    assert len(counted) == 2
    for layout, one in found.items():
        assert_close(
            one, expected, rtol=8 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps, msg=layout
        )


@pytest.mark.parametrize("name", losses_of_three())
@ALL_MODES
def test_a_gradient_formed_early_is_for_one_backward(name, reduction, counted):
    """A second backward, a second derivative and a freed graph answer as torch's own operations do."""
    f, x, t = losses_of_three(torch.float64)[name]

    def loss(leaf):
        return f(leaf, t, reduction=reduction).sum()

    leaf = x.clone().requires_grad_()
    value = loss(leaf)
    first, second = (torch.autograd.grad(value, leaf, 3 * torch.ones(()), retain_graph=True) for _ in "ab")
    near(first, second)
    (slope,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    near(3 * slope.detach(), first[0])
    curvature = torch.autograd.grad(slope.sum(), leaf)[0] if slope.requires_grad else torch.zeros_like(x)
    near(curvature, jvp(grad(loss), (x,), (torch.ones_like(x),))[1])
    near(torch.autograd.grad(loss(leaf), leaf, torch.ones(2), is_grads_batched=True)[0][1], first[0] / 3)
    assert len(counted) == 3
    value = loss(leaf)
    value.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        value.backward()


def test_a_tensor_changed_after_the_forward_pass_is_noticed(counted):
    s, y = torch.randn(20, requires_grad=True), torch.rand(20)
    loss = of_logits(s, y)
    y.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert counted


def test_a_loss_without_reduction_may_be_changed_in_place(counted):
    s = torch.randn(20, requires_grad=True)
    loss = unreduced(s, torch.ones(20))
    loss.mul_(2)
    (g,) = torch.autograd.grad(loss.sum(), s)
    assert_close(g, 2 * (s.detach().sigmoid() - 1))
    assert counted


def test_targets_that_learn_and_infinities_take_the_composition(counted):
    s, y = torch.randn(20, requires_grad=True), torch.rand(20, requires_grad=True)
    of_logits(s, y)
    certain = s.detach().clone()
    certain[13] = INF
    of_logits(certain.requires_grad_(), torch.ones(20))
    assert not counted
    assert of_logits(certain, torch.ones(20)).isfinite()


def test_slope_of_a_subnormal_probability(counted):
    """1/p is more than float32 holds, the mean's gradient is not."""
    p = torch.full((1000,), 0.5)
    p[7] = 1e-39
    _, g = gradients(lambda p: of_probabilities(p, torch.ones(1000)), p)
    assert counted
    assert g[7].item() == pytest.approx(-1e36, rel=1e-5)


# --------------------------------------------------------------------------------------------- modules


def test_modules_load_the_state_dicts_of_torch():
    s, y, w, pw = torch.randn(3, 4), torch.rand(3, 4), torch.rand(4), torch.rand(3, 1) + 1
    for options in ({}, {"weight": w}, {"weight": w, "reduction": "none"}):
        theirs, ours = torch.nn.BCELoss(**options), xent.nn.BCELoss(torch.zeros(4) if options else None)
        ours.reduction = theirs.reduction
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        assert_close(ours(s.sigmoid(), y), theirs(s.sigmoid(), y))
    options = {"weight": w, "pos_weight": pw, "reduction": "sum"}
    theirs, ours = torch.nn.BCEWithLogitsLoss(**options), xent.nn.BCEWithLogitsLoss(**options)
    assert set(ours.state_dict()) == {"weight", "pos_weight"}
    ours.load_state_dict(theirs.state_dict())
    assert_close(ours(s, y), theirs(s, y))
    assert ours.double().pos_weight.dtype == torch.float64
    assert repr(ours) == "BCEWithLogitsLoss(reduction='sum')"
    assert repr(xent.nn.BCELoss(clamp=True)) == "BCELoss(clamp=True)"
    assert xent.nn.BCELoss(clamp=True)(torch.tensor([0.0]), torch.tensor([1.0])) == 100


# -------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize("clamp", [False, True])
def test_a_bad_probability_is_named(clamp):
    f = partial(of_probabilities, clamp=clamp)
    good = torch.full((2, 3), 0.5)
    for value, word in ((1.5, r"1\.5"), (-1e-3, r"-0\.001"), (torch.nan, "nan"), (INF, "inf")):
        bad = good.clone()
        bad[1, 2] = value
        wrong = "is not a number" if math.isnan(value) else r"is outside \[0, 1\]"
        with pytest.raises(ValueError, match=rf"input {word} at position \(1, 2\) {wrong}; logits go to"):
            f(bad, good)
        with pytest.raises(ValueError, match=rf"target {word} at position \(1, 2\) {wrong}; targets of any"):
            f(good, bad)
    with pytest.raises(ValueError, match=r"input 2 at row 1 is outside"):
        f(torch.tensor([0.5, 2.0]), torch.ones(2))
    with pytest.raises(ValueError, match=r"input 2 is outside"):
        f(torch.tensor(2.0), torch.tensor(1.0))
    with pytest.raises(
        ValueError, match=r"input 2 at row 1 is outside"
    ):  # under a transform that can be asked
        grad(f)(torch.tensor([0.5, 2.0]), torch.ones(2))


def test_a_bad_probability_costs_nan_where_it_cannot_be_asked():
    p, y = torch.tensor([0.5, 1.5, -0.5, torch.nan, 0.5, 0.5]), torch.tensor([1.0, 1, 0, 0, 1.5, torch.nan])
    torch._dynamo.reset()
    compiled = torch.compile(unreduced_p, fullgraph=True, backend="aot_eager")
    for losses in (vmap(of_probabilities)(p, y), compiled(p, y)):
        assert losses[0].item() == pytest.approx(math.log(2))
        assert losses[1:].isnan().all()
    with pytest.raises(RuntimeError, match="between 0 and 1"):  # torch's own function asks
        vmap(partial(of_probabilities, clamp=True))(p, y)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda():
    s, y = torch.randn(5, 4), torch.rand(5, 4)
    for f, x in ((of_logits, s), (of_probabilities, s.sigmoid())):
        for a, b in zip(gradients(f, x.cuda(), y.cuda()), gradients(f, x, y), strict=True):
            assert_close(a.cpu(), b)
    s, y = torch.tensor([-INF, INF]), torch.tensor([0.0, 1.0])
    for a, b in zip(gradients(of_logits, s.cuda(), y.cuda()), gradients(of_logits, s, y), strict=True):
        assert torch.equal(a.cpu(), b)
    half = torch.tensor([0.25, 0.75], dtype=torch.float16)
    with torch.autocast("cuda"):  # where torch refuses
        for clamp in (False, True):
            loss = of_probabilities(half.cuda(), half.cuda(), clamp=clamp)
            assert_close(loss.cpu(), of_probabilities(half.float(), half.float()))


@FORMS
def test_messages(form):
    f, _, x = ours_and_torch(form)
    y = torch.rand_like(x)
    with pytest.raises(ValueError, match=r"reduction must be 'none', 'sum' or 'mean', got 'batchmean'"):
        f(x, y, reduction="batchmean")
    with pytest.raises(ValueError, match=r"target must have the shape of input, \(3, 4\); got \(3,\)"):
        f(x, y[:, 0])
    for shape in ((3,), (2, 3, 4), (5, 1)):
        with pytest.raises(ValueError, match=r"weight must broadcast to the shape of input, \(3, 4\); got"):
            f(x, y, torch.ones(shape))
    with pytest.raises(TypeError, match=r"target must be of a floating type.*got torch.int64.*target\.to\("):
        f(x, y.long())
    with pytest.raises(TypeError, match=r"input must be of a floating type.*got torch.bool"):
        f(x > 0, y)
    w = torch.ones(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"weight takes no gradient: pass weight\.detach\(\)"):
        f(x, y, w.clone().requires_grad_())
    with pytest.raises(ValueError, match="weight takes no gradient"):  # not silently zero in forward mode
        jvp(lambda w: f(x, y, w), (w,), (w,))
    if form == "logits":
        with pytest.raises(ValueError, match="pos_weight takes no gradient"):
            f(x, y, pos_weight=w.clone().requires_grad_())
        with pytest.raises(ValueError, match=r"pos_weight must broadcast to the shape of input"):
            f(x, y, pos_weight=torch.ones(3))


@FORMS
def test_inputs_are_left_alone(form):
    f, _, x = ours_and_torch(form)
    y, w = torch.rand_like(x), torch.tensor([0.0, 1, 2, 3])
    before = [t.clone() for t in (x, y, w)]
    f(x.requires_grad_(), y, w).backward()
    assert all(torch.equal(a, b) for a, b in zip((x, y, w), before, strict=True))


@FORMS
def test_noncontiguous_and_expanded(form):
    f, theirs, x = ours_and_torch(form)
    y = torch.rand(4, 1, dtype=torch.float64).expand(4, 3)
    assert_close(gradients(f, x.t(), y), gradients(theirs, x.t(), y))


@pytest.mark.parametrize("shape", [(4,), (1,), (), (1, 4)])
def test_a_factor_that_broadcasts_compiles_with_dynamic_shapes(shape):
    loss = xent.nn.BCEWithLogitsLoss(weight=torch.rand(shape), pos_weight=torch.rand(shape))
    compiled = torch.compile(loss, dynamic=True, fullgraph=True, backend="eager")
    for rows in (3, 7):
        s, y = torch.randn(rows, 4), torch.rand(rows, 4)
        torch.testing.assert_close(compiled(s, y), loss(s, y))
