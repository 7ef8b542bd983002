"""Margins: against a plain autograd version that moves the target's logit, and their own laws."""

from __future__ import annotations

import copy
import math

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import xent
from xent._core.margin import _with_odds
from xent._core.one_tile import OneTile

N, D, C = 9, 5, 7
MARGINS = [
    xent.Margin(cosine=0.35),
    xent.Margin(angle=0.5),
    xent.Margin(cosine=0.1, angle=0.3),
    xent.Margin(angle=1.5),  # many a row past π
]
EACH = pytest.mark.parametrize("margin", MARGINS, ids=str)


def plain(x, w, target, margin, scale, **options):
    """Cosines, the target's angle turned, everything scaled; (N, C) throughout."""
    c = F.normalize(x, dim=1) @ F.normalize(w, dim=1).T
    y = target.clamp(min=0)[:, None]
    theta = torch.arccos(c.gather(1, y))
    past = torch.cos(theta) - margin.angle * math.sin(margin.angle)
    own = torch.where(theta <= math.pi - margin.angle, torch.cos(theta + margin.angle), past) - margin.cosine
    return F.cross_entropy(scale * c.scatter(1, y, own), target, **options)


def draw(dtype=torch.float64):
    x, w = (torch.randn(n, D, dtype=dtype, requires_grad=True) for n in (N, C))
    target = torch.randint(C, (N,))
    target[3] = -100
    return x, w, target


@EACH
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("budget", [None, 900])
def test_equals_plain_autograd(margin, reduction, smoothing, weighted, budget):
    """Value, first and second derivatives, to float64 rounding; whole and in tiles."""
    x, w, target = draw()
    options = {
        "reduction": reduction,
        "label_smoothing": smoothing,
        "weight": torch.rand(C, dtype=torch.float64) if weighted else None,
    }
    ours = xent.linear_cross_entropy(
        x, w, target, margin=margin, temperature=1 / 16, normalize=True, memory_budget=budget, **options
    )
    theirs = plain(x, w, target, margin, 16.0, **options)
    assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    upstream, v = torch.rand_like(theirs), [torch.randn_like(t) for t in (x, w)]
    found = []
    for loss in (ours, theirs):
        first = torch.autograd.grad(loss, (x, w), upstream, create_graph=True)
        found.append((*first, *torch.autograd.grad(first, (x, w), v)))
    early = torch.autograd.grad(  # the gradient of the forward sweep
        xent.linear_cross_entropy(
            x, w, target, margin=margin, temperature=1 / 16, normalize=True, memory_budget=budget, **options
        ),
        (x, w),
        upstream,
    )
    for a, b in zip((*found[0], *early), (*found[1], *found[1][:2]), strict=True):
        assert_close(a, b, rtol=1e-11, atol=1e-12 * float(b.detach().abs().max()))


@EACH
def test_of_given_cosines(margin):
    x, w, target = draw()
    cosines = F.normalize(x, dim=1) @ F.normalize(w, dim=1).T
    loss = xent.cross_entropy(cosines, target, margin=margin, temperature=1 / 16)
    assert_close(loss, plain(x, w, target, margin, 16.0), rtol=1e-13, atol=1e-13)


def test_a_number_is_subtracted_from_the_targets_score():
    """Of any scores, not only cosines."""
    z, target = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 5, 2, 2])
    moved = z - 1.5 * F.one_hot(target, 6)
    assert_close(xent.cross_entropy(z, target, margin=1.5), F.cross_entropy(moved, target))
    assert_close(
        xent.cross_entropy(z, target, margin=-1.5), F.cross_entropy(z + 1.5 * F.one_hot(target, 6), target)
    )


def test_no_margin_changes_nothing():
    x, w, target = draw()
    loss = xent.linear_cross_entropy(x, w, target, margin=0.0)
    assert_close(loss, xent.linear_cross_entropy(x, w, target), rtol=1e-15, atol=0.0)


@EACH
def test_the_loss_never_falls_as_the_angle_to_the_target_grows(margin):
    theta = torch.linspace(0.0, math.pi, 1001, dtype=torch.float64)
    cosines = torch.stack([torch.cos(theta), torch.zeros_like(theta)], dim=1)
    loss = xent.cross_entropy(
        cosines, torch.zeros(1001, dtype=torch.int64), margin=margin, temperature=0.1, reduction="none"
    )
    assert (loss.diff() >= -1e-9).all()


