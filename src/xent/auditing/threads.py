"""Threads that each compute some tiles, and some measures, with one thread of torch.

An operation of torch on several threads ends with a barrier, at which it waits for a thread that has lost its
core to another process: of many small operations that is most of the time. Threads here meet once a batch.
What they compute does not depend on timing: tiles apart from each other, and each measure by one of them.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SMALL = 1 << 20
"""Numbers of predictions up to which one thread measures all."""


class Threads:
    """One thread; `threads` has several."""

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Yield the results of a function for each item, in their order."""
        yield from map(function, items)

    def run(self, *tasks: Callable[[], object]) -> None:
        """Do some tasks, which share nothing that they change."""
        for _ in self.map(lambda task: task(), tasks):
            pass


class _Several(Threads):
    def __init__(self, workers: Any) -> None:
        self._workers = workers

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        return self._workers.map(function, items)


@contextlib.contextmanager
def threads(numbers: int) -> Iterator[Threads]:
    """Have as many threads as torch has, for predictions of that many numbers."""
    count = torch.get_num_threads()
    if count == 1 or numbers <= SMALL or importlib.util.find_spec("threadpoolctl") is None:
        yield Threads()
        return
    from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

    from xent.linear_model.workers import Workers

    with Workers(count).at_work(ThreadpoolController()) as workers:
        yield _Several(workers)
