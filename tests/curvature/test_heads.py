"""Head operators against dense float64 autograd, for every operator × option, and their definitions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.func import hessian, jacrev
from torch.testing import assert_close

import xent
from table import ROWS, problem, spelt_out
from xent._core import reference
from xent.curvature import HeadFisher, HeadGGN, HeadHessian

# margins and samples of the classes have no operator
TABLE = [r for r in ROWS if "margin" not in r.options and not r.sampled]
CASES = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
WRT = [("weight",), ("bias",), ("features",), ("weight", "bias"), ("bias", "features", "weight")]
N, D, C = 6, 3, 4


def draw(row):
    p = problem(row, n=N, d=D, c=C)
    options = dict(p.options)
    weight = options.pop("weight", None)
    return p, {**options, "class_weight": weight}, {**options, "weight": weight}


def flat(given):
    return torch.cat([t.reshape(-1) for t in (given if isinstance(given, tuple) else (given,))])


def joined(blocks, wrt):
    """torch's blocks of (x, w, b) as one matrix, in the order of wrt."""
    at = [("features", "weight", "bias").index(name) for name in wrt]
    sizes = (N * D, C * D, C)
    rows = [torch.cat([blocks[i][j].reshape(sizes[i], sizes[j]) for j in at], dim=1) for i in at]
    return torch.cat(rows)


def loss_of(p, options, reduction):
    def loss(x, w, b):
        return reference.cross_entropy(x @ w.T + b, spelt_out(p.target, C), reduction=reduction, **options)

    return loss


def agrees(operator, dense):
    """Check products with every accepted shape of right-hand side."""
    size = dense.abs().max().item() or 1.0

    def near(a, b):
        assert_close(a, b, rtol=0.0, atol=2e-13 * size)

    near(operator.to_dense(), dense)
    near(flat(operator.diagonal()), dense.diagonal())
    near(operator.trace(), dense.trace())
    assert operator.shape == dense.shape
    vector = torch.randn(len(dense), dtype=dense.dtype)
    near(operator @ vector, dense @ vector)
    parts = operator._cut(vector)
    near(flat(operator @ parts), dense @ vector)
    columns = torch.randn(len(dense), 3, dtype=dense.dtype)
    near(operator @ columns, dense @ columns)
    if len(parts) == 1:
        near((operator @ parts[0]).reshape(-1), dense @ vector)
        if len(operator.shapes[0]) > 1:
            shaped = columns.t().reshape(3, *operator.shapes[0])
            near((operator @ shaped).reshape(3, -1), (dense @ columns).t())


@CASES
@pytest.mark.parametrize("wrt", WRT, ids="+".join)
@pytest.mark.parametrize("budget", [None, 2000])
def test_hessian_equals_autograd(row, wrt, budget):
    p, options, plain = draw(row)
    for reduction in ("mean", "sum"):
        dense = joined(hessian(loss_of(p, plain, reduction), (0, 1, 2))(p.x, p.w, p.b), wrt)
        operator = HeadHessian(
            p.x, p.w, p.target, bias=p.b, wrt=wrt, reduction=reduction, memory_budget=budget, **options
        )
        agrees(operator, dense)
        assert_close(operator.to_dense(), operator.to_dense().t())


def logit_curvature(p, plain):
    """(N, C, C): Σ over the divisor of s·(a·J + 2λ·p pᵀ) in z, and dz/du, (N, C)."""
    z = p.logits
    inner = {k: plain[k] for k in ("softcap", "temperature") if k in plain}
    full = reference.transform(z, **inner)
    t = reference.target_rows(
        spelt_out(p.target, C), C, weight=plain["weight"], label_smoothing=plain.get("label_smoothing", 0.0)
    )
    s = plain.get("sample_weight", torch.ones(N, dtype=z.dtype))
    is_index = isinstance(p.target, torch.Tensor) and not p.target.is_floating_point()
    s = torch.where(p.target != -100, s, 0.0) if is_index else s
    share = s
    if is_index and plain["weight"] is not None:
        share = s * plain["weight"][p.target.clamp(min=0)]
    q = full.softmax(1)
    outer = q[:, :, None] * q[:, None, :]
    mass, kappa = t.sum(1)[:, None, None], 2 * plain.get("z_loss", 0.0)
    curvature = mass * (torch.diag_embed(q) - outer) + kappa * outer
    leaf = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(reference.transform(leaf, **inner).sum(), leaf)
    return curvature * (s / share.sum())[:, None, None], slope


