"""While a fit runs, NumPy's BLAS has one thread and torch all of its own; afterwards both are as before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

import xent
from xent.linear_model import descent


def blas_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(("small", "of_torch"), [(1, 2), (1 << 40, 1)], ids=["large", "small"])
def test_threads_during_a_fit(small, of_torch, monkeypatch):
    monkeypatch.setattr(descent, "SMALL", small)
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(50, 4)), np.arange(50) % 3
    seen = []

    def look(now):
        seen.append((blas_threads(), torch.get_num_threads()))

    with threadpool_limits(2):
        xent.SoftmaxRegression(max_iter=2, tol=0.0).fit(X, y, callback=look)
        assert blas_threads() == {2}
        assert torch.get_num_threads() == 2
    assert seen == [({1}, of_torch)] * len(seen) != []
