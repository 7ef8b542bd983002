"""Triplet losses that can be trained: values, geometries, derivatives in every mode, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, jvp, vmap
from torch.testing import assert_close

import xent
from core.test_sweep import C, D, LiveBytes, N
from table import close, dtypes
from xent import triplets
from xent._core import matmul
from xent.triplets import _tiles

DOUBLE = torch.float64
LOSSES = {
    "triplet": (triplets.triplet_loss, triplets.linear_triplet_loss, lambda v: v.clamp_min(0)),
    "smooth": (
        triplets.smooth_triplet_loss,
        triplets.linear_smooth_triplet_loss,
        lambda v: torch.logaddexp(v, torch.zeros_like(v)),
    ),
}
FORMS = pytest.mark.parametrize("form", LOSSES)
GEOMETRIES = pytest.mark.parametrize("geometry", ["inner", "cosine", "squared_l2"])
NEGATIVES = pytest.mark.parametrize("kind", ["all", "hardest", "sampled"])


def head(dtype=DOUBLE, n=6, d=3, c=7):
    x, w, b = (torch.randn(*shape, dtype=dtype) for shape in ((n, d), (c, d), (c,)))
    y = torch.randint(c, (n,))
    y[n // 2] = -100
    return x, w, b, y


def chosen(kind, n, c, y):
    """Negatives of a kind; of sampled ones some are the row's own class."""
    if kind != "sampled":
        return {"all": "all", "hardest": 3}[kind]
    index = torch.randint(c, (n, 4))
    index[1, 2] = y[1]
    return index


def scores(geometry, x, w):
    if geometry == "inner":
        return x @ w.T
    if geometry == "cosine":
        return F.cosine_similarity(x[:, None], w[None], dim=2)
    return -(x[:, None] - w[None]).square().sum(2)


def plain(form, z, y, negatives, margin, s=None):
    """Row by row, as the formula says; a mean."""
    phi = LOSSES[form][2]
    values, weights = [], []
    for n, at in enumerate(y.tolist()):
        if at == -100:
            continue
        if isinstance(negatives, torch.Tensor):
            rivals = [j for j in negatives[n].tolist() if j != at]
        else:
            rivals = [j for j in range(z.shape[1]) if j != at]
        m = z[n, rivals] - z[n, at]
        if isinstance(negatives, int):
            m = m.sort(descending=True).values[:negatives]
        by = math.log(len(m) + 1) if margin is None else margin
        weights.append(1.0 if s is None else s[n])
        values.append(weights[-1] * phi(m + by).sum() / (len(m) + 1))
    return sum(values) / sum(weights)


@FORMS
@NEGATIVES
@GEOMETRIES
@pytest.mark.parametrize("margin", [0.0, 0.7, None])
def test_values(form, kind, geometry, margin):
    if form == "triplet" and margin is None:
        margin = -0.2
    x, w, b, y = head()
    s, negatives = torch.rand(6, dtype=DOUBLE), chosen(kind, 6, 7, y)
    dense, linear, _ = LOSSES[form]
    z = scores(geometry, x, w) + b
    expected = plain(form, z, y, negatives, margin, s)
    given = dict(margin=margin, negatives=negatives, sample_weight=s)
    assert_close(dense(z, y, **given), expected)
    for budget in (None, 700):
        found = linear(x, w, y, linear_bias=b, geometry=geometry, memory_budget=budget, **given)
        assert_close(found, expected)
    rows = dense(z, y, reduction="none", **given)
    assert rows[3] == 0
    assert_close(rows.sum(), dense(z, y, reduction="sum", **given))


