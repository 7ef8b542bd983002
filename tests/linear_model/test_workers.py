"""Worker threads: the same sums for any number of them, one thread each, and every setting restored."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

import xent
from xent.linear_model import workers as module
from xent.linear_model.workers import Workers, workers

BIG = (1 << 10, 1 << 10, 1 << 6)


def blas_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("small", [1, 1 << 40], ids=["large", "small"])
def test_threads_during_a_fit(small, monkeypatch):
    monkeypatch.setattr(module, "SMALL", small)
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(50, 4)), np.arange(50) % 3
    seen = []

    def look(now):
        seen.append((blas_threads(), torch.get_num_threads()))

    with threadpool_limits(2):
        xent.SoftmaxRegression(max_iter=2, tol=0.0).fit(X, y, callback=look)
        assert blas_threads() == {2}
        assert torch.get_num_threads() == 2
    assert seen == [({1}, 1)] * len(seen) != []


@pytest.mark.parametrize(
    ("shape", "options", "count", "torchs"),
    [
        (BIG, {}, 3, 1),
        ((10, 10, 10), {}, 1, 1),
        (BIG, {"class_parallel": True}, 1, 3),
        ((1 << 5, 1 << 8, module.WIDE), {}, 1, 3),
    ],
    ids=["rows", "small", "class-parallel", "many classes"],
)
def test_the_choice_goes_by_shape(shape, options, count, torchs):
    with threadpool_limits(3), workers(*shape, **options) as chosen:
        assert chosen.count == count
        assert chosen.why
        assert torch.get_num_threads() == torchs
        assert blas_threads() == {1}


def test_each_worker_computes_with_one_thread():
    meet = threading.Barrier(2, timeout=10)

    def look(_):
        meet.wait()
        return threading.get_ident(), torch.get_num_threads()

    with threadpool_limits(2), workers(*BIG) as chosen:
        found = list(chosen.map(look, range(2)))
        assert len({ident for ident, _ in found} - {threading.get_ident()}) == 2
        assert [threads for _, threads in found] == [1, 1]
        assert torch.get_num_threads() == 1
    assert list(chosen.map(str, range(3))) == ["0", "1", "2"]  # without a pool, in the calling thread


def test_results_come_in_the_order_of_the_items_and_few_are_taken_in_advance():
    taken, finished = [], []

    def items():
        for i in range(20):
            assert i - len(finished) <= 3
            taken.append(i)
            yield i

    with threadpool_limits(2), workers(*BIG) as chosen:
        for result in chosen.map(lambda i: i * i, items()):
            finished.append(result)
    assert finished == [i * i for i in range(20)]


def test_an_error_of_a_worker_is_raised_and_the_others_have_ended():
    running = []

    def work(i):
        if i == 1:
            raise ValueError("the second")
        running.append(i)

    with threadpool_limits(2), workers(*BIG) as chosen:
        with pytest.raises(ValueError, match="the second"):
            list(chosen.map(work, range(100)))
        before = len(running)
        assert list(chosen.map(abs, [-1])) == [1]
        assert len(running) == before < 100


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("n_rows", [1, 2, 7, 1000])
@pytest.mark.parametrize("work", [1, 5 * module.PART, 1 << 60])
def test_shares_are_all_rows_in_order(count, n_rows, work):
    shares = Workers(count).shares(n_rows, work)
    assert [i for share in shares for i in range(n_rows)[share]] == list(range(n_rows))
    assert len(shares) <= 4 * count
    assert len(shares) == min(n_rows, 1 if count == 1 else 4 * count if work == 1 << 60 else len(shares))


def test_a_fit_does_not_depend_on_timing(monkeypatch):
    monkeypatch.setattr(module, "SMALL", 1)
    monkeypatch.setattr(module, "PART", 1)
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 6)).astype(np.float32)
    y = rng.integers(5, size=300)
    with threadpool_limits(3):
        fits = [xent.SoftmaxRegression(max_iter=8, tol=0.2).fit(X, y).coef_ for _ in range(4)]
    assert all((fit == fits[0]).all() for fit in fits)
    torch.testing.assert_close(
        fits[0], xent.SoftmaxRegression(max_iter=8, tol=0.2).fit(X, y).coef_, rtol=1e-4, atol=1e-5
    )
