"""The objective: sums over chunks are those over all rows, its Hessian is that of its gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xent import SoftmaxRegression
from xent._processes.leader import Leader
from xent.data import rows as row_sources
from xent.data.rows import ArrayRows, MappedRows
from xent.linear_model.labelled_rows import LabelledRows
from xent.linear_model.objective import Objective


def objective(kind=ArrayRows, classes=3, soft=False, fit_intercept=True):
    rng = np.random.default_rng(0)
    X = 3 + rng.normal(size=(70, 4)) * [1, 10, 0.1, 1]
    y = rng.integers(classes, size=70)
    target = rng.dirichlet(np.ones(classes), 70) if soft else y
    source = ArrayRows(X) if kind is ArrayRows else MappedRows(X)
    return Objective(LabelledRows(source, target, rng.uniform(0, 2, 70)), classes, 2.0, fit_intercept)


CASES = [(3, False, True), (3, True, True), (3, False, False), (2, False, True), (2, True, False)]


@pytest.mark.parametrize(("classes", "soft", "fit_intercept"), CASES)
@pytest.mark.parametrize("kind", [ArrayRows, MappedRows])
def test_the_hessian_is_that_of_the_gradient(monkeypatch, kind, classes, soft, fit_intercept):
    monkeypatch.setattr(row_sources, "BATCH", 40)  # ten rows
    f = objective(kind, classes, soft, fit_intercept)
    theta = np.random.default_rng(1).normal(size=f.n_vectors * 5) / 3
    H = f.hessian(theta)
    dense = H.to_dense()
    K, first = len(H.weight), int(f.binary)
    place = np.concatenate(
        [np.arange(K * 4).reshape(K, 4), K * 4 + np.arange(K)[:, None]][: 1 + fit_intercept], axis=1
    )[first:]  # of a class's weights, and its bias, in the Hessian
    columns = 4 + fit_intercept
    for k in range(f.n_vectors):
        for j in range(columns):
            step = np.zeros((f.n_vectors, 5))
            step[k, j] = 1e-5
            up, down = f(theta + step.ravel())[1], f(theta - step.ravel())[1]
            slope = ((up - down) / 2e-5).reshape(f.n_vectors, 5)[:, :columns]
            if j < 4:
                slope[k, j] -= f.penalty / f.scale[j] ** 2
            expected = dense[place[k, j]].numpy()[place]
            np.testing.assert_allclose(expected, slope, atol=1e-7)
    assert len(dense) == K * columns
    v = torch.randn(len(dense), 2, dtype=torch.float64)
    torch.testing.assert_close(H @ v, dense @ v)
    torch.testing.assert_close(H.trace(), dense.trace())
    parts = H.diagonal() if fit_intercept else (H.diagonal(),)
    torch.testing.assert_close(torch.cat([part.reshape(-1) for part in parts]), dense.diagonal())
    own = torch.from_numpy(place[0])
    torch.testing.assert_close(H.block(first), dense[own][:, own])


def test_a_hessian_of_an_earlier_point_does_not_answer():
    f = objective()
    H = f.hessian(np.zeros(15))
    f.hessian(np.ones(15))
    with pytest.raises(RuntimeError, match="that of an earlier point"):
        H @ torch.ones(15, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("classes", [2, 3, 20])
def test_features_far_from_zero_keep_their_digits(dtype, classes):
    """Features of mean 1e4 and deviation 1 give what the same features of mean 0 do, W·mean in b aside."""
    rng = np.random.default_rng(0)
    x = rng.integers(-512, 512, size=(300, 4)) / 256  # whose sums with 1e4 are exact
    y, theta = rng.integers(classes, size=300), rng.normal(size=(1 if classes == 2 else classes) * 5)
    near, far = (
        Objective(LabelledRows(ArrayRows((x + offset).astype(dtype)), y), classes, 1.0, True)
        for offset in (0.0, 1e4)
    )
    eps = float(np.finfo(dtype).eps)
    shift = far.center - near.center - 1e4  # centers are rounded to the features' type
    theta_far = theta.reshape(-1, 5).copy()
    theta_far[:, -1] += theta_far[:, :-1] @ (shift / near.unit)
    np.testing.assert_allclose(far.unit, near.unit, rtol=1e-3 if dtype == np.float32 else 1e-12)
    far.scale = near.scale
    far.unit = near.unit
    (value, gradient), (value_far, gradient_far) = near(theta), far(theta_far.ravel())
    assert value_far == pytest.approx(value, rel=20 * eps)
    in_c = gradient.reshape(-1, 5)[:, -1]
    np.testing.assert_allclose(gradient_far.reshape(-1, 5)[:, -1], in_c, atol=20 * eps)


def test_chunks_change_no_more_than_rounding(monkeypatch):
    whole = objective()
    theta = np.random.default_rng(1).normal(size=15)
    value, gradient = whole(theta)
    monkeypatch.setattr(row_sources, "BATCH", 40)
    chunked = objective(MappedRows)
    np.testing.assert_allclose(chunked.mean, whole.mean, rtol=1e-14)
    np.testing.assert_allclose(chunked.scale, whole.scale, rtol=1e-14)
    assert chunked(theta)[0] == pytest.approx(value, rel=1e-14)
    np.testing.assert_allclose(chunked(theta)[1], gradient, rtol=0, atol=1e-14)


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_another_penalty_needs_no_pass_at_the_last_point(monkeypatch, fit_intercept):
    f = objective(fit_intercept=fit_intercept)
    theta = np.random.default_rng(1).normal(size=15)
    if not fit_intercept:
        theta.reshape(3, 5)[:, -1] = 0
    f(theta)
    model = f.unscaled(theta)
    with monkeypatch.context() as none:
        none.setattr(f, "_sums", None)
        for C in (0.5, 1e-3, np.inf):
            f.penalise(C)
            kept = f.to_solver(*model).ravel()
            value, gradient = f(kept)
            found = value, gradient, f.gradient_norm, f.duality_gap
            fresh = objective(fit_intercept=fit_intercept)
            fresh.penalise(C)
            for a, b in zip(found, (*fresh(kept), fresh.gradient_norm, fresh.duality_gap), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)
    assert f.last_loss == pytest.approx(fresh.last_loss, rel=1e-13)


def test_one_process_sends_itself_nothing(monkeypatch):
    def sum_of(part):
        return part

    assert Leader().register(sum_of) is sum_of
    for method in ("reduce", "header", "_sum"):
        monkeypatch.delattr(Leader, method)
    X, y = np.eye(6), np.arange(6) % 3
    for solver in ("lbfgs", "newton-cg"):
        assert SoftmaxRegression(solver=solver).fit(X, y).converged_
