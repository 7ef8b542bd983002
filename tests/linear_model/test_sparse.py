"""Sparse features: the same minimum as of X.toarray(), whatever the format, at the cost of what is stored."""

from __future__ import annotations

import json
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.special import softmax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from xent.data import sparse_rows
from xent.data.batches import DenseBatch
from xent.data.rows import ArrayRows
from xent.data.sparse_rows import FilledRows, SparseRows, sparse_source
from xent.linear_model import SoftmaxRegression, SoftmaxRegressionCV, preconditioner
from xent.linear_model.labelled_rows import LabelledRows
from xent.linear_model.objective import Objective
from xent.linear_model.solvers import _newton_step

FORMATS = ["csr", "csc", "coo", "lil", "dok", "bsr", "dia"]
TIGHT = 1e-14


def problem(n_classes=3, n_rows=200, n_features=12, density=0.15, soft=False, seed=0):
    """Rows with empty rows, an empty column, a full one, and labels that depend on them."""
    rng = np.random.default_rng(seed)
    X = sparse.random_array((n_rows, n_features), density=density, rng=rng, format="lil")
    X[::9] = 0
    X[:, 3] = 0
    X[:, 5] = rng.normal(2, 1, n_rows)[:, None]
    X = X.tocsr()
    z = 2 * (X @ rng.normal(size=(n_features, n_classes)))
    if soft:
        return X, softmax(z, 1) * rng.uniform(0.5, 2, (n_rows, 1))
    return X, (z + rng.gumbel(size=z.shape)).argmax(1)


def fitted(X, y, weight=None, **options):
    return SoftmaxRegression(**{"tol": TIGHT, **options}).fit(X, y, weight)


def assert_same(a, b, atol=1e-6):
    np.testing.assert_allclose(a.coef_, b.coef_, rtol=0, atol=atol)
    np.testing.assert_allclose(a.intercept_, b.intercept_, rtol=0, atol=atol)


@pytest.fixture
def native(monkeypatch):
    """Rows are never filled in."""
    monkeypatch.setattr(sparse_rows, "DENSE", 2.0)


@pytest.mark.parametrize("solver", ["lbfgs", "newton-cg"])
@pytest.mark.parametrize("n_classes", [2, 3, 20])
@pytest.mark.parametrize("widest", [0, 256])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # where digits end
def test_the_minimum_is_that_of_dense_rows(
    native, solver, n_classes, widest, soft, fit_intercept, weighted, monkeypatch
):
    monkeypatch.setattr(preconditioner, "WIDEST_SPARSE", widest)
    monkeypatch.setattr(_newton_step, "SPARSE_FACTOR", widest)
    X, y = problem(n_classes, soft=soft)
    assert isinstance(sparse_source(X), SparseRows)
    weight = np.arange(len(y)) % 3 + 0.5 if weighted else None
    options = {"fit_intercept": fit_intercept, "class_weight": "balanced" if weighted else None}
    exact = fitted(X.toarray(), y, weight, solver="newton-cg", **options)
    found = fitted(X, y, weight, solver=solver, **options)
    assert_same(found, exact)
    above = found.loss_curve_[-1] - exact.loss_curve_[-1]
    assert above <= found.objective_gap_ + 1e-13
    assert found.gradient_norm_ < 1e-6


@pytest.mark.filterwarnings("ignore::scipy.sparse.SparseEfficiencyWarning")
@pytest.mark.parametrize("kind", ["array", "matrix"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read(native, name, kind):
    X, y = problem()
    given = getattr(sparse, f"{name}_{kind}")(X)
    model, dense = fitted(X, y), X.toarray()
    found = fitted(given, y)
    assert np.array_equal(found.coef_, model.coef_)
    assert found.n_features_in_ == X.shape[1]
    for call in ("predict", "decision_function", "predict_proba", "predict_log_proba"):
        np.testing.assert_allclose(getattr(found, call)(given), getattr(found, call)(dense), rtol=1e-12)
    assert found.score(given, y) == found.score(dense, y)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.int8, np.uint8, bool])
@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_types_of_numbers_and_of_positions(native, dtype, index):
    X, y = problem()
    X.data = np.round(X.data)
    X = X.astype(dtype)
    X.indices, X.indptr = X.indices.astype(index), X.indptr.astype(index)
    found = fitted(X, y, tol=1e-7)
    assert found.coef_.dtype == (np.float32 if dtype == np.float32 else np.float64)
    assert_same(found, fitted(X.toarray().astype(np.float64), y), atol=2e-3)


