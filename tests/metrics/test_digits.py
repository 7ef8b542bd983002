"""The tolerance of a row's sum follows its digits: computed, converted and rounded rows are accepted."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.naive_bayes import GaussianNB

from predictions import problem
from xent import metrics

OF_PREDICTIONS = {
    name: metric
    for name, metric in vars(metrics).items()
    if inspect.isfunction(metric) and "y_pred" in inspect.signature(metric).parameters
}


def off(by, classes=2, dtype="float64"):
    """Labels, and rows whose sums are 1 but for the last, which is off by a number."""
    p = torch.full((7, classes), 1 / classes, dtype=torch.float64)
    p[-1] *= 1 + by
    return np.arange(7) % classes, p.to(getattr(torch, dtype))


def numbers(found):
    """Return a metric's result as one array."""
    return np.concatenate([np.ravel(each) for each in found]) if isinstance(found, tuple) else np.ravel(found)


def test_every_metric_of_predictions_may_renormalize():
    assert set(OF_PREDICTIONS) == set(metrics.__all__) - {"ClassLoss", "label_entropy"}
    for metric in OF_PREDICTIONS.values():
        *_, last = inspect.signature(metric).parameters.values()
        assert (last.name, last.default, last.kind) == ("renormalize", False, last.KEYWORD_ONLY)


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_float32_read_as_float64_counts(classes):
    rng = np.random.default_rng(0)
    z = torch.from_numpy(rng.normal(size=(500, classes)).astype(np.float32) * 3)
    p = z.softmax(1).double().numpy()
    assert np.abs(p.sum(1) - 1).max() > 1.5e-8
    y = rng.integers(classes, size=500)
    labels = range(classes)
    right = -np.log(p[np.arange(500), y]).mean()
    assert metrics.log_loss(y, p, labels=labels) == pytest.approx(right, rel=1e-14)
    assert metrics.log_loss(y, p.tolist(), labels=labels) == metrics.log_loss(y, p, labels=labels)


def test_a_calibrated_classifier_counts():
    X, y = load_digits(return_X_y=True)
    p = CalibratedClassifierCV(GaussianNB(), method="isotonic", cv=2).fit(X, y).predict_proba(X)
    for rows in (p, p.astype(np.float32).astype(np.float64), pd.DataFrame(p)):
        assert math.isfinite(metrics.brier_score(y, rows))


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
@pytest.mark.parametrize("name", OF_PREDICTIONS)
def test_rows_of_six_places_count_as_they_are(name, classes):
    y, p = problem(max(40, classes), classes)
    p = p.round(6)
    assert classes == 2 or np.abs(p.sum(1) - 1).max() > 1e-7
    exact = -np.log(p[np.arange(len(y)), y])
    found = OF_PREDICTIONS[name](y, p)
    if name == "log_loss":
        assert found == pytest.approx(exact.mean(), rel=1e-14)
    if name == "log_loss_per_sample":
        np.testing.assert_allclose(found, exact, rtol=1e-14)


def test_six_places_at_their_worst_count():
    """Off by half a unit of the sixth place in every column; in binary by a little more."""
    metrics.log_loss([0, 1], [[0.3333333, 0.6666666], [0.333333, 0.666666]])
    metrics.log_loss([0, 1, 2], [[0.333333] * 3] * 3)
    for classes in (2, 3, 7, 1000):
        for sign in (1, -1):
            y, p = off(sign * max(1e-6, classes * 5e-7), classes)
            metrics.log_loss(y, p, labels=range(classes))


RANGES = [  # up to the first as it is, up to the second divided, beyond it never
    ("float64", 2, 1e-6, 1e-3),
    ("float64", 20, 1e-5, 1e-3),
    ("float64", 1000, 5e-4, 1e-3),
    ("float64", 4000, 2e-3, 2e-3),
    ("float32", 2, 2**-11.5, 1e-3),
    ("float32", 1000, 5e-4, 1e-3),
    ("float16", 2, 2**-5, 2**-5),
    ("bfloat16", 2, 2**-3.5, 2**-3.5),
]


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("dtype", "classes", "exact", "nearly"), RANGES)
@pytest.mark.parametrize("name", OF_PREDICTIONS)
def test_the_three_ranges(name, dtype, classes, exact, nearly, sign):
    def found(by, **options):
        return numbers(OF_PREDICTIONS[name](*off(by, classes, dtype), labels=range(classes), **options))

    y, p = off(0.9 * sign * exact, classes, dtype)
    if name == "log_loss_per_sample":
        assert found(0.9 * sign * exact)[-1] == -p[-1, y[-1]].double().log().item()
    found(0.9 * sign * exact)

    within = 0.9 * sign * nearly
    y, p = off(within, classes, dtype)
    divided = OF_PREDICTIONS[name](y, p.double() / p.double().sum(1, keepdim=True), labels=range(classes))
    np.testing.assert_allclose(found(within, renormalize=True), numbers(divided), rtol=1e-13)
    if nearly > exact:
        with pytest.raises(ValueError, match=r"y_pred sums to \S+ at row 6, .* pass renormalize=True"):
            found(1.1 * sign * exact)

    for renormalize in (False, True):
        with pytest.raises(ValueError, match=r"y_pred sums to \S+ at row 6, .* at most") as refused:
            found(1.2 * sign * nearly, renormalize=renormalize)
        assert "renormalize" not in str(refused.value)


def test_a_sum_is_judged_alike_in_every_part(monkeypatch):
    """Rows of float32 a few digits from the bound: the sum in float32 depends on how many rows there are."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(300), 64)
    p *= 1 + 2**-11.5 * np.linspace(0.999, 1.001, 64)[:, None]
    p = torch.from_numpy(p.astype(np.float32))

    def refused(rows, **options):
        try:
            metrics.log_loss([0], rows, labels=range(300), **options)
        except ValueError as error:
            return "row 0" in str(error)
        return False

    alone = [refused(p[n : n + 1]) for n in range(64)]
    assert any(alone)
    assert not all(alone)
    first = alone.index(True)
    for rows in (1, 3, 64):
        monkeypatch.setattr("xent.metrics._arrays.ROWS", rows)
        with pytest.raises(ValueError, match=f"at row {first},"):
            metrics.log_loss([0] * 64, p, labels=range(300))
        metrics.log_loss([0] * first, p[:first], labels=range(300))


def test_one_column_has_no_sum():
    y, p = [0, 1, 1], [0.3, 0.6, 0.999]
    assert metrics.log_loss(y, p, renormalize=True) == metrics.log_loss(y, p)


def test_a_row_of_zeros_is_never_a_distribution():
    p = torch.zeros(1, 2_100_000)
    for renormalize in (False, True):
        with pytest.raises(ValueError, match="y_pred sums to 0 at row 0"):
            metrics.log_loss([0], p, labels=range(2_100_000), renormalize=renormalize)


def test_renormalizing_leaves_the_callers_array_alone():
    y, p = off(5e-4)
    before = p.clone()
    metrics.brier_score(y, p, renormalize=True)
    metrics.log_loss(y, p.numpy(), renormalize=True)
    assert torch.equal(p, before)
