"""Assignments: the sums, the form of the plan, and its derivatives; against a slow loop, mpmath and POT."""

from __future__ import annotations

import math
import warnings

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import xent
from xent.sinkhorn import _ascent, _coupling, _iterations, assign

F64 = torch.float64


def normal(*shape, dtype=F64):
    return torch.randn(*shape, dtype=F64).to(dtype)


def slow(scores, epsilon, iterations, row=None, column=None):
    """Sinkhorn's iterations as they are written, in float64."""
    z = scores.double() / epsilon
    n, k = z.shape
    log_r = torch.zeros(n, dtype=F64) if row is None else row.log()
    log_c = torch.full((k,), math.log(n / k), dtype=F64) if column is None else column.log()
    a = torch.zeros(n, dtype=F64)
    for _ in range(iterations):
        b = log_c - (z + a[:, None]).logsumexp(0)
        a = log_r - (z + b).logsumexp(1)
    return (z + a[:, None] + b).exp()


def check_is_the_plan(found, scores, epsilon, row, column, rel=1e-12):
    """The sums, and log Q − S/ε = f + g: there is one such plan, however it was found."""
    plan = found.plan.double()
    assert found.converged.all()
    f, g = (t / epsilon for t in found.potentials)
    torch.testing.assert_close(
        plan, (scores.double() / epsilon + f[..., None] + g[..., None, :]).exp(), rtol=1e-6, atol=1e-40
    )
    assert ((plan.sum(-1) - row).abs() <= rel * row).all()
    assert (plan.sum(-2) - column).abs().sum(-1).max() <= rel * column.sum(-1).max()


# Against what is known


@pytest.mark.parametrize("iterations", [1, 2, 3, 10, 57])
@pytest.mark.parametrize(
    ("epsilon", "size"), [(0.5, (9, 4)), (0.05, (40, 12)), (0.02, (12, 40)), (0.001, (30, 9))]
)
def test_a_number_of_iterations_is_that_number(iterations, epsilon, size):
    """A kernel with absorbed potentials, absorbed anew in between, takes the same steps as a plain loop."""
    scores = normal(*size)
    found = assign(scores, epsilon=epsilon, tolerance=None, max_iterations=iterations)
    assert found.iterations == iterations
    torch.testing.assert_close(found.plan, slow(scores, epsilon, iterations), rtol=0, atol=1e-11)


@pytest.mark.parametrize("epsilon", [0.02, 0.001])
def test_scalings_out_of_reach_are_absorbed_anew(epsilon):
    """Float32 kernels, whose entries and scalings over- and underflow soonest, and small masses."""
    scores, column = normal(30, 9, dtype=torch.float32), torch.full((9,), 30 / 8, dtype=F64)
    column[0] = 1e-12
    column *= 30 / column.sum()
    for iterations in (2, 5, 40):
        found = assign(
            scores, epsilon=epsilon, column_marginal=column, tolerance=None, max_iterations=iterations
        )
        assert (found.plan - slow(scores, epsilon, iterations, column=column)).abs().max() < 1e-5


