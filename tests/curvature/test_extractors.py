"""Products through an extractor, and rows' own gradients, against dense float64 autograd."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, hessian, jacrev
from torch.testing import assert_close

import xent
from table import ROWS, problem, spelt_out
from xent.core import reference
from xent.curvature import (
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
    (lambda: ggn_vector_product(MODEL, PARAMS, X[None], Y, PARAMS), ValueError, r"logits \(N, C\)"),
    (lambda: row_gradients(X[None], torch.ones(4, 3), Y), ValueError, r"features must be \(N, D\)"),
    (lambda: row_gradient_norms(X, torch.ones(4, 3), Y + 9), IndexError, "target 9 at row 0"),
]


@pytest.mark.parametrize(("call", "error", "match"), BAD, ids=[match for *_, match in BAD])
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_public_names():
    assert set(xent.curvature.__all__) >= {"HeadHessian", "ggn_vector_product", "row_gradient_norms"}
