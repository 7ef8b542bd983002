"""Divergences in every direction: against their definitions in mpmath and in float64, and each other."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jacrev, jvp, vmap
from torch.testing import assert_close

import xent

F64 = torch.float64
BETAS = [0.0, 1e-3, 0.3, 0.5, 0.9, 1.0]


def exact(t, z, beta, logits, digits=60):
    """The definition, to many digits; t are logits or masses of one row."""
    with mpmath.workdps(digits):
        p = [mpmath.exp(mpmath.mpf(v)) for v in z.tolist()]
        q = [mpmath.exp(mpmath.mpf(v)) if logits else mpmath.mpf(v) for v in t.tolist()]
        p = [v / sum(p) for v in p]
        q = [v / sum(q) for v in q] if logits else q

        def kl(a, b):
            return sum(x * mpmath.log(x / y) for x, y in zip(a, b, strict=True) if x)

        if beta in (0.0, 1.0):
            return float(kl(q, p) if beta == 0.0 else kl(p, q))
        beta = mpmath.mpf(beta)
        m = [(1 - beta) * x + beta * y for x, y in zip(p, q, strict=True)]
        return float(beta * kl(q, m) + (1 - beta) * kl(p, m))


def ours(target, z, beta, **options):
    if beta in (0.0, 1.0):
        direction = "forward" if beta == 0.0 else "reverse"
        return xent.kl_divergence(target=target, input=z, direction=direction, **options)
    return xent.js_divergence(target=target, input=z, beta=beta, **options)


def plain(target, z, beta, *, logits=True, temperature=1.0):
    log_p = (z / temperature).log_softmax(-1)
    log_t = (target / temperature).log_softmax(-1) if logits else target.log()
    if beta == 0.0:
        return (log_t.exp() * (log_t - log_p)).sum(-1)
    if beta == 1.0:
        return (log_p.exp() * (log_p - log_t)).sum(-1)
    log_m = torch.logaddexp(log_p + math.log1p(-beta), log_t + math.log(beta))
    of_t, of_p = (log_t.exp() * (log_t - log_m)).sum(-1), (log_p.exp() * (log_p - log_m)).sum(-1)
    return beta * of_t + (1 - beta) * of_p


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("near", [1.0, 1e-3, 1e-7, 0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_values_are_those_of_the_definition(beta, near, dtype):
    """To a few units in the last place, also of distributions that hardly differ, or are sure."""
    torch.manual_seed(1)
    z = torch.randn(4, 9, dtype=F64).to(dtype)
    t = (z.double() + near * torch.randn(4, 9, dtype=F64)).to(dtype)
    found = ours(t, z, beta, target_is_logits=True)
    expected = [exact(*row, beta, True) for row in zip(t.double(), z.double(), strict=True)]
    assert (found >= 0).all()
    rounding = 200 * torch.finfo(dtype).eps
    # δ is known to the rounding of the logits' differences, relative to itself
    assert_close(found.double(), torch.tensor(expected, dtype=F64), rtol=rounding, atol=rounding**2)


@pytest.mark.parametrize("beta", BETAS)
def test_probabilities_of_any_mass(beta):
    z, t = torch.randn(5, 7, dtype=F64), torch.rand(5, 7, dtype=F64)
    for mass in (1.0, 0.5, 3.0):
        q = mass * t / t.sum(1, keepdim=True)
        expected = torch.tensor([exact(*row, beta, False) for row in zip(q, z, strict=True)], dtype=F64)
        assert_close(ours(q, z, beta), expected, rtol=1e-12, atol=1e-14)
    q = t / t.sum(1, keepdim=True)
    q[:, 2] = 0.0
    found = ours(q, z, beta)
    if beta == 1.0:
        assert found.isinf().all()
    else:
        expected = torch.tensor([exact(*row, beta, False) for row in zip(q, z, strict=True)], dtype=F64)
        assert_close(found, expected)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("logits", [True, False])
def test_derivatives(beta, logits):
    z = torch.randn(3, 5, dtype=F64, requires_grad=True)
    t = torch.randn(3, 5, dtype=F64)
    t = (t if logits else t.softmax(1)).requires_grad_()

    def f(t, z):
        return ours(t, z, beta, target_is_logits=logits, temperature=0.7)

    assert_close(
        f(t, z), plain(t, z if logits else z / 0.7, beta, logits=logits, temperature=0.7 if logits else 1.0)
    )
    assert gradcheck(f, (t, z), check_forward_ad=True)
    assert gradgradcheck(f, (t, z))
    near = z.detach() + 1e-4 * torch.randn(3, 5, dtype=F64)
    if logits:  # where the terms are those of the series
        assert_close(
            jacrev(f, argnums=(0, 1))(near, z.detach()),
            jacrev(lambda t, z: plain(t, z, beta, temperature=0.7), argnums=(0, 1))(near, z.detach()),
            rtol=1e-6,
            atol=1e-10,
        )
        one = hessian(lambda z: f(near, z).sum())(z.detach())
        other = hessian(lambda z: plain(near, z, beta, temperature=0.7).sum())(z.detach())
        assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_limits_in_beta():
    """JS/β tends to KL(t ‖ p) and JS/(1 − β) to KL(p ‖ t); β = ½ is bounded by log 2 and symmetric."""
    z, t = torch.randn(6, 8, dtype=F64), torch.randn(6, 8, dtype=F64)
    both = {"target_is_logits": True}
    small = 1e-6
    assert_close(ours(t, z, small, **both) / small, ours(t, z, 0.0, **both), rtol=1e-4, atol=0.0)
    assert_close(ours(t, z, 1 - small, **both) / small, ours(t, z, 1.0, **both), rtol=1e-4, atol=0.0)
    assert_close(ours(t, z, 0.5, **both), ours(z, t, 0.5, **both))
    assert_close(ours(t, z, 0.3, **both), ours(z, t, 0.7, **both))
    apart = torch.tensor([[0.0, -800.0]]), torch.tensor([[-800.0, 0.0]])
    assert ours(*apart, 0.5, **both).item() == pytest.approx(math.log(2))
    assert xent.js_divergence(target=t, input=z, beta=0.0, **both).equal(ours(t, z, 0.0, **both))


@pytest.mark.parametrize("beta", BETAS)
def test_masked_classes(beta):
    z, t = torch.randn(2, 5), torch.randn(2, 5)
    z[:, 1] = t[:, 1] = -torch.inf
    z.requires_grad_()
    found = ours(t, z, beta, target_is_logits=True)
    keep = [0, 2, 3, 4]
    assert_close(found, ours(t[:, keep], z[:, keep], beta, target_is_logits=True))
    (g,) = torch.autograd.grad(found.sum(), z)
    assert g.isfinite().all()
    assert not g[:, 1].any()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (3, 6, 2)])
def test_reductions_weights_and_temperatures(beta, shape):
    z, t = torch.randn(shape, dtype=F64), torch.randn(shape, dtype=F64)
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    weight = torch.rand(rows, dtype=F64) + 0.1
    each = torch.rand(rows, dtype=F64) + 0.5
    axis = 0 if len(shape) == 1 else 1
    a, b = z.movedim(axis, -1), t.movedim(axis, -1)
    value = plain(b, a, beta, temperature=each[..., None])
    options = {"target_is_logits": True, "temperature": each}
    assert_close(ours(t, z, beta, **options), value)
    assert_close(ours(t, z, beta, scale_by_t2=True, **options), value * each**2)
    assert_close(ours(t, z, beta, bits=True, **options), value / math.log(2))
    assert_close(ours(t, z, beta, reduction="sum", sample_weight=weight, **options), (weight * value).sum())
    mean = ours(t, z, beta, reduction="mean", sample_weight=weight, **options)
    assert_close(mean, (weight * value).sum() / weight.sum())
    assert_close(ours(t, z, beta, reduction="mean", **options), value.mean())


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("logits", [True, False])
def test_a_row_of_weight_0_is_left_out(beta, logits):
    z, t = torch.randn(4, 5, dtype=F64), torch.randn(4, 5, dtype=F64).softmax(1)
    z[1], t[2] = torch.nan, torch.nan
    each = torch.tensor([1.0, 0.0, -1.0, 2.0], dtype=F64)
    weight = torch.tensor([1.0, 0.0, 0.0, 2.0], dtype=F64)
    z.requires_grad_()
    options = {"target_is_logits": logits, "reduction": "mean"}
    found = ours(t, z, beta, sample_weight=weight, temperature=each, **options)
    keep = [0, 3]
    assert_close(
        found, ours(t[keep], z[keep], beta, sample_weight=weight[keep], temperature=each[keep], **options)
    )
    (g,) = torch.autograd.grad(found, z)
    assert g.isfinite().all()
    assert ours(t, z, beta, sample_weight=torch.zeros(4), **options).item() == 0.0
    learnt = weight[keep].clone().requires_grad_()
    found = ours(
        t[keep], z[keep].detach(), beta, sample_weight=learnt, target_is_logits=logits, reduction="sum"
    )
    (g,) = torch.autograd.grad(found, learnt)
    assert_close(g, ours(t[keep], z[keep].detach(), beta, target_is_logits=logits))


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_many_rows_are_taken_some_at_a_time(monkeypatch, beta):
    z = torch.randn(40, 9, dtype=F64, requires_grad=True)
    t = torch.randn(40, 9, dtype=F64, requires_grad=True)
    whole = ours(t, z, beta, target_is_logits=True)
    expected = torch.autograd.grad((whole * torch.arange(40)).sum(), (t, z))
    monkeypatch.setattr(xent.losses._divergence_rows, "PIECE", 30)
    some = ours(t, z, beta, target_is_logits=True)
    assert_close(some, whole)
    assert_close(torch.autograd.grad((some * torch.arange(40)).sum(), (t, z)), expected)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_modes_of_torch(beta):
    z, t, v = (torch.randn(3, 5, dtype=F64) for _ in range(3))

    def f(z):
        return ours(t, z, beta, target_is_logits=True).sum()

    assert_close(jvp(f, (z,), (v,))[1], (torch.autograd.functional.jacobian(f, z) * v).sum())
    many = torch.randn(4, 3, 5, dtype=F64)
    assert_close(vmap(f)(many), torch.stack([f(one) for one in many]))
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert_close(compiled(z), f(z))


def test_top_k_targets():
    z = torch.randn(3, 6, dtype=F64)
    indices = torch.tensor([[0, 1], [4, 2], [5, 3]])
    q = torch.tensor([[0.5, 0.2], [0.6, 0.4], [0.1, 0.1]], dtype=F64)
    spread = xent.TopKTarget(indices, q, "spread")
    for beta in (0.3, 1.0):
        assert_close(ours(spread, z, beta)[[0, 2]], ours(spread.to_dense(6), z, beta)[[0, 2]])
    drop = xent.TopKTarget(indices, q)
    assert_close(ours(drop, z, 0.3), ours(drop.to_dense(6), z, 0.3))
    with pytest.raises(ValueError, match="whose remainder is dropped is infinite"):
        ours(drop, z, 1.0)


HEADS = pytest.mark.parametrize("frozen", [True, False], ids=["frozen teacher", "learning teacher"])


def of_heads(student, teacher, beta, **options):
    if beta in (0.0, 1.0):
        direction = "forward" if beta == 0.0 else "reverse"
        return xent.linear_kl_divergence(student=student, teacher=teacher, direction=direction, **options)
    return xent.linear_js_divergence(student=student, teacher=teacher, beta=beta, **options)


def heads(learns):
    """Leaves of a student and a teacher of other widths, float64."""
    torch.manual_seed(0)
    sizes = (7, 4), (9, 4), (9,), (7, 3), (9, 3)
    return [torch.randn(s, dtype=F64, requires_grad=learns or i < 3) for i, s in enumerate(sizes)]


@HEADS
@pytest.mark.parametrize("budget", [None, 300])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_two_heads_are_their_logits(frozen, budget, reduction, beta):
    """Value, gradients of a first backward, and gradients of a second one."""
    leaves = heads(not frozen)
    x, w, b, y, v = leaves
    weight = torch.rand(7, dtype=F64)
    weight[3] = 0.0
    shared = {
        "temperature": torch.rand(7, dtype=F64) + 0.5,
        "scale_by_t2": True,
        "reduction": reduction,
        "sample_weight": weight,
    }
    one = of_heads((x, w, b), (y, v), beta, memory_budget=budget, **shared)
    other = ours(y @ v.t(), x @ w.t() + b, beta, target_is_logits=True, **shared)
    assert_close(one, other)
    if reduction == "none":
        upstream = torch.linspace(0.5, 1.5, 7, dtype=F64)
        one, other = (one * upstream).sum(), (other * upstream).sum()
    leaves = [t for t in leaves if t.requires_grad]
    first = [torch.autograd.grad(value, leaves, create_graph=True) for value in (one, other)]
    assert_close(*first)
    along = [torch.randn_like(t) for t in leaves]
    again = [
        torch.autograd.grad(sum((g * d).sum() for g, d in zip(gs, along, strict=True)), leaves)
        for gs in first
    ]
    assert_close(*again)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_two_heads_in_every_mode(beta):
    x, w, b, y, v = (t.detach() for t in heads(False))

    def fused(w, v):
        return of_heads((x, w, b), (y, v), beta)

    def unfused(w, v):
        return ours(y @ v.t(), x @ w.t() + b, beta, target_is_logits=True, reduction="mean")

    along = torch.randn_like(w), torch.randn_like(v)
    assert_close(jvp(fused, (w, v), along), jvp(unfused, (w, v), along))
    for argument in (0, 1):
        assert_close(jacrev(fused, argnums=argument)(w, v), jacrev(unfused, argnums=argument)(w, v))
        assert_close(hessian(fused, argnums=argument)(w, v), hessian(unfused, argnums=argument)(w, v))
    many = torch.randn(3, 9, 4, dtype=F64)
    assert_close(vmap(fused, (0, None))(many, v), torch.stack([unfused(one, v) for one in many]))
    torch._dynamo.reset()
    leaves = [w.clone().requires_grad_(), v.clone().requires_grad_()]
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*leaves), unfused(*leaves))
    one, other = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, unfused))
    assert_close(one, other)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_equal_and_masked_heads(beta):
    x, w, b, _, _ = heads(False)
    assert of_heads((x, w, b), (x, w, b), beta).item() == 0.0
    near = w.detach() + 1e-8 * torch.randn(9, 4, dtype=F64)
    with mpmath.workdps(60):
        exact_ones = [
            exact(t, z, beta, True)
            for t, z in zip((x @ near.t() + b).detach(), (x @ w.t() + b).detach(), strict=True)
        ]
    found = of_heads((x, w, b), (x, near, b), beta, reduction="none")
    assert (found >= 0).all()
    assert_close(found, torch.tensor(exact_ones, dtype=F64), rtol=1e-5, atol=0.0)
    masked = b.detach().clone()
    masked[2] = -torch.inf
    found = of_heads((x, w, masked), (x, near, masked), beta)
    keep = [i for i in range(9) if i != 2]
    assert_close(found, of_heads((x, w[keep], masked[keep]), (x, near[keep], masked[keep]), beta))
    (g,) = torch.autograd.grad(found, w)
    assert g.isfinite().all()


@pytest.mark.parametrize("learns", [False, True], ids=["frozen teacher", "learning teacher"])
def test_heads_in_float32_that_are_kept_or_not(learns):
    """A common offset of one head's logits, and heads that are equal, whichever way the moment is known."""
    x, w, b, _, v = (t.detach().float() for t in heads(False))
    v = w + 0.3 * torch.randn_like(w)
    found = []
    for budget in (None, 200):
        leaves = [w.clone().requires_grad_(), v.clone().requires_grad_(learns)]
        value = of_heads((x, leaves[0], b + 1e4), (x, leaves[1], b), 1.0, memory_budget=budget)
        grads = torch.autograd.grad(value, [t for t in leaves if t.requires_grad])
        found.append((value, grads))
    assert_close(*found, rtol=1e-4, atol=1e-6)
    same = [w.clone().requires_grad_(), w.clone().requires_grad_(learns)]
    value = of_heads((x, same[0], b), (x, same[1], b), 1.0, memory_budget=200)
    grads = torch.autograd.grad(value, [t for t in same if t.requires_grad])
    assert value.item() == 0.0
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("learns", [False, True], ids=["frozen teacher", "learning teacher"])
def test_tiles_of_several_classes_that_are_not_kept(beta, learns):
    """Where a tile is one class wide, a logit and the largest of its tile are the same."""
    torch.manual_seed(0)
    x, w = torch.randn(150, 4, dtype=F64), torch.randn(200, 4, dtype=F64, requires_grad=True)
    y, v = torch.randn(150, 3, dtype=F64), torch.randn(200, 3, dtype=F64, requires_grad=learns)
    leaves = [t for t in (w, v) if t.requires_grad]
    one = of_heads((x, w), (y, v), beta, memory_budget=20_000)
    other = ours(y @ v.t(), x @ w.t(), beta, target_is_logits=True, reduction="mean")
    assert_close(one, other)
    assert_close(torch.autograd.grad(one, leaves), torch.autograd.grad(other, leaves))


