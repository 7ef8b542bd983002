"""The strength chosen by cross-validation: what each fit alone finds, and the choice scikit-learn makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_iris
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold

from xent import SoftmaxRegression, SoftmaxRegressionCV
from xent.data.rows import ArrayRows
from xent.linear_model.labelled_rows import LabelledRows
from xent.linear_model.objective import Objective
from xent.linear_model.path import regularisation_path

X, Y = load_iris(return_X_y=True)
CS = [0.01, 0.1, 1.0, 10.0, 100.0]
TIGHT = {"tol": 1e-9}


def test_a_path_is_what_each_fit_alone_finds():
    objective = Objective(LabelledRows(ArrayRows(X), Y), 3, 1.0, True)
    points = list(regularisation_path(objective, reversed(CS), tol=1e-10))
    assert [point.C for point in points] == CS
    for point in points:
        assert point.converged
        alone = SoftmaxRegression(point.C, tol=1e-10).fit(X, Y)
        np.testing.assert_allclose(point.coef, alone.coef_, atol=2e-4 * np.abs(alone.coef_).max())
        np.testing.assert_allclose(point.intercept, alone.intercept_, atol=1e-3)


def test_a_warm_path_takes_fewer_iterations():
    X, y = load_digits(return_X_y=True)
    X = X / 16
    Cs = np.logspace(-3, 3, 20)
    objective = Objective(LabelledRows(ArrayRows(X), y), 10, 1.0, True)
    warm = sum(point.n_iter for point in regularisation_path(objective, Cs))
    cold = sum(SoftmaxRegression(C).fit(X, y).n_iter_ for C in Cs)
    assert warm < 0.75 * cold


@pytest.mark.filterwarnings("ignore::FutureWarning:sklearn")
@pytest.mark.parametrize("solver", ["lbfgs", "newton-cg"])
@pytest.mark.parametrize("classes", [2, 3])
def test_scores_and_choice_are_those_of_scikit_learn(solver, classes):
    x, y = X[classes > Y], Y[classes > Y] + np.random.default_rng(0).integers(2, size=(classes > Y).sum())
    y = y % classes  # some labels are wrong: there is a best strength
    folds = StratifiedKFold(4)
    ours = SoftmaxRegressionCV(CS, cv=folds, solver=solver, **TIGHT).fit(x, y)
    search = GridSearchCV(SoftmaxRegression(**TIGHT), {"C": CS}, cv=folds, scoring="neg_log_loss").fit(x, y)
    right = np.stack([search.cv_results_[f"split{k}_test_score"] for k in range(4)])
    np.testing.assert_allclose(ours.scores_, right, atol=1e-4)
    assert search.best_params_["C"] == ours.C_
    np.testing.assert_allclose(ours.coef_, search.best_estimator_.coef_, atol=1e-4)
    assert ours.n_iter_path_.shape == (4, 5)
    peer = LogisticRegressionCV(Cs=CS, cv=folds, scoring="neg_log_loss", tol=1e-8, max_iter=5000).fit(x, y)
    assert np.ravel(peer.C_)[0] == ours.C_


def test_a_frame_is_fitted_without_a_warning(recwarn):
    frame = load_iris(as_frame=True).data
    model = SoftmaxRegressionCV(Cs=2, cv=2, scoring="accuracy").fit(frame, Y)
    assert model.feature_names_in_.tolist() == [*frame]
    SoftmaxRegressionCV(Cs=2, cv=2, refit=False).fit(frame, Y).predict(frame)
    assert [str(warning.message) for warning in recwarn] == []


def test_scoring_by_name_or_function():
    by_name = SoftmaxRegressionCV(CS, scoring="accuracy", cv=3).fit(X, Y)
    by_function = SoftmaxRegressionCV(CS, scoring=lambda m, x, y: m.score(x, y), cv=3).fit(X, Y)
    np.testing.assert_array_equal(by_name.scores_, by_function.scores_)
    assert 0.9 < by_name.scores_.max() <= 1
    assert by_name.Cs_[by_name.scores_.mean(axis=0).argmax()] == by_name.C_


def test_folds_averaged_without_a_refit():
    model = SoftmaxRegressionCV([1.0], cv=KFold(3, shuffle=True, random_state=0), refit=False, **TIGHT).fit(
        X, Y
    )
    folds = KFold(3, shuffle=True, random_state=0).split(X)
    fits = [SoftmaxRegression(**TIGHT).fit(X[training], Y[training]) for training, _ in folds]
    np.testing.assert_allclose(model.coef_, np.mean([fit.coef_ for fit in fits], axis=0), atol=1e-4)


def test_soft_labels_and_weights():
    T = np.eye(3)[Y] * 0.8 + 0.2 / 3
    weight = np.random.default_rng(0).uniform(0.5, 2, 150)
    model = SoftmaxRegressionCV([0.1, 1.0], cv=3, **TIGHT).fit(X, T, weight)
    (training, test), *_ = StratifiedKFold(3).split(X, Y)
    fit = SoftmaxRegression(0.1, **TIGHT).fit(X[training], T[training], weight[training])
    loss = -(T[test] * fit.predict_log_proba(X[test])).sum(axis=1)
    assert model.scores_[0, 0] == pytest.approx(-np.average(loss, weights=weight[test]), rel=1e-4)


def test_tensors_and_half_types():
    for x in (torch.tensor(X).bfloat16(), X.astype(np.float16), torch.tensor(X)):
        model = SoftmaxRegressionCV(CS, cv=3).fit(x, Y)
        assert log_loss(Y, model.predict_proba(x)) < 0.3


@pytest.mark.parametrize(
    ("Cs", "message"),
    [
        (0, "Cs must be at least one strength, got 0"),
        ([], "Cs holds no strength"),
        ([1.0, -1.0], "C must be positive"),
        ("many", "Cs must be a whole number or an array"),
        (True, "Cs must be a whole number or an array"),
        (None, "Cs must be a whole number or an array"),
    ],
)
def test_strengths_that_are_none(Cs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        SoftmaxRegressionCV(Cs).fit(X, Y)


def test_a_score_that_is_no_number():
    with pytest.raises(ValueError, match="not finite on a fold"):
        SoftmaxRegressionCV([1.0], scoring=lambda *_: np.nan).fit(X, Y)