@pytest.mark.parametrize("density", ["native", "filled in"])
def test_entries_in_any_order_given_twice_or_zero(density, monkeypatch):
    monkeypatch.setattr(sparse_rows, "DENSE", 2.0 if density == "native" else 0.0)
    X, y = problem()
    data, column, start = [], [], [0]
    for row in range(X.shape[0]):
        here = slice(X.indptr[row], X.indptr[row + 1])
        values, columns = X.data[here][::-1], X.indices[here][::-1]
        data += [*(values * 0.75), *(values * 0.25), 0.0]
        column += [*columns, *columns, 3]
        start.append(len(data))
    twisted = sparse.csr_matrix((data, column, start), shape=X.shape)
    before = [part.copy() for part in (twisted.data, twisted.indices, twisted.indptr)]
    kept = [twisted.data, twisted.indices, twisted.indptr]
    found = fitted(twisted, y)
    assert_same(found, fitted(X.toarray(), y))
    np.testing.assert_allclose(found.decision_function(twisted), found.decision_function(X), rtol=1e-9)
    for part, same, old in zip((twisted.data, twisted.indices, twisted.indptr), kept, before, strict=True):
        assert part is same
        assert np.array_equal(part, old)


def test_rows_of_which_much_is_stored_are_filled_in(monkeypatch):
    X, y = problem(density=0.9)
    source = sparse_source(X)
    assert isinstance(source, FilledRows)
    monkeypatch.setattr(sparse_rows, "BATCH", 100)
    assert len(list(source.batches())) > 5
    assert_same(fitted(X, y), fitted(X.toarray(), y))


def test_chunks_and_moments_do_not_change_the_sums(native, monkeypatch):
    X, y = problem()
    whole = fitted(X, y)
    monkeypatch.setattr(sparse_rows, "ENTRIES", 10)
    monkeypatch.setattr(sparse_rows, "SPREAD", 0)
    monkeypatch.setattr("xent.linear_model.row_pass.TILE", 1)
    monkeypatch.setattr("xent.linear_model.row_pass.FEWEST", 7)
    monkeypatch.setattr("xent.data.rows.BLOCK", 30)
    monkeypatch.setattr("xent.data.rows.BATCH", 30)
    for solver in ("lbfgs", "newton-cg"):
        assert_same(fitted(X, y, solver=solver), whole)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_full_column_far_from_0_does_not_hide_the_rest(native, dtype):
    X, y = problem()
    far = X.toarray()
    far[:, 5] += 1000
    far = far.astype(dtype)
    found, exact = fitted(sparse.csr_array(far), y, tol=1e-5), fitted(far.astype(np.float64), y)
    above = found.loss_curve_[-1] - exact.loss_curve_[-1]
    assert found.converged_
    assert abs(above) <= found.objective_gap_ + 1e-6


def test_the_certificate_holds_with_a_weak_penalty():
    """One-hot rows of rare levels, where the pairs of L-BFGS alone say a quarter of what is left."""
    rng = np.random.default_rng(1)
    share = 1 / np.arange(1, 41) ** 1.1
    X = OneHotEncoder().fit_transform(rng.choice(40, size=(4000, 15), p=share / share.sum()))
    assert X.shape[1] > preconditioner.WIDEST_SPARSE
    z = X @ rng.normal(size=(X.shape[1], 8))
    y = (z + rng.gumbel(size=z.shape)).argmax(1)
    found = SoftmaxRegression(C=300).fit(X, y)
    least = SoftmaxRegression(C=300, tol=1e-9, solver="newton-cg").fit(X, y)
    assert found.loss_curve_[-1] - least.loss_curve_[-1] <= found.objective_gap_


def test_text_goes_through_a_pipeline():
    modules = [json, warnings, tracemalloc, np.linalg, np.random, np.ma, np.fft]
    texts, topics = [], []
    for module in modules:
        for name in dir(module):
            said = getattr(module, name).__doc__
            texts += [said] if said else []
            topics += [module.__name__] if said else []
    model = make_pipeline(TfidfVectorizer(), SoftmaxRegression(C=100)).fit(texts, topics)
    X = model[0].transform(texts)
    assert X.shape[1] > 3 * X.shape[0] > 500
    assert model.score(texts, topics) > 0.8
    assert_same(model[1], SoftmaxRegression(C=100, tol=1e-10).fit(X.toarray(), topics), atol=1.0)
    np.testing.assert_allclose(model.predict_proba(texts).sum(1), 1)


def test_categories_go_through_a_pipeline():
    rng = np.random.default_rng(0)
    table = rng.choice(list("abcdefgh"), size=(400, 4))
    y = np.where(rng.random(400) < 0.8, table[:, 0], table[:, 1])
    model = make_pipeline(OneHotEncoder(), SoftmaxRegression(tol=TIGHT)).fit(table, y)
    dense = make_pipeline(OneHotEncoder(sparse_output=False), SoftmaxRegression(tol=TIGHT)).fit(table, y)
    assert model.score(table, y) > 0.7
    assert_same(model[1], dense[1])