def test_the_reverse_of_a_teacher_without_mass_is_infinite():
    x, w = torch.randn(3, 2), torch.randn(4, 2)
    bias = torch.tensor([0.0, -torch.inf, 0.0, 0.0])
    assert of_heads((x, w), (x, w, bias), 1.0).item() == math.inf
    assert of_heads((x, w), (x, w, bias), 0.5).item() < math.log(2)
    assert of_heads((x, w), (x, w, bias), 0.0).isfinite()


def test_the_factor_of_the_temperature_is_its_square():
    x, w, v = torch.randn(4, 3), torch.randn(5, 3), torch.randn(5, 3)
    plain_one = xent.linear_kl_divergence(student=(x, w), teacher=(x, v), temperature=3.0)
    scaled = xent.linear_kl_divergence(student=(x, w), teacher=(x, v), temperature=3.0, scale_by_t2=True)
    assert_close(scaled, 9 * plain_one)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7, torch.tensor([0.5, 1.0, 2.0], dtype=F64)])
@pytest.mark.parametrize("budget", [None, 6_000])
def test_a_logit_scale_is_a_factor_of_both_heads(beta, temperature, budget):
    """As features scaled by it, whichever head learns; the factor T² is that of the temperature."""
    x, y = torch.randn(3, 4, dtype=F64, requires_grad=True), torch.randn(3, 5, dtype=F64)
    w, v = (
        torch.randn(20, 4, dtype=F64, requires_grad=True),
        torch.randn(20, 5, dtype=F64, requires_grad=True),
    )
    options = {"temperature": temperature, "scale_by_t2": True, "memory_budget": budget}

    def f(student, teacher, **more):
        if beta in (0.0, 1.0):
            direction = "forward" if beta == 0.0 else "reverse"
            return xent.linear_kl_divergence(
                student=student, teacher=teacher, direction=direction, **options, **more
            )
        return xent.linear_js_divergence(student=student, teacher=teacher, beta=beta, **options, **more)

    for teacher in (v, v.detach()):
        of = [x, w, v] if teacher.requires_grad else [x, w]
        for reduction in ("mean", "none"):
            one = f((x, w), (y, teacher), logit_scale=0.3, reduction=reduction)
            other = f((0.3 * x, w), (0.3 * y, teacher), reduction=reduction)
            assert_close(one, other)
            assert_close(torch.autograd.grad(one.sum(), of), torch.autograd.grad(other.sum(), of))