def test_exact_arithmetic():
    """Six rows, three columns in 60 digits, marginals of their own."""
    scores, epsilon = normal(6, 3), 0.2
    row, column = torch.rand(6, dtype=F64) + 0.1, torch.rand(3, dtype=F64) + 0.1
    column *= row.sum() / column.sum()
    with mpmath.workdps(60):
        kernel = [[mpmath.exp(mpmath.mpf(s) / mpmath.mpf(epsilon)) for s in line] for line in scores.tolist()]
        r, c = [mpmath.mpf(t) for t in row.tolist()], [mpmath.mpf(t) for t in column.tolist()]
        c = [t * mpmath.fsum(r) / mpmath.fsum(c) for t in c]
        u = [mpmath.mpf(1)] * 6
        for _ in range(1500):
            v = [c[j] / mpmath.fsum(u[i] * kernel[i][j] for i in range(6)) for j in range(3)]
            u = [r[i] / mpmath.fsum(kernel[i][j] * v[j] for j in range(3)) for i in range(6)]
        exact = torch.tensor(
            [[float(u[i] * kernel[i][j] * v[j]) for j in range(3)] for i in range(6)], dtype=F64
        )
    found = assign(scores, epsilon=epsilon, row_marginal=row, column_marginal=column, tolerance=1e-15)
    torch.testing.assert_close(found.plan, exact, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize(("size", "epsilon"), [((256, 16), 0.02), ((300, 40), 0.05), ((40, 100), 0.1)])
def test_plans_of_pot(size, epsilon):
    ot = pytest.importorskip("ot")
    scores, (n, k) = normal(*size), size
    plan = ot.bregman.sinkhorn_log(
        np.ones(n), np.full(k, n / k), -scores.numpy(), epsilon, numItermax=100_000, stopThr=1e-12
    )
    found = assign(scores, epsilon=epsilon, tolerance=1e-13)
    assert (found.plan - torch.from_numpy(plan)).abs().max() < 1e-9


@pytest.mark.parametrize("relaxations", [(1.0, 1.0), (0.3, 2.0), (math.inf, 0.5), (0.5, math.inf)])
def test_unbalanced_plans_of_pot(relaxations):
    ot = pytest.importorskip("ot")
    scores, row, column = normal(20, 7), torch.rand(20, dtype=F64) + 0.1, torch.rand(7, dtype=F64) + 0.1
    plan = ot.unbalanced.sinkhorn_unbalanced(
        row.numpy(),
        column.numpy(),
        -scores.numpy(),
        0.5,
        relaxations,
        reg_type="kl",
        numItermax=100_000,
        stopThr=1e-15,
    )
    lam, mu = relaxations
    found = assign(
        scores,
        epsilon=0.5,
        row_marginal=row,
        column_marginal=column,
        row_relaxation=lam,
        column_relaxation=mu,
        tolerance=1e-14,
    )
    torch.testing.assert_close(found.plan, torch.from_numpy(plan), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("relaxations", [(1.0, 1.0), (0.3, 2.0), (None, 0.5), (0.5, None), (1e-3, 1e3)])
def test_unbalanced_plan_is_the_best_one(relaxations):
    """No plan nearby has a larger ⟨S, Q⟩ − ε·KL(Q ‖ r cᵀ) − λ·KL(Q·1 ‖ r) − μ·KL(Qᵀ·1 ‖ c)."""
    scores, row, column, epsilon = normal(8, 5), torch.rand(8, dtype=F64), torch.rand(5, dtype=F64) + 0.1, 0.3
    found = assign(
        scores,
        epsilon=epsilon,
        row_marginal=row,
        column_marginal=column,
        row_relaxation=relaxations[0],
        column_relaxation=relaxations[1],
        tolerance=1e-14,
    )
    log_q = found.plan.log().requires_grad_()

    def kl(q, p):
        return (torch.xlogy(q, q / p) - q + p).sum()

    q = log_q.exp()
    value = (scores * q).sum() - epsilon * kl(q, row[:, None] * column)
    for sums, marginal, relaxation in ((q.sum(1), row, relaxations[0]), (q.sum(0), column, relaxations[1])):
        if relaxation is not None:
            value = value - relaxation * kl(sums, marginal)
    (slope,) = torch.autograd.grad(value, q)
    # along changes that keep the sums that are held: off the span of those rows' and columns' multipliers
    if relaxations[0] is None:
        slope = slope - slope[:, :1]
        torch.testing.assert_close(found.plan.sum(1), row)
    if relaxations[1] is None:
        slope = slope - slope[:1]
        torch.testing.assert_close(found.plan.sum(0), column)
    scale = max(1.0, *(r for r in relaxations if r is not None))
    assert slope.abs().max() < 1e-11 * scale


@pytest.mark.parametrize(
    ("relaxations", "iterations"),
    [((0.05, 0.02), 200), ((5.0, 5.0), 200), ((None, 0.05), 100), ((0.05, None), 60)],
)
def test_unbalanced_plans_at_a_small_epsilon(relaxations, iterations):
    """With small relaxations the mass grows as exp(S/(λ + μ)), and Sinkhorn's iterations converge fast."""
    options = dict(epsilon=0.005, row_relaxation=relaxations[0], column_relaxation=relaxations[1])
    found = assign(scores := normal(100, 30), tolerance=1e-12, **options)
    assert found.converged
    assert found.iterations < iterations
    long = assign(scores, tolerance=None, max_iterations=3000, **options)
    if long.error < 1e-11:
        torch.testing.assert_close(found.plan, long.plan, rtol=1e-7, atol=1e-9 * float(long.plan.max()))


def test_an_infinite_relaxation_is_the_condition():
    scores = normal(9, 5)
    free = assign(scores, row_relaxation=math.inf, column_relaxation=math.inf, tolerance=1e-12)
    torch.testing.assert_close(free.plan, assign(scores, tolerance=1e-12).plan)


# The named cases


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_sinkhorn_small_epsilon(dtype):
    """N(0, 1), 256 × 64, ε = 0.02: plain iterations creep, exponentials overflow, the plan is the plan."""
    scores = normal(256, 64, dtype=torch.float32)
    right = assign(scores.double(), epsilon=0.02, tolerance=1e-13)
    check_is_the_plan(right, scores, 0.02, torch.ones(256, dtype=F64), torch.full((64,), 4.0, dtype=F64))
    assert (right.plan - slow(scores, 0.02, 3000)).abs().max() < 0.1  # on its way there
    found = assign(scores.to(dtype), epsilon=0.02, tolerance=1e-12)
    assert found.plan.dtype == dtype
    assert found.converged
    assert (found.plan - right.plan).abs().max() < 4 * torch.finfo(torch.float32).eps


def test_sinkhorn_empty_prototype():
    """Fewer rows than columns, and columns that underflow in exp(S/ε)."""
    scores = normal(5, 12, dtype=torch.float32)
    scores[:, 3] -= 300.0
    scores[2] += 1000.0
    found = assign(scores, epsilon=0.05)
    check_is_the_plan(
        found, scores, 0.05, torch.ones(5, dtype=F64), torch.full((12,), 5 / 12, dtype=F64), rel=1e-5
    )
    assert (found.plan[:, 3].sum() - 5 / 12).abs() < 1e-5


# Small epsilons: the plan is nearly a vertex, and exponents leave the range of numbers


def random_problem(seed):
    """Scores with ties and without, marginals even and skewed, of up to seven rows and columns."""
    draw = torch.Generator().manual_seed(seed)
    n, k, ties, skew = (
        int(torch.randint(*span, (), generator=draw)) for span in ((1, 8), (1, 8), (0, 3), (0, 4))
    )
    scores = torch.randn(n, k, generator=draw, dtype=F64)
    if ties:
        scores = (scores * (10, 2)[ties - 1]).round() / (10, 2)[ties - 1]
    masses = [
        (
            torch.ones(count, dtype=F64),
            torch.rand(count, generator=draw, dtype=F64),
            torch.randint(1, 9, (count,), generator=draw).to(F64),
            (-10 * torch.rand(count, generator=draw, dtype=F64)).exp(),
        )[skew]
        for count in (n, k)
    ]
    row, column = (t / t.sum() for t in masses)
    return scores, row, column


def in_sixty_digits(scores, epsilon, row, column, potentials):
    """The plan, by Newton's steps from potentials near it, which double the digits: there is only one."""
    n, rows, columns = len(scores), range(scores.shape[0]), range(scores.shape[1])
    with mpmath.workdps(60):
        s = mpmath.matrix(scores.tolist())
        r, c, f, g = ([mpmath.mpf(x) for x in t.tolist()] for t in (row, column, *potentials))
        c = [x * mpmath.fsum(r) / mpmath.fsum(c) for x in c]
        for _ in range(300):  # an entry that should be far smaller goes down by a factor of e a step
            plan = s.apply(lambda x: x)
            for i in rows:
                for j in columns:
                    plan[i, j] = mpmath.exp((s[i, j] + f[i] + g[j]) / mpmath.mpf(epsilon))
            p, q = [mpmath.fsum(plan[i, :]) for i in rows], [mpmath.fsum(plan[:, j]) for j in columns]
            off = [x - y for x, y in zip([*r, *c], [*p, *q], strict=True)]
            if mpmath.fsum(map(abs, off)) < 1e-28:
                return torch.tensor([[float(plan[i, j]) for j in columns] for i in rows], dtype=F64)
            system = mpmath.diag([x * (1 + mpmath.mpf(10) ** -45) for x in [*p, *q]])
            for i in rows:
                for j in columns:
                    system[i, n + j] = system[n + j, i] = plan[i, j]
            step = mpmath.lu_solve(system, mpmath.matrix(off)) * mpmath.mpf(epsilon)
            f, g = (
                [x + y for x, y in zip(f, step[:n], strict=True)],
                [x + y for x, y in zip(g, step[n:], strict=True)],
            )
    raise AssertionError("no plan in sixty digits")


def check_small_epsilon(seeds, ratio, dtype=F64, digits=True):
    """Plans of random problems at a spread of scores over ε."""
    for seed in seeds:
        scores, row, column = random_problem(seed)
        scores = scores.to(dtype)
        epsilon = (float(scores.max() - scores.min()) or 1.0) / ratio
        options = dict(epsilon=epsilon, row_marginal=row, column_marginal=column)
        tolerance = max(1e-10, 1e-14 * ratio)
        found, usual = assign(scores, tolerance=tolerance, **options), assign(scores, **options)
        for one in (found, usual):
            assert one.plan.isfinite().all(), seed
            assert one.error.isfinite(), seed
            assert one.converged, seed
            assert (one.plan.sum(1) - row).abs().max() < 1e-6, seed
            assert (one.plan.sum(0) - column).abs().sum() < 1.2e-6, seed
        assert usual.iterations <= 400, seed
        if digits:
            right = in_sixty_digits(scores, epsilon, row, column, found.potentials)
            rounding = 0 if dtype == F64 else 1e-7
            assert (found.plan - right).abs().max() < 10 * tolerance + rounding, seed
            assert (usual.plan - right).abs().max() < 1e-5, seed


@pytest.mark.parametrize("ratio", [1e3, 1e5, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_plans_at_small_epsilons(ratio, dtype):
    # of the last four two were cycles of steps, two hung by entries of a billionth
    check_small_epsilon([*range(25), 1407, 2373, 2738, 3241], ratio, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [1e3, 1e5])
def test_thousands_of_plans_at_small_epsilons(ratio):
    check_small_epsilon(range(1000, 1400), ratio)
    check_small_epsilon(range(1400, 4000), ratio, digits=False)


SKEWED = dict(
    row_marginal=torch.tensor([1 / 8, 7 / 8], dtype=F64),
    column_marginal=torch.tensor([8 / 11, 3 / 11], dtype=F64),
    epsilon=1e-4,
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_plan_whose_column_sums_underflow(dtype, offset):
    """Skewed masses at a small epsilon; the same with a constant in a row."""
    scores = torch.tensor([[0.0, -0.3], [-0.3, -2.1]], dtype=dtype)
    found = assign(
        scores if dtype.itemsize < 4 else scores + torch.tensor([[offset], [0.0]], dtype=dtype), **SKEWED
    )
    right = torch.tensor([[0.0, 0.125], [0.7272727, 0.1477273]], dtype=dtype)
    assert found.converged
    assert found.iterations < 100
    torch.testing.assert_close(found.plan, right, rtol=1e-3 if dtype.itemsize < 4 else 1e-6, atol=1e-6)
    batch = assign(scores.repeat(2, 3, 1, 1), **SKEWED)
    assert batch.converged.all()
    torch.testing.assert_close(
        batch.plan, right.expand(2, 3, 2, 2), rtol=1e-3 if dtype.itemsize < 4 else 1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    "options", [dict(tolerance=None, max_iterations=50), dict(max_iterations=20), {}], ids=str
)
def test_an_unconverged_plan_is_finite(options):
    """Sinkhorn's iterations, too few of either kind, and unrolled ones."""
    scores = torch.tensor([[0.0, -0.3], [-0.3, -2.1]], dtype=F64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for differentiate in ("implicit", "unroll"):
            found = assign(scores, differentiate=differentiate, **{**SKEWED, **options})
            assert found.plan.isfinite().all()
            assert found.error < 2
            torch.testing.assert_close(found.plan.sum(1), SKEWED["row_marginal"])
            (g,) = torch.autograd.grad(found.plan.square().sum(), scores)
            assert g.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_derivatives_of_a_vertex(dtype):
    """Scores move none of its masses, marginals move them as the sums say."""
    scores = torch.tensor([[0.0, -0.3], [-0.3, -2.1]], dtype=dtype, requires_grad=True)
    row, column = (SKEWED[name].clone().requires_grad_() for name in ("row_marginal", "column_marginal"))
    plan = assign(scores, epsilon=1e-4, row_marginal=row, column_marginal=column).plan
    upstream = torch.tensor([[1.0, 2.0], [-3.0, 5.0]], dtype=dtype)
    on_scores, on_row, on_column = torch.autograd.grad((plan * upstream).sum(), (scores, row, column))
    assert on_scores.abs().max() < 1e-8
    # P₀₁ = r₀, P₁₀ = c₀, P₁₁ = r₁ − c₀
    for to_row, to_column in (((1.0, -1.0), (0.0, 0.0)), ((0.0, 0.0), (1.0, -1.0)), ((1.0, 0.0), (0.0, 1.0))):
        right = 2 * to_row[0] - 3 * to_column[0] + 5 * (to_row[1] - to_column[0])
        slope = on_row @ torch.tensor(to_row, dtype=F64) + on_column @ torch.tensor(to_column, dtype=F64)
        assert slope.item() == pytest.approx(right, abs=1e-6)


@pytest.mark.parametrize("epsilon", [1e-2, 1e-3])
def test_float32_gradients_at_a_small_epsilon_are_those_of_float64(epsilon):
    """The difference of upstream gradient and the system's solution cancels, and is divided by epsilon."""
    scores, upstream = normal(12, 5, dtype=torch.float32), normal(12, 5, dtype=torch.float32)
    found = []
    for dtype in (torch.float32, F64):
        leaf = scores.to(dtype).requires_grad_()
        plan = assign(leaf, epsilon=epsilon, tolerance=1e-11).plan
        found.append(torch.autograd.grad(plan, leaf, upstream.to(dtype))[0].double())
    assert (found[0] - found[1]).abs().max() < 1e-5 * found[1].abs().max().clamp(min=1.0)


@pytest.mark.parametrize("relaxations", [(None, None), (3.0, None), (None, 3.0), (3.0, 2.0)])
@pytest.mark.parametrize("epsilon", [1e-3, 1e-5, 1e-7])
def test_small_epsilons_with_relaxed_marginals(relaxations, epsilon):
    for seed in range(12):
        scores, row, column = random_problem(seed)
        found = assign(
            scores,
            epsilon=epsilon,
            row_marginal=row,
            column_marginal=column,
            row_relaxation=relaxations[0],
            column_relaxation=relaxations[1],
        )
        assert found.plan.isfinite().all(), seed
        assert found.converged, seed
        # the conditions of the best plan, in the potentials: sums are r·exp(−(f − ε log r)/λ)
        for t, mass, sums, price in zip(
            found.potentials, (row, column), (found.plan.sum(1), found.plan.sum(0)), relaxations, strict=True
        ):
            wanted = mass if price is None else mass * ((epsilon * mass.log() - t) / price).exp()
            assert (sums - wanted).abs().sum() < 1e-5 * wanted.sum(), seed


FAR = dict(epsilon=0.05, row_relaxation=100, column_relaxation=0.1)


def test_a_plan_beyond_float32():
    """Mass goes up as exp(S/(λ + μ))."""
    scores, right = (
        torch.tensor([[1e4], [0.0], [1e4]]),
        torch.tensor([[2.3164e43], [0.9059], [2.3164e43]], dtype=F64),
    )
    found = assign(scores.double(), **FAR)
    assert found.converged
    torch.testing.assert_close(found.plan, right, rtol=1e-4, atol=0)
    for differentiate in ("implicit", "unroll"):
        leaf = scores.clone().requires_grad_()
        with pytest.warns(UserWarning, match="beyond the range of torch.float32.*pass the scores as float64"):
            found = assign(leaf, differentiate=differentiate, **FAR)
        assert not found.converged
        assert found.error <= 1e-6
        most = torch.finfo(torch.float32).max
        torch.testing.assert_close(
            found.plan.detach(), torch.tensor([[most], [0.9059], [most]]), rtol=1e-4, atol=0
        )
        wide = scores.double().requires_grad_()
        (g,) = torch.autograd.grad(found.plan.sum(), leaf)
        (right_g,) = torch.autograd.grad(assign(wide, differentiate=differentiate, **FAR).plan[1, 0], wide)
        torch.testing.assert_close(g, right_g.float())  # what is held at the largest number does not move


@pytest.mark.parametrize("differentiate", ["implicit", "unroll"])
def test_a_plan_beyond_float64(differentiate):
    for scores in ([[1e5], [0.0], [1e5]], [[1e6, 3.0], [5.0, 0.0]]):
        leaf = torch.tensor(scores, dtype=F64, requires_grad=True)
        with pytest.warns(
            UserWarning, match=r"beyond the range of torch\.float64.*: raise epsilon, row_relaxation"
        ):
            found = assign(leaf, differentiate=differentiate, **FAR)
        assert found.plan.isfinite().all()
        assert found.plan.max() == torch.finfo(F64).max
        assert found.error <= 1e-6  # by logarithms
        assert not found.converged


@pytest.mark.parametrize(("dtype", "mass"), [(torch.float16, 1e5), (torch.float32, 1e39)], ids=str)
def test_masses_beyond_the_type_of_the_scores(dtype, mass):
    scores, row = normal(5, 3, dtype=dtype), torch.full((5,), mass, dtype=F64)
    with pytest.warns(UserWarning, match="beyond the range"):
        found = assign(scores, row_marginal=row)
    assert found.plan.isfinite().all()
    assert found.error <= 1e-6
    assert not found.converged
    with pytest.raises(ValueError, match=r"row_marginal has a sum beyond torch\.float64"):
        assign(scores, row_marginal=torch.full((5,), 1e308, dtype=F64))


@pytest.mark.parametrize("scale", [1e-300, 1e300])
@pytest.mark.parametrize("epsilon", [5e-324, 1e-12, 0.05, 1e300])
@pytest.mark.parametrize(
    "options", [{}, dict(row_relaxation=2.0), dict(row_relaxation=1e-320, column_relaxation=1e-300)]
)
def test_any_scores_have_a_finite_plan(scale, epsilon, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for differentiate in ("implicit", "unroll"):
            found = assign(
                scale * normal(4, 3),
                epsilon=epsilon,
                max_iterations=50,
                differentiate=differentiate,
                **options,
            )
            assert found.plan.isfinite().all()
            assert found.error.isfinite()


@pytest.mark.parametrize("ratio", [1e3, 1e5])
def test_masked_plans_at_small_epsilons(ratio):
    """A mask that leaves room for one plan at least: what is forbidden is as if it were far below."""
    for seed in range(25):
        scores, row, column = random_problem(seed)
        corner = torch.minimum(row.cumsum(0)[:, None], column.cumsum(0))
        some = corner.diff(dim=0, prepend=torch.zeros(1, len(column), dtype=F64))
        some = some.diff(dim=1, prepend=torch.zeros(len(row), 1, dtype=F64)) > 1e-12
        mask = some | (torch.rand(scores.shape) < 0.4)
        epsilon = (float(scores.max() - scores.min()) or 1.0) / ratio
        options = dict(epsilon=epsilon, row_marginal=row, column_marginal=column)
        found = assign(scores, mask=mask, **options)
        assert found.converged, seed
        assert (found.plan[~mask] == 0).all(), seed
        distant = assign(torch.where(mask, scores, -1e3), **options)
        assert (found.plan - distant.plan).abs().max() < 1e-5, seed


def test_tiny_masses_at_a_small_epsilon():
    row, column = torch.tensor([1, 1e-300, 1e-20, 0], dtype=F64), torch.tensor([1e-20, 1, 0], dtype=F64)
    scores = normal(4, 3)
    found = assign(scores, row_marginal=row, column_marginal=column, epsilon=1e-4)
    assert found.converged
    torch.testing.assert_close(found.plan.sum(1), row, rtol=1e-12, atol=0)
    assert found.plan[3].sum() == 0


def test_a_batch_of_easy_and_hard_items():
    """Items that have converged stay converged while the others go on."""
    scores = torch.tensor(
        [[[0.0, -0.3], [-0.3, -2.1]], [[0.0, 0.0], [0.0, 0.0]], [[3e3, 0.0], [0.0, -1e3]]], dtype=F64
    )
    found = assign(scores, **SKEWED)
    assert found.converged.all()
    for item, plan in zip(scores, found.plan, strict=True):
        torch.testing.assert_close(plan, assign(item, **SKEWED).plan, rtol=0, atol=2e-6)


# Laws


SIZES = st.tuples(st.integers(1, 12), st.integers(1, 9))
EPSILONS = st.sampled_from([1.0, 0.2, 0.05])


@given(SIZES, EPSILONS, st.integers(0, 2**31))
def test_the_plan(size, epsilon, seed):
    torch.manual_seed(seed)
    (n, k), scores = size, 0.3 * normal(*size)
    found = assign(scores, epsilon=epsilon, tolerance=1e-11)
    check_is_the_plan(
        found, scores, epsilon, torch.ones(n, dtype=F64), torch.full((k,), n / k, dtype=F64), rel=1e-10
    )
    assert found.error <= 1e-11
    assert abs(found.potentials[1].mean()) < 1e-12 * (1 + scores.abs().max())


@given(SIZES, EPSILONS, st.integers(0, 2**31))
def test_marginals_are_kept(size, epsilon, seed):
    torch.manual_seed(seed)
    scores, row, column = 0.3 * normal(*size), torch.rand(size[0], dtype=F64), torch.rand(size[1], dtype=F64)
    column = column * row.sum() / column.sum()
    found = assign(scores, epsilon=epsilon, row_marginal=row, column_marginal=column, tolerance=1e-11)
    check_is_the_plan(found, scores, epsilon, row, column, rel=1e-10)


def test_shift_invariance():
    """A constant added to a row or a column is taken up by its potential."""
    scores, rows, columns = normal(30, 8), 100 * normal(30), 100 * normal(8)
    plain, moved = (assign(s, tolerance=1e-13) for s in (scores, scores + rows[:, None] + columns))
    torch.testing.assert_close(moved.plan, plain.plan, rtol=0, atol=1e-10)
    shift = columns.mean()
    torch.testing.assert_close(moved.potentials[0], plain.potentials[0] - rows - shift, rtol=0, atol=1e-9)
    torch.testing.assert_close(moved.potentials[1], plain.potentials[1] - columns + shift, rtol=0, atol=1e-9)


def test_permutation_equivariance():
    scores, rows, columns = normal(30, 8), torch.randperm(30), torch.randperm(8)
    plain, moved = (assign(s, tolerance=1e-13).plan for s in (scores, scores[rows][:, columns]))
    torch.testing.assert_close(moved, plain[rows][:, columns], rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", [(30, 8), (8, 30)])
def test_transposition_swaps_the_marginals(size):
    scores, row, column = normal(*size), torch.rand(size[0], dtype=F64), torch.rand(size[1], dtype=F64)
    column *= row.sum() / column.sum()
    plain = assign(scores, row_marginal=row, column_marginal=column, tolerance=1e-14)
    turned = assign(scores.T, row_marginal=column, column_marginal=row, tolerance=1e-14)
    torch.testing.assert_close(turned.plan.T, plain.plan, rtol=0, atol=1e-11)


def test_marginals_scale_the_plan():
    scores, row, column = normal(12, 5), torch.rand(12, dtype=F64), torch.rand(5, dtype=F64)
    column *= row.sum() / column.sum()
    one, many = (
        assign(scores, row_marginal=t * row, column_marginal=t * column, tolerance=1e-13).plan
        for t in (1.0, 1e6)
    )
    torch.testing.assert_close(many, 1e6 * one, rtol=1e-9, atol=0)


def test_scores_and_epsilon_have_one_unit():
    scores = normal(12, 5)
    one, many = (assign(t * scores, epsilon=t * 0.1, tolerance=1e-13) for t in (1.0, 1e3))
    torch.testing.assert_close(many.plan, one.plan, rtol=0, atol=1e-11)
    torch.testing.assert_close(many.potentials[1], 1e3 * one.potentials[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("options", [dict(tolerance=None, max_iterations=7), dict(tolerance=1e-12)], ids=str)
@pytest.mark.parametrize("relaxation", [None, 0.5])
def test_batch_is_loop(options, relaxation):
    scores, row = normal(2, 3, 11, 6), torch.rand(3, 11, dtype=F64) + 0.1
    options = dict(options, row_marginal=row, epsilon=0.1, row_relaxation=relaxation)
    found = assign(scores, **options)
    assert found.error.shape == found.converged.shape == found.iterations.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            one = assign(scores[i, j], **{**options, "row_marginal": row[j]})
            torch.testing.assert_close(found.plan[i, j], one.plan, rtol=0, atol=1e-10)
            torch.testing.assert_close(found.potentials[0][i, j], one.potentials[0], rtol=0, atol=1e-9)


def test_large_batches_and_long_rows_are_cut_into_parts(monkeypatch):
    scores, long = normal(5, 11, 6), normal(40, 30)
    whole = [assign(s, tolerance=None, max_iterations=5).plan for s in (scores, long)]
    monkeypatch.setattr(_iterations, "CHUNK", 140)  # two items; four rows
    parts = [assign(s, tolerance=None, max_iterations=5).plan for s in (scores, long)]
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


def test_one_column_and_one_row():
    torch.testing.assert_close(assign(normal(4, 1)).plan, torch.ones(4, 1, dtype=F64))
    torch.testing.assert_close(assign(normal(1, 4)).plan, torch.full((1, 4), 0.25, dtype=F64))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (0, 4, 3), (0, 0)])
def test_nothing_is_assigned(shape):
    found = assign(torch.zeros(shape))
    assert found.plan.shape == shape
    assert found.converged.shape == shape[:-2]
    assert found.converged.all()


# Types


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_are_computed_in_float32(dtype):
    scores = normal(64, 10, dtype=dtype)
    found = assign(scores, tolerance=1e-9)
    assert found.plan.dtype == dtype
    assert found.potentials[0].dtype == F64
    torch.testing.assert_close(
        found.plan, assign(scores.float(), tolerance=1e-9).plan.to(dtype), rtol=0, atol=0
    )


@pytest.mark.parametrize("iterations", [3, 200])
def test_float32_is_float64_rounded(iterations):
    """Potentials are float64, and so is the last step; of 200 steps each product rounds."""
    scores = normal(256, 40, dtype=torch.float32)
    options = dict(tolerance=None, max_iterations=iterations)
    found, right = assign(scores, **options).plan, assign(scores.double(), **options).plan
    assert (found - right).abs().max() < (2e-7 if iterations == 3 else 2e-6)


def test_a_tolerance_below_the_rounding_of_float32_is_reached():
    found = assign(normal(300, 50, dtype=torch.float32), tolerance=1e-12)
    assert found.converged
    assert found.error <= 1e-12


def test_inputs_are_left_untouched():
    scores, mask = normal(9, 5), torch.rand(9, 5) > 0.1
    row, column = torch.ones(9, dtype=F64), torch.full((5,), 1.8, dtype=F64)
    before = [t.clone() for t in (scores, mask, row, column)]
    assign(scores, mask=mask, row_marginal=row, column_marginal=column)
    for a, b in zip(before, (scores, mask, row, column), strict=True):
        assert torch.equal(a, b)


# Masks and masses of 0


def test_masked_pairs_get_no_mass():
    scores, mask = normal(20, 6), torch.rand(20, 6) > 0.4
    mask[:, 0] = True
    options = dict(epsilon=0.2, tolerance=1e-12)
    found = assign(scores.masked_fill(~mask, math.nan), mask=mask, **options)
    assert (found.plan[~mask] == 0).all()
    assert found.converged
    torch.testing.assert_close(found.plan, assign(scores.masked_fill(~mask, -math.inf), **options).plan)
    distant = assign(torch.where(mask, scores, -1e5), **options)
    torch.testing.assert_close(found.plan, distant.plan, rtol=0, atol=1e-10)


@pytest.mark.parametrize("differentiate", ["implicit", "unroll"])
@pytest.mark.parametrize("tolerance", [None, 1e-12])
def test_rows_and_columns_without_mass_are_left_out(differentiate, tolerance):
    scores, rows, columns = normal(9, 6), torch.tensor([0, 4]), torch.tensor([5])
    row, column = torch.ones(9, dtype=F64), torch.full((6,), 7 / 5, dtype=F64)
    row[rows], column[columns] = 0.0, 0.0
    scores[0], scores[:, 5] = -math.inf, -math.inf
    scores[4, 2] = 300.0
    scores.requires_grad_()
    options = dict(epsilon=0.3, tolerance=tolerance, max_iterations=200, differentiate=differentiate)
    found = assign(scores, row_marginal=row, column_marginal=column, **options)
    assert (found.plan[rows] == 0).all()
    assert (found.plan[:, columns] == 0).all()
    assert (found.potentials[0][rows] == -math.inf).all()
    keep = [i for i in range(9) if i not in (0, 4)]
    inner = scores.detach()[keep, :5].requires_grad_()
    torch.testing.assert_close(found.plan[keep, :5], assign(inner, **options).plan)
    few = dict(epsilon=0.3, tolerance=None, max_iterations=2, differentiate=differentiate)
    plan = assign(scores, row_marginal=row, column_marginal=column, **few).plan
    torch.testing.assert_close(plan[keep, :5], assign(inner, **few).plan)
    weight = normal(9, 6)
    (g,) = torch.autograd.grad((found.plan * weight).sum(), scores)
    (right,) = torch.autograd.grad((assign(inner, **options).plan * weight[keep, :5]).sum(), inner)
    torch.testing.assert_close(g[keep, :5], right)
    assert (g[rows] == 0).all()


def test_a_mask_without_a_plan_is_reported():
    """Three rows may lie on one column alone, which is to hold one: no plan, though each row has a place."""
    scores = torch.zeros(4, 4)
    scores[:3, 1:] = -math.inf
    for tolerance in (1e-6, None):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = assign(scores, tolerance=tolerance, max_iterations=300)
        assert not found.converged
        assert found.error > 0.4
        assert found.plan.isfinite().all()
        assert len(caught) == (tolerance is not None)
    torch.testing.assert_close(found.plan.sum(1), torch.ones(4))


@pytest.mark.parametrize("relaxed", ["row_relaxation", "column_relaxation"])
def test_relaxed_marginals_allow_rows_without_a_pair(relaxed):
    scores = normal(5, 4)
    if relaxed == "row_relaxation":
        scores[2] = -math.inf
    else:
        scores[:, 2] = -math.inf
    found = assign(scores, epsilon=0.5, tolerance=1e-12, **{relaxed: 1.0})
    assert found.plan.isfinite().all()
    assert found.plan[scores == -math.inf].sum() == 0
    assert found.plan.sum() > 1
    assert found.converged


# Bad input


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(epsilon=0.0), "epsilon must be positive and finite, got 0.0"),
        (dict(epsilon=math.nan), "epsilon must be positive and finite, got nan"),
        (dict(epsilon=math.inf), "epsilon must be positive and finite, got inf"),
        (dict(tolerance=-1.0), "tolerance must be positive and finite, got -1.0"),
        (dict(max_iterations=0), "max_iterations must be at least 1, got 0"),
        (dict(row_relaxation=0.0), "row_relaxation must be positive, or None, got 0.0"),
        (dict(differentiate="forward"), "differentiate must be 'implicit' or 'unroll', got 'forward'"),
        (
            dict(row_marginal=torch.ones(4)),
            r"row_marginal \(4,\) does not fit scores \(3, 2\): it must be \(3,\)",
        ),
        (dict(column_marginal=torch.ones(2, 3)), "column_marginal"),
        (dict(row_marginal=torch.tensor([1.0, -1.0, 1.0])), "row_marginal is -1 at 1"),
        (dict(column_marginal=torch.tensor([math.nan, 1.0])), "column_marginal is nan at 0"),
        (dict(column_marginal=torch.ones(2)), "rows 3, columns 2"),
        (dict(start=(torch.zeros(2), torch.zeros(2))), r"start\[0\] is \(2,\)"),
        (dict(mask=torch.tensor([[True], [False], [True]])), "row 1 has a mass of 1"),
        (dict(mask=torch.tensor([True, False])), "column 1 has a mass of 1.5"),
        (dict(mask=torch.ones(4, 3, 2, dtype=torch.bool)), "mask"),
    ],
    ids=str,
)
def test_bad_arguments(options, says):
    with pytest.raises(ValueError, match=says):
        assign(torch.zeros(3, 2), **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("epsilon", value) for value in (None, "a", True, torch.ones(2), [0.1])],
        *[("max_iterations", value) for value in (None, "a", 1.5, math.nan)],
        *[("tolerance", value) for value in ("a", torch.ones(2))],
        *[("row_relaxation", value) for value in ("a", torch.ones(2))],
        ("column_relaxation", "a"),
        *[("mask", value) for value in (torch.ones(3, 2), [[True]], 1)],
        *[(name, value) for name in ("row_marginal", "column_marginal") for value in ([1.0], 1.0, "a")],
        ("row_marginal", torch.ones(3, dtype=torch.bool)),
        ("row_marginal", torch.ones(3, dtype=torch.complex64)),
        ("row_marginal", torch.ones(3).to_sparse()),
        *[("start", value) for value in (torch.zeros(3), (torch.zeros(3),), 3, (None, None), ([0.0], [0.0]))],
        *[("differentiate", value) for value in (3, None)],
    ],
)
def test_options_of_the_wrong_kind(name, value):
    with pytest.raises((TypeError, ValueError), match=rf"^{name}(\[0\])? must be "):
        assign(torch.zeros(3, 2), **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tolerance", math.nan),
        ("row_relaxation", math.nan),
        ("column_relaxation", -1.0),
        ("max_iterations", -1),
        ("differentiate", "forward"),
        ("mask", torch.ones(2, 2, dtype=torch.bool)),
        ("start", (torch.tensor([0.0, math.nan, 0.0]), torch.zeros(2))),
        ("start", (torch.tensor([0.0, -math.inf, 0.0]), torch.zeros(2))),
    ],
)
def test_options_out_of_range(name, value):
    with pytest.raises(ValueError, match=rf"^{name}"):
        assign(torch.zeros(3, 2), **{name: value})


def test_numbers_of_any_library():
    scores = normal(6, 4)
    right = assign(scores, epsilon=0.5, row_relaxation=2.0, max_iterations=50, tolerance=None).plan
    for number in (np.float64, torch.tensor):
        found = assign(
            scores,
            epsilon=number(0.5),
            row_relaxation=number(2.0),
            max_iterations=np.int64(50),
            tolerance=None,
        )
        assert torch.equal(found.plan, right)
    whole = assign(scores, row_marginal=torch.ones(6, dtype=torch.int64), column_relaxation=math.inf)
    assert torch.equal(whole.plan, assign(scores).plan)


def test_bad_scores():
    scores = torch.zeros(2, 3, 2)
    scores[1, 2, 0] = math.nan
    with pytest.raises(ValueError, match=r"scores hold nan at \(1, 2, 0\)"):
        assign(scores)
    scores[1, 2, 0] = math.inf
    with pytest.raises(ValueError, match=r"scores hold inf at \(1, 2, 0\)"):
        assign(scores)
    with pytest.raises(ValueError, match=r"\(\.\.\., N, K\)"):
        assign(torch.zeros(3))
    with pytest.raises(ValueError, match="no column"):
        assign(torch.zeros(3, 0))
    with pytest.raises(TypeError, match=r"scores must be a tensor of floating-point .* torch\.int64"):
        assign(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="mask must be a tensor of bools"):
        assign(torch.zeros(3, 2), mask=torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"item \[1\]"):
        assign(torch.zeros(2, 3, 2), column_marginal=torch.tensor([[1.5, 1.5], [1.0, 1.0]]))
    with pytest.raises(ValueError, match="epsilon takes no gradient"):
        assign(torch.zeros(3, 2), epsilon=torch.tensor(0.1, requires_grad=True))
    with pytest.raises(ValueError, match="every pair that it could lie on is forbidden"):
        # its only place is a column that is to have no mass
        assign(
            torch.tensor([[0.0, -math.inf], [0.0, 0.0]]),
            row_marginal=torch.tensor([1.0, 1.0]),
            column_marginal=torch.tensor([0.0, 2.0]),
        )


def test_marginals_that_differ_by_rounding_agree():
    """N/K rounded to float32: their own sums would be an error that no plan goes below."""
    found = assign(normal(50, 6), column_marginal=torch.full((6,), 50 / 6), tolerance=1e-13)
    assert found.converged


def test_too_few_iterations_warn():
    with pytest.warns(
        UserWarning, match=r"has not converged: its column sums are off by .* after 3 iterations"
    ):
        found = assign(normal(50, 6), epsilon=0.01, max_iterations=3)
    assert not found.converged
    assert found.iterations == 3
    torch.testing.assert_close(found.error, (found.plan.sum(0) - 50 / 6).abs().sum() / 50)


@pytest.mark.parametrize("limit", [1, 2, 12, 13, 30])
def test_max_iterations_is_a_limit(limit):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (
            assign(normal(200, 40), epsilon=0.005, tolerance=1e-12, max_iterations=limit).iterations <= limit
        )


def test_a_warm_start_has_converged():
    scores = normal(60, 9)
    first = assign(scores, epsilon=0.02, tolerance=1e-12)
    again = assign(scores, epsilon=0.02, tolerance=1e-12, start=first.potentials)
    assert again.iterations <= 2 < first.iterations
    torch.testing.assert_close(again.plan, first.plan, rtol=0, atol=1e-9)


# Derivatives

CONVERGED = dict(epsilon=0.5, tolerance=1e-15, max_iterations=400)
VARIANTS = {
    "balanced": {},
    "masked": dict(mask=torch.tensor([[True, True, False], *[[True] * 3] * 3, [False, True, True]])),
    "rows give way": dict(row_relaxation=0.7),
    "columns give way": dict(column_relaxation=0.4),
    "both give way": dict(row_relaxation=0.7, column_relaxation=0.4),
}


def outputs(scores, row, column, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = assign(scores, row_marginal=row, column_marginal=column, **{**CONVERGED, **options})
    return found.plan, *found.potentials


def inputs():
    return normal(5, 3).requires_grad_(), normal(5).requires_grad_(), normal(3).requires_grad_()


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_derivatives_are_finite_differences(options):
    """First and second, forward and backward, of plan and potentials, in scores and marginals of one sum."""

    def f(scores, a, b):
        return outputs(scores, a.softmax(0), b.softmax(0), **options)

    assert gradcheck(f, inputs(), check_forward_ad=True)
    assert gradgradcheck(f, inputs())


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_unrolled_derivatives_are_finite_differences(options):
    def f(scores, a, b):
        many = dict(tolerance=None, max_iterations=4, differentiate="unroll")
        return outputs(scores, a.softmax(0), b.softmax(0), **{**options, **many})

    assert gradcheck(f, inputs(), check_forward_ad=True)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("size", [(5, 3), (3, 5)])
def test_implicit_is_unrolled_at_convergence(options, size):
    if "mask" in options and size == (3, 5):
        options = dict(mask=options["mask"].T)
    scores, upstream = normal(*size).requires_grad_(), normal(*size)
    row, column = torch.full((size[0],), 1.0, dtype=F64), torch.full((size[1],), size[0] / size[1], dtype=F64)
    for order in (1, 2):
        found = []
        for how in ("implicit", "unroll"):
            plan, *_ = outputs(scores, row, column, **{**options, "tolerance": None, "differentiate": how})
            (g,) = torch.autograd.grad((plan * upstream).sum(), scores, create_graph=True)
            if order == 2:
                (g,) = torch.autograd.grad((g * upstream).sum(), scores)
            found.append(g)
        torch.testing.assert_close(*found, rtol=0, atol=1e-14 * 10**order * float(upstream.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_gradient_at_a_small_epsilon(dtype):
    """Along a direction of the scores, by a difference of converged plans."""
    scores, way, upstream = normal(60, 12), normal(60, 12), normal(60, 12)
    options, h = dict(epsilon=0.05, tolerance=1e-13), 1e-5

    def value(s):
        return (assign(s, **options).plan * upstream).sum()

    slope = (value(scores + h * way) - value(scores - h * way)) / (2 * h)
    leaf = scores.to(dtype).requires_grad_()
    (g,) = torch.autograd.grad((assign(leaf, **options).plan * upstream.to(dtype)).sum(), leaf)
    assert g.dtype == dtype
    assert (g.double() * way).sum() == pytest.approx(slope.item(), rel=1e-5 if dtype == F64 else 1e-4)


@pytest.mark.parametrize("epsilon", [1e-3, 1e-4])
def test_gradient_where_the_plan_is_nearly_a_permutation(epsilon):
    """Weakly connected groups, eigenvalues below rounding: the gradient is 0, not rounding error."""
    scores = torch.rand(8, 8, dtype=F64)
    scores += 2 * torch.eye(8, dtype=F64)
    leaf = scores.requires_grad_()
    (g,) = torch.autograd.grad((assign(leaf, epsilon=epsilon).plan * normal(8, 8)).sum(), leaf)
    assert g.abs().max() < 1e-9


def test_a_forbidden_pair_may_have_any_upstream_gradient():
    scores, upstream = normal(6, 3), normal(6, 3)
    scores[0, 0] = -math.inf
    scores.requires_grad_()
    plan = assign(scores, epsilon=0.5).plan
    (right,) = torch.autograd.grad(plan, scores, upstream, retain_graph=True)
    upstream[0, 0] = -math.inf
    torch.testing.assert_close(torch.autograd.grad(plan, scores, upstream)[0], right)


def test_half_types_have_gradients():
    leaf = normal(20, 5, dtype=torch.bfloat16).requires_grad_()
    upstream = normal(20, 5, dtype=torch.bfloat16)
    (g,) = torch.autograd.grad((assign(leaf, epsilon=0.5).plan * upstream).sum(), leaf)
    wide = leaf.detach().float().requires_grad_()
    (right,) = torch.autograd.grad((assign(wide, epsilon=0.5).plan * upstream.float()).sum(), wide)
    torch.testing.assert_close(g.float(), right, rtol=2e-2, atol=2e-3)


def test_gradient_of_a_mass_of_zero_is_nan():
    """The derivative in a mass of 0 is not determined by the plan, so 0 would be wrong."""
    row = torch.tensor([1.0, 0.0, 1.0], dtype=F64, requires_grad=True)
    plan = assign(normal(3, 2), row_marginal=row, epsilon=0.5).plan
    (g,) = torch.autograd.grad(plan.square().sum(), row)
    assert g.isnan().tolist() == [False, True, False]


def test_potentials_of_parts_that_nothing_connects_have_no_derivative():
    scores = torch.full((4, 4), -math.inf, dtype=F64)
    scores[:2, :2] = scores[2:, 2:] = normal(2, 2)
    scores.requires_grad_()
    found = assign(scores, epsilon=0.5)
    (g,) = torch.autograd.grad((found.plan * normal(4, 4)).sum(), scores, retain_graph=True)
    assert g.isfinite().all()
    with pytest.raises(RuntimeError, match="differentiate the plan instead"):
        torch.autograd.grad(found.potentials[0][0], scores)


# Modes


def loss(scores, **options):
    return assign(scores, epsilon=0.5, tolerance=1e-14, **options).plan.square().sum()


def test_modes_agree():
    scores, way = normal(6, 3), normal(6, 3)
    (right,) = torch.autograd.grad(loss(leaf := scores.clone().requires_grad_()), leaf)
    torch.testing.assert_close(grad(loss)(scores), right)
    torch.testing.assert_close(jvp(loss, (scores,), (way,))[1], (right * way).sum())
    whole = torch.autograd.functional.hessian(loss, scores)
    assert whole.abs().max() > 1e-3
    for second in (hessian(loss), jacrev(jacrev(loss)), jacrev(jacfwd(loss))):
        torch.testing.assert_close(second(scores), whole)
    for forward in (loss, grad(loss)):
        with pytest.raises(NotImplementedError, match="put reverse mode inside"):
            jacfwd(jacfwd(forward))(scores)
    with pytest.raises(NotImplementedError, match=r"use torch\.func"):
        torch.autograd.grad(loss(leaf), leaf, torch.ones(2, dtype=F64), is_grads_batched=True)


def test_vmap_is_loop():
    batch = normal(4, 6, 3)
    found = vmap(lambda s: assign(s, epsilon=0.5))(batch)
    torch.testing.assert_close(found.plan, assign(batch, epsilon=0.5).plan)
    assert found.converged.tolist() == [True] * 4
    torch.testing.assert_close(vmap(grad(loss))(batch), torch.stack([grad(loss)(s) for s in batch]))
    marginals = torch.rand(6, 4, dtype=F64)
    one = vmap(lambda r: assign(batch[0], row_marginal=r, epsilon=0.5).plan, in_dims=1)(marginals)
    torch.testing.assert_close(one[2], assign(batch[0], row_marginal=marginals[:, 2], epsilon=0.5).plan)
    torch.testing.assert_close(vmap(vmap(loss))(batch[None])[0], vmap(loss)(batch))
    with pytest.raises(ValueError, match=r"scores hold nan at \(1, 0, 0\)"):
        vmap(lambda s: assign(s).plan)(torch.stack([torch.zeros(3, 2), torch.full((3, 2), math.nan)]))
    with pytest.raises(NotImplementedError, match="no rule for vmap"):
        vmap(lambda s: assign(s, differentiate="unroll").plan)(batch)


def test_a_graph_is_refused():
    with pytest.raises(NotImplementedError, match="outside the graph"):
        assign(torch.zeros(3, 2, device="meta"))


def test_autocast_changes_nothing():
    scores = normal(30, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = assign(scores).plan
    assert torch.equal(inside, assign(scores).plan)


def test_swapped_assignments_train():
    """One view's plan is the other's target; as a target it is a constant."""
    first, second = (normal(32, 5, dtype=torch.float32).requires_grad_() for _ in range(2))
    target = assign(first, epsilon=0.1).plan.detach()
    xent.cross_entropy(second / 0.1, target).backward()
    assert first.grad is None
    right = (second.detach() / 0.1).softmax(1) - target
    torch.testing.assert_close(second.grad, right / 0.1 / 32, rtol=1e-4, atol=1e-6)


# The linear system


@pytest.mark.parametrize("size", [(9, 4), (4, 9), (2, 9, 4), (6, 6)])
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("free", [True, False], ids=["singular", "regular"])
def test_the_linear_system(size, direct, free, monkeypatch):
    if not direct:
        monkeypatch.setattr(_coupling, "DIRECT", 0)
    P = torch.rand(size, dtype=F64)
    d, e = P.sum(-1), P.sum(-2)
    if not free:
        d, e = 1.5 * d, 1.1 * e
    x, y = normal(*d.shape), normal(*e.shape)
    a, b = d * x + _coupling.matvec(P, y), e * y + _coupling.rmatvec(P, x)
    found_x, found_y, steps = _coupling.solve(P, d, e, a, b)
    assert (steps == 1) == direct
    shift = (x - found_x).mean(-1, keepdim=True) if free else 0.0
    torch.testing.assert_close(found_x + shift, x, rtol=0, atol=1e-11)
    torch.testing.assert_close(found_y - shift, y, rtol=0, atol=1e-11)


def test_slow_conjugate_gradients_give_way_to_cholesky(monkeypatch):
    P = assign(normal(80, 40), epsilon=0.02, tolerance=1e-12).plan
    monkeypatch.setattr(_coupling, "DIRECT", 0)
    d, e = 1.001 * P.sum(-1), 1.001 * P.sum(-2)
    a, b = normal(80), normal(40)
    *right, one = _coupling.solve(P, d, e, a, b, patience=0)
    *found, steps = _coupling.solve(P, d, e, a, b, patience=5)
    assert (one, steps) == (1, 6)
    for s, t in zip(found, right, strict=True):
        torch.testing.assert_close(s, t)
    assert _coupling.residual(P, d, e, a, b, *found) < 1e-12


def test_newton_on_conjugate_gradients(monkeypatch):
    scores = normal(100, 30)
    right = assign(scores, epsilon=0.02, tolerance=1e-13)
    monkeypatch.setattr(_coupling, "DIRECT", 0)
    found = assign(scores, epsilon=0.02, tolerance=1e-12)
    assert found.converged
    assert (found.plan - right.plan).abs().max() < 1e-8


def test_newtons_steps_never_lower_the_dual():
    """Two states whose errors halve each other's would be a cycle, if that alone let a step be taken."""
    for seed in [*range(20), 1407]:
        scores, row, column = random_problem(seed)
        epsilon = (float(scores.max() - scores.min()) or 1.0) / 100
        problem = _iterations.Problem(scores[None], row[None], column[None], epsilon)
        state, count = _iterations.run_iterations(problem, torch.zeros_like(row)[None], 1)
        for _ in range(60):
            before, _ = problem.dual(state.f, state.g, state.q)
            state, count = _ascent.newton_ascent(
                problem, _iterations.Progress(state, count), 1e-12, count + 3
            )
            after, rounding = problem.dual(state.f, state.g, state.q)
            assert after >= before - 2 * rounding, seed
