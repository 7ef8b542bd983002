"""Worked values, inputs that broke other libraries, laws, and what a call costs."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import xent
from predictions import problem
from xent import metrics

INF = math.inf


# --- worked values --------------------------------------------------------------


def test_worked_values():
    each = metrics.log_loss_per_sample([1, 0], [0.7, 0.2])
    assert each == pytest.approx([0.356675, 0.223144], abs=5e-7)
    assert metrics.log_loss([1, 0], [0.7, 0.2]) == pytest.approx(0.2899092476264711, rel=1e-15)
    labels = [0, 1, 2]
    assert metrics.log_loss([1], [[0.4, 0.4, 0.2]], labels=labels) == pytest.approx(
        0.916290731874155, rel=1e-15
    )
    assert metrics.log_loss([2], [[0.1, 0.12, 0.78]], labels=labels) == pytest.approx(0.2484613593, abs=5e-11)


def test_spam_and_ham():
    y_pred = [[0.1, 0.9], [0.9, 0.1], [0.8, 0.2], [0.35, 0.65]]
    assert metrics.log_loss(["spam", "ham", "ham", "spam"], y_pred) == pytest.approx(0.21616187468, abs=5e-12)


def test_six_white_balls_of_ten():
    """The entropy is the log loss of the best constant; the loss of another one exceeds it by KL."""
    y = ["white"] * 6 + ["black"] * 4
    entropy = metrics.label_entropy(y)
    assert entropy == pytest.approx(0.673012, abs=5e-7)
    assert metrics.log_loss(y, [0.6] * 10) == pytest.approx(entropy, rel=1e-15)
    assert metrics.log_loss(y, [0.5] * 10) - entropy == pytest.approx(0.020136, abs=5e-7)
    assert entropy / math.log(2) == pytest.approx(0.970951, abs=5e-7)


def test_the_same_as_cross_entropy_of_the_logarithms():
    y, p = problem()
    loss = xent.cross_entropy(torch.from_numpy(p).log(), torch.from_numpy(y))
    assert metrics.log_loss(y, p) == pytest.approx(loss.item(), rel=1e-14)


# --- inputs that broke other libraries ------------------------------------------------------------------


@pytest.mark.parametrize("label", [0, 1, 2])
def test_log_loss_one_label(label):
    p = [[0.7, 0.2, 0.1]] * 2
    expected = -math.log(p[0][label])
    assert metrics.log_loss([label] * 2, p, labels=[0, 1, 2]) == pytest.approx(expected, rel=1e-15)
    if label < 2:
        expected = -math.log([0.7, 0.3][label])
        assert metrics.log_loss([label] * 2, [0.3, 0.3], labels=[0, 1]) == pytest.approx(expected, rel=1e-15)


def test_log_loss_unsorted_labels():
    """Columns follow `labels`, in silence."""
    y, p = ["a", "b", "c"], np.array([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3], [0.8, 0.1, 0.1]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = metrics.log_loss(y, p, labels=["c", "a", "b"])
        score = metrics.brier_score(y, p, labels=["c", "a", "b"])
        explained = metrics.d2_log_loss(y, p, labels=["c", "a", "b"])
    ordered = p[:, [1, 2, 0]]
    assert loss == metrics.log_loss(y, ordered)
    assert score == pytest.approx(metrics.brier_score(y, ordered), rel=1e-15)
    assert explained == pytest.approx(metrics.d2_log_loss(y, ordered), rel=1e-15)
    assert metrics.log_loss(["b", "a"], [0.9, 0.2], labels=["b", "a"]) == metrics.log_loss([0, 1], [0.9, 0.2])


def test_log_loss_not_normalised():
    with pytest.raises(ValueError, match=r"y_pred sums to 0\.5 at row 1"):
        metrics.log_loss([0, 1], [[0.5, 0.5], [0.25, 0.25]])


# --- laws -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("weighted", [False, True])
def test_samples_and_classes_add_up(weighted):
    y, p = problem()
    s = np.random.default_rng(1).random(len(y)) if weighted else np.ones(len(y))
    options = {"sample_weight": s} if weighted else {}
    loss = metrics.log_loss(y, p, **options)
    each = metrics.log_loss_per_sample(y, p)
    assert each == pytest.approx(-np.log(p[np.arange(len(y)), y]), rel=1e-15)
    assert loss == pytest.approx((s * each).sum() / s.sum(), rel=1e-14)
    assert metrics.log_loss(y, p, normalize=False, **options) == pytest.approx((s * each).sum(), rel=1e-14)
    labels, losses, weight = metrics.log_loss_per_class(y, p, **options)
    assert labels.tolist() == [0, 1, 2, 3]
    for c in range(4):
        assert losses[c] == pytest.approx(np.average(each[y == c], weights=s[y == c]), rel=1e-14)
        assert weight[c] == pytest.approx(s[y == c].sum(), rel=1e-14)
    assert loss == pytest.approx((losses * weight).sum() / weight.sum(), rel=1e-14)
    f = weight / weight.sum()
    entropy = metrics.label_entropy(y, **options)
    assert entropy == pytest.approx(-(f * np.log(f)).sum(), rel=1e-14)
    assert metrics.d2_log_loss(y, p, **options) == pytest.approx(1 - loss / entropy, rel=1e-13)
    squares = ((p - np.eye(4)[y]) ** 2).sum(1)
    assert metrics.brier_score(y, p, **options) == pytest.approx((s * squares).sum() / s.sum(), rel=1e-14)


@given(st.integers(2, 5), st.integers(0, 1 << 30))
def test_whole_weights_repeat_rows(c, seed):
    y, p = problem(12, c, seed)
    s = np.random.default_rng(seed).integers(0, 4, size=len(y))
    s[0] += 1
    labels = list(range(c))
    again = np.repeat(np.arange(len(y)), s)
    for metric in (metrics.log_loss, metrics.brier_score, metrics.d2_log_loss):
        weighted = metric(y, p, sample_weight=s, labels=labels)
        repeated = metric(y[again], p[again], labels=labels)
        assert weighted == pytest.approx(repeated, rel=1e-12, abs=1e-14, nan_ok=True)
    assert metrics.label_entropy(y, sample_weight=s) == pytest.approx(
        metrics.label_entropy(y[again]), abs=1e-14
    )


def test_the_best_constant_explains_nothing():
    y, _ = problem()
    frequencies = np.bincount(y) / len(y)
    constant = np.tile(frequencies, (len(y), 1))
    assert metrics.log_loss(y, constant) == pytest.approx(metrics.label_entropy(y), rel=1e-14)
    assert metrics.d2_log_loss(y, constant) == pytest.approx(0, abs=1e-15)


def test_a_row_without_weight_costs_nothing_even_where_it_is_infinite():
    y, p = [0, 1, 0], [[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]]
    assert metrics.log_loss(y, p, sample_weight=[1, 0, 1]) == pytest.approx(math.log(2) / 2, rel=1e-15)
    assert metrics.log_loss(y, p) == INF
    assert metrics.log_loss_per_sample(y, p).tolist() == [0.0, INF, math.log(2)]
    each = metrics.log_loss_per_class(y, p, sample_weight=[1, 0, 1])
    assert each.weight.tolist() == [2, 0]
    assert math.isnan(each.loss[1])


def test_a_certain_row_costs_nothing():
    """0, not −0."""
    for y, p in (([0, 1], [[1, 0], [0, 1]]), ([0, 1], [0.0, 1.0])):
        assert str(metrics.log_loss(y, p)) == "0.0"
        assert [str(v) for v in metrics.log_loss_per_sample(y, p)] == ["0.0", "0.0"]
        assert str(metrics.brier_score(y, p)) == "0.0"
    assert str(metrics.label_entropy([7, 7])) == "0.0"


def test_nothing_to_explain():
    assert math.isnan(metrics.d2_log_loss([1, 1], [0.9, 0.8], labels=[0, 1]))
    assert math.isnan(metrics.d2_log_loss([1], [0.9], labels=[0, 1]))
    assert metrics.d2_log_loss([1, 0], [0.0, 0.5]) == -INF
    assert metrics.d2_log_loss([1, 0], [1.0, 0.0]) == 1.0


# --- what it costs --------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("n", "c"), [(10**6, 10), (50_000, 1000)])
def test_memory_beyond_the_inputs(n, c):
    """32 MiB at most, where scikit-learn's log_loss takes five times the probabilities."""
    code = f"""
import resource
import numpy as np
from xent import metrics
def now(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
metrics.log_loss(np.arange(70000) % 3, np.full((70000, 3), 1 / 3))
y, p = np.arange({n}) % {c}, np.full(({n}, {c}), 1 / {c})
shifted = y + 1
before = max(now(), peak())
metrics.log_loss(y, p, sample_weight=p[:, 0])
metrics.brier_score(y, p)
metrics.log_loss_per_class(shifted, p)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 32 << 20
