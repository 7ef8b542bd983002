"""KL(t ‖ p): of logits against mpmath, of two heads against that of their logits, in every mode."""

from __future__ import annotations

import contextlib
import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jvp, vmap
from torch.testing import assert_close

import xent
from core.test_sweep import LiveBytes
from xent._autograd import custom_ops
from xent._autograd.forms import TwoHeads
from xent._core import matmul, ops
from xent._core.tiles.divergences import NEAR, phi
from xent._core.tiles.pair import PairForm

F64 = torch.float64
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32)}
BOTH = pytest.mark.parametrize("dtype", list(EPS), ids=lambda t: str(t).removeprefix("torch."))


# --- exact arithmetic ---------------------------------------------------------------------------------------


def log_softmax(z: list[float], temperature: float = 1.0) -> list[mpmath.mpf]:
    z = [mpmath.mpf(v) / mpmath.mpf(temperature) for v in z]
    top = max(z)
    total = mpmath.log(mpmath.fsum(mpmath.exp(v - top) for v in z))
    return [(v - top) - total for v in z]


def exact_kl(target, z, *, logits, temperature=1.0) -> mpmath.mpf:
    """Σ t (log t − log p) of one row, to a hundred digits more than its smallest probability."""
    z = z.double().tolist()
    with mpmath.workdps(900):
        log_p = log_softmax(z, temperature)
        if logits:
            log_t = log_softmax(target.double().tolist(), temperature)
            return mpmath.fsum(
                mpmath.exp(a) * (a - b) for a, b in zip(log_t, log_p, strict=True) if a != -mpmath.inf
            )
        t = [mpmath.mpf(v) for v in target.double().tolist()]
        return mpmath.fsum(c * (mpmath.log(c) - b) for c, b in zip(t, log_p, strict=True) if c != 0)


def error(found: float, expected: mpmath.mpf) -> float:
    return float(abs(mpmath.mpf(found) - expected) / abs(expected))


@BOTH
def test_phi_to_a_few_units_in_the_last_place(dtype):
    """e^δ − 1 − δ near 0, where expm1(δ) − δ loses all digits below 1e-8."""
    sizes = torch.cat([torch.logspace(-15, math.log10(NEAR), 300), torch.linspace(0.01, NEAR, 300)]).to(dtype)
    for delta in (sizes, -sizes):
        for x, value in zip(delta.double().tolist(), phi(delta).double().tolist(), strict=True):
            with mpmath.workdps(60):
                assert error(value, mpmath.expm1(mpmath.mpf(x)) - mpmath.mpf(x)) <= 3 * EPS[dtype]


