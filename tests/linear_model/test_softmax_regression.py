"""``SoftmaxRegression`` against scikit-learn's ``LogisticRegression``, and the laws that tie its options."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.special import logsumexp
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import xent
from xent.linear_model.softmax_regression import Progress, SoftmaxRegression

LOADERS = {"digits": load_digits, "iris": load_iris, "wine": load_wine, "breast_cancer": load_breast_cancer}
# many fits below ask for more than the arithmetic resolves, to come as close as it can
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
TIGHT = {"tol": 1e-10, "max_iter": 20_000, "stopping": "gradient"}


def load(name: str, standardised: bool = True):
    X, y = LOADERS[name](return_X_y=True)
    return (StandardScaler().fit_transform(X) if standardised else X), y


def objective(model, X, y, C=1.0, weight=None) -> float:
    """C Σ s ℓ + ½‖W‖², independent of the code under test."""
    z = model.decision_function(X)
    z = np.stack([np.zeros_like(z), z], axis=1) if z.ndim == 1 else z
    nll = logsumexp(z, axis=1) - z[np.arange(len(y)), y]
    return C * float(nll @ (np.ones(len(y)) if weight is None else weight)) + 0.5 * float(
        (model.coef_**2).sum()
    )


def fit_quietly(model, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(*args, **kwargs)


@pytest.mark.parametrize("standardised", [True, False], ids=["standardised", "raw"])
@pytest.mark.parametrize("name", LOADERS)
def test_objective_is_the_best_of_logistic_regression(name, standardised):
    X, y = load(name, standardised)
    peers = [
        fit_quietly(LogisticRegression(solver=solver, tol=1e-10, max_iter=2000), X, y)
        for solver in ("newton-cholesky", "newton-cg")
    ]
    best = min(peers, key=lambda peer: objective(peer, X, y))
    ours = fit_quietly(SoftmaxRegression(**TIGHT), X, y)
    assert objective(ours, X, y) == pytest.approx(objective(best, X, y), rel=1e-7)
    np.testing.assert_allclose(ours.predict_proba(X), best.predict_proba(X), atol=1e-4)


def test_raw_features_converge_in_tens_of_iterations():
    # (W, b) itself takes L-BFGS 10,756 iterations to the same point
    X, y = load("wine", standardised=False)
    assert fit_quietly(SoftmaxRegression(**TIGHT), X, y).n_iter_ < 200


@pytest.mark.parametrize("C", [1e-3, 10.0, np.inf])
def test_strength_of_the_penalty(C):
    X, y = load("wine") if np.isfinite(C) else load("iris")
    ours = fit_quietly(SoftmaxRegression(C, **TIGHT), X, y)
    peer = fit_quietly(LogisticRegression(C=C, solver="newton-cg", tol=1e-10, max_iter=2000), X, y)
    np.testing.assert_allclose(ours.predict_proba(X), peer.predict_proba(X), atol=1e-4)


@pytest.mark.parametrize("solver", ["auto", "lbfgs", "newton-cg"])
@pytest.mark.parametrize("name", LOADERS)
def test_without_an_intercept_there_is_none(name, solver):
    X, y = load(name)
    model = SoftmaxRegression(fit_intercept=False, solver=solver).fit(X + 1, y)
    assert (model.intercept_ == 0).all()
    peer = SoftmaxRegression(fit_intercept=False, solver="newton-cg", tol=1e-9).fit(X + 1, y)
    np.testing.assert_allclose(model.loss_curve_[-1], peer.loss_curve_[-1], rtol=1e-4)


def test_without_intercept():
    X, y = load("wine")
    ours = SoftmaxRegression(fit_intercept=False, tol=1e-8, stopping="gradient").fit(X, y)
    peer = LogisticRegression(fit_intercept=False, tol=1e-10, max_iter=2000).fit(X, y)
    np.testing.assert_allclose(ours.coef_, peer.coef_, atol=1e-5)
    assert (ours.intercept_ == 0).all()


def test_tol_bounds_the_gradient_as_in_scikit_learn():
    X, y = load("iris", standardised=False)
    model = SoftmaxRegression(tol=1e-3, stopping="gradient").fit(X, y)
    p = model.predict_proba(X)
    p[np.arange(len(y)), y] -= 1
    to_W = p.T @ X / len(X) + model.coef_ / len(X)
    to_b = p.mean(axis=0)
    assert max(np.abs(to_W).max(), np.abs(to_b).max()) == pytest.approx(model.gradient_norm_)
    assert model.gradient_norm_ <= 1e-3


# Weights, labels, classes


def test_weights_equal_repetition():
    X, y = load("iris")
    times = np.random.default_rng(0).integers(0, 4, len(X))
    weighted = SoftmaxRegression(tol=1e-9, stopping="gradient").fit(X, y, sample_weight=times)
    repeated = SoftmaxRegression(tol=1e-9, stopping="gradient").fit(
        np.repeat(X, times, axis=0), np.repeat(y, times)
    )
    np.testing.assert_allclose(weighted.coef_, repeated.coef_, atol=1e-6)
    np.testing.assert_allclose(weighted.loss_curve_[-1], repeated.loss_curve_[-1], rtol=1e-12)


@pytest.mark.parametrize("class_weight", ["balanced", {0: 3.0, 1: 0.5, 2: 1.0}], ids=["balanced", "dict"])
def test_class_weight_as_in_scikit_learn(class_weight):
    X, y = load("iris")
    X, y = X[20:], y[20:]  # uneven classes
    ours = SoftmaxRegression(class_weight=class_weight, tol=1e-9, stopping="gradient").fit(X, y)
    peer = LogisticRegression(class_weight=class_weight, tol=1e-10, max_iter=2000).fit(X, y)
    np.testing.assert_allclose(ours.coef_, peer.coef_, atol=1e-5)


@pytest.mark.parametrize("class_weight", [None, "balanced", {0: 3.0, 1: 0.5, 2: 1.0}])
def test_one_hot_labels_equal_hard_labels(class_weight):
    X, y = load("iris")
    X, y = X[20:], y[20:]
    weight = np.random.default_rng(0).uniform(0.5, 2, len(X))
    hard = SoftmaxRegression(class_weight=class_weight, tol=1e-9, stopping="gradient").fit(X, y, weight)
    soft = SoftmaxRegression(class_weight=class_weight, tol=1e-9, stopping="gradient").fit(
        X, np.eye(3)[y], weight
    )
    np.testing.assert_allclose(soft.coef_, hard.coef_, atol=1e-7)
    assert soft.score(X, np.eye(3)[y], weight) == pytest.approx(hard.score(X, y, weight))


def test_a_soft_label_is_its_classes_weighted():
    X, _ = load("iris")
    T = (
        np.random.default_rng(0).dirichlet(np.ones(3), len(X)) * np.linspace(0, 2, len(X))[:, None]
    )  # any mass
    soft = SoftmaxRegression(tol=1e-9, stopping="gradient").fit(X, T)
    rows = SoftmaxRegression(tol=1e-9, stopping="gradient").fit(
        np.tile(X, (3, 1)), np.repeat(np.arange(3), len(X)), T.T.ravel()
    )
    np.testing.assert_allclose(soft.coef_, rows.coef_, atol=1e-6)
    assert soft.loss_curve_[-1] == pytest.approx(rows.loss_curve_[-1], rel=1e-12)


def test_two_classes_are_one_vector():
    X, y = load("breast_cancer")
    ours = SoftmaxRegression(tol=1e-8, stopping="gradient").fit(X, y)
    peer = LogisticRegression(tol=1e-10, max_iter=2000).fit(X, y)
    assert ours.coef_.shape == (1, X.shape[1])
    assert ours.intercept_.shape == (1,)
    assert ours.decision_function(X).shape == (len(X),)
    np.testing.assert_allclose(ours.coef_, peer.coef_, atol=1e-4)
    soft = SoftmaxRegression(tol=1e-8, stopping="gradient").fit(X, np.eye(2)[y])
    np.testing.assert_allclose(soft.coef_, ours.coef_, atol=1e-6)


@pytest.mark.parametrize(
    "rename",
    [np.array(["b", "c", "a"]), np.array([30, -1, 7]), np.array(["b", "c", "a"], dtype=object)],
    ids=["str", "int", "object"],
)
def test_labels_of_any_type(rename):
    X, y = load("iris")
    plain = SoftmaxRegression(tol=1e-8, stopping="gradient").fit(X, y)
    renamed = SoftmaxRegression(tol=1e-8, stopping="gradient").fit(X, rename[y])
    np.testing.assert_array_equal(renamed.classes_, np.unique(rename))
    np.testing.assert_array_equal(renamed.predict(X), rename[plain.predict(X)])


def test_boolean_labels():
    X, y = load("breast_cancer")
    model = SoftmaxRegression().fit(X, y.astype(bool))
    assert model.classes_.dtype == bool
    assert model.predict(X).dtype == bool


# Precision, progress, what ends a fit


def test_log_probabilities_stay_finite_where_probabilities_round_to_zero():
    X = np.array([[-1.0], [1.0]])
    for y in ([0, 1], [0, 2]):
        model = SoftmaxRegression().fit(np.concatenate([X, [[0.0]]]), np.array([*y, 1]))
        log_p = model.predict_log_proba(1e6 * X)
        assert np.isfinite(log_p).all()
        assert log_p.min() < -745  # below the smallest double's logarithm


def test_float32_stays_float32():
    X, y = load("digits")
    double = SoftmaxRegression().fit(X, y)
    single = SoftmaxRegression().fit(X.astype(np.float32), y)
    for name in ("coef_", "intercept_"):
        assert getattr(single, name).dtype == np.float32
    assert single.predict_proba(X.astype(np.float32)).dtype == np.float32
    assert single.converged_
    np.testing.assert_allclose(single.predict_proba(X.astype(np.float32)), double.predict_proba(X), atol=1e-2)


def test_warm_start_goes_on_where_it_was():
    X, y = load("digits")
    whole = SoftmaxRegression(warm_start=True).fit(X, y)
    end = whole.loss_curve_[-1]
    whole.fit(X, y)
    assert whole.n_iter_ <= 3  # until the solver knows the curvature again
    assert whole.loss_curve_[0] == pytest.approx(end, rel=1e-12)
    with pytest.raises(ValueError, match="warm_start=False"):
        whole.fit(X[:, :5], y)


def test_loss_curve_falls_from_the_start():
    X, y = load("digits")
    model = SoftmaxRegression().fit(X, y)
    assert len(model.loss_curve_) == model.n_iter_ + 1
    assert model.loss_curve_[0] == pytest.approx(np.log(10))
    assert (np.diff(model.loss_curve_) < 0).all()


ENDS = {  # options, type of the features, why it ends and what helps
    "max_iter": ({"max_iter": 3}, float, "max_iter is reached; raise max_iter or tol"),
    "Newton's max_iter": (
        {"max_iter": 1, "solver": "newton-cg"},
        float,
        "max_iter is reached; raise max_iter or tol",
    ),
    "stalled": (
        {"tol": 0, "solver": "lbfgs"},
        float,
        'the arithmetic resolves no further decrease; try solver="newton-cg", standardised features, '
        "a smaller C or a larger tol",
    ),
    "stalled in float32": (
        {"tol": 0, "solver": "lbfgs"},
        np.float32,
        'the arithmetic resolves no further decrease; try solver="newton-cg", standardised features, '
        "a smaller C or a larger tol, or pass float64 features",
    ),
    "Newton stalled": (
        {"tol": 0, "solver": "newton-cg"},
        float,
        "the arithmetic resolves no further decrease; try standardised features, a smaller C or a larger tol",
    ),
    "Newton stalled in float32": (
        {"tol": 0, "solver": "newton-cg"},
        np.float32,
        "the arithmetic resolves no further decrease; try standardised features, a smaller C or a larger "
        "tol, or pass float64 features",
    ),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_fit_that_has_not_converged_says_what_helps(case):
    options, dtype, advice = ENDS[case]
    X, y = load("wine")
    with pytest.warns(ConvergenceWarning) as said:
        model = SoftmaxRegression(**options).fit(X.astype(dtype), y)
    assert not model.converged_
    (message,) = (str(warning.message) for warning in said)
    assert message.endswith(f" above tol {options.get('tol', 1e-4):.3g}: {advice}")


@pytest.mark.parametrize("solver", ["lbfgs", "newton-cg"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_features_that_leave_the_range_are_the_reason(solver):
    X, y = load("iris")
    with pytest.warns(ConvergenceWarning, match="too large for float32; scale them down, or pass float64"):
        SoftmaxRegression(solver=solver).fit((X * 1e37).astype(np.float32), y)
    with pytest.warns(ConvergenceWarning, match="too large for float64; scale them down$"):
        SoftmaxRegression(solver=solver).fit(X * 1e307, y)


def test_what_is_advised_helps():
    """Each way out, taken alone, ends a fit that had stalled."""
    X, y = load("wine", standardised=False)
    stalled = {"C": 1e3, "tol": 1e-9, "max_iter": 10**4, "stopping": "gradient", "solver": "lbfgs"}
    assert not SoftmaxRegression(**stalled).fit(X.astype(np.float32), y).converged_
    assert SoftmaxRegression(**stalled).fit(X, y).converged_
    assert SoftmaxRegression(**{**stalled, "tol": 0.1}).fit(X.astype(np.float32), y).converged_


def test_converged_means_that_the_gradient_is_within_tol():
    X, y = load("digits", standardised=False)
    with pytest.warns(ConvergenceWarning, match="resolves no further decrease.*or pass float64 features"):
        single = SoftmaxRegression(C=100, tol=1e-10, stopping="gradient", max_iter=5000).fit(
            X.astype(np.float32), y
        )
    assert not single.converged_
    double = SoftmaxRegression(C=100, tol=1e-6, stopping="gradient", max_iter=5000).fit(X, y)
    assert double.converged_
    assert objective(single, X, y, 100) == pytest.approx(objective(double, X, y, 100), rel=1e-3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_does_not_matter(mode):
    X, y = load("iris")
    with mode():
        inside = SoftmaxRegression().fit(X, y)
    np.testing.assert_array_equal(inside.coef_, SoftmaxRegression().fit(X, y).coef_)


def test_callback_sees_every_iteration_and_may_end_the_fit():
    X, y = load("digits")
    seen: list[Progress] = []

    def watch(now: Progress) -> None:
        seen.append(now)
        if now.iteration == 4:
            raise StopIteration

    model = SoftmaxRegression().fit(X, y, callback=watch)
    assert [now.iteration for now in seen] == [1, 2, 3, 4]
    np.testing.assert_array_equal(model.coef_, seen[-1].coef)
    np.testing.assert_array_equal(model.loss_curve_[1:], [now.objective for now in seen])


def test_interrupting_keeps_the_last_iteration():
    X, y = load("digits")

    def interrupt(now: Progress) -> None:
        if now.iteration == 4:
            raise KeyboardInterrupt

    model = SoftmaxRegression()
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, y, callback=interrupt)
    assert model.n_iter_ == 4
    assert model.score(X, y) > 0.9


def test_verbose_prints_the_iterations(capsys):
    X, y = load("iris")
    SoftmaxRegression(verbose=1).fit(X, y)
    solver, threads, first, *_ = capsys.readouterr().out.splitlines()
    assert solver.startswith("solver lbfgs: first-order passes, features decorrelated")
    assert threads == "1 worker thread: the problem is small"
    assert first.startswith("iteration 1: objective ")


# Newton's method


def gradient_of(model, X, y, C=1.0):
    """The scaled objective's, in (W, b), as rounded; independent of the code under test."""
    z = X @ model.coef_.T + model.intercept_
    p = np.exp(z - logsumexp(z, axis=1, keepdims=True))
    p[np.arange(len(y)), y] -= 1
    return max(np.abs(p.T @ X / len(X) + model.coef_ / (C * len(X))).max(), np.abs(p.mean(axis=0)).max())


