"""Newton's step against the dense system, for every operator × option and preconditioner."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

import xent
from table import ROWS, problem
from xent.curvature import HeadGGN, HeadHessian, _cg, newton_step
from xent.curvature._newton import loss_gradient

TABLE = [r for r in ROWS if "margin" not in r.options and not r.sampled]
PRECONDITIONERS = ["class-blocks", "kronecker", "diagonal", None]
N, D, C = 6, 3, 4


def draw(row):
    p = problem(row, n=N, d=D, c=C)
    options = dict(p.options)
    weight = options.pop("weight", None)
    return p, {**options, "class_weight": weight}, {**options, "weight": weight}


def small(n=60, d=4, c=5, dtype=torch.float64):
    x = torch.randn(n, d, dtype=dtype)
    w = torch.randn(c, d, dtype=dtype)
    b = torch.randn(c, dtype=dtype)
    return x, w - w.mean(0), b - b.mean(), torch.randint(c, (n,))


def flat(*parts):
    return torch.cat([t.reshape(-1) for t in parts if t is not None])


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_the_gradient_is_that_of_the_loss(row):
    p, options, plain = draw(row)
    for operator in (HeadHessian, HeadGGN):
        found = loss_gradient(operator(p.x, p.w, p.target, bias=p.b, wrt=("weight", "bias"), **options))
        leaves = [p.w.clone().requires_grad_(), p.b.clone().requires_grad_()]
        loss = xent.linear_cross_entropy(p.x, leaves[0], p.target, linear_bias=leaves[1], **plain)
        dw, db = torch.autograd.grad(loss, leaves)
        assert_close(found, torch.cat([dw, db[:, None]], dim=1))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_solves_the_dense_system(row, preconditioner, with_bias):
    """(H + l2·I_W + damping·I) s = −∇; with damping, so that one s does."""
    p, options, plain = draw(row)
    bias = p.b if with_bias else None
    wrt = ("weight", "bias") if with_bias else ("weight",)
    l2, damping = 0.3, 0.2
    dense = HeadGGN(p.x, p.w, p.target, bias=bias, wrt=wrt, **options).to_dense()
    lowest = torch.linalg.eigvalsh(dense)[0].item()
    damping += max(0.0, -2 * lowest)  # of masses below 0
    leaves = [t.clone().requires_grad_() for t in (p.w, bias) if t is not None]
    loss = xent.linear_cross_entropy(p.x, leaves[0], p.target, linear_bias=(leaves[1:] or [None])[0], **plain)
    gradient = flat(*torch.autograd.grad(loss + l2 / 2 * leaves[0].square().sum(), leaves))
    ridge = torch.full((len(dense),), damping, dtype=dense.dtype)
    ridge[: C * D] += l2
    right = torch.linalg.solve(dense + ridge.diag(), -gradient)
    found = newton_step(
        p.x,
        p.w,
        p.target,
        bias=bias,
        l2=l2,
        damping=damping,
        preconditioner=preconditioner,
        tolerance=1e-12,
        **options,
    )
    assert found.converged
    assert not found.negative_curvature
    assert found.residual <= 1e-11
    assert_close(flat(found.weight, found.bias), right, rtol=1e-8, atol=1e-11)
    model = -(gradient @ right) - 0.5 * right @ (dense + ridge.diag()) @ right
    assert found.decrease == pytest.approx(model.item(), rel=1e-6, abs=1e-14)
    assert (found.bias is None) != with_bias


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize("l2", [0.0, 0.05])
def test_the_step_is_zero_along_undetermined_directions(preconditioner, l2):
    """The system is singular; the step is its solution of least length there, and the classes sum to zero."""
    x, w, b, y = small()
    found = newton_step(x, w, y, bias=b, l2=l2, preconditioner=preconditioner, tolerance=1e-10)
    assert found.converged
    dense = HeadHessian(x, w, y, bias=b, wrt=("weight", "bias")).to_dense()
    ridge = torch.zeros(len(dense), dtype=dense.dtype)
    ridge[: w.numel()] = l2
    leaves = [w.clone().requires_grad_(), b.clone().requires_grad_()]
    loss = xent.linear_cross_entropy(x, leaves[0], y, linear_bias=leaves[1])
    gradient = flat(*torch.autograd.grad(loss + l2 / 2 * leaves[0].square().sum(), leaves))
    right = -torch.linalg.pinv(dense + ridge.diag(), rtol=1e-12) @ gradient
    assert_close(flat(found.weight, found.bias), right, rtol=1e-6, atol=1e-8)
    assert found.bias.sum().abs() < 1e-12
    assert found.weight.sum(0).abs().max() < 1e-8


def test_steps_converge_quadratically():
    x, w, b, y = small()
    w, b = torch.zeros_like(w), torch.zeros_like(b)  # far away steps need a line search
    gradients = []
    for _ in range(7):
        step = newton_step(x, w, y, bias=b, l2=0.01, tolerance=1e-12)
        w, b = w + step.weight, b + step.bias
        leaf = w.clone().requires_grad_()
        loss = xent.linear_cross_entropy(x, leaf, y, linear_bias=b) + 0.005 * leaf.square().sum()
        gradients.append(torch.autograd.grad(loss, leaf)[0].abs().max().item())
    assert gradients[-1] < 1e-15
    late = [(a, b) for a, b in itertools.pairwise(gradients) if 1e-6 < a < 1e-2]
    assert late
    assert all(b < 10 * a**1.8 for a, b in late)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_preconditioners_save_products(scale):
    """Correlated inputs of different sizes: class blocks and Kronecker factors account for both."""
    x, w, b, y = small(n=300, d=12, c=6)
    mix = torch.randn(12, 12, dtype=x.dtype) * torch.logspace(0, -2, 12, dtype=x.dtype) * scale
    inverse = torch.linalg.inv(mix)
    both = {"bias": b, "damping": 0.0, "tolerance": 1e-6}
    counts, plainly = {}, {}
    for name in PRECONDITIONERS:
        mixed = newton_step(x @ mix, w @ inverse.t(), y, preconditioner=name, max_iterations=5000, **both)
        plain = newton_step(x, w, y, preconditioner=name, **both)
        counts[name], plainly[name] = mixed.iterations, plain.iterations
    for name in ("class-blocks", "kronecker"):
        assert counts[name] <= 2 * plainly[name] + 2  # no linear map of the inputs matters
        assert 4 * counts[name] < counts[None]


def test_batches_are_the_whole_and_the_objectives_scale_does_not_matter():
    x, w, b, y = small()
    whole = newton_step(x, w, y, bias=b, l2=0.1, tolerance=1e-12)
    pieces = newton_step([(x[:10], y[:10]), (x[10:], y[10:])], w, bias=b, l2=0.1, tolerance=1e-12)
    total = newton_step(x, w, y, bias=b, l2=0.1 * len(x), tolerance=1e-12, reduction="sum")
    for other in (pieces, total):
        assert_close(other.weight, whole.weight, rtol=1e-8, atol=1e-10)
        assert_close(other.bias, whole.bias, rtol=1e-8, atol=1e-10)


def test_negative_curvature_ends_the_iterations_downhill():
    """The exact Hessian of softcapped logits; Gauss–Newton's is not negative anywhere."""
    ended = 0
    for seed in range(8):
        torch.manual_seed(seed)
        x, w, _, y = small()
        options = {"softcap": 1.0, "z_loss": 0.01}
        dense = HeadHessian(x, w, y, **options).to_dense()
        assert torch.linalg.eigvalsh(dense)[0] < -1e-4
        exact = newton_step(x, w, y, curvature="hessian", **options)
        safe = newton_step(x, w, y, **options)
        assert safe.converged
        assert not safe.negative_curvature
        ended += exact.negative_curvature
        leaf = w.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(xent.linear_cross_entropy(x, leaf, y, **options), leaf)
        assert (gradient * exact.weight).sum() < 0
        assert (gradient * safe.weight).sum() < 0
    assert ended


