"""Classes spread over processes: every rank holds all rows and a contiguous slice of the classes.

    m = MAX over ranks of m_k        shares(m) = SUM over ranks of shares_k(m)

These are the two steps of `Statistics.merge`, which joins two sets of classes, for as many as there are
ranks: one all-reduce each; further logsumexps of a row go with them. What is linear in a row's classes,
tangents and the gradient of the features, is one SUM. Nothing of size N·C is ever sent.

The MAX carries beside m (M,) what the ranks must agree on, so that a slice that another rank did not expect
is noticed by all of them in the same call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xent._core.ops import Sent
from xent._core.statistics import PartialSums, Statistics

BLOCK = 4 << 20  # bytes of features whose gradient is summed at a time, while the next is computed
MOST_BLOCKS = 16


class Disagreement(Exception):
    """Some rank did not expect another's slice, or call; raised on all of them."""

    def __init__(self, ranks: ClassGroup, sizes: tuple[int, ...], *, same: bool) -> None:
        super().__init__("the ranks hold other slices of the classes than expected")
        self.ranks = ranks
        self.sizes = sizes  # the true ones
        self.same = same  # whether it is one call


@dataclass(frozen=True, eq=False)
class ClassGroup:
    """The processes of a group, as the one of number ``rank`` sees them."""

    group: Any  # torch.distributed.ProcessGroup
    rank: int
    sizes: tuple[int, ...]  # classes that each rank is expected to hold
    held: int  # classes that this one holds
    call: int = 0  # a number of what must be the same on every rank
    about: dict[str, Any] = field(default_factory=dict)  # what that is, by name
    doubts: list[Exception] = field(default_factory=list)  # what is wrong if the slices are as expected

    @property
    def first(self) -> int:
        return sum(self.sizes[: self.rank])

    @property
    def classes(self) -> int:
        return sum(self.sizes)

    def join(self, found: Statistics) -> Statistics:
        """Return the statistics over all ranks' classes from those over the classes here; (M,) each."""
        # some transports drop nan from a maximum; +inf has no softmax either, and `rest` stays nan
        found = replace(found, m=found.m.nan_to_num(torch.inf, torch.inf, -torch.inf))
        split = [] if found.lse_own is None else [found.lse_own, found.lse_others]
        m, *largest = self._max(found.m, *split)  # type: ignore[arg-type]  # there are both or none
        shares = found.shares(m)
        k = None if found.k is None else torch.where(shares.top > 0, found.k, 0).to(m.dtype)
        parts = [_relative(part, most) for part, most in zip(split, largest, strict=True)]  # type: ignore[arg-type]
        *whole, k = self.sum_all((*shares, *parts, k))
        whole, sums = whole[: len(shares)], whole[len(shares) :]
        shares = PartialSums(*whole)  # type: ignore[arg-type]  # None where it was None
        if found.k is not None and (shares.top > 1).any():  # the class of a shared maximum is the lowest
            k = torch.where(found.m == m, found.k, self.classes)
            dist.all_reduce(k, op=dist.ReduceOp.MIN, group=self.group)
        joined = shares.at(m, None if k is None else k.to(torch.int64))
        if not split:
            return joined
        own, others = (most + torch.log(part) for part, most in zip(sums, largest, strict=True))  # type: ignore[arg-type]
        return replace(joined, lse_own=own, lse_others=others)

    def sum(self, value: Tensor) -> Tensor:
        """Add up the ranks' values in place."""
        dist.all_reduce(value, group=self.group)
        return value

    def sum_all(self, values: Iterable[Tensor | None]) -> list[Tensor | None]:
        """Add up the ranks' values, each (M,) or (M, K), in one go; None stays."""
        given = list(values)
        columns = [t for t in given if t is not None]
        widths = [1 if t.dim() == 1 else t.shape[1] for t in columns]
        summed = self.sum(
            torch.cat([t if t.dim() > 1 else t[:, None] for t in columns], dim=1).t().contiguous()
        )
        parts = iter(zip(columns, summed.split(widths), strict=True))
        whole: list[Tensor | None] = []
        for t in given:
            if t is None:
                whole.append(None)
                continue
            like, part = next(parts)
            whole.append(part[0] if like.dim() == 1 else part.t())
        return whole

    def sum_later(self, value: Tensor) -> Sent:
        """Add up the ranks' values in the background; call `wait` on the result before reading them."""
        sent: Sent = dist.all_reduce(value, group=self.group, async_op=True)
        return sent

    def blocks(self, rows: int, bytes_per_row: int) -> Iterator[slice]:
        """Yield the rows whose feature gradient is sent at a time: the same on every rank."""
        parts = max(1, min(MOST_BLOCKS, rows * bytes_per_row // BLOCK))
        size = max(1, -(-rows // parts))
        for start in range(0, rows, size):
            yield slice(start, min(start + size, rows))

    def _max(self, *columns: Tensor) -> tuple[Tensor, ...]:
        """Return MAX over ranks of each column (M,), and compare the numbers on which the ranks must agree.

        A number is the same on every rank if its maximum is minus the maximum of its negative.
        """
        expected = hash(self.sizes) & (2**52 - 1)
        sizes = [float(self.held) if k == self.rank else 0.0 for k in range(len(self.sizes))]
        said = [*sizes, expected, -expected, self.call, -self.call]
        m, n = columns[0], len(columns) * len(columns[0])
        packed = torch.cat([*columns, m.new_tensor(said)])
        dist.all_reduce(packed, op=dist.ReduceOp.MAX, group=self.group)
        *true, most, least, call, same_call = packed[n:].tolist()
        sizes_now = tuple(int(size) for size in true)
        if sizes_now != self.sizes or most != -least or call != -same_call:
            raise Disagreement(self, sizes_now, same=call == -same_call)
        if self.doubts:
            raise self.doubts[0]
        return packed[:n].split(len(m)) if len(m) else columns


def _relative(lse: Tensor, most: Tensor) -> Tensor:
    """Return exp(lse − most), of −inf relative to itself 0."""
    return torch.where(lse == -torch.inf, 0.0, torch.exp(lse - most))
