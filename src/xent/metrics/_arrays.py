"""Anybody's array as torch tensors of a few rows at a time.

    concatenate(rows[part] for part in rows.parts()) = the array

Nothing is copied that can be read where it lies, and the working memory is that of a part, whatever N. Parts
are large: every operation ends with its threads waiting for each other, which on a busy machine takes longer
than the second trip to memory that parts of the cache's size would save.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

NUMBERS = 1 << 23  # of a part that is read where it lies, 64 MiB of float64
COPIED = 1 << 20  # of a part that is copied, 8 MiB of float64
ROWS = 1 << 19  # of a part: what is O(rows) is a few times 4 MiB
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

    @property
    def copied(self) -> bool:
        """Whether `__getitem__` has to copy."""
        if isinstance(self.source, Tensor):
            return self.source.dtype not in _FLOATING
        return self.source.dtype not in _NATIVE or not _lies_well(self.source)

    def parts(self, copied: bool = False) -> Iterator[slice]:
        """Slices that cover 0..N in order; short ones if the caller is going to copy them."""
        n, *rest = self.shape
        numbers = COPIED if copied or self.copied else NUMBERS
        step = max(1, min(ROWS, numbers // max(1, *rest, 1)))
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
        _check_dense(given, name)
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
    return torch.from_numpy(array if _lies_well(array) else array.copy())


def _lies_well(array: np.ndarray) -> bool:
    """torch refuses negative strides, and warns of read-only arrays."""
    return array.flags.behaved and all(s >= 0 and s % array.itemsize == 0 for s in array.strides)


def as_array(given: Any, name: str) -> np.ndarray:
    """``numpy.asarray``, with the argument's name in the error; of tensors too, half types in float32."""
    if isinstance(given, Tensor):
        _check_dense(given, name)
        half = given.dtype.is_floating_point and given.dtype.itemsize < 4
        array: np.ndarray = (given.float() if half else given).numpy(force=True)
        return array
    if isinstance(given, list | tuple) and any(isinstance(each, Tensor) for each in given):
        given = [as_array(each, name) if isinstance(each, Tensor) else each for each in given]
    try:
        return np.asarray(given)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{name} is no array: {error}") from None


def _check_dense(given: Tensor, name: str) -> None:
    if given.layout != torch.strided:
        raise TypeError(f"{name} is a sparse tensor; pass {name}.to_dense()")
