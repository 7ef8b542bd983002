"""Products through an extractor, and rows' own gradients, against dense float64 autograd."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, hessian, jacrev
from torch.testing import assert_close

import xent
from table import ROWS, problem, spelt_out
from xent._core import reference
from xent.curvature import (
    HeadFisher,
    HeadGGN,
    ggn_vector_product,
    hessian_vector_product,
    row_gradient_norms,
    row_gradients,
)

TABLE = [r for r in ROWS if "margin" not in r.options and not r.sampled]
CASES = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
N, D, C = 6, 3, 4


def draw(row, outputs):
    p = problem(row, n=N, d=D, c=C)
    options = dict(p.options)
    weight = options.pop("weight", None)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(D, 3), torch.nn.Tanh(), torch.nn.Linear(3, outputs)).double()
    params = {k: v.detach() for k, v in model.named_parameters()}
    sizes = [v.numel() for v in params.values()]

    def unflat(v):
        return {k: t.reshape(params[k].shape) for k, t in zip(params, v.split(sizes), strict=True)}

    return p, {**options, "class_weight": weight}, {**options, "weight": weight}, model, params, unflat


def flat(params):
    return torch.cat([v.reshape(-1) for v in params.values()])


@CASES
@pytest.mark.parametrize("outputs", ["logits", "features"])
def test_hessian_products(row, outputs):
    p, options, plain, model, params, unflat = draw(row, C if outputs == "logits" else D)
    head = None if outputs == "logits" else (p.w, p.b)

    def loss(theta):
        out = functional_call(model, unflat(theta), (p.x,))
        z = out if head is None else out @ p.w.T + p.b
        return reference.cross_entropy(z, spelt_out(p.target, C), **plain)

    dense, v = hessian(loss)(flat(params)), torch.randn(len(flat(params)), dtype=torch.float64)
    found = hessian_vector_product(model, params, p.x, p.target, v, head=head, **options)
    assert_close(found, dense @ v, rtol=1e-9, atol=1e-11)
    shaped = hessian_vector_product(model, params, p.x, p.target, unflat(v), head=head, **options)
    assert_close(flat(shaped), dense @ v, rtol=1e-9, atol=1e-11)


@CASES
@pytest.mark.parametrize("outputs", ["logits", "features"])
def test_gauss_newton_products(row, outputs):
    """Jacᵀ H_out Jac, with H_out that of a head of which the outputs are the features."""
    p, options, _, model, params, unflat = draw(row, C if outputs == "logits" else D)
    head = None if outputs == "logits" else (p.w, p.b)
    jac = jacrev(lambda theta: functional_call(model, unflat(theta), (p.x,)))(flat(params))
    out = functional_call(model, params, (p.x,))
    w, b = (torch.eye(C, dtype=torch.float64), None) if head is None else head
    middle = HeadGGN(out, w, p.target, bias=b, wrt="features", **options).to_dense()
    jac = jac.reshape(len(middle), -1)
    v = torch.randn(jac.shape[1], dtype=torch.float64)
    found = ggn_vector_product(model, params, p.x, p.target, v, head=head, **options)
    assert_close(found, jac.T @ (middle @ (jac @ v)), rtol=1e-9, atol=1e-11)


def test_functions_several_inputs_and_part_of_the_parameters():
    p, _, _, model, params, _ = draw(ROWS[0], C)
    first = {k: v for k, v in params.items() if k.startswith("0")}
    v = {k: torch.randn_like(t) for k, t in first.items()}
    whole = {k: v.get(k, torch.zeros_like(t)) for k, t in params.items()}
    for product in (ggn_vector_product, hessian_vector_product):
        some = product(model, first, p.x, p.target, v)
        every = product(model, params, (p.x,), p.target, whole)
        assert_close(some, {k: every[k] for k in some})
        as_function = product(lambda q, x: functional_call(model, q, (x,)), params, p.x, p.target, whole)
        assert_close(as_function, every)
        one = product(lambda w, x: x @ w.T, p.w, p.x, p.target, torch.ones_like(p.w))
        assert_close(one, torch.zeros_like(p.w))  # the gauge


@CASES
@pytest.mark.parametrize("biased", [False, True])
def test_row_gradients(row, biased):
    p, options, plain, *_ = draw(row, C)
    rows = jacrev(
        lambda w, b: reference.cross_entropy(
            p.x @ w.T + b, spelt_out(p.target, C), reduction="none", **plain
        ),
        (0, 1),
    )(p.w, p.b)
    found = row_gradients(p.x, p.w, p.target, bias=p.b, **options)
    assert_close(found, rows, rtol=1e-10, atol=1e-12)
    b = p.b if biased else None
    z = p.x @ p.w.T + (p.b if biased else 0)
    bare = row_gradients(p.x, p.w, p.target, bias=b, **options)
    parts = bare if biased else (bare,)
    norms = torch.stack([t.flatten(1).square().sum(1) for t in parts]).sum(0).sqrt()
    assert_close(row_gradient_norms(p.x, p.w, p.target, bias=b, **options), norms, rtol=1e-10, atol=1e-14)
    assert z.shape == (N, C)


def test_norms_of_rows_left_out_and_of_rows_that_are_sure():
    x = torch.tensor([[1.0], [torch.nan], [1.0]], dtype=torch.float64)
    w = torch.tensor([[0.0], [-40.0]], dtype=torch.float64)
    norms = row_gradient_norms(x, w, torch.tensor([0, -100, 1]))
    sure = 2**0.5 * torch.exp(torch.tensor(-40.0, dtype=torch.float64))
    assert_close(norms[0], sure, rtol=1e-14, atol=0.0)
    assert norms[1] == 0
    assert_close(norms[2], torch.tensor(2.0, dtype=torch.float64).sqrt())
    assert not row_gradients(x, w, torch.tensor([0, -100, 1]))[1].any()


def test_norms_of_leading_dimensions():
    x, w, y = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randint(5, (2, 3))
    norms = row_gradient_norms(x, w, y)
    assert norms.shape == (2, 3)
    assert_close(norms.reshape(-1), row_gradient_norms(x.reshape(6, 4), w, y.reshape(6)))


def test_hessian_products_obey_the_options_that_move_the_targets_scores():
    p, _, _, model, params, unflat = draw(ROWS[0], C)
    v = torch.randn_like(flat(params))
    for option in ({"margin": 0.3}, {"log_q": torch.rand(C, dtype=torch.float64).log()}):

        def loss(theta, option=option):
            return xent.cross_entropy(functional_call(model, unflat(theta), (p.x,)), p.target, **option)

        found = hessian_vector_product(model, params, p.x, p.target, v, **option)
        assert_close(found, hessian(loss)(flat(params)) @ v)


@pytest.mark.parametrize("product", [ggn_vector_product, hessian_vector_product])
def test_logits_of_more_dimensions(product):
    """(N, C, d1): a loss at each place."""
    w = torch.randn(4, 3, dtype=torch.float64)
    x, y = torch.randn(5, 3, 2, dtype=torch.float64), torch.randint(4, (5, 2))
    v = torch.randn_like(w)
    places = product(lambda w, x: torch.einsum("cd,ndk->nck", w, x), w, x, y, v)
    rows = product(lambda w, x: x @ w.T, w, x.movedim(1, 2).reshape(10, 3), y.reshape(10), v)
    assert_close(places, rows)
    one = product(lambda w, x: w @ x, w, x[0, :, 0], y[0, 0], v)
    assert_close(one, product(lambda w, x: x @ w.T, w, x[:1, :, 0], y[:1, 0], v))


@pytest.mark.parametrize("outputs", ["logits", "features"])
def test_gauss_newton_products_are_differentiable_in_the_vector_and_in_nothing_else(outputs):
    p, _, _, model, params, unflat = draw(ROWS[0], C if outputs == "logits" else D)
    head = None if outputs == "logits" else (p.w, p.b)
    v = torch.randn_like(flat(params))

    def form(v, params=params):
        return (v * ggn_vector_product(model, params, p.x, p.target, v, head=head)).sum()

    right = 2 * ggn_vector_product(model, params, p.x, p.target, v, head=head)
    assert_close(torch.func.grad(form)(v), right)
    leaf = v.clone().requires_grad_()
    assert_close(torch.autograd.grad(form(leaf), leaf)[0], right)
    with pytest.raises(NotImplementedError, match="held constant here"):
        torch.func.grad(lambda theta: form(v, unflat(theta)))(flat(params))
    if head is not None:
        with pytest.raises(NotImplementedError, match="held constant here"):
            torch.func.grad(lambda w: ggn_vector_product(model, params, p.x, p.target, v, head=(w,)).sum())(
                p.w
            )


@pytest.mark.parametrize("of", [row_gradient_norms, row_gradients])
def test_rows_gradients_are_no_silent_zeros(of):
    x, w, y = torch.randn(3, 2), torch.randn(4, 2), torch.tensor([0, 1, 2])
    for call, at in ((lambda t: of(t, w, y).sum(), x), (lambda t: of(x, t, y).sum(), w)):
        with pytest.raises(NotImplementedError, match="held constant here"):
            torch.func.grad(call)(at)


@pytest.mark.parametrize("product", [ggn_vector_product, hessian_vector_product])
def test_the_order_of_names_does_not_matter(product):
    p, _, _, model, params, _ = draw(ROWS[0], C)
    v = {k: torch.randn_like(t) for k, t in params.items()}
    reversed_ = dict(reversed(v.items()))
    right, found = (product(model, params, p.x, p.target, one) for one in (v, reversed_))
    for name in params:
        assert torch.equal(found[name], right[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("budget", [None, 200])
def test_norms_do_not_underflow(dtype, budget):
    """e⁻⁶⁰, whose square is no float32, and e⁻⁵⁰⁰, whose square is no float64."""
    far = 60.0 if dtype == torch.float32 else 500.0
    w = torch.tensor([[0.0], [-far], [-far - 1]], dtype=dtype)
    x = torch.ones(1, 1, dtype=dtype)
    scaled = torch.tensor([1.0, torch.exp(torch.tensor(-1.0))]).double()
    right = torch.exp(torch.tensor(-far).double()) * (scaled.sum() ** 2 + scaled.square().sum()).sqrt()
    found = row_gradient_norms(x, w, torch.tensor([0]), memory_budget=budget)
    assert_close(found.double(), right[None], rtol=1e-6, atol=0.0)
    tiny = 1e-30 if dtype == torch.float32 else 1e-200
    found = row_gradient_norms(x * tiny, w * 0, torch.tensor([0]))
    assert_close(found, torch.tensor([tiny * (2 / 3) ** 0.5], dtype=dtype))
    if dtype == torch.float32:  # the square of 1e10 makes it one again
        large = x * 1e10, w / 1e10, torch.tensor([0])
        trace = HeadFisher(*large, kind="empirical").trace()
        assert_close(trace.double(), row_gradient_norms(*large).double()[0] ** 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_gradients_of_rows_are_rounded_once(dtype):
    x, w, y = torch.randn(20, 6).to(dtype), (5 * torch.randn(7, 6)).to(dtype), torch.randint(7, (20,))
    found = row_gradients(x, w, y)
    right = row_gradients(x.double(), w.double(), y)
    assert found.dtype == dtype
    assert ((found.double() - right).abs() <= torch.finfo(dtype).eps * right.abs() + 1e-7).all()


def test_gradients_of_rows_in_inference_mode_and_under_autocast():
    x, w, y = torch.randn(3, 2), torch.randn(4, 2), torch.tensor([0, 1, 2])
    right = row_gradients(x, w, y), row_gradient_norms(x, w, y)
    with torch.inference_mode():
        assert torch.equal(row_gradients(x, w, y), right[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(row_gradients(x, w, y), right[0])
        assert torch.equal(row_gradient_norms(x, w, y), right[1])


MODEL = torch.nn.Linear(3, 4)
PARAMS = dict(MODEL.named_parameters())
X, Y = torch.ones(2, 3), torch.tensor([0, 1])
BAD = [
    (lambda: ggn_vector_product(MODEL, PARAMS, X, Y, torch.ones(3)), ValueError, r"shape \(16,\)"),
    (lambda: ggn_vector_product(MODEL, PARAMS, X, Y, {"weight": X}), ValueError, "structure and shapes"),
    (
        lambda: ggn_vector_product(MODEL, PARAMS, X, Y, PARAMS, reduction="none"),
        ValueError,
        "'mean' or 'sum'",
    ),
    (lambda: ggn_vector_product(MODEL, PARAMS, X[None], Y, PARAMS), ValueError, r"must have shape \(1, 4\)"),
    (lambda: ggn_vector_product(MODEL, PARAMS, X, Y, PARAMS, margin=0.1), TypeError, "takes no margin; its"),
    (lambda: ggn_vector_product(MODEL, PARAMS, X, Y, PARAMS, log_q=X[0]), TypeError, "takes no log_q; its"),
    (lambda: ggn_vector_product(MODEL, PARAMS, X, Y, PARAMS, memory_budget=1), TypeError, "no memory_budget"),
    (lambda: hessian_vector_product(MODEL, PARAMS, X, Y, PARAMS, reduction="none"), ValueError, "got 'none'"),
    (
        lambda: ggn_vector_product(MODEL, PARAMS, X, Y, PARAMS, head=(X, Y, X)),
        ValueError,
        r"head must be \(weight,\) or \(weight, bias\), got a tuple of 3",
    ),
    (lambda: hessian_vector_product(MODEL, PARAMS, X, Y, PARAMS, head=X), ValueError, "got a Tensor"),
    (lambda: row_gradient_norms(X, torch.ones(4, 3), Y, reduction="sum"), TypeError, "takes no reduction"),
    (lambda: row_gradient_norms(X, torch.ones(4, 3), Y, margin=0.1), TypeError, "takes no margin"),
    (lambda: row_gradient_norms(X, torch.ones(4, 3), Y, normalize=True), TypeError, "takes no normalize"),
    (lambda: row_gradient_norms(X, torch.ones(4, 3), Y, classes=Y), TypeError, "takes no classes"),
    (lambda: row_gradients(X, torch.ones(4, 3), Y, log_q=X[0]), TypeError, "takes no log_q"),
    (lambda: row_gradients(X, torch.ones(4, 3), None), ValueError, "a target is needed"),
    (lambda: row_gradients(X[None], torch.ones(4, 3), Y), ValueError, r"features must be \(N, D\)"),
    (lambda: row_gradient_norms(X, torch.ones(4, 3), Y + 9), IndexError, "target 9 at row 0"),
]


@pytest.mark.parametrize(("call", "error", "match"), BAD, ids=[match for *_, match in BAD])
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_public_names():
    assert set(xent.curvature.__all__) >= {"HeadHessian", "ggn_vector_product", "row_gradient_norms"}