def test_single_precision_and_a_cap_on_the_iterations():
    x, w, b, y = small()
    exact = newton_step(x, w, y, bias=b, l2=0.01, tolerance=1e-12)
    single = newton_step(x.float(), w.float(), y, bias=b.float(), l2=0.01, tolerance=1e-5)
    assert single.weight.dtype == torch.float32
    assert_close(single.weight.double(), exact.weight, rtol=1e-2, atol=1e-3)
    short = newton_step(x, w, y, bias=b, preconditioner=None, max_iterations=3)
    assert (short.iterations, short.converged) == (3, False)
    assert 1e-6 < short.residual < 2
    none = newton_step(x, w, y, max_iterations=0)
    assert not none.weight.any()


def test_at_the_minimum_and_over_no_rows_it_is_zero():
    for x, y in (
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)),
        (torch.zeros(4, 3), torch.arange(4)),
    ):
        found = newton_step(x, torch.zeros(4, 3), y)
        assert found == found._replace(weight=found.weight)
        assert not found.weight.any()
        assert (found.iterations, found.residual, found.converged) == (0, 0.0, True)


def model_of(x, w, y, bias, **options):
    """∇ and H of weight and bias, flat."""
    wrt = ("weight",) if bias is None else ("weight", "bias")
    dense = HeadGGN(x, w, y, bias=bias, wrt=wrt, **options).to_dense()
    gradient = loss_gradient(HeadGGN(x, w, y, bias=bias, wrt=wrt, **options))
    parts = (gradient,) if bias is None else (gradient[:, :-1], gradient[:, -1])
    return flat(*parts), dense


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(20, 10, 50), (3, 5, 4), (5, 3, 30)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_directions_without_curvature_do_not_matter(
    preconditioner, softcap, with_bias, shape, dtype, tolerance
):
    """Fewer rows than features without a penalty; with a softcap, a direction of almost no curvature."""
    n, c, d = shape
    x, w, y = torch.randn(n, d, dtype=dtype), torch.randn(c, d, dtype=dtype) / d**0.5, torch.randint(c, (n,))
    bias = torch.zeros(c, dtype=dtype) if with_bias else None
    given = {} if softcap is None else {"softcap": softcap}
    found = newton_step(x, w, y, bias=bias, preconditioner=preconditioner, tolerance=tolerance, **given)
    assert found.converged
    wide = None if bias is None else bias.double()
    gradient, dense = model_of(x.double(), w.double(), y, wide, **given)
    best = 0.5 * gradient @ torch.linalg.pinv(dense, rtol=1e-12, hermitian=True) @ gradient
    assert found.decrease == pytest.approx(best.item(), rel=1e-4)
    step = flat(found.weight, found.bias).double()
    assert -(gradient @ step) - 0.5 * step @ dense @ step == pytest.approx(best.item(), rel=1e-3)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reported_residual_and_decrease_are_the_steps_own(preconditioner, dtype):
    """True also where the tolerance is below the type's rounding, or the iterations are too few."""
    for tolerance, most in ((1e-3, None), (1e-7, None), (1e-13, None), (1e-13, 7), (1e-30, None)):
        x, w, b, y = small(dtype=dtype)
        asked = {"preconditioner": preconditioner, "tolerance": tolerance, "max_iterations": most}
        found = newton_step(x, w, y, bias=b, softcap=20.0, **asked)
        operator = HeadGGN(x, w, y, bias=b, wrt=("weight", "bias"), softcap=20.0)
        gradient, step = loss_gradient(operator), (found.weight, found.bias)
        bent = torch.cat([t if t.dim() == 2 else t[:, None] for t in operator @ step], dim=1)
        residual = ((bent + gradient).norm() / gradient.norm()).item()
        assert found.residual == pytest.approx(residual, rel=0.5, abs=1e-15)
        assert found.converged == (found.residual <= tolerance)
        assert found.decrease > 0


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize("by", [30, 100, 200, 1000])
def test_rows_without_curvature_do_not_raise_the_model(preconditioner, by):
    """Confident wrong rows: H is 0 or nearly, and the step must not raise the quadratic model."""
    x, w, b, y = small(n=20, d=4, c=3)
    found = newton_step(x, w * by, y, bias=b, preconditioner=preconditioner)
    assert found.decrease >= 0
    assert found.converged == (found.residual <= 1e-6)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_the_units_of_the_features_do_not_matter_until_their_squares_are_lost(preconditioner):
    x, w, _, y = small(n=30, d=4, c=3)
    given = {"preconditioner": preconditioner, "tolerance": 1e-9}
    right = newton_step(x, w, y, **given)
    for unit in (1e-100, 1e100):
        found = newton_step(x * unit, w / unit, y, **given)
        assert found.converged
        assert_close(found.weight * unit, right.weight, rtol=1e-6, atol=1e-8)
    assert not newton_step(x * 1e-200, w * 1e200, y, **given).converged
    if preconditioner is None:
        assert not newton_step(x * 1e200, w / 1e200, y, **given).converged
    else:
        with pytest.raises(ValueError, match="squares of these features leave the range"):
            newton_step(x * 1e200, w / 1e200, y, **given)