def test_confident_rows_keep_their_digits():
    """A margin of 22 nats on a row that costs e⁻⁶⁰: e⁻⁶⁰·e²², gradients alike."""
    z = torch.tensor([[0.0, -60.0]], dtype=torch.float64, requires_grad=True)
    loss = xent.cross_entropy(z, torch.tensor([0]), margin=22.0)
    (gradient,) = torch.autograd.grad(loss, z)
    exact = math.exp(-38.0)
    assert math.isclose(loss.item(), exact, rel_tol=1e-14)
    assert_close(gradient, torch.tensor([[-exact, exact]], dtype=torch.float64), rtol=1e-14, atol=0.0)


@pytest.mark.parametrize(
    "cost", [0.0, 1e-300, 1e-20, 1e-3, 0.999, 1.0, 1.001, 30.0, 499.0, 1e3, 1e9, math.inf]
)
@pytest.mark.parametrize("delta", [0.0, -1e-9, -0.35, -22.4, -500.0, 0.35, 30.0])
def test_moved_costs_against_exact_arithmetic(cost, delta):
    found = _with_odds(*(torch.tensor([v], dtype=torch.float64) for v in (cost, delta))).item()
    if math.isinf(cost):
        assert found == math.inf
        return
    with mpmath.workdps(400):
        exact = mpmath.log(1 + mpmath.exp(-mpmath.mpf(delta)) * mpmath.expm1(mpmath.mpf(cost)))
        # δ multiplies the odds where they are small, and is added to their logarithm where not
        size = exact * (1 + abs(delta)) + (0 if cost < 1 or delta > 0 else abs(delta))
        assert abs(found - exact) <= 4 * mpmath.mpf(2) ** -52 * size + mpmath.mpf(2) ** -1073


def test_confident_rows_keep_the_digits_of_their_hessian():
    """A margin multiplies what is left of a sure row, e^22 here: 1 − p_y must not be a difference from 1."""
    z, scale, margin = [0.9, -0.3, 0.2, 0.1], 64, 0.35
    with mpmath.workdps(60):
        powers = [mpmath.exp(scale * (mpmath.mpf(v) - (margin if j == 0 else 0))) for j, v in enumerate(z)]
        p = [power / sum(powers) for power in powers]
        right = [[float(scale**2 * p[i] * ((i == j) - p[j])) for j in range(4)] for i in range(4)]
    cosines = torch.tensor([z], dtype=torch.float64)
    for smoothing in (0.0, 0.1):

        def loss(c, smoothing=smoothing):
            return xent.cross_entropy(
                c, torch.tensor([0]), margin=margin, temperature=1 / scale, label_smoothing=smoothing
            )

        hessian = torch.func.hessian(loss)(cosines)[0, :, 0]
        assert_close(hessian, torch.tensor(right, dtype=torch.float64), rtol=1e-13, atol=0)


def test_an_angle_of_nothing_has_a_finite_gradient():
    """A feature on its own class vector: sin θ = 0, where sin(θ + m)/sin θ has no value."""
    w = torch.eye(3, requires_grad=True)
    x = torch.eye(3)[:1].clone().requires_grad_()
    for reduction in ("mean", "none"):
        loss = xent.linear_cross_entropy(
            x,
            w,
            torch.tensor([0]),
            normalize=True,
            margin=xent.Margin(angle=0.5),
            temperature=1 / 16,
            reduction=reduction,
        )
        assert_close(loss.sum(), torch.log1p(2 * torch.exp(torch.tensor(-16 * math.cos(0.5)))))
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), (x, w)))


def test_ignored_rows_may_hold_anything():
    x, w, target = draw()
    x = x.detach()
    expected = xent.linear_cross_entropy(x, w, target, normalize=True, margin=0.35, temperature=1 / 16)
    x[3] = math.nan
    x.requires_grad_()
    loss = xent.linear_cross_entropy(x, w, target, normalize=True, margin=0.35, temperature=1 / 16)
    assert_close(loss, expected)
    dx, dw = torch.autograd.grad(loss, (x, w))
    assert not dx[3].any()
    assert dw.isfinite().all()


