"""Worker threads of a fit: each adds up its own share of the rows, and the parts are added in their order.

    Σ_n f(n) = Σ_w Σ_{n in share w} f(n)            w = 0, 1, ...: the result does not depend on timing

An operation of torch that uses several threads ends with a barrier. Where other processes want the cores too,
every barrier waits for the thread that has lost its core. Workers meet once a pass over the rows, and each
computes with one thread.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from xent._processes.group import Share

T = TypeVar("T")
R = TypeVar("R")

SMALL = 1 << 25
"""Multiplications in one product of a pass, N·D·C, below which one thread computes everything.

Some 10 ms of work. Below it, threads that wait for each other cost more than they save: on a machine whose
two cores are also wanted by others the digits (to tol 1e-8) take 0.3 s on one thread and 13 s on two.
"""

PART = 1 << 28
"""Multiplications in one product of a part of a pass, at least: 10 ms of work, beside 0.5 ms to begin it."""

WIDE = 1 << 13
"""Classes from which on torch's own threads are used instead: the gradient of a worker leaves the cache."""


class Workers:
    """Threads that compute parts of a sum; one worker is the calling thread itself.

    Args:
        count: how many.
        why: the reason for that number, a clause.
    """

    def __init__(self, count: int = 1, why: str = "") -> None:
        self.count, self.why = count, why
        self._pool: ThreadPoolExecutor | None = None

    def __str__(self) -> str:
        return f"{self.count} worker thread{'s' * (self.count > 1)}{': ' * bool(self.why)}{self.why}"

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield the results of a function for each item, in their order; few items are taken in advance."""
        if self._pool is None:
            yield from map(function, items)
            return
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(self._pool.submit(function, item))
                if len(waiting) > self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # where one has failed, or Ctrl-C has come, the others end before anything else begins
            for future in waiting:
                future.cancel()
            wait(waiting)

    def shares(self, n_rows: int, work: int) -> list[slice]:
        """Return the rows of each part of a pass, of which as many multiplications are asked.

        There are more parts than workers where each is long enough: a worker whose core is taken by another
        process then holds up one part, not half of the rows.
        """
        parts = min(max(self.count, work // PART), 4 * self.count) if self.count > 1 else 1
        parts = max(1, min(parts - parts % self.count, n_rows))
        return [Share(i, parts).of(n_rows) for i in range(parts)]

    @contextlib.contextmanager
    def at_work(self, controller: ThreadpoolController) -> Iterator[Workers]:
        """Have the threads ready within the block."""
        if self.count == 1:
            yield self
            return

        def one_thread() -> None:
            torch.get_num_threads()  # the first such call in a thread sets its number of threads
            controller.limit(limits=1, user_api="openmp")

        with ThreadPoolExecutor(self.count, "xent", initializer=one_thread) as self._pool:
            try:
                yield self
            finally:
                self._pool = None


@contextlib.contextmanager
def workers(
    n_rows: int, n_features: int, n_classes: int, *, device: str = "cpu", class_parallel: bool = False
) -> Iterator[Workers]:
    """Choose the threads of a fit by its shape, and have them within the block.

    NumPy's and SciPy's BLAS have one thread meanwhile: theirs spin for some time after each product and keep
    the cores from the workers (`benchmarks/threads.py`).
    """
    threads, controller = torch.get_num_threads(), ThreadpoolController()
    if n_rows * n_features * n_classes < SMALL:
        chosen, limited = Workers(1, "the problem is small"), None
    elif device != "cpu":
        chosen, limited = Workers(1, f"the rows are computed with on {device}"), "blas"
    elif threads == 1:
        chosen, limited = Workers(1, "torch has one thread"), None
    elif class_parallel:
        chosen, limited = Workers(1, "ranks that share the classes meet in every product"), "blas"
    elif n_classes >= WIDE:
        chosen, limited = (
            Workers(1, f"{n_classes} classes keep {threads} threads busy in each product"),
            "blas",
        )
    else:
        chosen, limited = Workers(threads, "each adds up its rows with one thread"), None
    with controller.limit(limits=1, user_api=limited), chosen.at_work(controller) as ready:
        yield ready
