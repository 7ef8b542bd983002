"""Calibration taken apart: published values, scikit-learn's isotonic regression, and merging."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import brier_score_loss, log_loss

from xent.auditing import scores
from xent.auditing.calibration import Reliability, pool


def of(p: np.ndarray, y: np.ndarray, weight: np.ndarray | None = None) -> Reliability:
    found = Reliability.empty()
    weight = np.ones(len(p)) if weight is None else weight
    values = {"confidence": p, "rest": 1 - p, "hit": y, "weight": weight}
    with np.errstate(divide="ignore"):
        values |= {"top_log": np.log(p), "rest_log": np.log(1 - p)}
    found.update(SimpleNamespace(**{name: torch.tensor(x) for name, x in values.items()}))
    return found


def test_the_published_value():
    p, y = np.array([0.1, 0.4, 0.6, 0.3, 0.7, 0.9]), np.array([0, 0, 0, 1, 1, 1])
    loss, brier = of(p, y).decomposition()
    np.testing.assert_allclose(
        [brier.score, brier.miscalibration, brier.discrimination, brier.uncertainty],
        [0.186667, 0.075556, 0.138889, 0.25],
        atol=5e-7,
    )
    np.testing.assert_allclose(
        [loss.score, loss.miscalibration, loss.discrimination, loss.uncertainty],
        [0.533081, 0.214824, 0.374890, 0.693147],
        atol=5e-7,
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kept", [True, False], ids=["scores", "cells"])
def test_it_is_that_of_isotonic_regression(monkeypatch, weighted, kept):
    monkeypatch.setattr(scores, "MOST", scores.MOST if kept else 0)
    near = 1e-12 if kept else 1e-4
    rng = np.random.default_rng(0)
    p = rng.beta(0.3, 0.5, 20_000)
    p = np.clip(p, 1e-12, 1 - 1e-12)
    y = (rng.random(20_000) < p**1.7).astype(int)
    weight = rng.uniform(0.5, 2, 20_000) if weighted else np.ones(20_000)
    best = IsotonicRegression(y_min=0, y_max=1).fit_transform(p, y, sample_weight=weight)
    loss, brier = of(p, y, weight).decomposition()
    np.testing.assert_allclose(loss.score, log_loss(y, p, sample_weight=weight), rtol=1e-10)
    np.testing.assert_allclose(brier.score, brier_score_loss(y, p, sample_weight=weight), rtol=1e-10)
    of_best = np.average(-np.log(np.where(y == 1, best, 1 - best)), weights=weight)
    assert abs((loss.score - loss.miscalibration) - of_best) < near
    assert abs((brier.score - brier.miscalibration) - brier_score_loss(y, best, sample_weight=weight)) < near
    for part in (loss, brier):
        assert part.miscalibration >= 0
        assert part.discrimination >= 0
        assert part.score == pytest.approx(part.miscalibration - part.discrimination + part.uncertainty)


def test_parts_add_up():
    rng = np.random.default_rng(1)
    p, y, weight = rng.random(3000), rng.integers(0, 2, 3000), rng.random(3000)
    whole, parts = of(p, y, weight), Reliability.empty()
    for part in np.array_split(rng.permutation(3000), 7):
        parts.merge(of(p[part], y[part], weight[part]))
    for one, other in zip(whole.decomposition(), parts.decomposition(), strict=True):
        np.testing.assert_allclose(one.score, other.score, rtol=1e-12)
        np.testing.assert_allclose(one.miscalibration, other.miscalibration, rtol=1e-10)
    np.testing.assert_allclose(whole.error(), parts.error(), rtol=1e-12)


def test_what_is_sure_and_right_costs_nothing():
    loss, brier = of(np.array([0.0, 1.0, 1.0]), np.array([0, 1, 1])).decomposition()
    assert loss.score == brier.score == loss.miscalibration == 0
    assert loss.discrimination == pytest.approx(loss.uncertainty)
    wrong, _ = of(np.array([0.0, 1.0]), np.array([1, 1])).decomposition()
    assert wrong.score == np.inf


def test_rows_of_weight_0_do_not_count():
    found = of(np.array([0.0, 0.3]), np.array([1, 0]), np.array([0.0, 1.0]))
    assert found.log_loss == pytest.approx(-np.log(0.7))


def test_error_of_equal_mass():
    """Confidence 0.8 and a rate of 0.6 in every bin: 0.2."""
    p, y = np.full(1500, 0.8), np.tile([1, 1, 1, 0, 0], 300)
    assert of(p, y).error() == pytest.approx(0.2)
    assert of(np.full(10, 0.6), np.tile([1, 1, 1, 0, 0], 2)).error() == pytest.approx(0.0, abs=1e-12)


def test_pools_rise():
    rng = np.random.default_rng(2)
    weight = rng.random(500) + 0.1
    hits = weight * rng.random(500)
    pooled, rate = pool(weight, hits)
    assert (np.diff(rate) > 0).all()
    assert pooled.sum() == pytest.approx(weight.sum())
    best = IsotonicRegression().fit_transform(np.arange(500), hits / weight, sample_weight=weight)
    np.testing.assert_allclose(np.unique(best), rate, rtol=1e-9)