def test_a_logit_scale_in_a_graph():
    x, y, v = torch.randn(3, 4), torch.randn(3, 5), torch.randn(20, 5)
    w = torch.randn(20, 4, requires_grad=True)

    def f(w):
        return xent.linear_js_divergence(student=(x, w), teacher=(y, v), logit_scale=0.3, temperature=2.0)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert_close(torch.autograd.grad(compiled(w), w), torch.autograd.grad(f(w), w))


def dense_divergence(z_s, z_t, beta, *, temperature=1.0, scales=(1.0, 1.0), softcaps=(None, None)):
    """The divergence of logits by plain operations, behind both heads' scales and softcaps."""
    each = temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature
    p, t = (
        ((k * torch.tanh(c * z / k) if k else c * z) / each).log_softmax(1)
        for z, c, k in zip((z_s, z_t), scales, softcaps, strict=True)
    )
    if beta == 0.0:
        return (t.exp() * (t - p)).sum(1)
    if beta == 1.0:
        return (p.exp() * (p - t)).sum(1)
    m = (beta * t.exp() + (1 - beta) * p.exp()).log()
    return (beta * t.exp() * (t - m) + (1 - beta) * p.exp() * (p - m)).sum(1)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("budget", [None, 6_000], ids=["kept", "tiled"])