@pytest.mark.parametrize("C", [1.0, 1e4])
@pytest.mark.parametrize("standardised", [True, False], ids=["standardised", "raw"])
@pytest.mark.parametrize("name", ["digits", "wine"])
def test_newton_goes_on_where_values_no_longer_differ(name, standardised, C):
    X, y = load(name, standardised)
    model = SoftmaxRegression(C, solver="newton-cg", tol=1e-10, stopping="gradient", max_iter=40).fit(X, y)
    assert model.converged_
    assert model.gradient_norm_ <= 1e-10
    assert gradient_of(model, X, y, C) <= 2e-10
    assert (np.diff(model.loss_curve_) < 1e-14).all()


@pytest.mark.parametrize("standardised", [True, False], ids=["standardised", "raw"])
@pytest.mark.parametrize("name", LOADERS)
def test_newton_equals_the_best_of_logistic_regression(name, standardised):
    X, y = load(name, standardised)
    peers = [
        fit_quietly(LogisticRegression(solver=solver, tol=1e-10, max_iter=2000), X, y)
        for solver in ("newton-cholesky", "newton-cg")
    ]
    best = min(peers, key=lambda peer: objective(peer, X, y))
    ours = SoftmaxRegression(solver="newton-cg", tol=1e-9, stopping="gradient").fit(X, y)
    assert ours.converged_
    assert objective(ours, X, y) <= objective(best, X, y) * (1 + 1e-13)
    np.testing.assert_allclose(ours.predict_proba(X), best.predict_proba(X), atol=1e-5)


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("kind", ["hard", "soft", "weighted", "balanced", "two", "two soft"])
def test_newton_finds_what_lbfgs_finds(kind, fit_intercept):
    X, y = load("breast_cancer" if kind.startswith("two") else "wine")
    rng = np.random.default_rng(0)
    classes = y.max() + 1
    if "soft" in kind:
        y = rng.dirichlet(np.ones(classes), len(X)) * np.linspace(0, 2, len(X))[:, None]
    weight = rng.integers(0, 3, len(X)) if kind == "weighted" else None
    options = {"fit_intercept": fit_intercept, "class_weight": "balanced" if kind == "balanced" else None}
    ours = SoftmaxRegression(solver="newton-cg", tol=1e-11, stopping="gradient", **options).fit(X, y, weight)
    peer = SoftmaxRegression(**TIGHT, **options).fit(X, y, weight)
    assert ours.converged_
    assert ours.coef_.shape == peer.coef_.shape
    np.testing.assert_allclose(ours.coef_, peer.coef_, atol=1e-5)
    np.testing.assert_allclose(ours.intercept_, peer.intercept_, atol=1e-5)
    assert fit_intercept or (ours.intercept_ == 0).all()


