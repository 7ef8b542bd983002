"""Arrays of any kind, read as torch tensors of a few rows at a time.

    concatenate(rows[part] for part in rows.parts()) = the array

Arrays are read in place where torch can, and the working memory is that of one part, whatever N. Parts are
much larger than the cache: each operation ends with its threads waiting for each other, and on a busy machine
that wait costs more than reading the part from memory twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

NUMBERS = 1 << 23  # in a part that is read in place, 64 MiB of float64
COPIED = 1 << 20  # in a part that is copied, 8 MiB of float64
ROWS = 1 << 19  # in a part, so that a tensor of O(rows) takes a few times 4 MiB
_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_NATIVE = (np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16))


@dataclass(frozen=True)
class Rows:
    """N rows of numbers in the caller's array or tensor."""

    source: Tensor | np.ndarray  # (N,) or (N, C)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shape)

    @property
    def device(self) -> torch.device:
        return self.source.device if isinstance(self.source, Tensor) else torch.device("cpu")

    @property
    def eps(self) -> float:
        """The rounding unit of the type in which the numbers are stored; float64's for whole numbers."""
        least = float(np.finfo(np.float64).eps)
        if isinstance(self.source, Tensor):
            dtype = self.source.dtype
            return max(least, torch.finfo(dtype).eps) if dtype.is_floating_point else least
        return max(least, float(np.finfo(self.source.dtype).eps)) if self.source.dtype.kind == "f" else least

    @property
    def copied(self) -> bool:
        """True where `__getitem__` has to copy."""
        if isinstance(self.source, Tensor):
            return self.source.dtype not in _FLOATING
        return self.source.dtype not in _NATIVE or not _torch_can_share(self.source)

    def parts(self, copied: bool = False) -> Iterator[slice]:
        """Yield slices that cover 0..N in order; shorter ones if the caller copies each part."""
        n, *rest = self.shape
        numbers = COPIED if copied or self.copied else NUMBERS
        step = max(1, min(ROWS, numbers // max(1, *rest, 1)))
        for start in range(0, n, step):
            yield slice(start, min(n, start + step))

    def __getitem__(self, part: slice) -> Tensor:
        """Return rows as a floating tensor, often a view of the caller's, so not to be written to."""
        if isinstance(self.source, Tensor):
            piece = self.source[part]
            return piece if piece.dtype in _FLOATING else piece.to(torch.float64)
        array = self.source[part]
        return as_tensor(array if array.dtype in _NATIVE else array.astype(np.float64))


def read_numbers(given: Any, name: str) -> Rows:
    """Read an array, tensor, data frame or list of real numbers; raise a TypeError for anything else."""
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
    """Return a tensor that shares the array's memory, or a copy where torch cannot."""
    return torch.from_numpy(array if _torch_can_share(array) else array.copy())


def _torch_can_share(array: np.ndarray) -> bool:
    """Return False for arrays that torch refuses (negative strides) or warns about (read-only)."""
    return array.flags.behaved and all(s >= 0 and s % array.itemsize == 0 for s in array.strides)


def as_array(given: Any, name: str) -> np.ndarray:
    """Return ``numpy.asarray`` of anything, tensors too (half types as float32), naming it in errors."""
    if isinstance(given, Tensor):
        _check_dense(given, name)
        half = given.dtype.is_floating_point and given.dtype.itemsize < 4
        return (given.float() if half else given).numpy(force=True)
    if isinstance(given, list | tuple) and any(isinstance(each, Tensor) for each in given):
        given = [as_array(each, name) if isinstance(each, Tensor) else each for each in given]
    try:
        return np.asarray(given)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{name} is no array: {error}") from None


def _check_dense(given: Tensor, name: str) -> None:
    if given.layout != torch.strided:
        raise TypeError(f"{name} is a sparse tensor; pass {name}.to_dense()")
