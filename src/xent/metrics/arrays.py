"""Anybody's array as torch tensors of a few rows at a time.

    concatenate(rows[part] for part in rows.parts()) = the array

A metric reads every number once. Read in parts that stay in the cache, all that is asked of a part costs one
trip to memory, and the working memory is that of a part, whatever N.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

NUMBERS = (
    1 << 21
)  # of a part, 16 MiB of float64. A quarter of it is as fast on idle cores, and half as fast on
# busy ones, where threads wait for each other at the end of every operation
ROWS = 1 << 18  # of a part: what is O(rows) is a few times 2 MiB
_ACCELERATOR = 4  # times as many there, where a part costs launches instead of misses
_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_NATIVE = (np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16))


@dataclass(frozen=True)
class Rows:
    """N rows of numbers that stay where they are."""

    source: Tensor | np.ndarray  # (N,) or (N, C)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shape)

    @property
    def device(self) -> torch.device:
        return self.source.device if isinstance(self.source, Tensor) else torch.device("cpu")

    @property
    def eps(self) -> float:
        """The rounding unit of the numbers as they are stored; that of float64 for whole numbers."""
        least = float(np.finfo(np.float64).eps)
        if isinstance(self.source, Tensor):
            dtype = self.source.dtype
            return max(least, torch.finfo(dtype).eps) if dtype.is_floating_point else least
        return max(least, float(np.finfo(self.source.dtype).eps)) if self.source.dtype.kind == "f" else least

    def parts(self, copies: int = 0) -> Iterator[slice]:
        """Slices that cover 0..N in order, smaller where so many copies of a part will be made."""
        n, *rest = self.shape
        scale = 1 if self.device.type == "cpu" else _ACCELERATOR
        step = scale * max(1, min(ROWS, NUMBERS // (1 + copies) // max(1, *rest, 1)))
        for start in range(0, n, step):
            yield slice(start, min(n, start + step))

    def __getitem__(self, part: slice) -> Tensor:
        """Rows as a floating tensor that nobody writes to: a view of the caller's where it can be."""
        if isinstance(self.source, Tensor):
            piece = self.source[part]
            return piece if piece.dtype in _FLOATING else piece.to(torch.float64)
        array = self.source[part]
        return as_tensor(array if array.dtype in _NATIVE else array.astype(np.float64))


def read_numbers(given: Any, name: str) -> Rows:
    """An array, tensor, data frame or list of real numbers; TypeError for anything else."""
    if isinstance(given, Tensor):
        if given.is_complex():
            raise TypeError(f"{name} must hold real numbers, got {given.dtype}")
        return Rows(given.detach())
    array = as_array(given, name)
    if array.dtype.kind == "O":  # a data frame with columns of several types, or a list with None
        try:
            array = array.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} must hold real numbers: {error}") from None
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold real numbers, got an array of {array.dtype}")
    return Rows(array)


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor on the array's numbers, or on a copy where torch will not have them as they lie."""
    # torch refuses negative strides, and warns of read-only arrays
    regular = all(stride >= 0 and stride % array.itemsize == 0 for stride in array.strides)
    return torch.from_numpy(array if regular and array.flags.behaved else array.copy())


def as_array(given: Any, name: str) -> np.ndarray:
    """``numpy.asarray`` of what is no tensor, with the argument's name in the error."""
    try:
        return np.asarray(given)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{name} is no array: {error}") from None