@pytest.mark.parametrize("C", [1.0, np.inf])
def test_newton_fixes_the_gauge(C):
    X, y = load("iris")
    model = SoftmaxRegression(C, solver="newton-cg", tol=1e-9, stopping="gradient").fit(X, y)
    assert model.converged_
    assert abs(model.intercept_.sum()) < 1e-9
    assert np.abs(model.coef_.sum(axis=0)).max() < (1e-6 if np.isfinite(C) else 1e-11)


def test_newton_of_two_classes_solves_each_system_at_once():
    """The preconditioner is the Hessian: as many products as iterations, and few of either."""
    X, y = load("breast_cancer", standardised=False)
    model = SoftmaxRegression(solver="newton-cg", tol=1e-10, stopping="gradient").fit(X, y)
    assert model.converged_
    assert model.n_iter_ < 15


@pytest.mark.parametrize("name", ["wine", "breast_cancer"])
def test_newton_comes_back_from_a_start_that_is_sure_and_wrong(name):
    X, y = load(name)
    model = SoftmaxRegression(solver="newton-cg", tol=1e-9, stopping="gradient", warm_start=True).fit(X, y)
    right = model.coef_.copy()
    model.coef_ = -100 * right
    model.fit(X, y)
    assert model.converged_
    np.testing.assert_allclose(model.coef_, right, atol=1e-5)
    model.fit(X, y)
    assert model.n_iter_ == 0