@BOTH
@pytest.mark.parametrize("difference", [1.0, 1e-1, 1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_near_logits_keep_their_digits(dtype, difference, offset, temperature):
    """KL ~ difference²: 1e-16 is known to as many digits as 1."""
    for classes in (2, 7, 40) * 3:
        t = torch.randn(classes, dtype=dtype) * 2
        z = t + difference * torch.randn(classes, dtype=dtype) + offset
        if offset:
            z, t = z.round(decimals=3), t.round(decimals=3)
        if torch.equal(z - z[0], t - t[0]):
            continue
        found = xent.kl_divergence(target=t, input=z, target_is_logits=True, temperature=temperature)
        expected = exact_kl(t, z, logits=True, temperature=temperature)
        assert error(found.item(), expected) <= 30 * EPS[dtype]


def rows(kind: str, classes: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(student's logits, teacher's logits)"""
    z, t = (3 * torch.randn(classes, dtype=dtype) for _ in range(2))
    if kind == "confident":  # both in the same class
        z[0], t[0] = z.max() + 40, t.max() + 30
    elif kind == "beyond doubt":
        z[0], t[0] = z.max() + 69, t.max() + 69
    elif kind == "hopeless":
        z[0], t[0] = z.min() - (600 if dtype == F64 else 80), t.max() + 20
    elif kind == "huge offset":
        z, t = z + (1e12 if dtype == F64 else 1e6), t - (1e10 if dtype == F64 else 1e5)
    elif kind == "masked in both":
        z[-1] = t[-1] = -math.inf
    elif kind == "masked in the teacher":
        t[-1] = -math.inf
    elif kind == "wide":
        z, t = 30 * z, 30 * t
    return z, t


KINDS = ["normal", "confident", "beyond doubt", "hopeless", "huge offset", "masked in both", "wide"]


@BOTH
@pytest.mark.parametrize("kind", [*KINDS, "masked in the teacher"])
@pytest.mark.parametrize("classes", [2, 7, 40])
def test_two_logits_against_mpmath(dtype, kind, classes):
    """Beside 8 units in the last place: what rounding a subtraction a class costs, through |p − t| and t|δ|,
    and through the exponential that each term is a multiple of."""
    for _ in range(5):
        z, t = rows(kind, classes, dtype)
        found = xent.kl_divergence(target=t, input=z, target_is_logits=True)
        expected = exact_kl(t, z, logits=True)
        p, q = (v.double().softmax(0) for v in (z, t))
        far_z, far_t = (torch.where(v > -math.inf, v.double().max() - v.double(), 0.0) for v in (z, t))
        delta = torch.where(q > 0, z.double().log_softmax(0) - t.double().log_softmax(0), 0.0).abs()
        slopes = ((p - q).abs() * far_z).sum() + (q * (delta + float(expected)) * far_t).sum()
        relative = 8 + far_t.max().item()
        bound = EPS[dtype] * (relative * expected + 2 * slopes.item())
        assert found >= 0
        assert abs(mpmath.mpf(found.item()) - expected) <= bound + torch.finfo(dtype).smallest_normal


@BOTH
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mass", [1.0, 1e-3, 50.0])
def test_probabilities_against_mpmath(dtype, kind, mass):
    for classes in (2, 7, 40):
        z, _ = rows(kind, classes, dtype)
        t = torch.rand(classes, dtype=dtype) * mass * (z > -math.inf)
        t[1] = 0.0
        found = xent.kl_divergence(target=t, input=z)
        expected = exact_kl(t, z, logits=False)
        size = sum(abs(v) for v in (t.double() * t.double().log().nan_to_num(0, 0, 0)).tolist())
        p = z.double().softmax(0) * t.sum().item()
        far = torch.where(z > -math.inf, z.double().max() - z.double(), 0.0)
        size += ((p - t).abs() * far).sum().item() + t.sum().item()
        assert abs(mpmath.mpf(found.item()) - expected) <= 8 * EPS[dtype] * size


@BOTH
def test_a_target_near_the_prediction(dtype):
    """The plain sum errs by eps here; φ by eps times the distance, beside the rounding of the mass itself."""
    z = torch.randn(9, dtype=F64) * 2
    t = (z + 1e-3 * torch.randn(9, dtype=F64)).softmax(0).to(dtype)
    found = xent.kl_divergence(target=t, input=z.to(dtype)).item()
    expected = exact_kl(t, z.to(dtype), logits=False)
    assert abs(mpmath.mpf(found) - expected) <= EPS[dtype] * 1e-2 + 4 * EPS[F64]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_round_once(dtype):
    z, t = torch.randn(6, 20).to(dtype), torch.randn(6, 20).to(dtype)
    for logits in (True, False):
        target = t if logits else t.abs()
        half = xent.kl_divergence(target=target, input=z, target_is_logits=logits)
        full = xent.kl_divergence(target=target.float(), input=z.float(), target_is_logits=logits)
        assert half.dtype == dtype
        assert torch.equal(half, full.to(dtype))


# --- what KL is ---------------------------------------------------------------------------------------------


def test_worked_values():
    even, odds = torch.tensor([0.5, 0.5]), torch.tensor([0.6, 0.4])
    one = xent.kl_divergence(target=odds, input=even.log())
    other = xent.kl_divergence(target=even, input=odds.log())
    assert round(one.item(), 6) == 0.020136
    assert round(other.item(), 6) == 0.020411  # no distance: the other way round it is another number
    bits = xent.kl_divergence(target=odds, input=even.log(), bits=True)
    assert_close(bits, one / math.log(2))


def test_shapes():
    for shape, of_rows in [((5,), ()), ((3, 5), (3,)), ((3, 5, 2, 4), (3, 2, 4)), ((0, 5), (0,))]:
        z, t = torch.randn(shape, dtype=F64), torch.randn(shape, dtype=F64)
        found = xent.kl_divergence(target=t, input=z, target_is_logits=True)
        assert found.shape == of_rows
        axis = 0 if len(shape) == 1 else 1
        p, q = z.log_softmax(axis), t.log_softmax(axis)
        assert_close(found, (q.exp() * (q - p)).sum(axis))
        assert_close(xent.kl_divergence(target=q.exp(), input=z), found)


LOGITS = st.lists(st.floats(-60, 60, width=32), min_size=2, max_size=6)


@given(LOGITS, LOGITS, st.floats(-1e4, 1e4, width=32))
def test_never_negative_and_shift_invariant(z, t, shift):
    classes = min(len(z), len(t))
    z, t = (torch.tensor(v[:classes], dtype=F64) for v in (z, t))
    kl = xent.kl_divergence(target=t, input=z, target_is_logits=True)
    assert kl >= 0
    assert_close(xent.kl_divergence(target=t - shift, input=z + shift, target_is_logits=True), kl)
    assert xent.kl_divergence(target=z, input=z, target_is_logits=True) == 0


def test_equals_cross_entropy_less_entropy():
    for temperature in (1.0, 2.5):
        z, t = (torch.randn(8, 6, dtype=F64) for _ in range(2))
        q = (t / temperature).softmax(1)
        difference = xent.cross_entropy(z, q, temperature=temperature, reduction="none") - xent.entropy(
            t, temperature=temperature
        )
        for target, logits in ((t, True), (q, False)):
            kl = xent.kl_divergence(
                target=target,
                input=z,
                target_is_logits=logits,
                temperature=temperature,
            )
            assert_close(kl, difference)


def test_the_student_is_taught_as_by_cross_entropy():
    """With the target constant, ∂KL/∂z = ∂CE/∂z."""
    z, q = torch.randn(8, 6, dtype=F64, requires_grad=True), torch.rand(8, 6, dtype=F64)
    (one,) = torch.autograd.grad(xent.kl_divergence(target=q, input=z).sum(), z)
    (other,) = torch.autograd.grad(xent.cross_entropy(z, q, reduction="sum"), z)
    assert_close(one, other)


def test_corners():
    inf = math.inf
    z = torch.tensor([0.0, 1.0, -inf], dtype=F64, requires_grad=True)
    kl = xent.kl_divergence(target=torch.tensor([0.5, 0.5, 0.0], dtype=F64), input=z)
    (g,) = torch.autograd.grad(kl, z)
    assert kl.isfinite()
    assert g.isfinite().all()
    assert g[2] == 0
    assert xent.kl_divergence(target=torch.tensor([0.5, 0.4, 0.1]), input=z.detach()) == inf
    assert xent.kl_divergence(target=torch.zeros(3), input=z.detach()) == 0
    one_hot = xent.kl_divergence(target=torch.tensor([1.0, 0.0]), input=torch.tensor([0.0, -40.0]))
    assert_close(one_hot.item(), 4.248354255291589e-18, rtol=1e-6, atol=0)
    for teacher in (z.detach(), torch.tensor([0.0, 1.0, -inf], dtype=F64)):
        both = teacher.clone().requires_grad_()
        kl = xent.kl_divergence(target=both, input=z, target_is_logits=True)
        assert kl == 0
        assert all((g == 0).all() for g in torch.autograd.grad(kl, (z, both)))
    t = torch.tensor([0.0, 1.0], dtype=F64, requires_grad=True)
    (g,) = torch.autograd.grad(xent.kl_divergence(target=t, input=torch.zeros(2, dtype=F64)), t)
    assert g.tolist() == [-inf, 1 + math.log(2)]  # the slope of t·log t at 0


def test_errors():
    z = torch.zeros(2, 3)
    bad = torch.tensor([[0.5, 0.5, 0.0], [0.5, -0.1, 0.6]])
    with pytest.raises(ValueError, match=r"-0\.1.* at \(1, 1\)"):
        xent.kl_divergence(target=bad, input=z)
    with pytest.raises(ValueError, match=r"nan at \(0, 2\)"):
        xent.kl_divergence(target=torch.tensor([[0.5, 0.5, math.nan]] * 2), input=z)
    with pytest.raises(ValueError, match="shape of input"):
        xent.kl_divergence(target=z[:1], input=z)
    with pytest.raises(ValueError, match="temperature"):
        xent.kl_divergence(target=z, input=z, temperature=0.0)
    with pytest.raises(ValueError, match="temperature takes no gradient"):
        xent.kl_divergence(target=z, input=z, temperature=torch.tensor(2.0, requires_grad=True))
    with pytest.raises(TypeError, match="target"):
        xent.kl_divergence(target=z.long(), input=z)
    x, w = torch.zeros(4, 2), torch.zeros(3, 2)
    for student, teacher, said in [
        ((x, w), (x[:3], w), "same rows"),
        ((x, w), (x, torch.zeros(5, 2)), "3 and 5 classes"),
        ((x, w), (x, torch.zeros(3, 4)), "the teacher: input has 2 features"),
        ((x,), (x, w), "student must be"),
    ]:
        with pytest.raises(ValueError, match=said):
            xent.linear_kl_divergence(student=student, teacher=teacher)
    with pytest.raises(TypeError, match=r"float32 and the teacher in torch\.float64"):
        xent.linear_kl_divergence(student=(x, w), teacher=(x.double(), w.double()))
    with pytest.raises(ValueError, match="sample_weight"):
        xent.linear_kl_divergence(student=(x, w), teacher=(x, w), sample_weight=torch.ones(3))
    with pytest.raises(ValueError, match="reduction"):
        xent.linear_kl_divergence(student=(x, w), teacher=(x, w), reduction="batchmean")
    with pytest.raises(ValueError, match="at least"):
        xent.linear_kl_divergence(student=(x, w), teacher=(x, w), memory_budget=10)


# --- derivatives of the dense form --------------------------------------------------------------------------


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("near", [True, False])
def test_dense_gradcheck_and_gradgradcheck(logits, near):
    z = torch.randn(3, 4, dtype=F64)
    t = z + 1e-2 * torch.randn(3, 4, dtype=F64) if near else torch.randn(3, 4, dtype=F64)
    t = t if logits else t.softmax(1) * 1.1
    z, t = z.requires_grad_(), t.detach().requires_grad_()

    def loss(z, t):
        return xent.kl_divergence(target=t, input=z, target_is_logits=logits, temperature=1.3)

    assert torch.autograd.gradcheck(loss, (z, t), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, (z, t))


def test_dense_in_every_mode():
    z, t = torch.randn(4, 5, dtype=F64), torch.randn(4, 5, dtype=F64)

    def ours(z):
        return xent.kl_divergence(target=t, input=z, target_is_logits=True).sum()

    def theirs(z):
        p, q = z.log_softmax(1), t.log_softmax(1)
        return (q.exp() * (q - p)).sum()

    assert_close(grad(ours)(z), grad(theirs)(z))
    assert_close(hessian(ours)(z), hessian(theirs)(z))
    assert_close(jvp(ours, (z,), (t,)), jvp(theirs, (z,), (t,)))
    each = vmap(lambda z, t: xent.kl_divergence(target=t, input=z, target_is_logits=True))(z, t)
    assert_close(each.sum(), theirs(z))
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_close(compiled(z), theirs(z))
    third = torch.func.jacrev(hessian(ours))(z)
    assert_close(third, torch.func.jacrev(hessian(theirs))(z))


@pytest.mark.parametrize("logits", [True, False])
def test_many_rows_some_at_a_time(monkeypatch, logits):
    """The same numbers, derivatives of any order, any shape of rows."""
    z, t = torch.randn(3, 5, 2, dtype=F64), torch.rand(3, 5, 2, dtype=F64)

    def derivatives():
        leaves = [v.clone().requires_grad_() for v in (z, t)]
        kl = xent.kl_divergence(target=leaves[1], input=leaves[0], target_is_logits=logits)
        upstream = torch.arange(6.0, dtype=F64).reshape(3, 2)
        first = torch.autograd.grad(kl, leaves, upstream, retain_graph=True)
        again = torch.autograd.grad(kl, leaves, upstream, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in again), leaves, create_graph=True)
        third = torch.autograd.grad(second[0].square().sum(), leaves, retain_graph=True)
        one = torch.autograd.grad(kl, leaves[:1], torch.stack([upstream] * 2), is_grads_batched=True)
        return kl, first, again, second, third, one

    whole = derivatives()
    monkeypatch.setattr(xent.losses._divergence_rows, "PIECE", 10)
    assert_close(derivatives(), whole)
    with torch.no_grad():
        assert_close(xent.kl_divergence(target=t, input=z, target_is_logits=logits), whole[0])


@pytest.mark.parametrize("piece", [1, 1 << 16])
def test_a_target_made_of_the_input(monkeypatch, piece):
    """What reaches the logits through the target counts once, in a second derivative too."""
    z = torch.randn(3, 5, dtype=F64, requires_grad=True)
    monkeypatch.setattr(xent.losses._divergence_rows, "PIECE", piece)

    def ours(z):
        return xent.kl_divergence(target=z.square(), input=z, target_is_logits=True).sum()

    def theirs(z):
        p, q = z.log_softmax(1), z.square().log_softmax(1)
        return (q.exp() * (q - p)).sum()

    found, expected = (torch.autograd.grad(f(z), z, create_graph=True) for f in (ours, theirs))
    assert_close(found, expected)
    (found,), (expected,) = (torch.autograd.grad(g[0].square().sum(), z) for g in (found, expected))
    assert_close(found, expected)


def test_near_gradients_keep_their_digits():
    """p − t as t·expm1(δ), not as a difference of numbers near each other."""
    t = torch.randn(7, dtype=F64)
    z = (t + 1e-7 * torch.randn(7, dtype=F64)).requires_grad_()
    (g,) = torch.autograd.grad(xent.kl_divergence(target=t, input=z, target_is_logits=True), z)
    with mpmath.workdps(60):
        p, q = (log_softmax(v.tolist()) for v in (z, t))
        expected = [mpmath.exp(a) - mpmath.exp(b) for a, b in zip(p, q, strict=True)]
        size = max(abs(e) for e in expected)
        assert all(abs(a - e) <= 1e-14 * size for a, e in zip(g.tolist(), expected, strict=True))


# --- two linear heads ---------------------------------------------------------------------------------------

N, D, WIDTH, C = 6, 4, 3, 7


def heads(dtype=F64, bias=True, n=N, c=C):
    shapes = [(n, D), (c, D), (c,), (n, WIDTH), (c, WIDTH), (c,)]
    return [torch.randn(s, dtype=dtype) if bias or len(s) == 2 else None for s in shapes]


def linear(leaves, **options):
    return xent.linear_kl_divergence(student=leaves[:3], teacher=leaves[3:], **options)


def dense(leaves, reduction="mean", sample_weight=None, **options):
    z, t = (x @ w.T if b is None else x @ w.T + b for x, w, b in (leaves[:3], leaves[3:]))
    if z.dim() == 1:
        kl = xent.kl_divergence(target=t, input=z, target_is_logits=True, **options)
    else:
        kl = xent.kl_divergence(
            target=t.reshape(-1, t.shape[-1]),
            input=z.reshape(-1, z.shape[-1]),
            target_is_logits=True,
            **options,
        ).reshape(z.shape[:-1])
    s = torch.ones_like(kl) if sample_weight is None else sample_weight
    kl = kl * s
    return {"none": lambda: kl, "sum": kl.sum, "mean": lambda: kl.sum() / s.sum()}[reduction]()


def leaf(tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def present(tensors):
    return [t for t in tensors if t is not None]


BUDGETS = pytest.mark.parametrize("budget", [None, 1500, 500])  # a chunk of all rows; tiles of 3; of 1 class
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


@BUDGETS
@REDUCTIONS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_two_heads_equal_their_logits(budget, reduction, bias, weighted):
    leaves = leaf(heads(bias=bias))
    s = torch.rand(N, dtype=F64) if weighted else None
    options = dict(reduction=reduction, sample_weight=s, temperature=1.7)
    ours, theirs = linear(leaves, memory_budget=budget, **options), dense(leaves, **options)
    assert_close(ours, theirs)
    upstream = torch.rand_like(ours)
    expected = torch.autograd.grad(theirs, present(leaves), upstream)
    for _ in range(3):  # the first takes what has been formed, the others recompute
        found = torch.autograd.grad(ours, present(leaves), upstream, retain_graph=True)
        assert_close(found, expected)


@BUDGETS
@pytest.mark.parametrize("learns", [(0, 1, 2), (1,), (3, 4, 5), (5,), (0, 4)], ids=str)
def test_one_learns_from_the_other(budget, learns):
    """A frozen teacher's values come with the gradient, and a frozen student's before it."""
    tensors = heads()
    leaves = [t.requires_grad_(i in learns) for i, t in enumerate(tensors)]
    wanted = [leaves[i] for i in learns]
    ours, theirs = linear(leaves, memory_budget=budget), dense(leaves)
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad(ours, wanted), torch.autograd.grad(theirs, wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [None, 3000])
def test_types(dtype, budget):
    leaves = leaf([t.to(dtype) for t in heads()])
    exact = leaf([t.double() for t in leaves])
    ours, theirs = linear(leaves, memory_budget=budget), dense(exact)
    assert ours.dtype == dtype
    tolerance = 3e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    pairs = zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, exact), strict=True)
    for found, expected in pairs:
        assert found.dtype == dtype
        assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_teacher_in_half_type_teaches_a_student_in_float32():
    leaves = heads(torch.float32)
    teacher = [t.bfloat16() for t in leaves[3:]]
    ours = linear([*leaves[:3], *teacher])
    assert ours.dtype == torch.float32
    assert_close(ours, dense([*leaves[:3], *(t.float() for t in teacher)]))


def test_autocast():
    leaves = heads(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear(leaves)
        assert (
            xent.kl_divergence(target=leaves[0], input=leaves[0], target_is_logits=True).dtype
            == torch.float32
        )
    assert ours.dtype == torch.float32
    assert_close(ours, dense([t.bfloat16().float() for t in leaves]))


def test_leading_dimensions():
    x, w, b, teacher_x, teacher_w, teacher_b = heads()
    x, teacher_x = x.reshape(2, 3, D), teacher_x.reshape(2, 3, WIDTH)
    leaves = [x, w, b, teacher_x, teacher_w, teacher_b]
    assert linear(leaves, reduction="none").shape == (2, 3)
    assert_close(linear(leaves, reduction="none"), dense(leaves, reduction="none"))
    one = [x[0, 0], w, b, teacher_x[0, 0], teacher_w, teacher_b]
    assert linear(one, reduction="none").shape == ()
    assert_close(linear(one), dense(one))


@BUDGETS
def test_equal_heads_have_no_divergence(budget):
    leaves = leaf(heads()[:3] * 2)
    kl = linear(leaves, memory_budget=budget)
    assert kl == 0
    assert all((g == 0).all() for g in torch.autograd.grad(kl, leaves))


@BOTH
def test_never_negative(dtype):
    for scale in (1e-7, 1e-4, 1e-1, 10.0):
        leaves = heads(dtype, n=50)
        leaves[3:] = [leaves[0], leaves[1] + scale * torch.randn(C, D, dtype=dtype), leaves[2]]
        for budget in (None, 1500):
            kl = linear(leaves, reduction="none", memory_budget=budget)
            assert (kl >= 0).all()
            if scale == 1e-4 and dtype == F64:
                assert_close(kl, dense(leaves, reduction="none"), rtol=1e-9, atol=0)


@BUDGETS
@REDUCTIONS
def test_rows_of_weight_zero_are_left_out(budget, reduction):
    leaves = heads()
    s = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, 1.0], dtype=F64)
    clean = leaf([leaves[0][s > 0], *leaves[1:3], leaves[3][s > 0], *leaves[4:]])
    leaves[0][s == 0], leaves[3][s == 0] = math.nan, math.inf
    leaves = leaf(leaves)
    ours = linear(leaves, reduction=reduction, sample_weight=s, memory_budget=budget)
    theirs = dense(clean, reduction=reduction, sample_weight=s[s > 0])
    found = torch.autograd.grad(ours.sum(), leaves)
    expected = list(torch.autograd.grad(theirs.sum(), clean))
    for i in (0, 3):
        expected[i] = torch.zeros_like(leaves[i]).index_copy(0, s.nonzero().squeeze(1), expected[i])
    assert_close(found, tuple(expected))
    assert_close(ours[s > 0] if reduction == "none" else ours, theirs)
    if reduction == "none":
        assert (ours[s == 0] == 0).all()


@REDUCTIONS
def test_no_rows_to_count(reduction):
    leaves = leaf(heads())
    value = linear(leaves, reduction=reduction, sample_weight=torch.zeros(N, dtype=F64))
    assert (value == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(value.sum(), leaves))
    assert linear([t[:0] if i in (0, 3) else t for i, t in enumerate(leaves)]) == 0


def test_a_learnt_sample_weight():
    leaves = heads()
    s = torch.rand(N, dtype=F64).requires_grad_()
    for reduction in ("mean", "sum"):
        ours, theirs = (f(leaves, reduction=reduction, sample_weight=s) for f in (linear, dense))
        assert_close(torch.autograd.grad(ours, s), torch.autograd.grad(theirs, s))


def test_a_confident_row_keeps_the_digits_of_its_gradient():
    """1 − 1e-10 and 1 − 1e-9 are 1 in float32; the difference of the probabilities is not."""
    one, other = (torch.tensor([0.0, math.log(tiny)]) for tiny in (1e-9, 1e-10))
    bias = one.clone().requires_grad_()
    x, w = torch.zeros(3, 1), torch.zeros(2, 1)
    xent.linear_kl_divergence(student=(x, w, bias), teacher=(x, w, other)).backward()
    assert_close(bias.grad, torch.tensor([-9e-10, 9e-10]), rtol=1e-5, atol=0)


def test_batched_upstream_gradients():
    """The gradient formed in the forward sweep is for one upstream gradient."""
    leaves = leaf(heads())
    upstream = torch.rand(3, dtype=F64)
    found = torch.autograd.grad(linear(leaves), leaves, upstream, is_grads_batched=True)
    (one,) = torch.autograd.grad(linear(leaves), leaves[1])
    assert_close(found[1], upstream[:, None, None] * one)


def test_heads_that_share_their_tensors():
    """Self-distillation: one weight for both, and features made of one another."""
    x, w, b, _, _, other = heads()
    leaves = leaf([x, w, b, other])
    upstream = torch.rand((), dtype=F64)
    for options in ({}, {"reduction": "none"}):
        found = []
        for f in (linear, dense):
            x, w, b, other = leaves
            value = f([x, w, b, x.square(), w, other], **options).sum() * upstream
            plain = torch.autograd.grad(value, leaves, retain_graph=True)
            again = torch.autograd.grad(value, leaves, create_graph=True)
            found.append((plain, again, torch.autograd.grad(sum(g.square().sum() for g in again), leaves)))
        assert_close(found[0], found[1])


def test_masked_classes():
    """−inf in both biases: at no cost and no gradient, in one tile or alone in one."""
    leaves = heads()
    leaves[2][-1] = leaves[5][-1] = -math.inf
    fewer = leaf([t[:-1] if i in (1, 2, 4, 5) else t for i, t in enumerate(leaves)])
    leaves = leaf(leaves)
    for budget in (None, 500):
        ours, theirs = linear(leaves, memory_budget=budget), dense(fewer)
        assert_close(ours, theirs)
        pairs = zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, fewer), strict=True)
        for i, (found, expected) in enumerate(pairs):
            if i in (1, 2, 4, 5):
                assert (found[-1] == 0).all()
                found = found[:-1]
            assert_close(found, expected)
    student = [t.detach() for t in leaves]
    student[5] = torch.zeros_like(student[5])
    assert linear(student) == math.inf  # masked where the teacher has mass


@BUDGETS
def test_gradcheck_and_gradgradcheck(budget):
    leaves = leaf(heads(n=3, c=4))

    def loss(*leaves):
        return linear(leaves, reduction="none", temperature=1.3, memory_budget=budget)

    assert torch.autograd.gradcheck(loss, leaves, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, leaves, check_fwd_over_rev=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("which", [range(6), (1,), (0, 2), (3, 4, 5), (1, 4)], ids=str)
def test_double_backward(reduction, which):
    """Of any of the leaves, through the gradient that was formed in the forward sweep too."""
    tensors = heads()
    leaves = [t.requires_grad_(i in which) for i, t in enumerate(tensors)]
    wanted = [leaves[i] for i in which]
    upstream = torch.rand(N, dtype=F64) if reduction == "none" else torch.tensor(0.7, dtype=F64)
    tangents = [torch.randn_like(t) for t in wanted]
    found = []
    for f in (linear, dense):
        first = torch.autograd.grad(f(leaves, reduction=reduction), wanted, upstream, create_graph=True)
        value = sum((g * v).sum() for g, v in zip(first, tangents, strict=True))
        found.append((first, torch.autograd.grad(value, wanted)))
    assert_close(found[0], found[1])


def test_torch_func():
    leaves = heads(n=3, c=4)

    def scalar(f):
        return lambda *leaves: f(list(leaves))

    every = tuple(range(6))
    assert_close(grad(scalar(linear), every)(*leaves), grad(scalar(dense), every)(*leaves))
    for i in (0, 1, 4, 5):
        assert_close(hessian(scalar(linear), i)(*leaves), hessian(scalar(dense), i)(*leaves))
        assert_close(jacfwd(scalar(linear), i)(*leaves), jacfwd(scalar(dense), i)(*leaves))
    tangents = tuple(torch.randn_like(t) for t in leaves)
    assert_close(
        jvp(grad(scalar(linear), every), tuple(leaves), tangents),
        jvp(grad(scalar(dense), every), tuple(leaves), tangents),
    )
    s = torch.tensor([1.0, 0.0, 2.0], dtype=F64)
    leaves[0][1], leaves[3][1] = math.nan, math.inf

    def per_sample(x, y, s):
        return linear([x, *leaves[1:3], y, *leaves[4:]], reduction="sum", sample_weight=s)

    each = vmap(per_sample)(leaves[0], leaves[3], s)
    assert_close(each, linear(leaves, reduction="none", sample_weight=s))
    x, y, w = leaves[0], leaves[3], leaves[1]
    of_weight = vmap(
        grad(lambda w, x, y, s: linear([x, w, leaves[2], y, *leaves[4:]], reduction="sum", sample_weight=s)),
        (None, 0, 0, 0),
    )(w, x, y, s)
    whole = grad(lambda w: linear([x, w, *leaves[2:]], reduction="sum", sample_weight=s))(w)
    assert_close(of_weight.sum(0), whole)
    leaves[2][0] = -math.inf  # what costs +inf counts for nothing either
    assert vmap(per_sample)(x, y, s).tolist() == [math.inf, 0.0, math.inf]


def test_a_third_derivative_raises():
    leaves = leaf(heads())
    (g,) = torch.autograd.grad(linear(leaves), leaves[1], create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), leaves[1], create_graph=True)
    with pytest.raises(NotImplementedError, match="kl_divergence and js_divergence of both heads' logits"):
        h.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph(dynamic):
    s = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, 1.0], dtype=F64)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for options in ({}, {"sample_weight": s}, {"reduction": "none", "temperature": 2.0}):
        leaves = leaf(heads())
        ours, theirs = compiled(leaves, **options), linear(leaves, **options)
        assert_close(ours, theirs)
        assert_close(torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(theirs.sum(), leaves))


def test_export():
    class Lesson(torch.nn.Module):
        def __init__(self):
            super().__init__()
            _, self.w, self.b, _, self.teacher_w, self.teacher_b = (
                torch.nn.Parameter(t) for t in heads(torch.float32)
            )

        def forward(self, x, y):
            return linear([x, self.w, self.b, y, self.teacher_w, self.teacher_b])

    lesson, (x, _, _, y, _, _) = Lesson(), heads(torch.float32)
    rows = torch.export.Dim("rows", min=2)
    exported = torch.export.export(lesson, (x, y), dynamic_shapes=({0: rows}, {0: rows})).module()
    assert_close(exported(x, y), lesson(x, y))
    assert_close(exported(x[:3], y[:3]), lesson(x[:3], y[:3]))


def test_a_derivative_that_a_graph_has_not_is_no_silent_zero():
    leaves, along = heads(), torch.randn(N, D, dtype=F64)

    def derivative(x):
        return jvp(lambda x: linear([x, *leaves[1:]]), (x,), (along,))[1]

    with pytest.raises((NotImplementedError, torch._dynamo.exc.Unsupported)):
        torch.compile(derivative, backend="aot_eager", fullgraph=True)(leaves[0])
    compiled = torch.compile(lambda x: linear([x, *leaves[1:]]), backend="aot_eager", fullgraph=True)
    compiled(leaves[0])
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="of the eager loss"):
        compiled(forward_ad.make_dual(leaves[0], along))


def test_opcheck():
    leaves = leaf(heads())
    kept = torch.tensor([True, False, True, True, True, True])
    form = TwoHeads(PairForm(None, None, 1.5, (0.5, 2.0), (None, 3.0), 1 << 20))
    for tensors in ((*leaves, None, None, kept), (*leaves[:2], None, *leaves[3:], None, None, None)):
        given, present, *settings = custom_ops.arguments(form, tensors)
        torch.library.opcheck(torch.ops.xent.rows.default, (given, present, True, *settings))
    plain = [None if t is None else t.detach() for t in (*leaves, None, None, kept)]
    given, present, *settings = custom_ops.arguments(form, tuple(plain))
    _, saved, _ = torch.ops.xent.rows(given, present, True, *settings)
    arguments = (torch.rand(1, N, dtype=F64), saved, [True] * 6, given, present, *settings)
    torch.library.opcheck(torch.ops.xent.rows_gradient.default, arguments)


def test_meta_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    for place, within in ((lambda t: t.to("meta"), contextlib.nullcontext()), (mode.from_tensor, mode)):
        with within:
            leaves = [place(t).requires_grad_() for t in heads(torch.float32)]
            loss = linear(leaves)
            assert loss.shape == ()
            assert [g.shape for g in torch.autograd.grad(loss, leaves)] == [t.shape for t in leaves]
            z = place(torch.randn(3, 4))
            assert xent.kl_divergence(target=z, input=z).shape == (3,)


# --- what it costs ------------------------------------------------------------------------------------------

MANY, DEEP, CLASSES = 600, 8, 300


@pytest.fixture
def products(monkeypatch):
    """Multiply-adds of every matrix product, over those of one product of one head."""
    done = []
    plain = ops.multiply_

    def counting(out, a, b, *, accumulate):
        done.append(a.shape[0] * a.shape[1] * b.shape[1])
        plain(out, a, b, accumulate=accumulate)

    monkeypatch.setattr(ops, "multiply_", counting)
    return lambda: sum(done) / (MANY * DEEP * CLASSES)


def large(student=True, teacher=False, dtype=torch.float32):
    """Heads as wide as `LiveBytes` takes gradients to be."""
    shapes = [(MANY, DEEP), (CLASSES, DEEP)] * 2
    x, w, teacher_x, teacher_w = (torch.randn(s).to(dtype) for s in shapes)
    x, w = x.requires_grad_(student), w.requires_grad_(student)
    return (x, w), (teacher_x.requires_grad_(teacher), teacher_w.requires_grad_(teacher))


HOLDS_A_CHUNK = 128 * CLASSES * (2 + 2 + 1) * 4 * 4 // 3
HOLDS_FEWER = 128 * CLASSES * 2 * 4


@pytest.mark.parametrize(
    ("student", "teacher", "budget", "count"),
    [
        (False, False, None, 2),
        (False, False, HOLDS_FEWER, 4),
        (True, False, None, 4),
        (True, False, HOLDS_A_CHUNK, 4),
        (True, False, HOLDS_FEWER, 6),
        (True, True, None, 6),
        (True, True, HOLDS_FEWER, 8),
    ],
)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_products(products, student, teacher, budget, count, direction):
    """Each head's logits, a product for each gradient; where a chunk does not fit, the logits again."""
    heads = large(student, teacher)
    loss = xent.linear_kl_divergence(
        student=heads[0], teacher=heads[1], memory_budget=budget, direction=direction
    )
    if student or teacher:
        loss.backward()
    assert products() == count


@pytest.mark.parametrize(
    ("teacher", "budget", "count"),
    [(False, None, 4), (False, HOLDS_FEWER, 8), (True, None, 6), (True, HOLDS_FEWER, 10)],
)
def test_products_of_jensen_shannon(products, teacher, budget, count):
    """Its moments are known when both heads are normalised: one more pass where a chunk does not fit."""
    heads = large(True, teacher)
    xent.linear_js_divergence(student=heads[0], teacher=heads[1], memory_budget=budget).backward()
    assert products() == count


def test_products_of_weights_alone_and_of_rows_left_out(products):
    (x, w), teacher = large()
    s = torch.ones(MANY)
    s[: MANY // 2] = 0
    xent.linear_kl_divergence(student=(x.detach(), w), teacher=teacher, sample_weight=s).backward()
    assert products() == 1.5


@pytest.mark.parametrize("budget", [1 << 21, HOLDS_A_CHUNK, HOLDS_FEWER, 100_000])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sweep_stays_within_its_budget(budget, reduction, teacher, dtype):
    """Everything alive at once in forward and backward."""
    heads = large(teacher=teacher, dtype=dtype)
    matmul._allowed()  # the probe of this process is no part of a sweep
    with LiveBytes(*heads[0], *heads[1]) as live:
        xent.linear_kl_divergence(
            student=heads[0], teacher=heads[1], reduction=reduction, memory_budget=budget
        ).sum().backward()
    assert budget / 8 < live.peak <= budget


@pytest.mark.parametrize("budget", [1 << 22, HOLDS_FEWER, 100_000])
def test_a_hessian_product_stays_within_its_budget(budget):
    heads = large(teacher=True)
    wanted = (heads[0][1], heads[1][1])
    tangents = [torch.randn_like(t) for t in wanted]
    matmul._allowed()
    with LiveBytes(*heads[0], *heads[1], *tangents) as live:
        loss = xent.linear_kl_divergence(student=heads[0], teacher=heads[1], memory_budget=budget)
        g = torch.autograd.grad(loss, wanted, create_graph=True)
        torch.autograd.grad(g, wanted, tangents)
    assert budget / 8 < live.peak <= budget


@pytest.mark.parametrize("remainder", ["drop", "spread"])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 6, 3)], ids=str)
def test_a_sparse_target_is_the_dense_one(shape, remainder):
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    indices = torch.rand(*rows, 6).argsort(-1)[..., :3]
    target = xent.TopKTarget(indices, torch.rand(*rows, 3, dtype=torch.float64) / 3, remainder)
    dense = target.to_dense(6).movedim(-1, min(1, len(shape) - 1))
    z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found, right = (xent.kl_divergence(target=t, input=z) for t in (target, dense))
    assert_close(found, right)
    assert_close(torch.autograd.grad(found.sum(), z), torch.autograd.grad(right.sum(), z))
    loss = xent.cross_entropy(z, target, reduction="none")
    assert_close(found, loss - torch.special.entr(dense).sum(min(1, len(shape) - 1)))


def test_a_sparse_target_is_checked():
    z, indices = torch.zeros(1, 4), torch.tensor([[0, 1]])
    over = xent.TopKTarget(indices, torch.tensor([[0.7, 0.3000001]]), "spread")
    assert xent.kl_divergence(target=over, input=z).isfinite().all()  # rounding is no negative remainder
    for target, error, match in (
        (xent.TopKTarget(indices + 3, torch.ones(1, 2)), IndexError, r"indices\[0, 1\] is 4"),
        (xent.TopKTarget(indices, torch.tensor([[-0.5, 1.0]])), ValueError, "not negative"),
        (xent.TopKTarget(indices[0], torch.ones(2)), ValueError, "must have shape"),
    ):
        with pytest.raises(error, match=match):
            xent.kl_divergence(target=target, input=z)
    with pytest.raises(ValueError, match="holds probabilities"):
        xent.kl_divergence(target=over, input=z, target_is_logits=True)


@pytest.mark.parametrize("rows", [5, 3000], ids=["at once", "by chunks"])
@pytest.mark.parametrize("logits", [True, False])
def test_a_temperature_for_each_row_is_that_of_its_own_row(rows, logits):
    z, y = (torch.randn(rows, 60, dtype=torch.float64, requires_grad=True) for _ in range(2))
    target = y if logits else y.detach().softmax(1)
    each = torch.rand(rows, dtype=torch.float64) + 0.5
    kl = xent.kl_divergence(target=target, input=z, target_is_logits=logits, temperature=each)
    log_t = (target / each[:, None]).log_softmax(1) if logits else target.log()
    expected = (log_t.exp() * (log_t - (z / each[:, None]).log_softmax(1))).sum(1)
    torch.testing.assert_close(kl, expected)
    leaves = (z, y) if logits else (z,)
    ours, plain = (torch.autograd.grad(v.square().sum(), leaves, create_graph=True) for v in (kl, expected))
    torch.testing.assert_close(ours, plain)
    twice = [torch.autograd.grad(sum(g.square().sum() for g in first), leaves) for first in (ours, plain)]
    torch.testing.assert_close(*twice, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_two_heads_take_a_temperature_for_each_row(reduction):
    x, w, v = (torch.randn(s, 3, dtype=torch.float64, requires_grad=True) for s in (6, 5, 5))
    s = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 1.0], dtype=torch.float64)
    each = torch.rand(6, dtype=torch.float64) + 0.5
    given = torch.where(s == 0, -1.0, each)  # a row that is left out may have any
    kl = xent.linear_kl_divergence(
        student=(x, w), teacher=(x, v), temperature=given, reduction=reduction, sample_weight=s
    )
    logits = {"target": x @ v.T, "input": x @ w.T, "target_is_logits": True}
    rows = s * xent.kl_divergence(**logits, temperature=each)
    expected = {"mean": rows.sum() / s.sum(), "sum": rows.sum(), "none": rows}[reduction]
    torch.testing.assert_close(kl, expected)
    first = [torch.autograd.grad(value.sum(), (x, w, v), create_graph=True) for value in (kl, expected)]
    torch.testing.assert_close(*first)
    torch.testing.assert_close(
        *(torch.autograd.grad(sum(g.square().sum() for g in some), (x, w, v)) for some in first)
    )


