"""The processes that share a job: rank r of R holds a contiguous share of the rows, and sums run over all.

    Σ_n f(n) = Σ_shares Σ_{n in share} f(n)            share i of S: rows ⌊i·N/S⌋ to ⌊(i + 1)·N/S⌋

One process is the case R = 1, in which a sum over shares is the sum itself: jobs are written once, for ranks.
Every method is called by all ranks, in the same order. With K slices of the classes, S = R/K shares: ranks
r // K hold the same rows, r % K is the slice; their rows count once.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np

from xent.errors import BadInput

T = TypeVar("T")

DEFAULT_TIMEOUT = 300.0
"""Seconds that a rank waits for another before it gives up."""


@dataclasses.dataclass(frozen=True)
class Share:
    """One of ``count`` contiguous shares of some rows.

    >>> [Share(i, 3).of(8) for i in range(3)]
    [slice(0, 2, None), slice(2, 5, None), slice(5, 8, None)]
    """

    index: int = 0
    count: int = 1

    @property
    def whole(self) -> bool:
        return self.count == 1

    def of(self, rows: int) -> slice:
        return slice(self.index * rows // self.count, (self.index + 1) * rows // self.count)


class Ranks:
    """One process, which is all there are."""

    rank = 0
    size = 1
    slice = 0  # of the classes, of
    slices = 1

    @property
    def first(self) -> bool:
        """Whether this rank decides, writes and speaks."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        return Share(self.rank // self.slices, self.size // self.slices)

    @property
    def counts(self) -> bool:
        """Whether this rank's rows count in sums: of ranks with the same rows one does."""
        return self.slice == 0

    @property
    def group(self) -> Any:
        """The process group of the ranks that hold the same rows; None where that is one rank."""
        return None

    def sum(self, array: Any) -> np.ndarray:
        """Σ over shares, in float64, on every rank."""
        return np.asarray(array, dtype=np.float64)

    def sum_to_first(self, array: np.ndarray) -> np.ndarray:
        """Σ over *ranks*, in float64, on rank 0 (elsewhere what is returned says nothing)."""
        return np.asarray(array, dtype=np.float64)

    def maximum(self, array: Any) -> np.ndarray:
        return np.asarray(array, dtype=np.float64)

    def concatenate(self, codes: np.ndarray) -> np.ndarray:
        """int64 numbers of all rows from those of the shares, on every rank."""
        return codes

    def gather(self, value: T) -> list[T]:
        """What each share has, in their order, on every rank."""
        return [value]

    def everyones(self, value: T) -> list[T]:
        """What each rank has."""
        return [value]

    def broadcast(self, value: T) -> T:
        """What rank 0 has."""
        return value

    def broadcast_array(self, array: np.ndarray) -> np.ndarray:
        """What rank 0 has; the others pass an array of its shape and type."""
        return array

    def send(self, array: np.ndarray | None, share: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """What a share has, of a shape and type that all ranks know, on rank 0."""
        assert array is not None
        return array

    def agree(self, error: BaseException | None) -> None:
        """Raise on every rank if any has an error: the lowest such rank's, led by ``rank r:``."""
        if error is not None:
            raise error

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block of each rank's own work, no method of these in it: what one raises, all raise."""
        yield

    def stop_if_asked(self) -> None:
        """Raise ``KeyboardInterrupt`` on rank 0 after Ctrl-C; here Python itself does, at once."""

    def alike(self, what: str, value: object) -> None:
        """Raise ``BadInput`` unless every rank has the same value of what the message calls ``what``."""
        values = self.everyones(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise BadInput(
                    f"rank {rank} has another {what} than rank 0: start all ranks with "
                    "one command, on the same files"
                )


ALONE = Ranks()