@pytest.mark.parametrize("scoring", [None, "accuracy"])
@pytest.mark.parametrize("refit", [True, False])
def test_strengths_are_chosen_as_of_dense_rows(native, scoring, refit):
    X, y = problem()
    options = {"Cs": [0.1, 1.0, 10.0], "cv": 3, "scoring": scoring, "refit": refit, "tol": 1e-10}
    found = SoftmaxRegressionCV(**options).fit(X, y)
    dense = SoftmaxRegressionCV(**options).fit(X.toarray(), y)
    np.testing.assert_allclose(found.scores_, dense.scores_, rtol=1e-4)
    assert found.C_ == dense.C_
    assert_same(found, dense, atol=1e-3)


def test_callback_and_warm_start(native):
    X, y = problem()
    seen = []
    model = SoftmaxRegression(warm_start=True, tol=1e-8).fit(X, y, callback=seen.append)
    assert len(seen) == model.n_iter_ > 2
    assert model.fit(X, y).n_iter_ <= 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["csr", "coo", "csc"])
def test_what_is_not_finite_is_named(bad, name):
    X, y = problem()
    model = fitted(X, y)
    spoilt = X.tolil()
    spoilt[71, 4] = bad
    for call in (lambda X: fitted(X, y), model.predict, lambda X: model.score(X, y)):
        with pytest.raises(ValueError, match=rf"^X is {bad} at row 71, column 4; features are finite$"):
            call(spoilt.asformat(name))


def test_what_does_not_fit_is_refused():
    X, y = problem()
    model = fitted(X, y)
    with pytest.raises(ValueError, match="X has 11 features, but SoftmaxRegression is expecting 12"):
        model.predict(X[:, :11])
    with pytest.raises(ValueError, match="y has 199 rows and X has 200"):
        fitted(X, y[1:])
    with pytest.raises(ValueError, match=r"[Cc]omplex"):
        fitted(X.astype(complex), y)
    with pytest.raises(ValueError, match="0 sample"):
        fitted(X[:0], y[:0])
    beyond = sparse.csr_matrix(X)
    beyond.indices[-1] = 10_000
    with pytest.raises(ValueError, match="indices"):
        fitted(beyond, y)


@pytest.mark.parametrize("solver", ["lbfgs", "newton-cg"])
def test_memory_is_that_of_what_is_stored(solver):
    """20,000 × 200,000 are 32 GB dense; a thousandth of it is stored here 3 MB."""
    rng = np.random.default_rng(0)
    n_rows, n_features = 20_000, 200_000
    row, column = rng.integers(n_rows, size=200_000), rng.integers(n_features, size=200_000)
    X = sparse.csr_matrix((rng.random(len(row)), (row, column)), shape=(n_rows, n_features))
    y = rng.integers(3, size=n_rows)
    before = resident()
    tracemalloc.start()
    model = SoftmaxRegression(max_iter=30, tol=1e-3, solver=solver).fit(X, y)
    model.predict_proba(X)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert model.converged_
    assert peak < 5e8
    assert resident() - before < 1e9


def resident():
    """Return the highest memory of this process so far, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("twice", [False, True])
def test_moments_are_those_of_dense_rows(native, twice, monkeypatch):
    monkeypatch.setattr(sparse_rows, "ENTRIES", 30)
    X, _ = problem()
    if twice:
        data, indices = np.repeat(X.data / 2, 2), np.repeat(X.indices, 2)
        X = sparse.csr_array((data, indices, 2 * X.indptr), shape=X.shape)
    share = torch.rand(X.shape[0], dtype=torch.float64)
    share /= share.sum()
    dense = torch.from_numpy(X.toarray())
    ((_, batch),) = sparse_source(X).batches()
    for found, right in zip(
        batch.moments(share, torch.float64), DenseBatch(dense).moments(share, torch.float64), strict=True
    ):
        np.testing.assert_allclose(found, right, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_the_hessian_is_that_of_dense_rows(native, fit_intercept, soft):
    X, y = problem(4, soft=soft)
    weight = np.linspace(0.5, 2, len(y))
    sides = []
    for source in (sparse_source(X), ArrayRows(X.toarray())):
        objective = Objective(LabelledRows(source, y, weight), 4, 1.0, fit_intercept)
        theta = np.random.default_rng(1).normal(size=4 * 13)
        hessian = objective.hessian(theta)
        v = torch.randn(hessian.shape[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        diagonal, factors = hessian.diagonal(), hessian.kronecker()
        parts = diagonal if isinstance(diagonal, tuple) else (diagonal,)
        sides.append([hessian @ v, *parts, hessian.block(2), factors.A, factors.G * factors.total])
    for found, right in zip(*sides, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)