def test_row_temperatures_of_a_divergence_in_every_mode():
    x, w, v = (torch.randn(s, 3, dtype=torch.float64) for s in (6, 5, 5))
    each = torch.rand(6, dtype=torch.float64) + 0.5

    def heads(x, each=each):
        return xent.linear_kl_divergence(student=(x, w), teacher=(x, v), temperature=each)

    def given(x, each=each):
        z, t = x @ w.T, x @ v.T
        return xent.kl_divergence(target=t, input=z, target_is_logits=True, temperature=each).mean()

    for way in (torch.func.grad, torch.func.hessian, torch.func.jacfwd):
        torch.testing.assert_close(way(heads)(x), way(given)(x))
    both = torch.stack([each, each.flip(0)])
    for loss in (heads, given):
        batch = torch.func.vmap(lambda t, loss=loss: loss(x, t))(both)
        torch.testing.assert_close(batch, torch.stack([loss(x, t) for t in both]))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(heads, backend="aot_eager", fullgraph=True)(x), heads(x))


@pytest.mark.parametrize(
    ("temperature", "error", "message"),
    [
        (torch.tensor([1.0, -1.0, 1.0]), ValueError, "got -1.0 for row 1"),
        (torch.ones(4), ValueError, r"\(3,\); got \(4,\)"),
        (torch.ones(3, dtype=torch.int64), TypeError, "must be floating"),
        (torch.ones(3, requires_grad=True), ValueError, "takes no gradient"),
    ],
)
def test_row_temperatures_of_a_divergence_that_fit_nothing(temperature, error, message):
    z = torch.randn(3, 4)
    with pytest.raises(error, match=message):
        xent.kl_divergence(target=z, input=z, target_is_logits=True, temperature=temperature)
    with pytest.raises(error, match=message):
        xent.linear_kl_divergence(student=(z, z), teacher=(z, z), temperature=temperature)
