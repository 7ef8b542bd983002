"""A leader and its followers: rank 0 decides what is computed next, and all ranks compute it on their rows.

A solver runs on rank 0. The others follow: they wait for the number of a registered function and its
argument, compute it on their own rows, and wait again. So the ranks cannot disagree about a step, whatever
the rounding of a sum. What fails on one rank is raised on all. On one process nothing is sent: a registered
function is called as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, TypeVar, cast

import numpy as np

from xent._processes.group import ALONE, Ranks
from xent.errors import RankLost

T = TypeVar("T")

Part: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""From an argument, a flat float64 array, to this rank's part of a sum, an array."""

_END = -1
"""In the place of a function's number: nothing more is to be computed."""


class Leader:
    """Sums over the rows of all ranks, of functions that every rank registers and rank 0 calls.

    >>> leader = Leader()
    >>> squares = leader.register(lambda theta: theta**2)
    >>> leader.run(lambda: squares(np.array([2.0, 3.0])).tolist())
    [4.0, 9.0]
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self._parts: list[Part] = []
        self._failed_everywhere = False

    def register(self, part: Part, interruptible: bool = True) -> Part:
        """Return the function whose value on rank 0 is the sum of ``part`` over all ranks, in float64.

        Every rank registers the same functions in the same order; rank 0 alone calls what is returned. After
        Ctrl-C an interruptible one raises ``KeyboardInterrupt`` before anything is computed. One process gets
        ``part`` itself.
        """
        if self.ranks.size == 1:
            return part
        number = len(self._parts)
        self._parts.append(part)
        return lambda argument: self.reduce(number, argument, interruptible)

    def reduce(self, number: int, argument: np.ndarray, interruptible: bool = True) -> np.ndarray:
        """Return the sum over all ranks of a registered function, on rank 0, which calls this."""
        if interruptible:
            self.ranks.check_interrupt()
        self.header(number, argument.size)
        flat = np.asarray(argument, dtype=np.float64).ravel()
        return self._sum(number, self.ranks.broadcast_array(flat))

    def run(self, work: Callable[[], T]) -> T:
        """Do the work on rank 0 and follow it on the others; return its result on all."""
        if self.ranks.size == 1:
            return work()
        done: T | None = None
        error: BaseException | None = None
        if self.ranks.is_main:
            try:
                done = work()
            except (Exception, KeyboardInterrupt) as caught:
                if self._failed_everywhere or isinstance(caught, RankLost):
                    raise  # the others know, or are gone
                error = caught
            self.header(_END, 0)
        else:
            while (header := self.header(0, 0))[0] != _END:
                number, size = header
                self._sum(number, self.ranks.broadcast_array(np.empty(size)))
        self.ranks.agree(error)
        return cast(T, self.ranks.broadcast(done))

    def header(self, number: int, size: int) -> tuple[int, int]:
        """Return, on all ranks, which function rank 0 calls and the length of its argument."""
        sent = self.ranks.broadcast_array(np.array([number, size]))
        return int(sent[0]), int(sent[1])

    def _sum(self, number: int, argument: np.ndarray) -> np.ndarray:
        own, error = np.empty(0), None
        try:
            own = self._parts[number](argument)
        except Exception as caught:
            error = caught
        try:
            self.ranks.agree(error)
            return self.ranks.sum_to_main(own)
        except BaseException:
            self._failed_everywhere = True
            raise