@dtypes()
@pytest.mark.parametrize("classes", [1, 2, 9, 700])
def test_over_all_negatives_they_are_bounds(dtype, classes):
    """With margin log C."""
    z, y = 4 * torch.randn(8, classes, dtype=dtype), torch.randint(classes, (8,))
    bounds = triplets.bounds(z, y)
    smooth = triplets.smooth_triplet_loss(z, y, reduction="none")
    close(smooth, bounds.smooth)
    hinge = triplets.triplet_loss(z, y, margin=math.log(classes), reduction="none")
    close(hinge, bounds.hinge)
    loss = xent.cross_entropy(z, y, reduction="none")
    assert (smooth <= loss * (1 + 8 * torch.finfo(dtype).eps)).all()


def test_k_equal_to_the_number_of_rivals_is_all():
    x, w, _, y = head()
    for form in LOSSES:
        dense, linear, _ = LOSSES[form]
        for k in (6, 7, 100):
            assert_close(dense(x @ w.T, y, negatives=k), dense(x @ w.T, y))
            assert_close(linear(x, w, y, negatives=k), linear(x, w, y))


def test_a_confident_triplet_keeps_its_digits():
    z, y = torch.tensor([[0.0, -40.0]], dtype=DOUBLE, requires_grad=True), torch.tensor([0])
    loss = triplets.smooth_triplet_loss(z, y, margin=0.0)
    assert loss.item() == pytest.approx(4.248354255291589e-18 / 2, rel=1e-15)
    (g,) = torch.autograd.grad(loss, z, create_graph=True)
    assert g[0, 1].item() == pytest.approx(4.248354255291589e-18 / 2, rel=1e-14)
    assert torch.autograd.grad(g[0, 1], z)[0][0, 1].item() == pytest.approx(2.124177e-18, rel=1e-6)


def test_masked_rivals_add_nothing():
    z = torch.tensor([[0.0, -math.inf, 1.0]], dtype=DOUBLE, requires_grad=True)
    for form in LOSSES:
        for negatives in ("all", 1, 2, torch.tensor([[1, 2]])):
            (g,) = torch.autograd.grad(
                LOSSES[form][0](z, torch.tensor([0]), margin=1.0, negatives=negatives), z
            )
            assert g.isfinite().all()
            assert g[0, 1] == 0
    b = torch.tensor([0.0, -math.inf, 1.0], dtype=DOUBLE)
    x, w = torch.zeros(1, 2, dtype=DOUBLE), torch.zeros(3, 2, dtype=DOUBLE, requires_grad=True)
    for negatives in ("all", 1, 2):
        loss = triplets.linear_smooth_triplet_loss(
            x, w, torch.tensor([0]), linear_bias=b, margin=1.0, negatives=negatives
        )
        assert_close(
            loss, triplets.smooth_triplet_loss(b[None], torch.tensor([0]), margin=1.0, negatives=negatives)
        )
        assert torch.autograd.grad(loss, w)[0].isfinite().all()


def test_k_above_the_number_of_unmasked_rivals():
    b = torch.tensor([0.0, -math.inf, -math.inf, -math.inf, 1.0], dtype=DOUBLE)
    x, w, y = torch.zeros(1, 2, dtype=DOUBLE), torch.zeros(5, 2, dtype=DOUBLE), torch.tensor([0])
    given = dict(margin=1.0, negatives=3)
    loss = triplets.linear_triplet_loss(x, w, y, linear_bias=b, **given)
    assert_close(loss, triplets.triplet_loss(b[None], y, **given))
    assert loss.item() == pytest.approx(2.0 / 4)


def test_rows_left_out_may_hold_anything():
    x, w, _, y = head()
    x[3] = math.nan
    s = torch.tensor([1.0, 0.0, 1.0, 1.0, 2.0, 1.0], dtype=DOUBLE)
    x[1] = math.nan
    w.requires_grad_()
    for form in LOSSES:
        for kind in ("all", "hardest", "sampled"):
            loss = LOSSES[form][1](x, w, y, sample_weight=s, negatives=chosen(kind, 6, 7, y))
            assert loss.isfinite()
            assert torch.autograd.grad(loss, w)[0].isfinite().all()
    nothing = triplets.linear_triplet_loss(x, w, torch.full((6,), -100))
    assert nothing == 0
    assert not torch.autograd.grad(nothing, w)[0].any()
    only_own = triplets.smooth_triplet_loss(
        torch.randn(1, 3), torch.tensor([1]), negatives=torch.tensor([[1, 1]])
    )
    assert only_own == 0


