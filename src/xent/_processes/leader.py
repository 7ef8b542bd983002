"""Rank 0 leads: it asks for sums over all rows, and it alone decides what is asked next.

A solver runs on rank 0. The others follow: they wait for a question, answer with a sum over their own rows,
and wait again. So the ranks cannot disagree about a step, whatever the rounding of a sum. What fails on one
rank while it answers is raised on all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numpy as np

from xent._processes.group import ALONE, Ranks
from xent.errors import RankLost

T = TypeVar("T")

Answer = Callable[[np.ndarray], np.ndarray]
"""From what is asked, a flat float64 array, to this rank's part of the sum, an array."""

_NOTHING_MORE = -1


class Lead:
    """Questions by name, and who answers them.

    >>> lead = Lead()
    >>> lead.teach("squares", lambda theta: theta**2)
    >>> lead.run(lambda: lead.ask("squares", np.array([2.0, 3.0])).tolist())
    [4.0, 9.0]
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self._answers: dict[str, Answer] = {}
        self._over = False

    def teach(self, name: str, answer: Answer) -> None:
        """How to answer; told to every rank, in the same order."""
        self._answers[name] = answer

    def ask(self, name: str, argument: np.ndarray, interruptible: bool = True) -> np.ndarray:
        """The sum of all answers, float64; rank 0 asks.

        After Ctrl-C an interruptible question raises ``KeyboardInterrupt`` before it is asked.
        """
        if interruptible:
            self.ranks.stop_if_asked()
        self._header(list(self._answers).index(name), argument.size)
        return self._answer(name, self.ranks.broadcast_array(np.asarray(argument, dtype=np.float64).ravel()))

    def run(self, work: Callable[[], T]) -> T:
        """Do the work on rank 0, answer its questions on the others; what it returns, on all."""
        done: T | None = None
        error: BaseException | None = None
        if self.ranks.first:
            try:
                done = work()
            except (Exception, KeyboardInterrupt) as caught:
                if self._over or isinstance(caught, RankLost):
                    raise  # the others know, or are gone
                error = caught
            self._header(_NOTHING_MORE, 0)
        else:
            names = list(self._answers)
            while (told := self._header(0, 0))[0] != _NOTHING_MORE:
                self._answer(names[told[0]], self.ranks.broadcast_array(np.empty(told[1])))
        self.ranks.agree(error)
        return cast(T, self.ranks.broadcast(done))

    def _header(self, question: int, size: int) -> tuple[int, int]:
        """Which question it is and how long its argument, on all ranks."""
        told = self.ranks.broadcast_array(np.array([question, size]))
        return int(told[0]), int(told[1])

    def _answer(self, name: str, argument: np.ndarray) -> np.ndarray:
        answer, error = np.empty(0), None
        try:
            answer = self._answers[name](argument)
        except Exception as caught:
            error = caught
        try:
            self.ranks.agree(error)
            return self.ranks.sum_to_first(answer)
        except BaseException:
            self._over = True
            raise
