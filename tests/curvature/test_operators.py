"""Operators whose tensors change or whose rows are shuffled, and operators in every mode of torch."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from xent.curvature import HeadFisher, HeadGGN, HeadHessian, HeadKronecker, newton_step

OPERATORS = pytest.mark.parametrize("operator", [HeadHessian, HeadGGN, HeadFisher, HeadKronecker])


def small(n=32, d=4, c=3, dtype=torch.float64):
    x, w, b = torch.randn(n, d, dtype=dtype), torch.randn(c, d, dtype=dtype), torch.randn(c, dtype=dtype)
    return x, w, b, torch.randint(c, (n,))


# ── the point at which it was made ──


@pytest.mark.parametrize("changed", ["weight", "bias", "features", "target", "sample_weight", "class_weight"])
def test_a_tensor_that_was_changed_is_an_error(changed):
    """Statistics of one weight with logits of another would be wrong for both."""
    x, w, b, y = small()
    s, c = torch.ones(len(x)), torch.ones(len(w))
    H = HeadHessian(x, w, y, bias=b, sample_weight=s, class_weight=c)
    v = torch.randn_like(w)
    right = HeadHessian(x.clone(), w.clone(), y, bias=b.clone()) @ v
    assert_close(H @ v, right)
    tensors = {"weight": w, "bias": b, "features": x, "target": y, "sample_weight": s, "class_weight": c}
    tensors[changed].add_(0)
    for use in (lambda: H @ v, H.diagonal, H.trace, lambda: H.block(0), H.to_dense):
        with pytest.raises(
            RuntimeError, match=f"{changed}, or what it is a view of, was changed in place .* make a new"
        ):
            use()
    assert_close(HeadHessian(x, w, y, bias=b) @ v, right)


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_optimiser_step_is_a_change(in_memory):
    x, w, _, y = small()
    w.requires_grad_()
    given = (x, w, y) if in_memory else ([(x, y)], w)
    H, K = HeadHessian(*given), HeadKronecker(*given)
    before = K @ torch.ones_like(w)
    optimiser = torch.optim.SGD([w], lr=1.0)
    w.grad = torch.ones_like(w)
    optimiser.step()
    for use in (lambda: H @ torch.ones_like(w), H.trace, K.corrected):
        with pytest.raises(RuntimeError, match=r"weight, or what .* was changed"):
            use()
    assert torch.equal(K @ torch.ones_like(w), before)  # its factors are its own


def test_copies_are_of_the_same_point():
    x, w, _, y = small()
    H = HeadHessian(x, w, y)
    right = H.to_dense()
    copies = [copy.copy(H), copy.deepcopy(H), pickle.loads(pickle.dumps(H))]
    for one in copies:
        assert_close(one.to_dense(), right)
    w.add_(1)
    assert_close(copies[1].to_dense(), right)  # with tensors of its own
    with pytest.raises(RuntimeError, match=r"weight, or what .* was changed"):
        copy.deepcopy(H)


def test_inference_mode_has_no_versions_to_compare():
    with torch.inference_mode():
        x, w, _, y = small()
        assert_close(HeadHessian(x, w, y).trace(), HeadHessian(x, w, y).diagonal().sum())


# ── rows from batches ──


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_rounded_once_over_all_batches(dtype):
    x, w, b, y = small(n=2048, d=8, c=5, dtype=torch.float32)
    x, w, b = (t.to(dtype) for t in (x, w, b))
    both = {"bias": b, "wrt": ("weight", "bias")}
    batches = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 2048, 4)]
    whole = HeadHessian(x.double(), w.double(), y, bias=b.double(), wrt=both["wrt"])
    pieces = HeadHessian(batches, w, **both)
    v = torch.randn_like(w), torch.randn_like(b)
    found = (*(pieces @ v), *pieces.diagonal(), pieces.trace(), pieces.block(2))
    right = whole @ tuple(t.double() for t in v)
    right = (*right, *whole.diagonal(), whole.trace(), whole.block(2))
    for one, other in zip(found, right, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).abs().max() <= 1.1 * torch.finfo(dtype).eps * other.abs().max()


@pytest.mark.parametrize("samples", [1, 3])
def test_labels_belong_to_rows_and_not_to_an_order(samples):
    """One matrix, however a loader shuffles and splits."""
    x, w, _, y = small(n=64)
    y[5] = -100
    data = TensorDataset(x, y)
    given = {"kind": "monte-carlo", "samples": samples}

    def made(batches):
        return HeadFisher(batches, w, generator=torch.Generator().manual_seed(3), **given)

    ordered = made(DataLoader(data, batch_size=10))
    shuffled = made(DataLoader(data, batch_size=7, shuffle=True))
    v = torch.randn_like(w)
    assert_close(shuffled @ v, shuffled @ v, rtol=1e-12, atol=1e-14)
    assert_close(shuffled @ v, ordered @ v, rtol=1e-12, atol=1e-14)
    other = HeadFisher(DataLoader(data), w, generator=torch.Generator().manual_seed(4), **given)
    assert not torch.allclose(other @ v, ordered @ v, rtol=1e-3)


def test_equal_rows_of_one_tensor_draw_independently():
    """In one tensor the labels depend on the row's number, so equal rows draw different labels."""
    n = 4000
    x, w = torch.ones(n, 1, dtype=torch.float64), torch.tensor([[0.0], [1.0], [-1.0]]).double()
    y = torch.zeros(n, dtype=torch.int64)
    exact = HeadFisher(x, w, y).to_dense()
    estimate = HeadFisher(x, w, y, kind="monte-carlo").to_dense()
    assert (estimate - exact).norm() < 0.1 * exact.norm()