# Geometry


def test_inner_product_and_squared_l2_agree_where_norms_are_equal():
    """Their margins then differ by the factor 2, so that inner product at twice the score is squared L2."""
    x, w, _, y = head()
    equal = 1.7 * F.normalize(w, dim=1)
    for form in LOSSES:
        loss = LOSSES[form][1]
        assert_close(loss(2 * x, equal, y, margin=0.3), loss(x, equal, y, margin=0.3, geometry="squared_l2"))
        bias = -w.square().sum(1) / 2
        carried = loss(2 * x, w, y, linear_bias=2 * bias, margin=0.3)
        assert_close(carried, loss(x, w, y, margin=0.3, geometry="squared_l2"))
        # and not otherwise
        assert abs(loss(2 * x, w, y, margin=0.3) - loss(x, w, y, margin=0.3, geometry="squared_l2")) > 1e-3


def test_which_negative_is_hardest_depends_on_the_norms():
    w = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.9, 0.1]])
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    inner, l2 = (
        scores(g, x, w).scatter(1, y[:, None], -math.inf).argmax().item() for g in ("inner", "squared_l2")
    )
    assert (inner, l2) == (1, 2)
    m = triplets.linear_margins(x, w, y)
    assert m.argmax().item() == 0
    hardest = triplets.linear_triplet_loss(x, w, y, geometry="squared_l2", negatives=1, margin=1.0)
    assert hardest.item() == pytest.approx((1.0 - 0.02) / 2)


# Derivatives


@FORMS
@NEGATIVES
@GEOMETRIES
def test_derivatives_from_features(form, kind, geometry):
    """Backward, backward of backward, torch.func and forward mode, beside those of plain operations."""
    x, w, b, y = head(n=5, d=2, c=5)
    negatives = chosen(kind, 5, 5, y)
    linear = LOSSES[form][1]
    arguments = x, w, b

    def ours(x, w, b, **options):
        return linear(x, w, y, linear_bias=b, geometry=geometry, margin=0.3, negatives=negatives, **options)

    def theirs(x, w, b):
        return plain(form, scores(geometry, x, w) + b, y, negatives, 0.3)

    def tiled(x, w, b):
        return ours(x, w, b, memory_budget=500)

    leaves = [t.clone().requires_grad_() for t in arguments]
    tangents = tuple(torch.randn_like(t) for t in arguments)
    found = []
    for f in (theirs, ours, tiled):
        # squared, since a hinge alone has no second derivative
        first = torch.autograd.grad(f(*leaves).square(), leaves, create_graph=True)
        found.append((first, torch.autograd.grad(first, leaves, tangents)))
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])
    assert_close(grad(ours, (0, 1, 2))(*arguments), grad(theirs, (0, 1, 2))(*arguments))
    assert_close(jvp(ours, arguments, tangents)[1], jvp(theirs, arguments, tangents)[1])
    stacks = tuple(torch.stack([t, -t]) for t in arguments)
    assert_close(vmap(grad(ours, (0, 1, 2)))(*stacks), vmap(grad(theirs, (0, 1, 2)))(*stacks))


@FORMS
def test_gradcheck(form):
    x, w, b, y = head(n=3, d=2, c=4)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    for negatives in ("all", 2, torch.randint(4, (3, 3))):

        def f(x, w, b, negatives=negatives):
            return LOSSES[form][1](
                x, w, y, linear_bias=b, margin=0.4, negatives=negatives, reduction="none", memory_budget=300
            )

        assert torch.autograd.gradcheck(f, leaves)
        assert torch.autograd.gradgradcheck(f, leaves)
    z = (x @ w.T).detach().requires_grad_()
    dense = LOSSES[form][0]
    assert torch.autograd.gradcheck(lambda z: dense(z, y, margin=0.4), z, check_forward_ad=True)
    assert_close(
        hessian(lambda z: dense(z, y, margin=0.4))(z.detach()),
        hessian(lambda z: plain(form, z, y, "all", 0.4))(z.detach()),
    )