X, W, Y = torch.ones(3, 2), torch.ones(4, 2), torch.tensor([0, 1, 2])
BAD = [
    (lambda: newton_step(X, W, Y, l2=-1.0), ValueError, "l2 must be at least 0"),
    (lambda: newton_step(X, W, Y, damping=torch.nan), ValueError, "damping must be at least 0"),
    (lambda: newton_step(X, W, Y, tolerance=0.0), ValueError, "tolerance must be positive"),
    (
        lambda: newton_step(X, W, Y, preconditioner="blocks"),
        ValueError,
        "must be 'class-blocks', 'kronecker'",
    ),
    (lambda: newton_step(X, W, Y, curvature="fisher"), ValueError, "'gauss-newton' or 'hessian'"),
    (lambda: newton_step(X.half(), W.half(), Y), TypeError, "float32 or float64, got torch.float16"),
    (lambda: newton_step(X * torch.nan, W, Y), ValueError, "features of row 0 are not finite"),
    (lambda: newton_step(X, W * torch.nan, Y), ValueError, "the gradient is not finite"),
    (lambda: newton_step(X, W), ValueError, "a target is needed"),
]


@pytest.mark.parametrize(("call", "error", "match"), BAD, ids=[match for *_, match in BAD])
def test_errors_name_the_argument_and_a_remedy(call, error, match):
    with pytest.raises(error, match=match):
        call()


