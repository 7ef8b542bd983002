"""scikit-learn's own checks of an estimator, every one of them, with no expected failure."""

from __future__ import annotations

from sklearn.utils.estimator_checks import parametrize_with_checks

from xent.linear_model import SoftmaxRegression, SoftmaxRegressionCV


@parametrize_with_checks(
    [SoftmaxRegression(), SoftmaxRegression(solver="newton-cg"), SoftmaxRegressionCV(3, cv=2)]
)
def test_scikit_learn(estimator, check):
    check(estimator)
