"""Margins and bounds: order, accuracy, invariances, modes and errors."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap
from torch.testing import assert_close

import triplet_cases as cases
import xent
from core.test_sweep import HOLDS_A_CHUNK, C, D, LiveBytes, N
from table import TOLERANCE, close, dtypes
from triplet_cases import EXTREME, ROW, head, row
from xent import triplets
from xent._core import matmul
from xent.triplets import _sweep as core

INF = math.inf
CHAIN = ("hinge", "smooth", "tight", "loss", "union")
HARDEST = ("hardest_low", "loss", "hardest_high")
FEW = 8  # units in the last place


def in_order(found, dtype, units=FEW):
    for names in (CHAIN, HARDEST):
        for low, high in itertools.pairwise(names):
            a, b = (getattr(found, name).double() for name in (low, high))
            slack = units * torch.finfo(dtype).eps * b + torch.finfo(dtype).tiny
            assert (a <= b + slack).all(), (low, high, a, b)
    gap = found.smooth.double() - found.hinge.double()
    assert (gap >= 0).all()


@given(ROW, st.sampled_from(list(TOLERANCE)))
def test_the_chain_holds(given_row, dtype):
    z, y = row(*given_row, dtype)
    in_order(triplets.bounds(z, y), dtype)


@pytest.mark.parametrize(("z", "y"), EXTREME, ids=str)
@dtypes()
def test_the_chain_holds_of_extreme_rows(z, y, dtype):
    found = triplets.bounds(*row(z, y, dtype))
    assert all(value.isfinite().all() for value in found)
    in_order(found, dtype)


@dtypes()
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 30.0, 1e4])
def test_the_chain_holds_of_many_classes(dtype, scale):
    z, y = scale * torch.randn(20, 5001, dtype=dtype), torch.randint(5001, (20,))
    found = triplets.bounds(z, y)
    assert all(value.isfinite().all() for value in found)
    in_order(found, dtype)
    if scale == 0.0:
        assert_close(found.union, torch.full_like(found.union, 5000 * math.log(2)))


def exact(z, y, dtype, found):
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    for name, (value, moved) in cases.bounds(z[0].tolist(), int(y)).items():
        error = abs(getattr(found, name).item() - value)
        assert error <= FEW * eps * value + 2 * eps * moved + tiny, (name, getattr(found, name), value)


@given(ROW, st.sampled_from(list(TOLERANCE)))
def test_every_bound_is_exact_to_its_rounding(given_row, dtype):
    z, y = row(*given_row, dtype)
    exact(z, y, dtype, triplets.bounds(z, y))


@pytest.mark.parametrize(("z", "y"), EXTREME, ids=str)
@dtypes()
def test_every_bound_of_extreme_rows_is_exact(z, y, dtype):
    z, y = row(z, y, dtype)
    eye, none = torch.eye(z.shape[1], dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    exact(z, y, dtype, triplets.bounds(z, y))
    # as a bias, which no product rounds; and through tiles of one class
    for budget in (None, 8 * 4 + 40):
        found = triplets.linear_bounds(
            none, torch.zeros_like(eye[:, :1]), y, linear_bias=z[0], memory_budget=budget
        )
        exact(z, y, dtype, found)


def test_worked_values():
    found = triplets.bounds(torch.zeros(1, 10, dtype=torch.float64), torch.tensor([4]))
    assert found.smooth.item() == pytest.approx(2.158106, abs=5e-7)
    assert found.loss.item() == pytest.approx(math.log(10))
    z = torch.tensor([[0.0, 20.0, *[-5.0] * 8]], dtype=torch.float64)
    found = triplets.bounds(z, torch.tensor([0]))
    for name, value in (("loss", 20.000), ("smooth", 2.282), ("tight", 2.519)):
        assert getattr(found, name).item() == pytest.approx(value, abs=5e-4)


@pytest.mark.parametrize("m", [-40.0, -3.0, 0.0, 2.0, 90.0])
@dtypes()
def test_the_tight_bound_is_the_loss_of_equal_margins(m, dtype):
    """It is also the loss of any two classes."""
    for classes in (2, 3, 10, 1000):
        z = torch.full((1, classes), m, dtype=dtype)
        z[0, 0] = 0.0
        found = triplets.bounds(z, torch.tensor([0]))
        assert_close(found.tight, found.loss, rtol=FEW * torch.finfo(dtype).eps, atol=0.0)
        assert_close(found.hardest_high, found.loss, rtol=FEW * torch.finfo(dtype).eps, atol=0.0)


@dtypes()
def test_the_smooth_loss_is_at_most_log_2_above_the_hinge(dtype):
    z, y = 5 * torch.randn(200, 9, dtype=dtype), torch.randint(9, (200,))
    gap = triplets.bounds(z, y).smooth - triplets.bounds(z, y).hinge
    assert (gap <= 8 / 9 * math.log(2) * (1 + FEW * torch.finfo(dtype).eps)).all()
    at = torch.full((1, 9), -math.log(9.0), dtype=dtype)
    at[0, 0] = 0.0  # every triplet at the hinge's corner
    found = triplets.bounds(at, torch.tensor([0]))
    assert_close(found.smooth - found.hinge, torch.full((1,), 8 / 9 * math.log(2), dtype=dtype))


def test_one_class_has_no_triplet():
    found = triplets.bounds(torch.randn(3, 1), torch.zeros(3, dtype=torch.int64))
    assert all(torch.equal(value, torch.zeros(3)) for value in found)
    assert triplets.margins(torch.randn(3, 1), torch.zeros(3, dtype=torch.int64)).shape == (3, 0)


def test_a_masked_own_class_costs_infinity():
    found = triplets.bounds(torch.tensor([[-INF, 1.0, -INF]]), torch.tensor([0]))
    assert all(value.item() == INF for value in found)
    lost = triplets.bounds(torch.full((1, 3), -INF), torch.tensor([0]))
    assert all(value.isnan().all() for value in lost)


@dtypes()
def test_margins_beyond_the_largest_number_cost_infinity(dtype):
    large = 0.9 * torch.finfo(dtype).max
    z, y = torch.tensor([[large, -large, 0.0]], dtype=dtype), torch.tensor([1])
    assert xent.cross_entropy(z, y) == INF
    assert all(field.item() == INF for field in triplets.bounds(z, y))


@dtypes()
def test_shift_invariance(dtype):
    z = (torch.randn(6, 8, dtype=dtype) * 1024).round() / 1024
    y, shift = torch.randint(8, (6,)), torch.randint(-512, 512, (6, 1)).to(dtype)
    for a, b in zip(triplets.bounds(z, y), triplets.bounds(z + shift, y), strict=True):
        assert torch.equal(a, b)


@dtypes()
def test_class_permutation_changes_nothing(dtype):
    z, y, order = torch.randn(6, 70, dtype=dtype), torch.randint(70, (6,)), torch.randperm(70)
    moved = triplets.bounds(z[:, order], torch.argsort(order)[y])
    for a, b in zip(triplets.bounds(z, y), moved, strict=True):
        close(a, b)


@dtypes()
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.7}], ids=str)
def test_tiling_changes_nothing(dtype, reduction, options):
    x, w, b, y = head(dtype)
    weight = torch.rand(len(x), dtype=dtype)
    given = dict(reduction=reduction, sample_weight=weight, **options)
    whole = triplets.bounds(x @ w.T + b, y, **given)
    for budget in (None, 500, 3_000):
        found = triplets.linear_bounds(x, w, y, linear_bias=b, memory_budget=budget, **given)
        for a, e in zip(found, whole, strict=True):
            close(a, e)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_the_loss_is_cross_entropy(reduction):
    x, w, b, y = head()
    s = torch.rand(len(x), dtype=torch.float64)
    given = dict(linear_bias=b, reduction=reduction, sample_weight=s, temperature=1.5)
    found = triplets.linear_bounds(x, w, y, **given).loss
    assert_close(found, xent.linear_cross_entropy(x, w, y, **given))


def test_ignored_rows_may_hold_anything():
    x, w, b, y = head()
    x[len(x) // 2] = math.nan
    found = triplets.linear_bounds(x, w, y, linear_bias=b)
    assert all(value[len(x) // 2] == 0 and value.isfinite().all() for value in found)
    nothing = triplets.bounds(torch.full((2, 3), math.nan), torch.full((2,), -100), reduction="mean")
    assert all(value == 0 for value in nothing)
    empty = triplets.bounds(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert all(value.shape == (0,) for value in empty)


def test_shapes():
    z, y = torch.randn(2, 5, 3), torch.randint(5, (2, 3))
    assert triplets.bounds(z, y).loss.shape == (2, 3)
    assert triplets.margins(z, y).shape == (2, 3, 4)
    assert triplets.bounds(z[0, :, 0], y[0, 0]).loss.shape == ()
    x, w = torch.randn(2, 3, 4), torch.randn(5, 7, 4)
    y = torch.randint(5, (2, 3, 7))
    logits = torch.einsum("abd,cpd->abpc", x, w)
    found = triplets.linear_bounds(x, w, y)
    assert_close(found.loss, xent.linear_cross_entropy(x, w, y, reduction="none"))
    expected = triplets.margins(logits.reshape(-1, 5), y.reshape(-1)).reshape(2, 3, 7, 4)
    assert_close(triplets.linear_margins(x, w, y), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype):
    x, w, _, y = head(torch.float32)
    x, w = x.to(dtype), w.to(dtype)
    for a, e in zip(
        triplets.linear_bounds(x, w, y), triplets.bounds(x.float() @ w.float().T, y), strict=True
    ):
        assert a.dtype == torch.float32
        close(a, e)
    assert triplets.margins(x @ w.T, y).dtype == torch.float32
    with torch.autocast("cpu", dtype):
        found = triplets.linear_bounds(x.float(), w.float(), y)
        m = triplets.linear_margins(x.float(), w.float(), y)
    assert_close(found.loss, triplets.linear_bounds(x, w, y).loss)
    assert_close(m, triplets.linear_margins(x, w, y))


def test_inputs_are_left_untouched():
    z, y = torch.randn(4, 600), torch.randint(600, (4,))
    before = z.clone()
    triplets.bounds(z, y)
    triplets.attribution(z, y)
    triplets.pair_matrix(z, y)
    vmap(lambda z: triplets.bounds(z, y).loss)(z[None])
    assert torch.equal(z, before)
    assert z._version == 0


# Margins


def test_margins_are_the_classes_in_order_without_the_own_one():
    z = torch.tensor([[3.0, 1.0, 7.0, 2.0]]).expand(4, 4)
    expected = [[-2.0, 4.0, -1.0], [2.0, 6.0, 1.0], [-4.0, -6.0, -5.0], [1.0, -1.0, 5.0]]
    assert triplets.margins(z, torch.arange(4)).tolist() == expected
    assert triplets.linear_margins(z, torch.eye(4), torch.arange(4)).tolist() == expected


def test_margins_are_differentiable():
    x, w, b, y = (t.requires_grad_() if t.is_floating_point() else t for t in head(n=4, d=2, c=4))

    def f(x, w, b):
        return triplets.linear_margins(x, w, y, linear_bias=b).square()

    assert torch.autograd.gradcheck(f, (x, w, b), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (x, w, b))
    x.data[2] = math.nan
    assert torch.autograd.grad(f(x, w, b).sum(), w)[0].isfinite().all()  # an ignored row reaches nothing
    assert not f(x, w, b)[2].any()


def test_the_gradient_in_a_margin_is_the_probability():
    """∂CE/∂m_j = p_j."""
    z, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(5, (6,))
    m = triplets.margins(z, y).requires_grad_()
    loss = torch.cat([torch.zeros(6, 1, dtype=torch.float64), m], 1).logsumexp(1)
    assert_close(loss, xent.cross_entropy(z, y, reduction="none"))
    (p,) = torch.autograd.grad(loss.sum(), m)
    others = torch.ones(6, 5, dtype=torch.bool).scatter(1, y[:, None], False)
    assert_close(p, z.softmax(1)[others].reshape(6, 4))


# Modes, and what is refused


def test_under_vmap():
    z, y = torch.randn(3, 4, 6, dtype=torch.float64), torch.randint(6, (3, 4))
    y[1, 2] = -100
    found = vmap(triplets.bounds)(z, y)
    for i in range(3):
        for a, e in zip(found, triplets.bounds(z[i], y[i]), strict=True):
            assert_close(a[i], e)
    assert_close(vmap(triplets.margins)(z, y)[1], triplets.margins(z[1], y[1]))
    bad = torch.full_like(y, 6)
    assert vmap(triplets.bounds)(z, bad).loss.isnan().all()


@pytest.mark.parametrize("describe", [triplets.bounds, triplets.attribution], ids=lambda f: f.__name__)
def test_a_description_is_never_a_silent_zero(describe):
    z, y = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 2])
    assert not describe(z, y).loss.requires_grad
    with pytest.raises(NotImplementedError, match="has no derivative"):
        grad(lambda z: describe(z, y).loss.sum())(z.detach())
    with pytest.raises(NotImplementedError, match="has no derivative"):
        jvp(lambda z: describe(z, y).loss, (z.detach(),), (z.detach(),))
    with pytest.raises(NotImplementedError, match="tensors with data"):
        describe(z.to("meta"), y.to("meta"))


@pytest.mark.parametrize("f", [triplets.margins, triplets.bounds, triplets.attribution, triplets.pair_matrix])
def test_a_bad_target_is_named(f):
    with pytest.raises(IndexError, match=r"target 5 at row 1 is outside 0\.\.4"):
        f(torch.zeros(2, 5), torch.tensor([0, 5]))
    with pytest.raises(TypeError, match=r"target must be a tensor of class indices, got torch\.float32"):
        f(torch.zeros(2, 5), torch.zeros(2, 5))
    with pytest.raises(TypeError, match="class indices, got TopKTarget"):
        f(torch.zeros(2, 5), xent.TopKTarget(torch.tensor([[0], [1]]), torch.ones(2, 1)))
    with pytest.raises(ValueError, match="target must have shape"):
        f(torch.zeros(2, 5), torch.tensor([0]))
    with pytest.raises(TypeError, match="input must be of a floating type"):
        f(torch.zeros(2, 5, dtype=torch.int64), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    "f",
    [
        triplets.linear_margins,
        triplets.linear_bounds,
        triplets.linear_attribution,
        triplets.linear_pair_matrix,
    ],
)
def test_a_bad_head_is_named(f):
    y = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="input has 3 features a row, linear_weight has 4"):
        f(torch.zeros(2, 3), torch.zeros(5, 4), y)
    with pytest.raises(TypeError, match=r"linear_weight is torch\.float64"):
        f(torch.zeros(2, 3), torch.zeros(5, 3, dtype=torch.float64), y)
    with pytest.raises(ValueError, match="linear_bias must have shape"):
        f(torch.zeros(2, 3), torch.zeros(5, 3), y, linear_bias=torch.zeros(4))


def test_bad_options():
    z, y = torch.zeros(2, 5), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="reduction must be"):
        triplets.bounds(z, y, reduction="median")
    with pytest.raises(ValueError, match="sample_weight must have the shape"):
        triplets.bounds(z, y, sample_weight=torch.ones(3))
    unchecked = triplets.bounds(z, torch.tensor([0, 7]), check_targets=False)
    assert all(value[1].isnan() and not value[0].isnan() for value in unchecked)


# What it costs


@pytest.mark.parametrize("budget", [HOLDS_A_CHUNK, 40_000])
@pytest.mark.parametrize("f", [triplets.linear_bounds, partial(triplets.linear_attribution, top_k=1)])
@pytest.mark.parametrize("kind", ["plain", "ignoring", "half", "softcap"])
def test_a_sweep_stays_within_its_budget(budget, f, kind):
    x, w, y = torch.randn(N, D), torch.randn(C, D), torch.randint(C, (N,))
    if kind == "ignoring":
        y[::3] = -100
    if kind == "half":
        x, w = x.bfloat16(), w.bfloat16()
    matmul._allowed()  # the probe of this process is no part of a sweep
    with LiveBytes(x, w, y) as live:
        f(x, w, y, memory_budget=budget, softcap=5.0 if kind == "softcap" else None)
    assert budget / 16 < live.peak <= budget


def test_pieces_change_nothing(monkeypatch):
    z, y = torch.randn(40, 300), torch.randint(300, (40,))
    whole = triplets.bounds(z, y)
    monkeypatch.setattr(core, "PIECE", 700)
    for a, b in zip(triplets.bounds(z, y), whole, strict=True):
        assert torch.equal(a, b)
