"""Values that the documentation of others prints."""

from __future__ import annotations

import pytest

import xent


def test_log_loss_of_scikit_learn():
    """The example of ``sklearn.metrics.log_loss``."""
    p = [[0.1, 0.9], [0.9, 0.1], [0.8, 0.2], [0.35, 0.65]]
    found = xent.audit(p, target=["spam", "ham", "ham", "spam"])
    assert found.log_loss == pytest.approx(0.21616187468057912)


def test_brier_of_scikit_learn():
    """The example of ``brier_score_loss``, 0.0375 of one class: ‖p − t‖² of both is twice that."""
    found = xent.audit([0.1, 0.9, 0.8, 0.3], target=[0, 1, 1, 0])
    assert found.brier == pytest.approx(2 * 0.0375)


def test_d2_of_scikit_learn():
    """The values that the user guide of ``d2_log_loss_score`` prints."""
    y = [1, 1, 2, 3]
    frequencies = [[0.5, 0.25, 0.25]] * 4
    assert xent.audit(frequencies, target=y, classes=[1, 2, 3]).d2 == pytest.approx(0.0, abs=1e-12)
    sure = [[0.98, 0.01, 0.01], [0.98, 0.01, 0.01], [0.01, 0.98, 0.01], [0.01, 0.01, 0.98]]
    assert round(xent.audit(sure, target=y, classes=[1, 2, 3]).d2, 3) == 0.981


def test_the_decomposition_of_a_binary_score():
    """A probability of the second class, taken apart (Dimitriadis, Gneiting and Jordan, 2021)."""
    p, y = [0.1, 0.4, 0.6, 0.3, 0.7, 0.9], [0, 0, 0, 1, 1, 1]
    for row in xent.audit(p, target=y).per_class:
        assert row.calibration == pytest.approx((0.533081, 0.214824, 0.374890, 0.693147), abs=5e-7)


def test_the_brier_score_is_the_sum_of_the_classes():
    """Of each class against the rest: they add up to the multiclass score, as log losses do not."""
    import numpy as np

    from xent.auditing.arrays import read
    from xent.auditing.sweeps import FirstSweep

    rng = np.random.default_rng(0)
    z = rng.standard_normal((500, 4))
    p, y = np.exp(z) / np.exp(z).sum(1, keepdims=True), rng.integers(0, 4, 500)
    sweep = FirstSweep(4)
    for batch in read(p, None, None, None, None, y, None, None, None, False).batches():
        sweep.update(batch)
    parts = [sweep.per_class.decomposition(c)[1].score for c in range(4)]
    assert sum(parts) == pytest.approx(sweep.totals.mean("brier"))