def test_many_chunks_with_weights_of_rows_and_classes(monkeypatch):
    """Each chunk of the forward sweep asks for its own rows' coefficients."""
    torch.manual_seed(0)
    x, w = (torch.randn(n, D, dtype=torch.float64, requires_grad=True) for n in (300, C))
    target = torch.randint(C, (300,))
    options = {
        "weight": torch.rand(C, dtype=torch.float64) + 0.5,
        "sample_weight": torch.rand(300, dtype=torch.float64) + 0.5,
        "label_smoothing": 0.1,
        "log_q": -torch.rand(C, dtype=torch.float64),
        "margin": 0.35,
    }
    seen = []
    coefficients = xent._core.reduction.Reduction.coefficients
    monkeypatch.setattr(
        xent._core.reduction.Reduction,
        "coefficients",
        lambda self, *a: (seen.append(a[1]), coefficients(self, *a))[1],
    )
    monkeypatch.setattr(OneTile, "supports", lambda self, problem: "this is about chunks")
    budget = 140 * (8 * C + 8 * D + 64)
    found = [
        torch.autograd.grad(xent.linear_cross_entropy(x, w, target, memory_budget=b, **options), (x, w))
        for b in (None, budget)
    ]
    assert len(seen) > 2
    assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)
    z = (x @ w.T - options["log_q"]).scatter(1, target[:, None], (x @ w.T).gather(1, target[:, None]) - 0.35)
    rows = F.cross_entropy(z, target, options["weight"], reduction="none", label_smoothing=0.1)
    s = options["sample_weight"]
    plain_loss = (s * rows).sum() / (s * options["weight"][target]).sum()
    assert_close(found[0], torch.autograd.grad(plain_loss, (x, w)), rtol=1e-11, atol=1e-13)


def test_an_angle_among_sampled_classes():
    """The angle is that of the cosine itself, not of what log Q has made of it."""
    x, w, target = draw()
    log_q = -3 * torch.rand(C, dtype=torch.float64)
    margin = xent.Margin(angle=0.5)
    loss = xent.linear_cross_entropy(
        x, w, target, normalize=True, margin=margin, temperature=1 / 16, log_q=log_q
    )
    c = F.normalize(x, dim=1) @ F.normalize(w, dim=1).T
    y = target.clamp(min=0)[:, None]
    own = 16 * torch.cos(torch.arccos(c.gather(1, y)) + 0.5)
    assert_close(loss, F.cross_entropy((16 * c - log_q).scatter(1, y, own), target))


def test_ignored_positions_of_a_head_with_several():
    """A row's features are left out of the scaling only where all of its positions are ignored."""
    x = torch.randn(3, D, dtype=torch.float64)
    w = torch.randn(C, 2, D, dtype=torch.float64)
    target = torch.tensor([[0, -100], [-100, -100], [2, 3]])
    x[1] = torch.nan
    loss = xent.linear_cross_entropy(x, w, target, normalize=True, reduction="sum", margin=0.1)
    each = [
        xent.linear_cross_entropy(
            x[n : n + 1], w[:, k], target[n, k : k + 1], normalize=True, reduction="sum", margin=0.1
        )
        for n, k in ((0, 0), (2, 0), (2, 1))
    ]
    assert_close(loss, sum(each))


def test_products_are_three(monkeypatch):
    """A margin forms its gradient in the forward sweep like any loss."""
    seen = []
    tile = xent._core.logits.LinearHead.tile
    monkeypatch.setattr(
        xent._core.logits.LinearHead, "tile", lambda self, *a: (seen.append(1), tile(self, *a))[1]
    )
    x, w, target = draw(torch.float32)
    loss = xent.linear_cross_entropy(x, w, target, margin=0.35)
    loss.backward()
    assert len(seen) == 1  # and one product for each of the two gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EACH
def test_half_types_are_rounded_once(dtype, margin):
    x, w, target = (t.detach().to(dtype) if t.is_floating_point() else t for t in draw(torch.float32))
    leaves = [x.requires_grad_(), w.requires_grad_()]
    double = [t.detach().double().requires_grad_() for t in leaves]
    options = {"normalize": True, "margin": margin, "temperature": 1 / 16}
    loss, exact = (xent.linear_cross_entropy(*t, target, **options) for t in (leaves, double))
    assert loss.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert_close(loss.double(), exact, rtol=eps, atol=0.0)
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(exact, double), strict=True):
        assert_close(a.double(), b, rtol=eps, atol=1e-4 * float(b.abs().max()))


def test_compiles():
    x, w, target = draw(torch.float32)

    def step(x, w, target):
        return xent.linear_cross_entropy(
            x, w, target, normalize=True, margin=xent.Margin(angle=0.5), temperature=1 / 16
        )

    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(x, w, target)
    assert_close(loss, step(x, w, target))
    assert_close(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(step(x, w, target), (x, w)))