@FORMS
@NEGATIVES
def test_compiled(form, kind):
    x, w, _, y = head(torch.float32)
    x.requires_grad_()
    w.requires_grad_()
    negatives = chosen(kind, 6, 7, y)
    torch._dynamo.reset()

    def f(x, w):
        return LOSSES[form][1](x, w, y, geometry="cosine", margin=0.2, negatives=negatives)

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x, w), f(x, w))
    assert_close(torch.autograd.grad(compiled(x, w), (x, w)), torch.autograd.grad(f(x, w), (x, w)))


def test_under_vmap_a_bad_target_costs_nan():
    z, y = torch.randn(2, 3, 4), torch.tensor([[0, 1, 9], [3, -100, 2]])
    rows = vmap(lambda z, y: triplets.triplet_loss(z, y, reduction="none"))(z, y)
    assert rows.isnan().tolist() == [[False, False, True], [False, False, False]]
    assert rows[1, 1] == 0
    # an ignored row, which needs some class, costs nothing where that class is masked
    bias = torch.tensor([-math.inf, 0.0, 0.0, 0.0])
    x, w, y = torch.randn(2, 3, 5), torch.randn(4, 5), torch.tensor([[1, 2, 3], [3, -100, 2]])
    found = vmap(lambda x, y: triplets.linear_triplet_loss(x, w, y, linear_bias=bias))(x, y)
    assert_close(found[1], triplets.linear_triplet_loss(x[1], w, y[1], linear_bias=bias))


def test_a_learnt_sample_weight():
    x, w, _, y = head()
    s = torch.rand(6, dtype=DOUBLE, requires_grad=True)
    s.data[1] = 0.0

    def f(s):
        return triplets.linear_triplet_loss(x, w, y, sample_weight=s)

    assert torch.autograd.gradcheck(f, s)


@dtypes()
@pytest.mark.parametrize("kind", ["all", "hardest", "sampled"])
def test_positions_and_batches(dtype, kind):
    x, w = torch.randn(2, 3, 4, dtype=dtype), torch.randn(6, 5, 4, dtype=dtype)
    y = torch.randint(6, (2, 3, 5))
    negatives = torch.randint(6, (2, 3, 5, 3)) if kind == "sampled" else chosen(kind, 0, 0, y)
    z = torch.einsum("abd,cpd->abpc", x, w).reshape(-1, 6)
    flat = negatives.reshape(-1, 3) if kind == "sampled" else negatives
    expected = triplets.triplet_loss(z, y.reshape(-1), negatives=flat, reduction="none")
    found = triplets.linear_triplet_loss(x, w, y, negatives=negatives, reduction="none")
    close(found, expected.reshape(2, 3, 5))
    close(triplets.linear_triplet_loss(x, w, y, negatives=negatives), expected.mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype):
    x, w, _, y = (t.to(dtype) if t is not None and t.is_floating_point() else t for t in head(torch.float32))
    wide = triplets.linear_smooth_triplet_loss(x.float(), w.float(), y)
    found = triplets.linear_smooth_triplet_loss(x.requires_grad_(), w, y)
    assert found.dtype == dtype
    assert torch.equal(found, wide.to(dtype))
    assert torch.autograd.grad(found, x)[0].dtype == dtype
    with torch.autocast("cpu", dtype):
        found = triplets.linear_smooth_triplet_loss(x.detach().float(), w.float(), y)
    assert found.dtype == torch.float32
    assert_close(found, wide)