@CASES
@pytest.mark.parametrize("wrt", WRT, ids="+".join)
@pytest.mark.parametrize("operator", [HeadGGN, HeadFisher])
def test_gauss_newton_equals_its_definition(row, wrt, operator):
    """Jacᵀ (a·J + 2λ·p pᵀ) Jac, of weight, bias and features together too; semidefinite; type-2 Fisher."""
    p, options, plain = draw(row)
    if operator is HeadFisher and plain.get("z_loss"):
        with pytest.raises(ValueError, match="z_loss must be 0"):
            HeadFisher(p.x, p.w, p.target, **options)
        return
    curvature, slope = logit_curvature(p, plain)
    inner = jacrev(lambda x, w, b: x @ w.T + b, (0, 1, 2))(p.x, p.w, p.b)
    places = {"features": 0, "weight": 1, "bias": 2}
    jac = torch.cat([inner[places[name]].reshape(N, C, -1) for name in wrt], dim=2)
    jac = slope[:, :, None] * jac
    dense = torch.einsum("nci,ncd,ndj->ij", jac, curvature, jac)
    found = operator(p.x, p.w, p.target, bias=p.b, wrt=wrt, memory_budget=2000, **options)
    agrees(found, dense)
    if row.target == "index":
        assert torch.linalg.eigvalsh(dense).min() > -1e-14 * dense.abs().max()


def test_the_joint_hessian_is_indefinite_and_gauss_newton_is_not():
    p, options, _ = draw(ROWS[0])
    both = {"wrt": ("weight", "features"), **options}
    assert torch.linalg.eigvalsh(HeadHessian(p.x, p.w, p.target, **both).to_dense()).min() < -1e-3
    assert torch.linalg.eigvalsh(HeadGGN(p.x, p.w, p.target, **both).to_dense()).min() > -1e-14


@pytest.mark.parametrize("row", [r for r in TABLE if "z_loss" not in r.options], ids=lambda row: row.name)
@pytest.mark.parametrize("wrt", WRT, ids="+".join)
def test_empirical_fisher_is_the_sum_of_outer_products(row, wrt):
    """γ·g gᵀ of each row's gradient, as autograd gives it."""
    p, options, plain = draw(row)
    s = plain.pop("sample_weight", None)
    names = {"features": 0, "weight": 1, "bias": 2}
    whole = HeadFisher(p.x, p.w, p.target, bias=p.b, wrt=wrt, kind="empirical", **options)
    rows = jacrev(loss_of(p, plain, "none"), (0, 1, 2))(p.x, p.w, p.b)
    g = torch.cat([rows[names[name]].reshape(N, -1) for name in wrt], dim=1)
    share = torch.ones(N, dtype=g.dtype) if s is None else s
    is_index = isinstance(p.target, torch.Tensor) and not p.target.is_floating_point()
    share = torch.where(p.target != -100, share, 0.0) if is_index else share
    divisor = share
    if is_index and plain["weight"] is not None:
        divisor = share * plain["weight"][p.target.clamp(min=0)]
    agrees(whole, (g.t() * (share / divisor.sum())) @ g)


