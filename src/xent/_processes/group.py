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
        """True where it is all rows."""
        return self.count == 1

    def of(self, rows: int) -> slice:
        """Return this share of as many rows."""
        return slice(self.index * rows // self.count, (self.index + 1) * rows // self.count)


class Ranks:
    """The ranks of a job where there is one; ``torchrun.Joined`` is several."""

    rank = 0
    size = 1
    slice = 0  # of the classes, of
    slices = 1

    @property
    def is_main(self) -> bool:
        """True on rank 0, which decides, writes and prints."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        """The share of the rows that this rank holds."""
        return Share(self.rank // self.slices, self.size // self.slices)

    @property
    def counts(self) -> bool:
        """True on the one of the ranks with the same rows whose rows count in sums."""
        return self.slice == 0

    @property
    def group(self) -> Any:
        """The process group of the ranks that hold the same rows; None where that is one rank."""
        return None

    def sum(self, array: Any) -> np.ndarray:
        """Return the sum over shares, in float64, on every rank."""
        return np.asarray(array, dtype=np.float64)

    def sum_to_main(self, array: np.ndarray) -> np.ndarray:
        """Return the sum over *ranks*, in float64, on rank 0; the value returned elsewhere is of no use."""
        return np.asarray(array, dtype=np.float64)

    def maximum(self, array: Any) -> np.ndarray:
        """Return the largest over ranks, elementwise in float64, on every rank."""
        return np.asarray(array, dtype=np.float64)

    def concatenate(self, codes: np.ndarray) -> np.ndarray:
        """Return int64 numbers of all rows, from those of the shares, on every rank."""
        return codes

    def gather(self, value: T) -> list[T]:
        """Return the value of each share, in their order, on every rank."""
        return [value]

    def all_gather(self, value: T) -> list[T]:
        """Return the value of each rank, on every rank."""
        return [value]

    def broadcast(self, value: T) -> T:
        """Return the value of rank 0, on every rank."""
        return value

    def broadcast_array(self, array: np.ndarray) -> np.ndarray:
        """Return the array of rank 0, on every rank; the others pass one of its shape and type."""
        return array

    def send(self, array: np.ndarray | None, share: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return the array of a share, of a shape and type that all ranks know, on rank 0."""
        assert array is not None
        return array

    def agree(self, error: BaseException | None) -> None:
        """Raise on every rank if any has an error: the lowest such rank's, led by ``rank r:``."""
        if error is not None:
            raise error

    @contextlib.contextmanager
    def raise_together(self) -> Iterator[None]:
        """Raise on every rank what one raises in the block, which is each rank's own work."""
        yield

    def check_interrupt(self) -> None:
        """Raise ``KeyboardInterrupt`` on rank 0 after Ctrl-C; here Python itself does, at once."""

    def check_equal(self, what: str, value: object) -> None:
        """Raise ``BadInput`` unless every rank has the same value; the message calls it ``what``."""
        values = self.all_gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise BadInput(
                    f"rank {rank} has another {what} than rank 0: start all ranks with "
                    "one command, on the same files"
                )


ALONE = Ranks()