@pytest.mark.parametrize("budget", [400_000, 60_000])
@pytest.mark.parametrize("kind", ["all", "hardest", "sampled"])
def test_no_logits_are_kept(budget, kind):
    """Forward and backward; beside the budget what is as large as features or as weights."""
    x, w, y = (
        torch.randn(N, D, requires_grad=True),
        torch.randn(C, D, requires_grad=True),
        torch.randint(C, (N,)),
    )
    negatives = {"all": "all", "hardest": 3, "sampled": torch.randint(C, (N, 3))}[kind]
    matmul._allowed()
    given = (negatives,) if kind == "sampled" else ()
    with LiveBytes(x, w, y, *given) as live:
        triplets.linear_smooth_triplet_loss(x, w, y, negatives=negatives, memory_budget=budget).backward()
    assert live.peak <= budget + 4 * 8 * N * D < N * C * 4


# Modules, and embeddings


def test_modules():
    x, w, _, y = head(torch.float32)
    z = x @ w.T
    assert_close(xent.nn.SoftTripletLoss()(z, y), triplets.smooth_triplet_loss(z, y))
    loss = xent.nn.SoftTripletLoss(margin=0.1, negatives=2, reduction="sum")
    assert_close(loss(z, y), triplets.smooth_triplet_loss(z, y, margin=0.1, negatives=2, reduction="sum"))
    assert repr(loss) == "SoftTripletLoss(margin=0.1, negatives=2, reduction='sum')"
    sampled, s = torch.randint(7, (6, 4)), torch.rand(6)
    assert_close(
        loss(z, y, negatives=sampled, sample_weight=s),
        triplets.smooth_triplet_loss(z, y, margin=0.1, negatives=sampled, reduction="sum", sample_weight=s),
    )
    module = xent.nn.LinearSoftTripletLoss(3, 7, bias=True, geometry="cosine", memory_budget=1000)
    module.linear.weight.data.copy_(w)
    expected = triplets.linear_smooth_triplet_loss(
        x, w, y, linear_bias=module.linear.bias, geometry="cosine", negatives=sampled
    )
    assert_close(module(x, y, negatives=sampled), expected)
    assert "geometry='cosine', memory_budget=1000" in repr(module)
    assert set(module.state_dict()) == {"linear.weight", "linear.bias"}


@pytest.mark.parametrize("options", [{}, {"margin": 0.3, "p": 1.0, "swap": True}, {"eps": 1e-3}], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_embeddings(options, reduction):
    a, p, n = (torch.randn(6, 4, dtype=DOUBLE, requires_grad=True) for _ in range(3))
    found = triplets.triplet_margin_loss(a, p, n, reduction=reduction, **options)
    assert torch.equal(found, F.triplet_margin_loss(a, p, n, reduction=reduction, **options))
    in_order = (a, p, n, 0.3, 1.0, 1e-3, True)  # what a call of torch's may have without names
    assert torch.equal(triplets.triplet_margin_loss(*in_order), F.triplet_margin_loss(*in_order))
    smooth = triplets.triplet_margin_loss(a, p, n, reduction="none", smooth=True, **options)
    hinge = triplets.triplet_margin_loss(a, p, n, reduction="none", **options)
    assert ((smooth > hinge) & (smooth - hinge <= math.log(2))).all()
    signed = F.triplet_margin_loss(a, p, n, reduction="none", **(options | {"margin": 50.0})) - 50.0
    expected = torch.logaddexp(signed + options.get("margin", 1.0), torch.zeros_like(signed))
    assert_close(smooth, expected)
    reduced = triplets.triplet_margin_loss(a, p, n, reduction=reduction, smooth=True, **options)
    assert_close(reduced, {"none": smooth, "sum": smooth.sum(), "mean": smooth.mean()}[reduction])

    def f(*embeddings):
        return triplets.triplet_margin_loss(*embeddings, smooth=True, **options)

    assert torch.autograd.gradcheck(f, (a, p, n))


# What is refused


@pytest.mark.parametrize("loss", [triplets.triplet_loss, triplets.smooth_triplet_loss])
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"negatives": 0}, ValueError, "negatives must be at least 1, got 0"),
        ({"negatives": "hard"}, ValueError, "'all', how many of the hardest, or class indices; got 'hard'"),
        ({"negatives": True}, ValueError, "got True"),
        ({"negatives": torch.zeros(2, 3)}, TypeError, r"integer type, got torch\.float32"),
        ({"negatives": torch.zeros(3, 2, dtype=torch.int64)}, ValueError, r"shape \(2, 'k'\), got \(3, 2\)"),
        (
            {"negatives": torch.tensor([[0, 1], [1, 5]])},
            IndexError,
            r"negatives\[1, 1\] is 5, outside 0\.\.4",
        ),
        ({"margin": math.inf}, ValueError, "margin must be finite, got inf"),
        ({"margin": math.nan}, ValueError, "margin must be finite, got nan"),
        ({"reduction": "max"}, ValueError, "reduction must be"),
        ({"sample_weight": torch.ones(3)}, ValueError, "sample_weight must have the shape"),
    ],
)
def test_bad_options(loss, options, error, match):
    with pytest.raises(error, match=match):
        loss(torch.zeros(2, 5), torch.tensor([0, 1]), **options)


