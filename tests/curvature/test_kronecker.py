"""Kronecker factors against dense float64: the factors, the methods, and the approximation error."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from table import ROWS, problem
from xent.curvature import HeadGGN, HeadHessian, HeadKronecker

TABLE = [r for r in ROWS if "margin" not in r.options and not r.sampled]
CASES = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
WRT = [("weight",), ("bias",), ("weight", "bias"), ("bias", "weight")]
N, D, C = 6, 3, 4


def draw(row):
    p = problem(row, n=N, d=D, c=C)
    options = dict(p.options)
    weight = options.pop("weight", None)
    return p, {**options, "class_weight": weight}


def kept_weights(p, options):
    """s_n, 0 where ignored."""
    s = options.get("sample_weight", torch.ones(N, dtype=torch.float64))
    is_index = isinstance(p.target, torch.Tensor) and not p.target.is_floating_point()
    return torch.where(p.target != -100, s, 0.0) if is_index else s


def in_order(kron, wrt):
    """A matrix of vec(weight | bias) with its rows and columns in the order of wrt, flat."""
    at = torch.arange(C * (D + 1)).reshape(C, D + 1)
    parts = {"weight": at[:, :D].reshape(-1), "bias": at[:, D]}
    order = torch.cat([parts[name] for name in wrt])
    return kron[order][:, order] if len(wrt) > 1 else kron


def small(seed=0, n=40, d=3, c=5, spread=1.5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    w = spread * torch.randn(c, d, dtype=torch.float64, generator=generator)
    b = torch.randn(c, dtype=torch.float64, generator=generator)
    return x, w, b, torch.randint(c, (n,), generator=generator)


def flat(given):
    return torch.cat([t.reshape(-1) for t in (given if isinstance(given, tuple) else (given,))])


def checked(K, dense, damping):
    """Check every method of K against the dense matrix."""

    def near(a, b):
        assert_close(a, b, rtol=1e-9, atol=1e-12 * max(1.0, dense.abs().max().item() / damping))

    size = len(dense)
    damped = dense + damping * torch.eye(size, dtype=dense.dtype)
    near(K.to_dense(), dense)
    near(flat(K.diagonal()), dense.diagonal())
    near(K.trace(), dense.trace())
    values, u, v = K.eigh()
    near(values.reshape(-1).sort().values, torch.linalg.eigvalsh(dense))
    if K.wrt in (("weight",), ("bias",)):
        basis = torch.kron(u, v)
        near(basis * values.reshape(-1) @ basis.t(), dense)
    near(K.logdet(damping), damped.logdet())
    columns = torch.randn(size, 3, dtype=dense.dtype)
    near(K @ columns, dense @ columns)
    near(K.solve(columns, damping), torch.linalg.solve(damped, columns))
    near(K.solve(columns[:, 0], damping), torch.linalg.solve(damped, columns[:, 0]))
    near(flat(K.solve(K._cut(columns[:, 0]), damping)), torch.linalg.solve(damped, columns[:, 0]))
    if K.wrt == ("weight",):
        shaped = columns.t().reshape(3, *K.shapes[0])
        near(K.solve(shaped, damping).reshape(3, -1), torch.linalg.solve(damped, columns).t())


# ── the factors ──


@CASES
@pytest.mark.parametrize("wrt", WRT, ids="+".join)
@pytest.mark.parametrize("budget", [None, 1200])
def test_the_factors_are_the_means(row, wrt, budget):
    """Γ·G is the curvature in the bias, A the weighted mean of x̃ x̃ᵀ; both reductions."""
    p, options = draw(row)
    x = torch.cat(
        [t for t, name in ((p.x, "weight"), (torch.ones(N, 1, dtype=p.x.dtype), "bias")) if name in wrt],
        dim=1,
    )
    s = kept_weights(p, options)
    mean = (x * (s / s.sum())[:, None]).t() @ x
    for reduction in ("mean", "sum"):
        both = {"bias": p.b, "reduction": reduction, **options}
        K = HeadKronecker(p.x, p.w, p.target, wrt=wrt, memory_budget=budget, **both)
        of_classes = HeadGGN(p.x, p.w, p.target, **{**both, "wrt": "bias"}).to_dense()
        assert_close(K.A, mean)
        assert_close(K.G * K.total, of_classes)
        dense = in_order(torch.kron(of_classes, mean), wrt)
        lowest = torch.linalg.eigvalsh(dense).min().item()
        checked(K, dense, damping=0.01 + max(0.0, -2 * lowest))


@CASES
@pytest.mark.parametrize("wrt", WRT, ids="+".join)
@pytest.mark.parametrize("budget", [None, 1200])
def test_corrected_eigenvalues_are_the_diagonal_of_the_curvature_in_the_basis(row, wrt, budget):
    p, options = draw(row)
    both = {"bias": p.b, "wrt": wrt, **options}
    exact = HeadGGN(p.x, p.w, p.target, **both).to_dense()
    K = HeadKronecker(p.x, p.w, p.target, memory_budget=budget, **both)
    E = K.corrected()
    assert E.is_corrected
    assert not K.is_corrected
    _, u, v = K.eigh()
    basis = torch.kron(u, v)
    at = torch.arange(C * (D + 1)).reshape(C, D + 1)
    if len(wrt) > 1:
        order = torch.cat([{"weight": at[:, :D].reshape(-1), "bias": at[:, D]}[name] for name in wrt])
        basis = basis[order]
    moments = (basis.t() @ exact @ basis).diagonal()
    assert_close(E.eigh().values.reshape(-1), moments, rtol=1e-10, atol=1e-15)
    dense = basis * moments @ basis.t()
    lowest = moments.min().item()
    checked(E, dense, damping=0.01 + max(0.0, -2 * lowest))
    assert_close(E.trace(), exact.trace())
    apart = [(exact - other.to_dense()).norm() for other in (E, K)]
    assert apart[0] <= apart[1] + 1e-14 * exact.norm()  # both exact in the bias


def test_the_corrected_eigenvalues_are_the_nearest_in_frobenius_norm():
    x, w, b, y = small()
    both = {"bias": b, "wrt": ("weight", "bias")}
    exact = HeadHessian(x, w, y, **both).to_dense()
    E = HeadKronecker(x, w, y, corrected=True, **both)
    values, nearest = E.eigh().values.clone(), (exact - E.to_dense()).norm()
    for seed in range(5):
        torch.manual_seed(seed)
        E._eigen = E._eigen._replace(values=values + 1e-3 * torch.randn_like(values))
        assert (exact - E.to_dense()).norm() > nearest
    plain = HeadKronecker(x, w, y, **both)
    assert nearest < 0.95 * (exact - plain.to_dense()).norm()


# ── when it is exact ──


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum", "label_smoothing": 0.1, "temperature": 0.7},
        {"softcap": 3.0, "z_loss": 0.1, "sample_weight": torch.tensor([2.5], dtype=torch.float64)},
        {"class_weight": torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64), "denominator": 3.0},
    ],
    ids=str,
)
def test_one_row_is_exact(options):
    x, w, b, y = small(n=1)
    both = {"bias": b, "wrt": ("weight", "bias"), **options}
    exact = HeadGGN(x, w, y, **both).to_dense()
    for corrected in (False, True):
        for weighting in ("rows", "curvature"):
            K = HeadKronecker(x, w, y, corrected=corrected, weighting=weighting, **both)
            assert_close(K.to_dense(), exact)


def test_rows_of_one_input_or_of_one_prediction_are_exact():
    x, w, b, y = small()
    s = torch.rand(len(x), dtype=torch.float64) + 0.5
    alike = x[:1].expand_as(x)
    at_zero = torch.zeros_like(w)
    for features, weight in ((alike, w), (x, at_zero)):
        both = {"sample_weight": s, "reduction": "sum"}
        exact = HeadHessian(features, weight, y, **both).to_dense()
        for weighting in ("rows", "curvature"):
            K = HeadKronecker(features, weight, y, weighting=weighting, **both)
            assert_close(K.to_dense(), exact, rtol=1e-9, atol=1e-12)
    exact = HeadHessian(x, w, y, bias=b, wrt="bias").to_dense()
    assert_close(HeadKronecker(x, w, y, bias=b, wrt="bias").to_dense(), exact)  # whose inputs are all 1


# ── weights ──


def test_the_reduction_is_a_factor_and_weights_are_repetition():
    x, w, b, y = small()
    both = {"bias": b, "wrt": ("weight", "bias")}
    mean, total = (HeadKronecker(x, w, y, reduction=r, **both) for r in ("mean", "sum"))
    assert_close(mean.A, total.A)
    assert_close(mean.G, total.G)
    assert_close(torch.tensor([mean.total, total.total]), torch.tensor([1.0, float(len(x))]))
    times = torch.arange(len(x)) % 3
    repeated = HeadKronecker(x.repeat_interleave(times, 0), w, y.repeat_interleave(times), **both)
    weighted = HeadKronecker(x, w, y, sample_weight=times.double(), **both)
    for a, b in ((weighted, repeated), (weighted.corrected(), repeated.corrected())):
        assert_close(a.to_dense(), b.to_dense(), rtol=1e-10, atol=1e-14)
        assert_close(a.solve(w.new_ones(5 * 4), 0.1), b.solve(w.new_ones(5 * 4), 0.1))


@CASES
def test_weighted_by_curvature_the_trace_is_exact(row):
    """A = Σ tr M_n x̃ x̃ᵀ / Σ tr M_n, and of a fitted head nearer to the curvature."""
    p, options = draw(row)
    both = {"bias": p.b, "wrt": ("weight", "bias"), **options}
    exact = HeadGGN(p.x, p.w, p.target, **both)
    K = HeadKronecker(p.x, p.w, p.target, weighting="curvature", memory_budget=1200, **both)
    plain = HeadKronecker(p.x, p.w, p.target, **both)
    assert_close(K.trace(), exact.trace())
    assert_close(K.G, plain.G)
    assert K.total == plain.total
    checked(K, K.to_dense(), damping=0.01 + 2 * K.to_dense().norm().item() * bool(K.eigh().values.min() < 0))


def test_weighting_by_curvature_is_nearer_for_a_fitted_head():
    x, w, b, _ = small(n=200, spread=5.0)
    y = (x @ w.T + b).argmax(1)
    exact = HeadHessian(x, w, y, bias=b, wrt=("weight", "bias")).to_dense()
    by_rows, by_curvature = (
        (HeadKronecker(x, w, y, bias=b, wrt=("weight", "bias"), weighting=name).to_dense() - exact).norm()
        for name in ("rows", "curvature")
    )
    assert by_curvature < 0.9 * by_rows


def test_batches_are_the_whole():
    x, w, b, y = small()
    y[7] = -100
    s = torch.rand(len(x), dtype=torch.float64) + 0.5
    cuts = [slice(0, 1), slice(1, 1), slice(1, 30), slice(30, 40)]
    both = {"bias": b, "wrt": ("weight", "bias"), "label_smoothing": 0.1, "z_loss": 0.01}
    whole = HeadKronecker(x, w, y, sample_weight=s, **both)
    batches = [(x[at], y[at], s[at]) for at in cuts]
    pieces = HeadKronecker(batches, w, **both)
    assert_close(pieces.to_dense(), whole.to_dense(), rtol=1e-12, atol=1e-15)
    assert_close(pieces.corrected().to_dense(), whole.corrected().to_dense(), rtol=1e-9, atol=1e-14)
    whole = HeadKronecker(x, w, y, sample_weight=s, weighting="curvature", **both)
    pieces = HeadKronecker(batches, w, weighting="curvature", **both)
    assert_close(pieces.to_dense(), whole.to_dense(), rtol=1e-12, atol=1e-15)


def test_an_ignored_row_may_hold_anything():
    x, w, _, y = small()
    x[3], y[3] = torch.nan, -100
    kept = torch.arange(40) != 3
    for corrected in (False, True):
        found, right = (
            HeadKronecker(*given, corrected=corrected).to_dense()
            for given in ((x, w, y), (x[kept], w, y[kept]))
        )
        assert_close(found, right)


def test_no_rows_at_all():
    x, w = torch.zeros(0, 3), torch.randn(4, 3)
    for features, y in (
        (x, torch.zeros(0, dtype=torch.int64)),
        (torch.ones(2, 3), torch.tensor([-100, -100])),
    ):
        for corrected in (False, True):
            K = HeadKronecker(features, w, y, corrected=corrected)
            assert not K.to_dense().any()
            assert_close(K.solve(w, 0.5), 2 * w)
            assert K.trace() == 0


# ── digits ──


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", [0, 1])
@pytest.mark.parametrize("budget", [None, 800])
def test_confident_rows_keep_their_digits(dtype, target, budget):
    """Curvature e⁻⁴⁰ where 1 − p rounds to 0, for right and wrong rows."""
    x = torch.ones(1, 1, dtype=dtype)
    w = torch.zeros(5, 1, dtype=dtype)
    w[1:] = torch.tensor([[-40.0], [-41.0], [-42.0], [-43.0]])
    small = [math.exp(-40 - k) for k in range(4)]
    right = torch.zeros(5, 5, dtype=torch.float64)
    right[0, 0] = sum(small)
    for k, p in enumerate(small, start=1):
        right[0, k] = right[k, 0] = -p
        right[k, k] = p
        for j, q in enumerate(small, start=1):
            right[k, j] -= (k != j) * p * q
    K = HeadKronecker(x, w, torch.tensor([target]), memory_budget=budget)
    tolerance = 8 * torch.finfo(dtype).eps
    assert_close(K.to_dense().double(), right, rtol=tolerance, atol=0.0)
    trace = K.corrected().trace().double()
    assert_close(trace, right.trace(), rtol=4 * tolerance, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types(dtype):
    x, w, b, y = (t.to(dtype) if t.is_floating_point() else t for t in small())
    both = {"wrt": ("weight", "bias")}
    found = HeadKronecker(x, w, y, bias=b, **both)
    exact = HeadKronecker(x.double(), w.double(), y, bias=b.double(), **both)
    v = torch.randn(5 * 4, dtype=torch.float64).to(dtype)
    for a, right in ((found, exact), (found.corrected(), exact.corrected())):
        for got, want in ((a @ v, right @ v.double()), (a.solve(v, 0.1), right.solve(v.double(), 0.1))):
            assert got.dtype == dtype
            assert (got.double() - want).abs().max() <= 32 * torch.finfo(dtype).eps * want.abs().max()
    assert found.G.dtype == torch.float32


# ── what is made of the eigenvectors ──


@pytest.mark.parametrize("corrected", [False, True])
def test_draws_have_the_covariance_that_is_asked_for(corrected):
    x, w, b, y = small(c=3, d=2)
    K = HeadKronecker(x, w, y, bias=b, wrt=("bias", "weight"), corrected=corrected)
    generator = torch.Generator().manual_seed(3)
    count = 40_000
    drawn = K.sample(generator, 0.05, count=count)
    assert [tuple(t.shape) for t in drawn] == [(count, 3), (count, 3, 2)]
    columns = torch.cat([t.reshape(count, -1) for t in drawn], dim=1)
    right = torch.linalg.inv(K.to_dense() + 0.05 * torch.eye(9, dtype=torch.float64))
    found = columns.t() @ columns / count
    spread = (right.diagonal()[:, None] * right.diagonal() + right.square()).sqrt() / count**0.5
    assert ((found - right).abs() <= 5 * spread).all()
    assert (columns.mean(0).abs() <= 5 * (right.diagonal() / count).sqrt()).all()
    one = K.sample(torch.Generator().manual_seed(1), damping=1.0)
    again = K.sample(torch.Generator().manual_seed(1), damping=1.0)
    assert [t.shape for t in one] == [(3,), (3, 2)]
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert HeadKronecker(x, w, y).sample(damping=0.1).shape == (3, 2)
    assert HeadKronecker(x, w, y).sample(damping=0.1, count=0).shape == (0, 3, 2)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("corrected", [False, True])
def test_features_of_a_small_unit_are_no_rounding(dtype, unit, corrected):
    """G ⊗ SAS + λ is S(G ⊗ A + λ·S⁻²)S, where nothing is small."""
    x, w, _, y = small(n=60, c=4, d=5)
    scale = torch.tensor([1.0, unit, 1.0, unit**0.5, unit], dtype=torch.float64)
    far = HeadKronecker((x * scale).to(dtype), (w / scale).to(dtype), y, corrected=corrected)
    a, g = x.t() @ x / len(x), HeadKronecker(x, w, y).G
    values = far.eigh().values
    assert (values == 0).sum() == 5  # the gauge, and no more
    if corrected:
        exact = HeadHessian(x * scale, w / scale, y)
        assert_close(far.trace().double(), exact.trace(), rtol=1e-5, atol=0.0)
        return
    damping = 0.1 * unit**2
    apart = torch.linalg.qr(torch.cat([torch.ones(4, 1), torch.randn(4, 3)], dim=1).double()).Q[:, 1:]
    dense = torch.kron(apart.t() @ g @ apart, a) + (damping / scale.square()).repeat(3).diag()
    v = torch.randn(3, 5, dtype=torch.float64)
    right = apart @ torch.linalg.solve(dense, (v / scale).reshape(-1)).reshape(3, 5)
    found = far.solve((apart @ v).to(dtype), damping).double() * scale
    assert_close(found - found.mean(0), right, rtol=1e-2, atol=1e-2 * right.abs().max())
    logdet = dense.logdet() + 2 * 3 * scale.log().sum() + 5 * math.log(damping)
    assert far.logdet(damping).item() == pytest.approx(logdet.item(), rel=1e-4)
    assert far.sample(torch.Generator().manual_seed(0), damping).isfinite().all()


def test_the_corrected_diagonal_is_the_exact_one_at_zero():
    """Ten decades of units, in float32: at W = 0 the approximation is exact."""
    scale = torch.logspace(-5, 5, 6)
    x = torch.randn(50, 6) * scale
    w, y = torch.zeros(3, 6), torch.randint(3, (50,))
    exact = HeadHessian(x, w, y).diagonal()
    K = HeadKronecker(x, w, y)
    assert_close(K.corrected().diagonal(), exact, rtol=1e-4, atol=0.0)
    assert_close(K.diagonal(), exact, rtol=1e-5, atol=0.0)


def test_inputs_that_go_together_are_the_null_space_in_any_unit():
    x, w, _, y = small(n=40, c=3, d=4)
    x = torch.cat([x, 1e-6 * x[:, :1] + 1e-6 * x[:, 1:2]], dim=1)
    K = HeadKronecker(x, torch.cat([w, w[:, :1]], dim=1), y)
    values = K.eigh().values
    assert (values == 0).sum() == 3 * 1 + 5 - 1
    assert_close(torch.outer(*K._factors), values)
    dense = K.eigh().of_inputs
    assert_close(dense.t() @ dense, torch.eye(5, dtype=torch.float64))


def test_damping_of_the_factors():
    x, w, b, y = small()
    K = HeadKronecker(x, w, y, bias=b, wrt=("weight", "bias"), reduction="sum")
    damping = 0.3
    g, a = K.G * K.total, K.A
    ratio = math.sqrt((a.trace() / len(a)) / (g.trace() / len(g)))
    of_classes = g + math.sqrt(damping) / ratio * torch.eye(len(g), dtype=g.dtype)
    of_inputs = a + math.sqrt(damping) * ratio * torch.eye(len(a), dtype=g.dtype)
    dense = in_order_of_small(torch.kron(of_classes, of_inputs))
    v = torch.randn(len(dense), dtype=torch.float64)
    assert_close(K.solve(v, damping, factored=True), torch.linalg.solve(dense, v))
    assert_close(K.logdet(damping, factored=True), dense.logdet())


def in_order_of_small(kron):
    at = torch.arange(20).reshape(5, 4)
    order = torch.cat([at[:, :3].reshape(-1), at[:, 3]])
    return kron[order][:, order]


def test_scipy_accepts_the_operator():
    from scipy.sparse.linalg import eigsh

    x, w, _, y = small()
    K = HeadKronecker(x, w, y)
    largest = eigsh(K.to_scipy(), k=2, return_eigenvectors=False, v0=torch.ones(15).numpy())
    assert_close(torch.tensor(largest).max(), K.eigh().values.max())


def test_gauge_freedom_is_the_null_space():
    """G 1 = 0: D eigenvalues that are 0 and not nearly; any damping above 0 will do."""
    x, w, _, y = small()
    for corrected in (False, True):
        K = HeadKronecker(x, w, y, corrected=corrected)
        assert (K.eigh().values == 0).sum() == 3
        assert_close(K.solve(torch.ones(5, 3, dtype=torch.float64), 1e-25) * 1e-25, torch.ones(5, 3).double())
        assert not (K @ torch.ones(5, 3, dtype=torch.float64)).abs().max() > 1e-15


X, W, Y = torch.ones(3, 2), torch.ones(4, 2), torch.tensor([0, 1, 2])
MINUS = torch.tensor([1.0, 1.0, -1.5])
BAD = [
    (lambda: HeadKronecker(X, W, Y, wrt="features"), ValueError, "'weight', 'bias' or both"),
    (lambda: HeadKronecker(X, W, Y, wrt="bias"), ValueError, "there is none: pass bias"),
    (lambda: HeadKronecker(X, W, Y, weighting="mean"), ValueError, "'rows' or 'curvature', got 'mean'"),
    (lambda: HeadKronecker(X, W), ValueError, "a target is needed"),
    (lambda: HeadKronecker(iter([(X, Y)]), W), TypeError, "empty after one pass"),
    (lambda: HeadKronecker(X * torch.nan, W, Y), ValueError, "features of row 0 are not finite"),
    (lambda: HeadKronecker(X, W, Y).solve(W), ValueError, "is singular: damping must be above 0, got 0.0"),
    (lambda: HeadKronecker(X, W, Y).solve(W, -1.0), ValueError, "is singular: damping must be above 0, got"),
    (lambda: HeadKronecker(X, W, Y).logdet(), ValueError, "damping must be above 0"),
    (lambda: HeadKronecker(X, W, Y).sample(), ValueError, "damping must be above 0"),
    (lambda: HeadKronecker(X, W, Y).corrected().logdet(), ValueError, "damping must be above 0"),
    (lambda: HeadKronecker(X, W, Y).solve(W, factored=True), ValueError, "damping must be above 0"),
    (lambda: HeadKronecker(X, W, Y).solve(W, torch.nan), ValueError, "damping must be finite"),
    (
        lambda: HeadKronecker(X, W, Y, corrected=True).solve(W, 1.0, factored=True),
        ValueError,
        "no product of factors",
    ),
    (
        lambda: HeadKronecker(X, W, torch.rand(3, 4) - 1).solve(W, 1e-6),
        ValueError,
        r"has the eigenvalue -.*damping must be above 1\.",
    ),
    (lambda: HeadKronecker(X, W, Y).solve(X, 1.0), ValueError, r"must have shape \(4, 2\), \(8,\)"),
    (lambda: HeadKronecker(X, W, Y) @ W.double(), TypeError, "convert one of them"),
    (lambda: HeadKronecker(X, W, Y).block(4), IndexError, r"outside 0\.\.3"),
]


@pytest.mark.parametrize(("call", "error", "match"), BAD, ids=[match for *_, match in BAD])
def test_errors_name_the_argument_and_a_remedy(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_blocks_are_those_of_the_dense_matrix():
    x, w, _, y = small()
    for corrected in (False, True):
        K = HeadKronecker(x, w, y, corrected=corrected)
        dense = K.to_dense().reshape(5, 3, 5, 3)
        for c in range(5):
            assert_close(K.block(c), dense[c, :, c])
    assert repr(HeadKronecker(x, w, y)) == "HeadKronecker(weight (5, 3); 15 × 15)"