def test_threads_share_no_generator():
    x, w, _, y = small(n=512)
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 512, 16)]
    F = HeadFisher(batches, w, kind="monte-carlo")
    v = torch.randn_like(w)
    right, found = F @ v, []
    threads = [threading.Thread(target=lambda: found.append(F @ v)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(one, right) for one in found)


def test_torchs_generator_is_not_used_without_draws():
    x, w, _, y = small()
    for kind in ("type-2", "empirical"):
        before = torch.get_rng_state()
        HeadFisher(x, w, y, kind=kind).trace()
        assert torch.equal(torch.get_rng_state(), before)


# ── right-hand sides ──


@pytest.mark.parametrize("operator", [HeadHessian, HeadKronecker])
def test_a_matrix_is_columns(operator):
    """Square matrices too, which are not symmetric."""
    x, w, b, y = small(c=5)
    H = operator(x, w, y, bias=b, wrt="bias")
    dense, square = H.to_dense(), torch.randn(5, 5, dtype=torch.float64)
    assert_close(H @ square, dense @ square)
    assert_close(H @ square[:, :2], dense @ square[:, :2])
    found = H.to_scipy() @ square.numpy()
    assert_close(torch.from_numpy(found), dense @ square)
    with pytest.raises(ValueError, match=r"shape \(5,\) or \(5, K\); got \(3, 5\); a matrix is columns"):
        H @ square[:3]
    if operator is HeadKronecker:
        eye = torch.eye(5, dtype=torch.float64)
        assert_close(H.solve(square, 0.1), torch.linalg.solve(dense + 0.1 * eye, square))


def test_a_matrix_is_columns_with_respect_to_one_row_of_features():
    x, w, _, y = small(d=3)
    H = HeadHessian(x[0], w, y[0], wrt="features")
    dense, square = H.to_dense(), torch.randn(3, 3, dtype=torch.float64)
    assert_close(H @ square, dense @ square)
    assert_close(H @ square[0], dense @ square[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scipy_gets_a_type_that_numpy_has_and_complex_columns(dtype):
    x, w, _, y = small(dtype=dtype)
    H = HeadHessian(x, w, y)
    A, dense = H.to_scipy(), H.to_dense().float().numpy()
    assert A.dtype == np.float32
    v = np.random.default_rng(0).standard_normal((12, 3)).astype(np.float32)
    tolerance = 4 * torch.finfo(dtype).eps
    assert np.abs(A @ v - dense @ v).max() <= tolerance * np.abs(dense @ v).max()
    both = A @ (v[:, 0] + 1j * v[:, 1])
    assert np.abs(both - (A @ v[:, 0] + 1j * (A @ v[:, 1]))).max() == 0


# ── torch's modes ──


@OPERATORS
def test_autocast_changes_nothing(operator):
    x, w, b, y = small(dtype=torch.float32)
    given = {"bias": b, "wrt": ("weight", "bias")}
    v = torch.randn_like(w), torch.randn_like(b)

    def found():
        H = operator(x, w, y, **given)
        out = [*(H @ v), *H.diagonal(), H.trace(), H.block(1), H.to_dense()]
        if operator is HeadKronecker:
            E = H.corrected()
            solved = [*H.solve(v, 0.1), *E.solve(v, 0.1), H.logdet(0.1), E.trace()]
            out += [*solved, *H.sample(torch.Generator().manual_seed(0), 0.1)]
        return out

    right = found()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(found(), right, strict=True))


@pytest.mark.parametrize("preconditioner", ["kronecker", "class-blocks", "diagonal", None])
def test_autocast_changes_no_newton_step(preconditioner):
    x, w, b, y = small(dtype=torch.float32)
    right = newton_step(x, w, y, bias=b, l2=0.1, preconditioner=preconditioner)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = newton_step(x, w, y, bias=b, l2=0.1, preconditioner=preconditioner)
    assert torch.equal(found.weight, right.weight)
    assert found.residual == right.residual


@OPERATORS
def test_products_are_differentiable_in_the_right_hand_side(operator):
    """v ↦ H v is linear: its derivative is H, in reverse, forward and batched, twice, and mixed."""
    x, w, b, y = small()
    H = operator(x, w, y, bias=b, wrt=("weight", "bias"))
    dense = H.to_dense()
    u = torch.randn(len(dense), dtype=torch.float64)

    def form(v):
        return (v * (H @ v)).sum()

    assert_close(grad(form)(u), 2 * dense @ u)
    assert_close(jvp(lambda v: H @ v, (u,), (u,))[1], dense @ u)
    several = torch.randn(3, len(dense), dtype=torch.float64)
    assert_close(vmap(lambda v: H @ v)(several), several @ dense)
    assert_close(vmap(lambda v: H @ v, in_dims=1, out_dims=1)(several.t()), dense @ several.t())
    assert_close(vmap(grad(form))(several), 2 * several @ dense)
    assert_close(torch.func.hessian(form)(u), 2 * dense)
    leaf = u.clone().requires_grad_()
    (g,) = torch.autograd.grad(form(leaf), leaf, create_graph=True)
    assert_close(g.detach(), 2 * dense @ u)
    assert_close(torch.autograd.grad(g @ u, leaf)[0], 2 * dense @ u)
    parts = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    flat = torch.cat([t.reshape(-1) for t in parts])
    first, second = grad(lambda v: sum((a * c).sum() for a, c in zip(v, H @ v, strict=True)))(parts)
    assert_close(torch.cat([first.reshape(-1), second]), 2 * dense @ flat)
    if operator is HeadKronecker:
        inverse = torch.linalg.inv(dense + 0.1 * torch.eye(len(dense), dtype=torch.float64))
        assert_close(grad(lambda v: (v * H.solve(v, 0.1)).sum())(u), 2 * inverse @ u)


@OPERATORS
@pytest.mark.parametrize("argument", ["features", "weight", "bias", "sample_weight"])
def test_no_derivative_is_silently_zero(operator, argument):
    x, w, b, y = small()
    given = {"features": x, "weight": w, "bias": b, "sample_weight": torch.ones(len(x)).double()}

    def trace(t):
        tensors = {**given, argument: t}
        return operator(tensors.pop("features"), tensors.pop("weight"), y, **tensors).trace()

    at = given[argument]
    for derived in (
        lambda: grad(trace)(at),
        lambda: jvp(trace, (at,), (at,)),
        lambda: vmap(trace)(torch.stack([at, at])),
    ):
        with pytest.raises(NotImplementedError, match="held constant here"):
            derived()
    assert grad(lambda t: trace(t.detach()) * t.sum())(at).abs().sum() > 0


def test_no_derivative_in_a_batch_is_silently_zero():
    x, w, _, y = small()
    with pytest.raises(NotImplementedError, match="held constant here"):
        grad(lambda t: HeadHessian([(t, y)], w).trace())(x)


# ── errors ──

X, W, Y = torch.ones(3, 2), torch.ones(4, 2), torch.tensor([0, 1, 2])
BAD = [
    (lambda: HeadHessian(X.numpy(), W, Y), TypeError, "got ndarray: torch.from_numpy makes it one"),
    (lambda: HeadHessian(3, W, Y), TypeError, "must be a tensor, or batches of them; got int"),
    (lambda: HeadHessian([X], W), TypeError, "batch 0 must be .* got a Tensor"),
    (lambda: HeadHessian([(X,)], W), TypeError, r"batch 0 must be \(features, target\) .* a tuple of 1"),
    (lambda: HeadHessian([(X, Y), (X, Y, Y, Y)], W), TypeError, "batch 1 must be .* a tuple of 4"),
    (
        lambda: HeadHessian(X, W, Y).block(True),
        TypeError,
        "the number of a block, must be a whole number; got True",
    ),
    (
        lambda: HeadHessian(X, W, Y).block(1.5),
        TypeError,
        "the number of a block, must be a whole number; got 1.5",
    ),
    (
        lambda: HeadKronecker(X, W, Y).block(1.5),
        TypeError,
        "the number of a block, must be a whole number; got 1.5",
    ),
    (lambda: HeadKronecker(X, W, Y).sample(0.1), TypeError, "generator .* got float: damping=0.1"),
    (lambda: HeadFisher(X, W, Y, samples=2), ValueError, "are of kind='monte-carlo'; kind is 'type-2'"),
    (lambda: HeadHessian(X, W, Y) @ (2.0,), ValueError, "a tuple must hold"),
    (lambda: HeadHessian(X, W, Y) @ W.to(torch.complex64), TypeError, "complex64"),
    (lambda: newton_step(X, W, Y, wrt="weight"), TypeError, "newton_step takes no wrt"),
    (lambda: newton_step(X, W, Y, margin=0.1), TypeError, "newton_step takes no margin"),
]


@pytest.mark.parametrize(("call", "error", "match"), BAD, ids=[match for *_, match in BAD])
def test_errors_name_the_argument_and_a_remedy(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_a_head_spread_over_processes_is_refused():
    from xent._arguments.call import resolve_head
    from xent._arguments.options import Options
    from xent.curvature._tiles import Curvature, Form

    (problem,) = resolve_head(Options(), X, W, None, Y).problems
    with pytest.raises(NotImplementedError, match="gather the weight and the bias"):
        Curvature.of(dataclasses.replace(problem, ranks=object()), Form.HESSIAN)


def test_lists_and_integers_of_torch_and_numpy_are_accepted():
    x, w, _, y = small()
    H = HeadHessian([[x, y]], w)
    assert_close(H.trace(), HeadHessian(x, w, y).trace())
    for one in (np.int64(1), torch.tensor(1)):
        assert torch.equal(H.block(one), H.block(1))


def test_a_head_without_features_has_only_its_bias():
    """D = 0."""
    w, b, y = torch.zeros(3, 0), torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0, 1, 2, 2])
    x = torch.zeros(4, 0)
    right = HeadHessian(torch.ones(4, 1), torch.zeros(3, 1), y, bias=b, wrt="bias").to_dense()
    for operator in (HeadHessian, HeadKronecker):
        both = operator(x, w, y, bias=b, wrt=("weight", "bias"))
        assert_close(both.to_dense(), right)
        assert_close(both.block(1), right[1:2, 1:2])
        assert_close(both.diagonal()[1], right.diagonal())
        assert_close(both.trace(), right.trace())
        assert operator(x, w, y).trace() == 0
        assert (operator(x, w, y) @ w).shape == (3, 0)
    step = newton_step(x, w, y, bias=b)
    assert step.converged
    assert step.weight.shape == (3, 0)


def test_the_model_before_the_head_may_run_under_autocast():
    from xent.curvature import ggn_vector_product

    model = torch.nn.Linear(4, 3)
    params = dict(model.named_parameters())
    x, y, w = torch.randn(5, 4), torch.randint(6, (5,)), torch.randn(6, 3)
    right = ggn_vector_product(model, params, x, y, params, head=(w,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ggn_vector_product(model, params, x, y, params, head=(w,))
    for name in params:
        assert (found[name] - right[name]).norm() < 0.05 * right[name].norm()
    assert functional_call(model, params, (x,)).shape == (5, 3)


def test_batched_gradients_are_refused_by_name():
    x, w, y = torch.randn(5, 4), torch.randn(3, 4), torch.randint(3, (5,))
    v = torch.randn(3, 4, requires_grad=True)
    product = HeadHessian(x, w, y) @ v
    with pytest.raises(NotImplementedError, match="pass the batch as a stack"):
        torch.autograd.grad(product, v, torch.randn(2, 3, 4), is_grads_batched=True)


def test_no_features_at_all():
    y = torch.randint(3, (5,))
    operator = HeadHessian(
        torch.zeros(5, 0), torch.zeros(3, 0), y, bias=torch.zeros(3), wrt=("features", "bias")
    )
    assert (operator @ torch.ones(3)).shape == (3,)
