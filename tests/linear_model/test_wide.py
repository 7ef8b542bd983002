"""More features than rows: the minimum in the coordinates of the rows is the minimum."""

from __future__ import annotations

import numpy as np
import pytest

from xent import SoftmaxRegression, SoftmaxRegressionCV
from xent.data.rows import ArrayRows, MappedRows
from xent.linear_model import wide
from xent.linear_model.labelled_rows import LabelledRows
from xent.linear_model.objective import Objective
from xent.linear_model.wide import WideObjective, make_objective


@pytest.fixture(autouse=True)
def from_few_features_on(monkeypatch):
    monkeypatch.setattr(wide, "FEATURES", 1)


def plainly(monkeypatch):
    """Have no change of coordinates."""
    monkeypatch.setattr(wide, "FEATURES", 1 << 30)


def problem(classes=3, rows=40, columns=90):
    rng = np.random.default_rng(0)
    X = 5 + rng.normal(size=(rows, columns)) * rng.uniform(0.1, 3, columns)
    X[7] = X[3]  # the rows' span has fewer dimensions
    return X, np.arange(rows) % classes, rng


CASES = {
    "usual": {},
    "two classes": {"classes": 2},
    "no intercept": {"fit_intercept": False},
    "weighted": {"weighted": True},
    "soft": {"soft": True},
    "newton-cg": {"solver": "newton-cg"},
    "the gradient": {"stopping": "gradient"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_minimum_is_that_in_all_features(monkeypatch, case):
    options = {"tol": 1e-10, **CASES[case]}
    X, y, rng = problem(options.pop("classes", 3))
    weight = rng.integers(0, 3, len(X)).astype(float) if options.pop("weighted", False) else None
    if options.pop("soft", False):
        y = rng.dirichlet(np.ones(3), len(X)) * np.linspace(0, 2, len(X))[:, None]
    seen = []
    fits = SoftmaxRegression(**options).fit(X, y, weight, callback=seen.append)
    plainly(monkeypatch)
    plain = SoftmaxRegression(**options).fit(X, y, weight)
    assert fits.converged_
    assert fits.coef_.shape == plain.coef_.shape == seen[0].coef.shape
    np.testing.assert_allclose(fits.coef_, plain.coef_, atol=3e-5)
    np.testing.assert_allclose(fits.intercept_, plain.intercept_, atol=5e-4)
    np.testing.assert_array_equal(seen[-1].coef, fits.coef_)
    assert fits.loss_curve_[-1] == pytest.approx(plain.loss_curve_[-1], rel=1e-9)
    again = SoftmaxRegression(**options, warm_start=True)
    again.__dict__.update({k: v for k, v in vars(plain).items() if k.endswith("_")})
    assert again.fit(X, y, weight).n_iter_ <= 1  # W of all features begins where it ended


def test_value_gradient_and_bounds_are_those_of_the_model():
    X, y, rng = problem()
    rows = LabelledRows(ArrayRows(X), y, rng.uniform(0, 2, len(X)))
    made, plain = make_objective(rows, 3, 2.0, True), Objective(rows, 3, 2.0, True)
    assert isinstance(made, WideObjective)
    assert made.n_features < len(X)
    theta = rng.normal(size=3 * (made.n_features + 1)) / 10
    W, b = made.to_model(theta)
    np.testing.assert_allclose(made.to_solver(W, b).ravel(), theta, atol=1e-10)
    at = plain.to_solver(W, b).ravel()
    assert made(theta)[0] == pytest.approx(plain(at)[0], rel=1e-12)
    assert made.gradient_norm == pytest.approx(plain.gradient_norm, rel=1e-9)
    assert made.duality_gap == pytest.approx(plain.duality_gap, rel=1e-9)
    model = np.concatenate([W, b[:, None]], axis=1).ravel()
    np.testing.assert_allclose(made.loss(model, rows), plain.loss(model, rows), rtol=1e-12)


def test_where_it_is_used():
    X, y, _ = problem()
    rows = LabelledRows(ArrayRows(X), y)
    assert isinstance(make_objective(rows, 3, 1.0, True), WideObjective)
    mapped = LabelledRows(MappedRows(X), y)
    assert isinstance(make_objective(mapped, 3, 1.0, True), WideObjective)
    narrow = LabelledRows(ArrayRows(X[:, :30]), y)
    assert type(make_objective(narrow, 3, 1.0, True)) is Objective
    one = LabelledRows(ArrayRows(X[:1]), y[:1])
    assert type(make_objective(one, 3, 1.0, True)) is Objective


def test_features_that_do_not_vary():
    X, y = np.full((20, 50), 3.0), np.arange(20) % 4
    model = SoftmaxRegression().fit(X, y)
    assert model.converged_
    assert not model.coef_.any()
    np.testing.assert_allclose(model.predict_proba(X), 1 / 4)


def test_a_path_along_strengths(monkeypatch):
    X, y, _ = problem(rows=60)
    found = SoftmaxRegressionCV(Cs=5, cv=3, tol=1e-9).fit(X, y)
    plainly(monkeypatch)
    plain = SoftmaxRegressionCV(Cs=5, cv=3, tol=1e-9).fit(X, y)
    np.testing.assert_allclose(found.scores_, plain.scores_, rtol=0.02)
    np.testing.assert_allclose(found.coef_, plain.coef_, atol=1e-4)