@pytest.mark.parametrize("softcap", [2.0, (2.0, None), (None, 3.0), (1.5, 3.0)], ids=str)
def test_a_softcap_of_either_head(beta, budget, softcap):
    """Values and two derivatives, whichever head learns, with scales of their own and row temperatures."""
    scales, temperature = (0.5, 1.5), torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    softcaps = softcap if isinstance(softcap, tuple) else (softcap, softcap)
    given = [torch.randn(s, dtype=F64, requires_grad=True) for s in ((3, 4), (20, 4), (3, 5), (20, 5))]

    def fused(x, w, y, v, **more):
        return of_heads(
            (x, w),
            (y, v),
            beta,
            temperature=temperature,
            logit_scale=scales,
            softcap=softcap,
            memory_budget=budget,
            **more,
        )

    def dense(x, w, y, v):
        return dense_divergence(
            x @ w.T, y @ v.T, beta, temperature=temperature, scales=scales, softcaps=softcaps
        )

    for learns in ((0, 1), (2, 3), (0, 1, 2, 3)):
        heads = [t if i in learns else t.detach() for i, t in enumerate(given)]
        of = [heads[i] for i in learns]
        along = [torch.randn_like(t) for t in of]
        for reduction in ("none", "mean"):
            found, expected = fused(*heads, reduction=reduction), dense(*heads)
            expected = expected if reduction == "none" else expected.mean()
            assert_close(found, expected)
            first, right = (
                torch.autograd.grad(value.sum(), of, create_graph=True) for value in (found, expected)
            )
            assert_close(first, right)
            second, right = (
                torch.autograd.grad(sum((g * a).sum() for g, a in zip(gs, along, strict=True)), of)
                for gs in (first, right)
            )
            assert_close(second, right)
    plain = [t.detach() for t in given]
    directions = tuple(torch.randn_like(t) for t in plain)
    slope, right = (
        torch.func.jvp(f, tuple(plain), directions)[1]
        for f in (lambda *heads: fused(*heads, reduction="none"), dense)
    )
    assert_close(slope, right)


