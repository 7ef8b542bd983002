"""Against 50-digit arithmetic, whatever type the probabilities are stored in."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch

from predictions import problem
from xent import metrics

INF = math.inf


def exactly(y, p, s):
    """log loss, Brier score (unhalved) and label entropy in 50 digits; p as it is stored."""
    with mpmath.workdps(50):
        exact = [[mpmath.mpf(float(v)) for v in row] for row in p]
        s = [mpmath.mpf(float(v)) for v in s]
        mass = mpmath.fsum(s)
        loss = -mpmath.fsum(w * mpmath.log(row[c]) for w, row, c in zip(s, exact, y, strict=True)) / mass
        brier = mpmath.fsum(
            w * mpmath.fsum((v - (k == c)) ** 2 for k, v in enumerate(row))
            for w, row, c in zip(s, exact, y, strict=True)
        )
        f = [mpmath.fsum(w for w, c in zip(s, y, strict=True) if c == k) / mass for k in sorted(set(y))]
        return float(loss), float(brier / mass), float(-mpmath.fsum(v * mpmath.log(v) for v in f))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_against_fifty_digits(dtype):
    y, p = problem(300, 5, dtype=dtype)
    s = np.random.default_rng(2).random(300)
    loss, brier, entropy = exactly(y.tolist(), p, s)
    assert metrics.log_loss(y, p, sample_weight=s) == pytest.approx(loss, rel=1e-15)
    assert metrics.brier_score(y, p, sample_weight=s) == pytest.approx(brier, rel=1e-15)
    assert metrics.label_entropy(y, sample_weight=s) == pytest.approx(entropy, rel=1e-15)
    assert metrics.d2_log_loss(y, p, sample_weight=s) == pytest.approx(1 - loss / entropy, rel=1e-14)


def test_good_rows_keep_their_digits():
    """Small probabilities of the wrong label, given as one column or as two."""
    small = 1e-20
    assert metrics.log_loss([0, 0], [small] * 2, labels=[0, 1]) == pytest.approx(small, rel=1e-15, abs=0)
    assert metrics.brier_score([0, 0], [small] * 2) == pytest.approx(small**2, rel=1e-15, abs=0)
    p = [[1 - 2**-53, 2**-53]] * 2
    assert metrics.log_loss([0, 0], p, labels=[0, 1]) == pytest.approx(2.0**-53, rel=1e-15, abs=0)
    p = [[1.0, 1e-12, 1e-12]] * 2
    assert metrics.brier_score([0, 0], p, labels=[0, 1, 2]) == pytest.approx(2e-24, rel=1e-15, abs=0)


def test_rare_labels_keep_their_digits():
    n = 10**6
    y = np.zeros(n, dtype=int)
    y[17] = 1
    with mpmath.workdps(50):
        f = mpmath.mpf(1) / n
        expected = float(-f * mpmath.log(f) - (1 - f) * mpmath.log(1 - f))
    assert metrics.label_entropy(y) == pytest.approx(expected, rel=1e-15)


def test_float32_is_not_clipped_by_its_type():
    """scikit-learn clips float32 at 1.2e-7: 15.9 nats."""
    p = np.array([[1.0, 1e-30]], dtype=np.float32)
    assert metrics.log_loss([1], p, labels=[0, 1]) == pytest.approx(-math.log(float(p[0, 1])), rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_softmax_is_a_distribution_in_its_own_type(dtype):
    p = torch.randn(64, 1000, dtype=torch.float64).mul(3).softmax(1).to(dtype)
    p[p[:, 0] == 0, 0] = torch.finfo(dtype).smallest_normal  # float16 underflows
    y = torch.zeros(64, dtype=torch.int64)
    expected = -p[:, 0].double().log().mean().item()
    assert metrics.log_loss(y, p, labels=np.arange(1000)) == pytest.approx(expected, rel=1e-14)


def test_sums_do_not_drift():
    """10⁶ equal terms: a running float32 sum would be off by per cents, a running float64 one by 1e-11."""
    y = np.arange(10**6) % 2
    p = np.full(10**6, 0.1, dtype=np.float32)
    tenth = Fraction(float(p[0]))
    expected = -(math.log(tenth) + math.log(1 - tenth)) / 2
    assert metrics.log_loss(y, p) == pytest.approx(expected, rel=2e-15)