def test_the_module():
    torch.manual_seed(0)
    head = xent.nn.MarginLoss(D, C, margin=xent.Margin(angle=0.5), scale=16.0, label_smoothing=0.1)
    x, _, target = draw(torch.float32)
    assert_close(head(x, target), plain(x, head.class_weight, target, head.margin, 16.0, label_smoothing=0.1))
    assert "angle=0.5" in repr(head)
    assert "label_smoothing=0.1" in repr(head)
    assert_close(copy.deepcopy(head)(x, target), head(x, target))
    assert head.cosines(x).shape == (N, C)
    assert_close(head.cosines(head.class_weight).diagonal(), torch.ones(C))
    classes = torch.tensor([5, *target[target >= 0].unique().tolist()]).unique()
    some = head(x, target, classes=classes)
    local = torch.searchsorted(classes, target.clamp(min=0)).where(target >= 0, -100)
    assert_close(some, plain(x, head.class_weight[classes], local, head.margin, 16.0, label_smoothing=0.1))


def test_training_with_a_margin_widens_the_angles():
    """What margins are for: classes lie closer together and farther apart than without."""
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(4, 8), dim=1)
    target = torch.arange(4).repeat(16)
    x = centres[target] + 0.3 * torch.randn(64, 8)
    gaps = []
    for margin in (0.0, xent.Margin(angle=0.5)):
        torch.manual_seed(1)
        project, head = torch.nn.Linear(8, 8), xent.nn.MarginLoss(8, 4, margin=margin, scale=8.0)
        optimiser = torch.optim.Adam([*project.parameters(), *head.parameters()], lr=0.02)
        for _ in range(60):
            optimiser.zero_grad()
            head(project(x), target).backward()
            optimiser.step()
        cosines = head.cosines(project(x)).detach()
        own = cosines.gather(1, target[:, None])[:, 0]
        rival = cosines.scatter(1, target[:, None], -2.0).amax(1)
        gaps.append((own - rival).mean().item())
    assert gaps[1] > gaps[0]


BAD = [
    (lambda z, y: xent.cross_entropy(z, y, margin=xent.Margin(angle=0.5)), ValueError, "needs cosines"),
    (
        lambda z, y: xent.cross_entropy(z, z.softmax(1), margin=0.35),
        ValueError,
        "margin needs a target of class",
    ),
    (
        lambda z, y: xent.cross_entropy(z, xent.TopKTarget(y[:, None], torch.ones(2, 1)), margin=0.35),
        ValueError,
        "margin needs a target of class",
    ),
    (lambda z, y: xent.cross_entropy(z, y, margin="0.35"), TypeError, "number or a xent.Margin"),
    (
        lambda z, y: xent.cross_entropy(z, y, margin=10.0, temperature=0.01),
        ValueError,
        "beyond what exponentials",
    ),
    (lambda z, y: xent.Margin(angle=2.0), ValueError, "from 0 to π/2"),
    (lambda z, y: xent.Margin(angle=-0.1), ValueError, "from 0 to π/2"),
    (lambda z, y: xent.Margin(cosine=math.nan), ValueError, "finite"),
    (lambda z, y: xent.nn.MarginLoss(3, 4, scale=0.0), ValueError, "scale must be positive"),
]


@pytest.mark.parametrize(("call", "error", "match"), BAD, ids=[match for *_, match in BAD])
def test_errors_say_what_and_the_way_out(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.tensor([[3.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 1]))


@pytest.mark.parametrize("rows", [0, 3])
def test_second_derivatives_where_no_row_counts(rows):
    x, w = torch.randn(rows, D, requires_grad=True), torch.randn(C, D, requires_grad=True)
    target = torch.full((rows,), -100)
    loss = xent.linear_cross_entropy(x, w, target, margin=xent.Margin(cosine=0.3), label_smoothing=0.1)
    (g,) = torch.autograd.grad(loss, w, create_graph=True)
    again = torch.autograd.grad((g * torch.randn_like(g)).sum(), (x, w))
    assert not g.any()
    assert not any(t.any() for t in again)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"normalize": True, "linear_bias": torch.full((3,), 2.0)}, "the bias is added to the cosine"),
        ({"linear_bias": torch.full((3,), 2.0)}, "normalise features and classifier, pass no linear_bias"),
        ({"linear_bias": None}, "normalise features and classifier, and give the scale"),
    ],
)
def test_the_error_of_an_angle_names_what_carries_the_score_out(options, cause):
    x, w = 3 * torch.eye(3), torch.eye(3)
    with pytest.raises(ValueError, match=cause):
        xent.linear_cross_entropy(x, w, torch.tensor([0, 1, 2]), margin=xent.Margin(angle=0.5), **options)