def test_a_softcap_in_a_graph():
    x, y, v = torch.randn(3, 4), torch.randn(3, 5), torch.randn(20, 5)
    w = torch.randn(20, 4, requires_grad=True)

    def f(w):
        return xent.linear_js_divergence(
            student=(x, w), teacher=(y, v), logit_scale=(0.3, 2.0), softcap=(2.0, None), temperature=2.0
        )

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert_close(torch.autograd.grad(compiled(w), w), torch.autograd.grad(f(w), w))


def test_a_softcap_and_a_stored_teacher():
    x, w = torch.randn(3, 4, dtype=F64), torch.randn(20, 4, dtype=F64)
    target = xent.TopKTarget(torch.tensor([[2, 0]] * 3), torch.tensor([[0.5, 0.25]] * 3).double(), "bucket")
    found = xent.linear_kl_divergence(student=(x, w), teacher=target, softcap=2.0, logit_scale=0.5)
    z = 2.0 * torch.tanh(0.5 * x @ w.T / 2.0)
    assert_close(found, xent.kl_divergence(target=target, input=z, reduction="mean"))
    for pair in ({"softcap": (2.0, None)}, {"logit_scale": (1.0, 2.0)}):
        with pytest.raises(ValueError, match="must be one number where the teacher is a TopKTarget"):
            xent.linear_kl_divergence(student=(x, w), teacher=target, **pair)
    with pytest.raises(ValueError, match="one for the student and one for the teacher"):
        xent.linear_kl_divergence(student=(x, w), teacher=(x, w), softcap=(1.0, 2.0, 3.0))