@pytest.mark.parametrize("loss", [triplets.linear_triplet_loss, triplets.linear_smooth_triplet_loss])
def test_bad_heads(loss):
    x, w, y = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="geometry must be 'inner', 'cosine' or 'squared_l2', got 'l2'"):
        loss(x, w, y, geometry="l2")
    with pytest.raises(ValueError, match="memory_budget must be a positive number of bytes"):
        loss(x, w, y, memory_budget=0)
    with pytest.raises(IndexError, match="target 9 at row 0"):
        loss(x, w, torch.tensor([9, 0]))
    with pytest.raises(TypeError, match="one positive"):
        loss(x, w, torch.zeros(2, 5))
    with pytest.raises(ValueError, match="must have as many dimensions"):
        triplets.triplet_margin_loss(x, x, x[0], smooth=True)
    with pytest.raises(ValueError, match="reduction must be"):
        triplets.triplet_margin_loss(x, x, x, smooth=True, reduction="max")


def test_inputs_are_left_untouched():
    x, w, b, y = head()
    before = [t.clone() for t in (x, w, b, y)]
    leaves = [t.requires_grad_() for t in (x, w, b)]
    for form in LOSSES:
        for kind in ("all", "hardest"):
            LOSSES[form][1](*leaves[:2], y, linear_bias=b, negatives=chosen(kind, 6, 7, y)).backward()
    for t, old in zip((x, w, b, y), before, strict=True):
        assert torch.equal(t.detach(), old)
        assert t._version == 0 or t is y


def test_tiles_are_computed_again(monkeypatch):
    """Each tile is computed once in the forward pass and once in the backward pass."""
    calls = []
    recompute = _tiles._recompute

    def counting(f, *tensors):
        def counted(*tensors):
            calls.append(tensors[0].shape[0])
            return f(*tensors)

        return recompute(counted, *tensors)

    monkeypatch.setattr(_tiles, "_recompute", counting)
    x, w, _, y = head(torch.float32)
    loss = triplets.linear_triplet_loss(x.requires_grad_(), w, y, memory_budget=500)
    forward = len(calls)
    assert forward > 1
    loss.backward()
    assert len(calls) == 2 * forward


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("swap", [False, True])
def test_triplet_margin_loss_over_no_rows_is_zero(smooth, swap):
    rows = torch.zeros(0, 3, requires_grad=True)
    loss = xent.triplets.triplet_margin_loss(rows, rows, rows, smooth=smooth, swap=swap)
    loss.backward()
    assert loss.item() == 0
    assert rows.grad.shape == (0, 3)
