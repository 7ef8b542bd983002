"""Jobs whose items are made ahead by threads: their order, their bound, their errors and their end."""

from __future__ import annotations

import threading
import time

import pytest

from xent._util.ahead import made_ahead


def counted(job, made, items=5):
    for i in range(items):
        made.append((job, i))
        yield job, i


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("jobs", [0, 1, 2, 7])
def test_items_come_in_order(threads, jobs):
    made = []
    all_of_them = [lambda job=job: counted(job, made) for job in range(jobs)]
    assert list(made_ahead(all_of_them, threads)) == [(job, i) for job in range(jobs) for i in range(5)]


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_is_made_than_the_bound(most):
    made = []
    items = made_ahead([lambda job=job: counted(job, made, 20) for job in range(4)], 2, most)
    for taken in range(1, 20):
        next(items)
        time.sleep(0.01)
        # of two jobs those that wait, and one that waits for its place; and the last ones of the job before
        assert len(made) <= taken + 2 * (most + 1) + most


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_comes_after_what_was_made_before_it(threads):
    def fails():
        yield "before"
        raise OSError("gone")

    items = made_ahead([lambda: ["first"], fails, lambda: ["never"]], threads)
    assert [next(items), next(items)] == ["first", "before"]
    with pytest.raises(OSError, match="gone"):
        next(items)


def test_who_takes_no_more_leaves_no_thread_behind():
    before = threading.active_count()
    items = made_ahead([lambda: iter(range(1000)) for _ in range(9)], 3)
    assert next(items) == 0
    assert threading.active_count() > before
    items.close()
    assert threading.active_count() == before
