"""Comparison with scikit-learn: equal results on valid input, and its own tests run on xent's functions.

What differs stands in DIFFERENT, with the reason; the words of an error always do.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import sklearn.metrics as theirs
import sklearn.metrics.tests.test_classification as their_tests
import torch
from hypothesis import given
from hypothesis import strategies as st

from predictions import problem
from xent import metrics as ours

WORDS = np.array(["ant", "bee", "cow", "dog", "elk"])
KINDS = {
    "integers": lambda y: y,
    "from −3": lambda y: y - 3,
    "floats": lambda y: y * 2.0,
    "strings": lambda y: WORDS[y],
    "objects": lambda y: WORDS[y].astype(object),
    "list": lambda y: WORDS[y].tolist(),
    "a column": lambda y: y[:, None],
}
PAIRS = {
    "log_loss": (theirs.log_loss, ours.log_loss),
    "log_loss, sum": (
        lambda *a, **k: theirs.log_loss(*a, normalize=False, **k),
        lambda *a, **k: ours.log_loss(*a, normalize=False, **k),
    ),
    "brier": (theirs.brier_score_loss, ours.brier_score),
    "brier, halved": (
        lambda *a, **k: theirs.brier_score_loss(*a, scale_by_half=True, **k),
        lambda *a, **k: ours.brier_score(*a, scale_by_half=True, **k),
    ),
    "d2_log_loss": (theirs.d2_log_loss_score, ours.d2_log_loss),
}
seeds = st.integers(0, 1 << 30)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PAIRS)
@given(c=st.integers(2, 5), seed=seeds, weighted=st.booleans(), labels=st.booleans(), torch_too=st.booleans())
def test_equal_on_valid_input(name, kind, c, seed, weighted, labels, torch_too):
    y, p = problem(15, c, seed)
    named = KINDS[kind](y)
    options = {}
    if weighted:
        options["sample_weight"] = np.random.default_rng(seed).random(len(y)) + 0.01
    if labels:  # and then not all of them need occur
        options["labels"] = np.unique(named)
        named, p = named[2:], p[2:]
        options.update({"sample_weight": options["sample_weight"][2:]} if weighted else {})
    their_metric, our_metric = PAIRS[name]
    expected = their_metric(named, p, **options)
    assert our_metric(named, torch.from_numpy(p) if torch_too else p, **options) == pytest.approx(
        expected, rel=1e-12, abs=1e-13
    )


@pytest.mark.parametrize("name", PAIRS)
@given(seed=seeds, column=st.booleans(), weighted=st.booleans())
def test_equal_on_one_column(name, seed, column, weighted):
    y, p = problem(15, 2, seed)
    p = p[:, 1:] if column else p[:, 1]
    options = {"sample_weight": np.random.default_rng(seed).random(15)} if weighted else {}
    their_metric, our_metric = PAIRS[name]
    expected = their_metric(y, p, **options)
    assert our_metric(y, p, **options) == pytest.approx(expected, rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("name", PAIRS)
@given(c=st.integers(3, 5), seed=seeds)
def test_equal_on_one_hot_rows(name, c, seed):
    y, p = problem(15, c, seed)
    their_metric, our_metric = PAIRS[name]
    expected = their_metric(np.eye(c, dtype=int)[y], p)
    assert our_metric(np.eye(c, dtype=int)[y], p) == pytest.approx(expected, rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("pos_label", ["ham", "spam"])
@given(seed=seeds)
def test_equal_on_a_positive_label(pos_label, seed):
    y, p = problem(15, 2, seed)
    named = np.array(["ham", "spam"])[y]
    expected = theirs.brier_score_loss(named, p[:, 1], pos_label=pos_label)
    assert ours.brier_score(named, p[:, 1], pos_label=pos_label) == pytest.approx(expected, rel=1e-12)


# --- scikit-learn's own tests -------------------------------------------------------------------------

CLIPPED = "a true label of probability 0 costs inf: a clipped loss depends on the type, and hides the mistake"
REFUSED = "rows that do not sum to 1 are an error: what is computed from them is no log loss"
ORDER = "columns follow `labels` in the order given, so there is nothing to warn of"
RENAMED = "the second argument has kept its name, y_pred, which scikit-learn 1.9 is replacing"
UNDEFINED = "a single label without `labels` is an error, whatever the number of rows; with them D² is nan"

DIFFERENT = {  # test -> (what comes of it here, reason)
    "test_log_loss_eps": (AssertionError, CLIPPED),
    "test_log_loss_not_probabilities_warning": ("ValueError for the warning", REFUSED),
    "test_log_loss_warnings": ("no warning", ORDER),
    "test_brier_score_loss_warnings": ("no warning", ORDER),
    "test_log_loss_y_pred_deprecation": (TypeError, RENAMED),
    "test_d2_log_loss_score_y_pred_deprecation": (TypeError, RENAMED),
    "test_d2_log_loss_score_raises": ("ValueError for the warning", UNDEFINED),
}


def own_tests():
    """Every test of scikit-learn for these metrics, with its parameters."""
    for name in sorted(vars(their_tests)):
        if name.startswith(("test_log_loss", "test_brier_score_loss", "test_d2_log_loss_score")):
            test = getattr(their_tests, name)
            tables = [mark.args for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
            assert len(tables) <= 1, "several parametrize marks: their product is to be formed here"
            for names, rows in tables or [("", [()])]:
                keys = [key.strip() for key in names.split(",") if key.strip()]
                for n, row in enumerate(rows):
                    values = dict(zip(keys, row if len(keys) > 1 else (row,), strict=False))
                    yield pytest.param(test, values, id=f"{name}-{n}" if keys else name)


@contextmanager
def silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Pytest:
    """pytest as scikit-learn's tests see it here: errors in whatever words, warnings as DIFFERENT says."""

    def __init__(self, warning):
        self.warning = warning

    def __getattr__(self, name):
        return getattr(pytest, name)

    def raises(self, error, match=None):
        return pytest.raises(error)

    def warns(self, category, match=None):
        if self.warning == "ValueError for the warning":
            return pytest.raises(ValueError)
        if self.warning == "no warning":
            return silence()
        return nullcontext()  # the error that the test as a whole ends in


@pytest.mark.parametrize(("test", "values"), list(own_tests()))
def test_their_own(test, values, monkeypatch):
    def renamed(metric):  # y_proba is their new name for y_pred
        return lambda y_true, y_proba, **options: metric(y_true, y_proba, **options)

    outcome, _ = DIFFERENT.get(test.__name__, (None, None))
    monkeypatch.setattr(their_tests, "log_loss", renamed(ours.log_loss))
    monkeypatch.setattr(their_tests, "brier_score_loss", renamed(ours.brier_score))
    monkeypatch.setattr(their_tests, "d2_log_loss_score", renamed(ours.d2_log_loss))
    monkeypatch.setattr(their_tests, "pytest", Pytest(outcome))
    if isinstance(outcome, type):
        with pytest.raises(outcome):
            test(**values)
    else:
        test(**values)


def test_no_difference_is_out_of_date():
    assert set(DIFFERENT) <= set(vars(their_tests))
