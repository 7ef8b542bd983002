"""The two largest entries of each row, and their classes.

    top = max_j x_j        second = max_{j ≠ argmax} x_j        the lowest of equal classes

Of many classes the maximum of each block of them is taken first, in one pass over the numbers; what follows
looks only at the maxima, and at the two blocks that hold the largest.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128
"""Classes of a block."""


class TopTwo(NamedTuple):
    """The two largest entries of rows (n, C), and their classes."""

    top: Tensor  # (n,)
    likely: Tensor  # (n,) int64
    second: Tensor  # (n,), −inf where no other entry is above it
    runner_up: Tensor  # (n,) int64, never the likely class
    blocks: Tensor | None = None  # (n, ⌈C/128⌉) of many classes: an entry of each block, its largest or next


def top_two(x: Tensor) -> TopTwo:
    """Return the two largest entries of each row (n, C), C at least 2; each row has one above −inf.

    >>> found = top_two(torch.tensor([[1.0, 3.0, 3.0], [2.0, -math.inf, -math.inf]]))
    >>> found.likely.tolist(), found.runner_up.tolist(), found.second.tolist()
    ([1, 0], [2, 1], [3.0, -inf])
    """
    classes = x.shape[1]
    most = None
    if classes < 2 * BLOCK:
        top = x.amax(1)
        likely = first_equal(x, top)
        beside = x.clone().scatter_(1, likely[:, None], -math.inf)
        second = beside.amax(1)
        runner_up = first_equal(beside, second)
    else:
        most = _maxima(x)
        top = most.amax(1)
        block = first_equal(most, top)
        start, inside = _block(x, block)
        likely = start + first_equal(inside, top)
        inside.scatter_(1, (likely - start)[:, None], -math.inf)
        most.scatter_(1, block[:, None], inside.amax(1, keepdim=True))
        second = most.amax(1)
        start, inside = _block(x, first_equal(most, second))
        place = start[:, None] + _numbers(BLOCK, torch.int64, x.device)
        inside.masked_fill_(place == likely[:, None], -math.inf)
        runner_up = start + first_equal(inside, second)
    # where nothing else is above −inf, the likely class equals the others now
    return TopTwo(
        top, likely, second, torch.where(runner_up == likely, (likely == 0).long(), runner_up), most
    )


def _maxima(x: Tensor) -> Tensor:
    """Return the maxima of the blocks of each row (n, ⌈C/B⌉)."""
    full = x.shape[1] // BLOCK * BLOCK
    most = x[:, :full].unflatten(1, (-1, BLOCK)).amax(2)
    return most if full == x.shape[1] else torch.cat([most, x[:, full:].amax(1, keepdim=True)], 1)


def _block(x: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first class (n,) and the entries (n, B) of a block of each row; the last one is full too."""
    start = (block * BLOCK).clamp_(max=x.shape[1] - BLOCK)
    return start, x.gather(1, start[:, None] + _numbers(BLOCK, torch.int64, x.device))


def first_equal(x: Tensor, value: Tensor) -> Tensor:
    """Return of each row (n, C) the lowest class whose entry is ``value`` (n,); each row has one.

    >>> first_equal(torch.tensor([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]]), torch.tensor([3.0, 2.0])).tolist()
    [1, 0]
    """
    equal = torch.eq(x, value[:, None], out=torch.empty_like(x))
    ties = equal.sum(1) > 1
    at = equal.mul_(_numbers(x.shape[1], x.dtype, x.device)).sum(1).long()
    if ties.any():
        rows = ties.nonzero()[:, 0]
        at[rows] = (x[rows] == value[rows, None]).int().argmax(1)
    return at


@lru_cache(maxsize=8)
def _numbers(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return 0 to count − 1."""
    return torch.arange(count, dtype=dtype, device=device)