SURE_AND_WRONG = torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1])


@pytest.mark.parametrize("preconditioner", ["kronecker", "class-blocks", "diagonal", None])
@pytest.mark.parametrize("scale", [60.0, 90.0])
def test_a_step_from_confident_wrong_rows_is_finite(preconditioner, scale):
    """Biases with almost no curvature: the result is a step or zero, and reports which."""
    x, y = SURE_AND_WRONG
    w = torch.tensor([[-1.0], [0.0], [1.0]]) * scale
    step = newton_step(x, w, y, bias=torch.zeros(3), l2=1.0, preconditioner=preconditioner)
    assert step.weight.isfinite().all()
    assert step.bias.isfinite().all()
    assert 0 <= step.decrease < math.inf
    assert step.converged == (step.residual <= 1e-6)


def test_a_step_beyond_the_range_of_the_type_is_discarded():
    x = torch.tensor([[1000.2941284179688, 999.621826171875], [999.5814819335938, 1001.2180786132812]])
    x = torch.cat([x, torch.tensor([[1000.1009521484375, 1000.7918090820312]])])
    w = torch.tensor(
        [
            [0.20451515, 0.28323931],
            [-0.12317971, -0.06458157],
            [-0.11831664, -0.20663860],
            [0.20467086, 0.08124553],
            [0.15703592, 0.23496750],
        ]
    )
    bias = torch.tensor([-0.130148426, -0.079422362, 0.093177691, -0.138448596, -0.009695293])
    for preconditioner in ("class-blocks", "kronecker", "diagonal", None):
        step = newton_step(
            x, w, torch.tensor([4, 4, 0]), bias=bias, l2=1.0, z_loss=0.01, preconditioner=preconditioner
        )
        assert step.weight.isfinite().all()
        assert step.bias.isfinite().all()
        assert 0 <= step.decrease < math.inf


def test_a_solution_beyond_the_range_of_the_type_is_discarded():
    right = torch.full((2, 3), 1e20)
    found = _cg.solve_refined(lambda v: v * 1e-30, right, lambda r: r, 1e-6, 10)
    assert not found.result.converged
    assert not found.result.solution.any()
    assert found.decrease == 0.0
