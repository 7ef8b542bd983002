"""Suspects of a wrong label, beside cleanlab's on the same predictions."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from cleanlab.count import num_label_issues
from cleanlab.filter import find_label_issues
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import xent


def flipped(seed):
    """Return out-of-fold predictions of the digits, their labels with 5 % flipped, and which are."""
    X, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    odd = np.zeros(len(y), bool)
    odd[rng.permutation(len(y))[: round(0.05 * len(y))]] = True
    y = np.where(odd, (y + rng.integers(1, 10, len(y))) % 10, y)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    return cross_val_predict(model, X, y, cv=5, method="predict_proba"), y, odd


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_precision_and_recall_are_at_least_those_of_cleanlab(seed):
    p, y, odd = flipped(seed)
    result = xent.audit(p, target=y)
    listed = np.array([row.row - 1 for row in result.suspect_rows])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = find_label_issues(y, p)
        assert result.suspects == pytest.approx(num_label_issues(y, p), abs=2)
    precision, recall = odd[listed].mean(), odd[listed].sum() / odd.sum()
    assert precision >= odd[theirs].mean()
    assert recall >= theirs[odd].mean()
    assert result.suspects_low <= result.suspects <= result.suspects_high
    # the label to expect is the right one in most
    _, true = load_digits(return_X_y=True)
    right = [row.prediction == str(true[row.row - 1]) for row in result.suspect_rows if odd[row.row - 1]]
    assert np.mean(right) > 0.85


def test_clean_labels_of_a_sure_model_are_no_suspects():
    p = np.full((300, 3), 0.01)
    y = np.arange(300) % 3
    p[np.arange(300), y] = 0.98
    result = xent.audit(p, target=y)
    assert result.suspects == 0
    assert not result.suspect_rows
    assert "no label looks wrong" in str(result).lower()


@pytest.mark.parametrize("classes", [3, 8, 300])
def test_the_number_is_that_of_the_definition(classes):
    """Rows of few values, so that many are equal, and whose likeliest class is often below its threshold."""
    rng = np.random.default_rng(classes)
    p = rng.choice([1.0, 2.0, 2.0, 5.0], size=(600, classes)) * np.linspace(0.5, 2, classes)
    p[:200] = rng.choice([1.0, 2.0], size=(200, classes))
    y = rng.integers(0, classes, 600)
    y[:classes] = np.arange(classes)
    p[y == 0, 0] *= 50 * classes  # a class with a high threshold
    p[y != 0, 0] = p[y != 0, 1:].max(1) + rng.choice([0.0, 1.0], size=(y != 0).sum())
    p[:100, 0] = np.where(y[:100] == 0, p[:100, 0], 0.01)  # rows whose likeliest classes are equal and sure
    p /= p.sum(1, keepdims=True)
    threshold = np.array([p[y == c, c].mean() for c in range(classes)])
    sure = np.where(p >= threshold, p, 0.0)
    own = sure[np.arange(600), y]
    sure[np.arange(600), y] = 0
    expected = int((sure.max(1) > own).sum())
    likely = p.argmax(1)
    undecided = p.max(1) < threshold[likely]
    assert undecided.sum() > 20
    assert (sure.max(1)[undecided] > own[undecided]).any()
    assert 0 < expected < 600
    assert xent.audit(p, target=y).suspects == expected
    assert xent.audit(logits=np.log(p), target=y).suspects == pytest.approx(expected, abs=3)
