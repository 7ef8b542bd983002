"""The items of several jobs, one job after the other, while threads work ahead on the next ones.

    made_ahead([a, b, c], threads=2)  yields  a's items, b's items, c's items

Of each job at most a given number of items is made before they are taken; so memory stays bounded.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

_END = object()


def made_ahead(jobs: Sequence[Callable[[], Iterable[T]]], threads: int, most: int = 2) -> Iterator[T]:
    """Yield the items of some jobs in order; an error of a job is raised after its last item.

    Args:
        jobs: each returns its items.
        threads: jobs that run at the same time; where it is one, each is run as its items are taken.
        most: items of a job that are made before they are taken.

    >>> list(made_ahead([lambda: "ab", lambda: "c"], threads=2))
    ['a', 'b', 'c']
    """
    if threads < 2:
        for job in jobs:
            yield from job()
        return
    lines: list[queue.Queue[Any]] = [queue.Queue(most) for _ in jobs]
    stopped = threading.Event()

    def work(job: Callable[[], Iterable[T]], line: queue.Queue[Any]) -> None:
        last: object = _END
        try:
            for item in job():
                line.put((item, None))
                if stopped.is_set():
                    return
        except BaseException as error:  # raised where the items are taken
            last = error
        line.put((_END, last))

    pool = ThreadPoolExecutor(threads)
    try:
        # a job that has not begun holds no items, so those before it are never waited for in vain
        for job, line in zip(jobs, lines, strict=True):
            pool.submit(work, job, line)
        for line in lines:
            while (taken := line.get())[0] is not _END:
                yield taken[0]
                del taken
            if isinstance(taken[1], BaseException):
                raise taken[1]
    finally:
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for line in lines:  # who waits to put an item goes on, and stops
            while not line.empty():
                line.get_nowait()
        pool.shutdown()