def test_newton_says_when_the_arithmetic_ends():
    X, y = load("wine")
    with pytest.warns(ConvergenceWarning, match="resolves no further decrease"):
        double = SoftmaxRegression(solver="newton-cg", tol=0.0, stopping="gradient").fit(X, y)
    assert double.gradient_norm_ < 1e-14
    assert double.n_iter_ < 20
    with pytest.warns(ConvergenceWarning, match="or pass float64 features"):
        single = SoftmaxRegression(solver="newton-cg", tol=1e-12, stopping="gradient").fit(
            X.astype(np.float32), y
        )
    assert single.coef_.dtype == np.float32
    assert single.gradient_norm_ < 1e-6
    np.testing.assert_allclose(single.coef_, double.coef_, atol=1e-4)


def test_newton_is_watched_and_stopped_like_lbfgs(capsys):
    X, y = load("digits")
    seen: list[Progress] = []

    def watch(now: Progress) -> None:
        seen.append(now)
        if now.iteration == 3:
            raise StopIteration

    model = SoftmaxRegression(solver="newton-cg", verbose=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(X, y, callback=watch)
    assert [now.iteration for now in seen] == [1, 2, 3]
    np.testing.assert_array_equal(model.coef_, seen[-1].coef)
    assert capsys.readouterr().out.startswith("solver newton-cg: asked for\n")
    with pytest.warns(ConvergenceWarning, match="max_iter is reached"):
        assert SoftmaxRegression(solver="newton-cg", max_iter=2).fit(X, y).n_iter_ == 2


# What is refused, by name


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.zeros(4), "one class"),
        (np.array([0.5, 1.5, 2.5, 0.5]), "continuous"),
        (np.array([[0.5, 0.5], [1, 0], [0, 1], [0.5, -0.5]]), "row 3, class 1 is negative"),
        (np.zeros((4, 3)), "sums to 0"),
        (np.array([["a", "b"]] * 4), "must be numbers"),
    ],
)
def test_labels_refused(y, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxRegression().fit(np.eye(4), y)


def test_weights_refused():
    with pytest.raises(ValueError, match="sample_weight is -1 at row 2"):
        SoftmaxRegression().fit(np.eye(4), [0, 1, 0, 1], sample_weight=[1, 1, -1, 1])


def test_sparse_labels_refused():
    with pytest.raises(TypeError, match=r"toarray"):
        SoftmaxRegression().fit(np.eye(4), sparse.csr_matrix(np.eye(4)))


@pytest.mark.parametrize(
    "parameters", [{"C": 0}, {"C": -1.0}, {"tol": -1.0}, {"max_iter": -1}, {"solver": "sag"}]
)
def test_parameters_refused(parameters):
    with pytest.raises(ValueError, match=next(iter(parameters))):
        SoftmaxRegression(**parameters).fit(np.eye(4), [0, 1, 0, 1])


def test_it_is_a_name_of_the_package():
    assert xent.SoftmaxRegression is SoftmaxRegression


def test_masses_of_any_size_have_a_score():
    X, y = load_iris(return_X_y=True)
    model = SoftmaxRegression().fit(X, y)
    T = np.eye(3)[y]
    assert model.score(X, T * 1e308) == pytest.approx(model.score(X, T), rel=1e-12)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_raw_features_of_any_scale(classes, dtype):
    """Columns of deviation 1e-18 to 1e18: what all classes have in common is divided by no ridge of 1e-38."""
    rng = np.random.default_rng(1)
    X, y = rng.normal(size=(200, 6)), np.arange(200) % classes
    scales = np.array([1e-18, 1e-6, 1, 1e6, 1e12, 1e18])
    model = SoftmaxRegression(tol=1e-6).fit((X * scales).astype(dtype), y)
    right = SoftmaxRegression(tol=1e-9).fit(X * scales.clip(1e-6, 1e6), y)
    assert model.converged_
    assert model.loss_curve_[-1] == pytest.approx(right.loss_curve_[-1], rel=2e-6)
    np.testing.assert_allclose(
        model.predict_proba((X * scales).astype(dtype)),
        right.predict_proba(X * scales.clip(1e-6, 1e6)),
        atol=1e-3,
    )
