"""The certificate: a bound on the distance from the minimum, checked against the minimum itself."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logsumexp
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from sklearn.preprocessing import StandardScaler

from xent import SoftmaxRegression
from xent.linear_model import descent


def clusters(n, d, c, spread=1.0, power=0.0, share=None):
    rng = np.random.default_rng(0)
    y = rng.choice(c, n, p=None if share is None else share / share.sum())
    X = (rng.normal(size=(c, d)) * spread)[y] + rng.normal(size=(n, d))
    return X * np.arange(1, d + 1) ** -power, y


def planted(n, d, c):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, d))
    return X, (4.8 / np.sqrt(d) * X @ rng.normal(size=(c, d)).T + rng.gumbel(size=(n, c))).argmax(1)


def standardised(load):
    X, y = load(return_X_y=True)
    return StandardScaler().fit_transform(X), y


PROBLEMS = {
    "iris": lambda: load_iris(return_X_y=True),
    "wine": lambda: standardised(load_wine),
    "two classes": lambda: standardised(load_breast_cancer),
    "digits": lambda: load_digits(return_X_y=True),
    "digits, standardised": lambda: standardised(load_digits),
    "clusters": lambda: clusters(2000, 30, 20, 0.5),
    "power law": lambda: clusters(2000, 30, 20, 0.5, power=1.5),
    "imbalanced": lambda: clusters(2000, 30, 20, 0.5, share=1 / np.arange(1.0, 21)),
    "as many parameters as rows": lambda: planted(600, 30, 20),
    "more features than rows": lambda: planted(60, 200, 4),
}
STRENGTHS = [1e-3, 1.0, 1e3]


@pytest.mark.parametrize("C", STRENGTHS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_default_ends_as_near_the_minimum_as_it_says(name, C):
    X, y = PROBLEMS[name]()
    best = SoftmaxRegression(C, solver="newton-cg", tol=1e-9, stopping="gradient", max_iter=300).fit(X, y)
    least = best.loss_curve_[-1]
    for solver in ("lbfgs", "newton-cg"):
        model = SoftmaxRegression(C, solver=solver).fit(X, y)
        assert model.converged_
        away = model.loss_curve_[-1] - least
        assert away <= 1e-4 * max(least, descent.FLOOR * np.log(len(model.classes_))), solver
        assert away <= model.objective_gap_ + 1e-13, solver


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_bound_holds_on_the_way(name):
    """The duality gap is a bound everywhere; with the decrement, all but the first steps stay below it."""
    X, y = PROBLEMS[name]()
    seen = []
    model = SoftmaxRegression(tol=1e-6, solver="lbfgs")
    model.fit(X, y, callback=lambda now: seen.append((now.objective, now.above)))
    best = SoftmaxRegression(solver="newton-cg", tol=1e-9, stopping="gradient", max_iter=300).fit(X, y)
    least = best.loss_curve_[-1]
    near = [(value - least, above) for value, above in seen if value - least < 0.1 * least]
    assert near
    assert sum(away <= above for away, above in near) >= 0.95 * len(near)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_the_duality_gap_is_a_bound_from_the_start():
    for name in PROBLEMS:
        X, y = PROBLEMS[name]()
        best = SoftmaxRegression(solver="newton-cg", tol=1e-9, stopping="gradient", max_iter=300).fit(X, y)
        first = SoftmaxRegression(max_iter=0).fit(X, y)
        assert first.loss_curve_[0] - best.loss_curve_[-1] <= first.objective_gap_


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_rows_that_a_hyperplane_separates_are_said_to_have_no_minimum(fit_intercept):
    X, y = clusters(200, 5, 3, 8.0)
    options = {"C": np.inf, "fit_intercept": fit_intercept}
    with pytest.warns(match="a hyperplane separates, without a penalty: the loss has no minimum"):
        SoftmaxRegression(**options).fit(X, y)
    model = SoftmaxRegression(**options).fit(*planted(600, 5, 3))
    assert model.converged_
    assert np.isfinite(model.objective_gap_)


def raised(by):
    """Features whose mean is as many deviations, which without an intercept is a direction like any other."""
    X, y = planted(1500, 20, 5)
    return X + by, y, {"fit_intercept": False}


def nearly_alike(distance):
    """Pairs of columns that differ by as much; classes are told apart by the differences as well."""
    X, y = planted(1500, 20, 5)
    return np.hstack([X[:, :10], X[:, :10] + distance * X[:, 10:]]), y, {"C": 1e3 / distance**2}


ILL_CONDITIONED = {
    **{f"mean {by:g}": lambda by=by: raised(by) for by in (10, 1e3, 1e4, 1e6, 1e7)},
    **{f"differences {of:g}": lambda of=of: nearly_alike(of) for of in (1e-2, 1e-4, 1e-6)},
}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(
    ("name", "solver"),
    [
        # newton-cg takes 12 s where features differ by 1e-4
        pytest.param(name, solver, marks=[pytest.mark.slow] if "0.0001" in name and "cg" in solver else [])
        for name in ILL_CONDITIONED
        for solver in ("lbfgs", "newton-cg")
    ],
)
def test_directions_that_float32_hides_are_in_the_bound(name, solver, dtype):
    X, y, options = ILL_CONDITIONED[name]()
    if dtype == np.float32 and name in ("mean 1e+06", "mean 1e+07", "differences 1e-06"):
        pytest.skip("coef_ in float32 has no digits for it")
    X = X.astype(dtype)
    best = SoftmaxRegression(solver="lbfgs", tol=1e-7, max_iter=300, **options).fit(X.astype(float), y)
    for tol in (1e-4, 1e-8):
        model = SoftmaxRegression(solver=solver, tol=tol, **options).fit(X, y)
        z = model.decision_function(X.astype(float))
        W = model.coef_.astype(float)
        loss = logsumexp(z, axis=1) - z[np.arange(len(y)), y]
        away = loss.mean() + 0.5 / options.get("C", 1.0) / len(y) * np.vdot(W, W) - best.loss_curve_[-1]
        assert away <= model.objective_gap_ + 1e-6 * best.loss_curve_[-1]
        if dtype == np.float64 and solver == "lbfgs":
            assert away <= 1e-4 * best.loss_curve_[-1]