def test_monte_carlo_fisher_converges_to_the_type_2_and_the_empirical_does_not():
    torch.manual_seed(0)
    x, w = torch.randn(20, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    y = torch.full((20,), -100)
    y[:18] = (x[:18] @ w.T).argmax(1)
    exact = HeadFisher(x, w, y).to_dense()
    size = exact.norm()
    apart = []
    for samples in (1, 40, 1600):
        generator = torch.Generator().manual_seed(1)
        estimate = HeadFisher(x, w, y, kind="monte-carlo", samples=samples, generator=generator)
        dense = estimate.to_dense()
        assert_close(estimate.to_dense(), dense)  # labels are drawn once
        apart.append(((dense - exact).norm() / size).item())
    assert apart[0] > apart[1] > apart[2]
    assert apart[2] < 0.05
    assert ((HeadFisher(x, w, y, kind="empirical").to_dense() - exact).norm() / size) > 0.2
    masses = torch.rand(4, dtype=torch.float64) + 0.5
    weighted = {"class_weight": masses, "label_smoothing": 0.1}
    exact = HeadFisher(x, w, y, **weighted).to_dense()
    estimate = HeadFisher(
        x, w, y, kind="monte-carlo", samples=1600, generator=torch.Generator().manual_seed(1), **weighted
    )
    assert (estimate.to_dense() - exact).norm() < 0.05 * exact.norm()
    again = [
        HeadFisher(x, w, y, kind="monte-carlo", generator=torch.Generator().manual_seed(seed)).to_dense()
        for seed in (1, 1, 2)
    ]
    assert torch.equal(again[0], again[1])
    assert not torch.equal(again[0], again[2])


def test_labels_are_drawn_as_often_as_they_are_likely():
    """Whole and in tiles; a masked class never."""
    from xent._arguments.call import resolve_head
    from xent._arguments.options import Options
    from xent._core.tiles import sweep
    from xent.curvature._sampling import sample, uniforms

    u = uniforms(torch.arange(2), 20_000, seed=0)
    z = torch.tensor([[0.0, 1.0, -torch.inf, 2.0, -1.0, 0.5], [5.0, -50.0, 0.0, 0.0, 0.0, -torch.inf]])
    for budget in (1 << 20, 120):
        options = Options.of(memory_budget=budget)
        (problem,) = resolve_head(options, torch.eye(2), z.nan_to_num(neginf=-1e4).t(), None, None).problems
        found = sweep.statistics(problem)
        drawn = sample(problem, found, u)
        for row, p in zip(drawn, z.softmax(1), strict=True):
            share = torch.bincount(row, minlength=6) / 20_000
            assert ((share - p).abs() <= 5 * (p / 20_000).sqrt()).all()
            assert (share[p == 0] == 0).all()


def test_a_class_without_probability_is_never_drawn():
    """The smallest and the largest uniform numbers do not draw it either."""
    from xent._arguments.call import resolve_head
    from xent._arguments.options import Options
    from xent._core.tiles import sweep
    from xent.curvature._sampling import sample

    w = torch.tensor([[-1e9], [0.0], [0.0], [-1e9]])
    (problem,) = resolve_head(Options(), torch.ones(1, 1), w, None, None).problems
    found = sweep.statistics(problem)
    for u, right in ((0.0, 1), (1.0, 2)):
        assert sample(problem, found, torch.full((1, 3), u)).tolist() == [[right] * 3]


@pytest.mark.parametrize("row", [TABLE[6], TABLE[-4]], ids=lambda row: row.name)
def test_batches_are_the_whole(row):
    """Batches of any size, with ignored rows and weights, have one divisor."""
    p, options, _ = draw(replace(row, sample_weight=False))
    s = torch.rand(N, dtype=torch.float64) + 0.5
    cuts = [(0, 2), (2, 2), (2, 5), (5, 6)]  # one of them empty
    parts = [slice(*cut) for cut in cuts]

    def target(at):
        t = p.target
        return (
            xent.TopKTarget(t.indices[at], t.probabilities[at], t.remainder)
            if row.target == "top_k"
            else t[at]
        )

    batches = [(p.x[at], target(at), s[at]) for at in parts]
    both = {"bias": p.b, "wrt": ("weight", "bias"), **options}
    for operator in (HeadHessian, HeadGGN):
        whole = operator(p.x, p.w, p.target, sample_weight=s, **both)
        pieces = operator(batches, p.w, **both)
        assert_close(pieces.to_dense(), whole.to_dense(), rtol=1e-12, atol=1e-14)
        assert_close(pieces.diagonal(), whole.diagonal(), rtol=1e-12, atol=1e-14)
        assert_close(pieces.trace(), whole.trace())
        assert_close(pieces.block(1), whole.block(1))
    pieces = HeadFisher(batches, p.w, kind="monte-carlo", **both)
    assert_close(pieces.to_dense(), pieces.to_dense())


def test_blocks():
    p, options, plain = draw(ROWS[6])
    dense = hessian(loss_of(p, plain, "mean"), (0, 1, 2))(p.x, p.w, p.b)
    both = HeadHessian(p.x, p.w, p.target, bias=p.b, wrt=("weight", "bias"), **options)
    rows = HeadHessian(p.x, p.w, p.target, bias=p.b, wrt="features", **options)
    for c in range(C):
        block = both.block(c)
        assert_close(block[:D, :D], dense[1][1][c, :, c, :])
        assert_close(block[:D, D], dense[1][2][c, :, c])
        assert_close(block[D, D], dense[2][2][c, c])
    for n in range(N):  # one of them ignored
        assert_close(rows.block(n), dense[0][0][n, :, n, :])
    with pytest.raises(IndexError, match=r"block 4 is outside 0\.\.3"):
        both.block(4)


def test_gauge_freedom_is_the_null_space():
    """One vector added to every class's row changes nothing: D directions, and no more."""
    x, w = torch.randn(40, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    dense = HeadHessian(x, w, torch.randint(5, (40,))).to_dense()
    values = torch.linalg.eigvalsh(dense)
    assert (values[:3].abs() < 1e-15).all()
    assert values[3] > 1e-6
    shift = torch.randn(3, dtype=torch.float64).expand(5, 3)
    assert (dense @ shift.reshape(-1)).abs().max() < 1e-15


def test_confident_rows_keep_their_digits():
    """p(1 − p) = e⁻⁴⁰ on a row where 1 − p rounds to 0."""
    x, w = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[0.0], [-40.0]], dtype=torch.float64)
    operator = HeadHessian(x, w, torch.tensor([0]))
    right = torch.full((2, 1), math.exp(-40) / (1 + math.exp(-40)) ** 2, dtype=torch.float64)
    assert_close(operator.diagonal(), right, rtol=1e-14, atol=0.0)
    assert_close(operator.trace(), right.sum(), rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types(dtype):
    p, options, _ = draw(ROWS[6])
    exact = HeadHessian(p.x, p.w, p.target, bias=p.b, **options)
    x, w, b = (t.to(dtype) for t in (p.x, p.w, p.b))
    rounded = HeadHessian(x.double(), w.double(), p.target, bias=b.double(), **options)
    found = HeadHessian(x, w, p.target, bias=b, **options)
    v = torch.randn(C, D, dtype=torch.float64).to(dtype)
    assert (found @ v).dtype == dtype
    right = rounded @ v.double()
    assert ((found @ v).double() - right).abs().max() <= 4 * torch.finfo(dtype).eps * right.abs().max()
    assert exact.dtype == torch.float64


def test_scipy_accepts_the_operator():
    from scipy.sparse.linalg import cg, eigsh

    x, w = torch.randn(60, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    operator = HeadHessian(x, w, torch.randint(6, (60,)))
    dense = operator.to_dense().numpy()
    largest = eigsh(operator.to_scipy(), k=2, return_eigenvectors=False, v0=torch.ones(24).numpy())
    assert_close(torch.tensor(largest).sort().values, torch.linalg.eigvalsh(torch.tensor(dense))[-2:])
    right = dense @ torch.randn(24, dtype=torch.float64).numpy()
    solution, info = cg(operator.to_scipy(), right, rtol=1e-12)
    assert info == 0
    assert_close(torch.tensor(dense @ solution), torch.tensor(right), rtol=1e-8, atol=1e-10)
    assert_close(operator.to_scipy() @ torch.eye(24).double().numpy(), dense)


def test_nothing_of_the_callers_changes_and_nothing_is_kept_of_graphs():
    p, options, _ = draw(ROWS[6])
    x, w = p.x.clone().requires_grad_(), p.w.clone().requires_grad_()
    v = torch.randn(C, D, dtype=torch.float64)
    before = [t.clone() for t in (x, w, v)]
    operator = HeadHessian(x, w, p.target, **options)
    assert not (operator @ v).requires_grad
    for a, b in zip((x, w, v), before, strict=True):
        assert torch.equal(a, b)
    assert repr(operator) == "HeadHessian(weight (4, 3); 12 × 12)"


def test_no_rows_at_all():
    x, w = torch.zeros(0, 3), torch.randn(4, 3)
    operator = HeadHessian(x, w, torch.zeros(0, dtype=torch.int64))
    assert not (operator @ torch.ones(4, 3)).any()
    assert not operator.diagonal().any()
    assert operator.trace() == 0
    ignored = HeadHessian(torch.ones(2, 3), w, torch.tensor([-100, -100]))
    assert not ignored.to_dense().any()


X, W, Y = torch.ones(3, 2), torch.ones(4, 2), torch.tensor([0, 1, 2])
BAD = [
    (lambda: HeadHessian(X, W), ValueError, "a target is needed"),
    (lambda: HeadHessian(X, W[None], Y), ValueError, r"weight must be \(C, D\)"),
    (lambda: HeadHessian(X, W, Y, wrt="bias"), ValueError, "there is none: pass bias"),
    (lambda: HeadHessian(X, W, Y, wrt="both"), ValueError, "must name different ones"),
    (lambda: HeadHessian(X, W, Y, wrt=()), ValueError, "must name different ones"),
    (lambda: HeadHessian(X, W, Y, reduction="none"), ValueError, "'mean' or 'sum'"),
    (lambda: HeadHessian(X, W, torch.tensor([0, 1, 4])), IndexError, r"target 4 at row 2"),
    (lambda: HeadHessian(X * torch.nan, W, Y), ValueError, "features of row 0 are not finite"),
    (lambda: HeadHessian([(X, Y), (X / 0, Y)], W) @ W, ValueError, "row 0 of batch 1"),
    (lambda: HeadHessian(iter([(X, Y)]), W), TypeError, "empty after one pass"),
    (lambda: HeadHessian([(X, Y)], W, wrt="features"), ValueError, "one tensor, not batches"),
    (lambda: HeadHessian([(X, Y)], W, Y), ValueError, "batches bring their targets"),
    (lambda: HeadHessian(X, W, Y) @ X, ValueError, r"must have shape \(4, 2\), \(8,\) or \(8, K\)"),
    (lambda: HeadHessian(X, W, Y) @ W.double(), TypeError, "convert one of them"),
    (lambda: HeadHessian(X, W, Y) @ 2.0, TypeError, "got float"),
    (lambda: HeadHessian(X, W, Y) @ (W, W), ValueError, "a tuple must hold"),
    (lambda: HeadHessian(X, torch.ones(20000, 2), Y).to_dense(), ValueError, "too large for a dense matrix"),
    (lambda: HeadFisher(X, W, Y, kind="true"), ValueError, "kind must be"),
    (lambda: HeadFisher(X, W, Y, kind="monte-carlo", samples=0), ValueError, "samples must be"),
]


@pytest.mark.parametrize(("call", "error", "match"), BAD, ids=[match for *_, match in BAD])
def test_errors_name_the_argument_and_a_remedy(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_an_ignored_row_may_hold_anything():
    x = X.clone()
    x[1] = torch.nan
    y = torch.tensor([0, -100, 2])
    kept = torch.tensor([0, 2])
    for operator in (HeadHessian, HeadGGN):
        found, right = operator(x, W, y), operator(X[kept], W, Y[kept])
        assert_close(found.to_dense(), right.to_dense())
        assert_close(found.trace(), right.trace())
        assert_close(found.diagonal(), right.diagonal())
        assert_close(found.block(2), right.block(2))
    assert not HeadHessian(x, W, y, wrt="features").block(1).any()


def test_batches_without_rows_that_count():
    """An empty batch, and one of ignored rows, add nothing to the mean's divisor."""
    x, w, y = torch.randn(6, 2), torch.randn(4, 2), torch.tensor([0, 1, -100, -100, 2, 3])
    batches = [(x[at], y[at]) for at in (slice(0, 2), slice(2, 4), slice(4, 4), slice(4, 6))]
    assert_close(HeadHessian(batches, w).to_dense(), HeadHessian(x, w, y).to_dense())


@pytest.mark.parametrize("budget", [None, 200])
@pytest.mark.parametrize("target", [0, 1, 2])
def test_confident_rows_keep_their_digits_right_or_wrong(target, budget):
    """p(1 − p) ≈ e⁻⁴⁰ of the most probable class in float32, whichever class the target is; in tiles too."""
    w = torch.tensor([[0.0], [-40.0], [-41.0]])
    operator = HeadHessian(torch.ones(1, 1), w, torch.tensor([target]), memory_budget=budget)
    p = w.double().softmax(0)
    right = p * torch.cat([p[[1, 2]].sum(0, keepdim=True), 1 - p[1:]])
    assert_close(operator.diagonal().double(), right, rtol=2e-6, atol=0.0)
    assert_close(operator.trace().double(), right.sum(), rtol=2e-6, atol=0.0)
