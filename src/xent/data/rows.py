"""The rows of a fit, handed out a chunk at a time: features (N, D) with their targets and weights.

An array or a tensor in memory is one chunk, and stays in its type: half types are converted a tile at a time,
where they are computed with. Of an array mapped from a file a chunk is read at a time, and whatever is
made of it (another type, standardised features) is of the size of the chunk: the whole is never copied.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

HOST = torch.device("cpu")

CHUNK = 1 << 22
"""Numbers in a chunk of a mapped array."""

BLOCK = 1 << 20
"""Numbers of which float64 intermediates are formed at a time."""

Array: TypeAlias = np.ndarray | Tensor

Chunk: TypeAlias = tuple[Tensor, Tensor, Tensor | None]
"""Features (n, D), targets (n,) or (n, C), weights (n,) or None."""


class RowSource(Protocol):
    """Features (N, D) that can be gone through again and again."""

    shape: tuple[int, int]
    dtype: np.dtype  # float32 or float64, in which every chunk is computed with
    in_memory: bool  # then the only chunk is the whole

    def chunks(self) -> Iterator[tuple[slice, Array]]:
        """Yield which rows they are, and their features, C-contiguous, of ``dtype`` or a half type."""
        ...


class ArrayRows:
    """An array or a tensor in memory, (N, D) of a floating type."""

    in_memory = True

    def __init__(self, features: Array) -> None:
        self.features: Array
        if isinstance(features, Tensor):
            self.features = features.contiguous()
        else:
            self.features = np.ascontiguousarray(features)
        rows, columns = self.features.shape
        self.shape, self.dtype = (rows, columns), computed_dtype(features.dtype)

    def chunks(self) -> Iterator[tuple[slice, Array]]:
        """Yield the whole array, also where it has no rows."""
        yield slice(0, len(self.features)), self.features


class MappedRows:
    """An array mapped from a file, (N, D) of real numbers in any layout; chunks are of type ``dtype``."""

    in_memory = False

    def __init__(self, features: np.ndarray, dtype: np.dtype) -> None:
        self.features, self.dtype = features, np.dtype(dtype)
        self.shape = features.shape

    def chunks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield some rows at a time: views where type and layout fit, else copies."""
        for rows in slices(self.shape, CHUNK):
            yield rows, np.ascontiguousarray(self.features[rows], dtype=self.dtype)


class StandardisedRows:
    """The rows x of another source as (x − mean)/scale, computed anew for each chunk."""

    in_memory = False

    def __init__(self, source: RowSource, mean: np.ndarray, scale: np.ndarray) -> None:
        self.source, self.mean, self.scale = source, mean, scale
        self.shape, self.dtype = source.shape, source.dtype

    def chunks(self) -> Iterator[tuple[slice, Array]]:
        """Yield the source's chunks, standardised."""
        for rows, x in self.source.chunks():
            yield rows, standardise_tensor(as_tensor(x), self.mean, self.scale)


def row_source(features: Array) -> RowSource:
    """Return the rows of an array: mapped, where it is one that ``is_mapped``, else in memory."""
    if isinstance(features, np.ndarray) and is_mapped(features):
        return MappedRows(features, computed_dtype(features.dtype))
    return ArrayRows(features)


def is_mapped(features: object) -> bool:
    """Return whether it is a table of real numbers that lies in a mapped file."""
    return (
        isinstance(features, np.memmap)
        and features.ndim == 2
        and features.dtype.kind in "biuf"
        and 0 not in features.shape
    )


def computed_dtype(dtype: np.dtype | torch.dtype) -> np.dtype:
    """Return the type in which features are computed with: float32 for it and half types, else float64."""
    if isinstance(dtype, torch.dtype):
        return np.dtype(np.float32 if dtype.itemsize <= 4 else np.float64)
    return np.dtype(np.float32 if dtype in (np.float32, np.float16) else np.float64)


def standardised(source: RowSource, mean: np.ndarray, scale: np.ndarray) -> RowSource:
    """Return (x − mean)/scale for the rows of a source: a copy of rows in memory, else a chunk at a time."""
    if not source.in_memory:
        return StandardisedRows(source, mean, scale)
    ((_, features),) = source.chunks()
    return ArrayRows(standardise_tensor(as_tensor(features), mean, scale))


def standardise(x: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return (x − mean)/scale in the type that x is computed with, formed some rows at a time."""
    return standardise_tensor(as_tensor(x), mean, scale).numpy()


def standardise_tensor(x: Tensor, mean: np.ndarray, scale: np.ndarray) -> Tensor:
    """Return (x − mean)/scale in the type that x is computed with, formed some rows at a time, in float64."""
    made = x.new_empty(x.shape, dtype=getattr(torch, computed_dtype(x.dtype).name))
    center, unit = (torch.from_numpy(v.astype(np.float64)).to(x.device) for v in (mean, scale))
    for rows in slices(x.shape, BLOCK):
        made[rows] = (x[rows] - center) / unit
    return made


def slices(shape: tuple[int, ...], numbers: int) -> Iterator[slice]:
    """Yield consecutive ranges of the rows of an array, each of at most as many numbers, or of one row."""
    count, step = shape[0], max(1, numbers // max(1, shape[1]))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


@dataclasses.dataclass(frozen=True)
class LabelledRows:
    """The rows of a source with what they are to be."""

    source: RowSource
    target: np.ndarray  # (N,) class numbers or (N, C) masses
    weight: np.ndarray | None = None  # (N,)
    device: torch.device = HOST  # where they are computed with

    def take(self, rows: np.ndarray) -> LabelledRows:
        """Return some of the rows, in memory: (n,) positions, ascending."""
        weight = None if self.weight is None else self.weight[rows]
        parts = [
            as_tensor(x[rows[(rows >= here.start) & (rows < here.stop)] - here.start])
            for here, x in self.source.chunks()
        ]
        source = ArrayRows(parts[0] if len(parts) == 1 else torch.cat(parts))
        return LabelledRows(source, self.target[rows], weight, self.device)

    def chunks(self, shares: Sequence[slice] | None = None) -> Iterator[Chunk]:
        """Yield the rows as tensors, a chunk at a time; of rows in memory each chunk is one of ``shares``."""
        if not self.source.in_memory:
            yield from self._read()
            return
        ((x, target, weight),) = self._kept
        for rows in shares or [slice(0, len(x))]:
            yield x[rows], target[rows], None if weight is None else weight[rows]

    @functools.cached_property
    def _kept(self) -> list[Chunk]:
        return list(self._read())

    def _read(self) -> Iterator[Chunk]:
        for rows, x in self.source.chunks():
            weight = None if self.weight is None else as_tensor(self.weight[rows]).to(self.device)
            yield as_tensor(x).to(self.device), as_tensor(self.target[rows]).to(self.device), weight


def as_tensor(array: Array) -> Tensor:
    """Return a tensor on the array's memory, which is only read."""
    if isinstance(array, Tensor):
        return array
    array = np.ascontiguousarray(array)
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
        return torch.from_numpy(array)
