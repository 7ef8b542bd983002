"""Features (N, D) as rows that can be gone through again and again, a batch at a time.

An array in memory is one batch, and stays in its type; an array mapped from a file is read a batch at a time.
Rows chosen among others are gathered where they are used: of a batch a slice is asked for, and only that is
copied. So neither a split into training and validation rows nor another type ever copies the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeGuard

import numpy as np
import torch
from torch import Tensor

from xent.data.batches import (
    BLOCK,
    Array,
    Batch,
    DenseBatch,
    as_tensor,
    computed_dtype,
    slices,
)

BATCH = 1 << 22
"""Numbers in a batch of a source that is not in memory."""


class RowSource(Protocol):
    """Features (N, D) that can be gone through again and again."""

    shape: tuple[int, int]
    dtype: np.dtype  # float32 or float64, in which they are computed with
    in_memory: bool  # then the only batch is the whole
    width: int  # numbers that a row stores: D, or of sparse rows their average

    def batches(self) -> Iterator[tuple[slice, Batch]]:
        """Yield which rows they are, and their features, of ``dtype`` or a half type."""
        ...


class ArrayRows:
    """An array or a tensor in memory, (N, D) of a floating type."""

    in_memory = True

    def __init__(self, features: Array) -> None:
        self._batch = DenseBatch(as_tensor(features).contiguous())
        rows, columns = features.shape
        self.width = columns
        self.shape, self.dtype = (rows, columns), computed_dtype(features.dtype)

    def batches(self) -> Iterator[tuple[slice, Batch]]:
        """Yield the whole array, also where it has no rows."""
        yield slice(0, self.shape[0]), self._batch


class BatchRows:
    """A batch as the whole of a source."""

    in_memory = True

    def __init__(self, batch: Batch, like: RowSource) -> None:
        self._batch = batch
        self.shape, self.dtype, self.width = like.shape, like.dtype, like.width

    def batches(self) -> Iterator[tuple[slice, Batch]]:
        """Yield the whole."""
        yield slice(0, self.shape[0]), self._batch


class MappedRows:
    """An array mapped from a file, (N, D) of real numbers in any layout.

    Args:
        features: the array.
        columns: the columns that are meant; None is all of them, in their order.
        bfloat16: the array is uint16, the bits of that type.
    """

    in_memory = False

    def __init__(
        self, features: np.ndarray, columns: Sequence[int] | None = None, bfloat16: bool = False
    ) -> None:
        self._features, self._bfloat16 = features, bfloat16
        self.dtype = computed_dtype(torch.bfloat16 if bfloat16 else features.dtype)
        self._columns = None if columns is None else np.array(columns)
        self.shape = (len(features), features.shape[1] if columns is None else len(columns))
        self.width = self.shape[1]
        native = features.dtype.isnative and features.dtype.itemsize <= self.dtype.itemsize
        as_it_is = bfloat16 or (native and features.dtype.kind == "f")
        self._stored = features.dtype if as_it_is else self.dtype

    def batches(self) -> Iterator[tuple[slice, Batch]]:
        """Yield some rows at a time: views where type and layout fit, else copies."""
        for rows in slices(self._features.shape, BATCH):
            part = self._features[rows]
            part = part if self._columns is None else part[:, self._columns]
            with np.errstate(over="ignore"):  # what leaves the type is infinite, which a check finds
                x = as_tensor(np.ascontiguousarray(part, dtype=self._stored))
            yield rows, DenseBatch(x.view(torch.bfloat16) if self._bfloat16 else x)


class SelectedRows:
    """The rows of another source at some positions, (n,) int64, ascending."""

    def __init__(self, source: RowSource, rows: np.ndarray) -> None:
        self._source, self._rows = source, rows
        self.shape, self.dtype = (len(rows), source.shape[1]), source.dtype
        self.in_memory, self.width = source.in_memory, source.width

    def batches(self) -> Iterator[tuple[slice, Batch]]:
        """Yield the chosen rows of each of the source's batches."""
        for here, batch in self._source.batches():
            low, high = np.searchsorted(self._rows, [here.start, here.stop]).tolist()
            yield slice(low, high), batch.at(self._rows[low:high] - here.start)


class ConcatenatedRows:
    """The rows of several sources with the same columns, one source after the other."""

    in_memory = False

    def __init__(self, sources: Sequence[RowSource]) -> None:
        self._sources = sources
        self.shape = (sum(source.shape[0] for source in sources), sources[0].shape[1])
        self.dtype = max(source.dtype for source in sources)
        self.width = max(source.width for source in sources)

    def batches(self) -> Iterator[tuple[slice, Batch]]:
        """Yield the sources' batches, those of sources in memory in parts."""
        start = 0
        for source in self._sources:
            for here, batch in source.batches():
                for part in batch.parts(BATCH):
                    yield shifted(part, start + here.start), batch.part(part)
            start += source.shape[0]


class StandardisedRows:
    """The rows x of another source as (x − mean)/scale, computed anew for each batch."""

    in_memory = False

    def __init__(self, source: RowSource, mean: np.ndarray, scale: np.ndarray) -> None:
        self._source, self._mean, self._scale = source, mean, scale
        self.shape, self.dtype, self.width = source.shape, source.dtype, source.width

    def batches(self) -> Iterator[tuple[slice, Batch]]:
        """Yield the source's rows, standardised."""
        for here, batch in self._source.batches():
            for part in batch.parts(BATCH):
                yield shifted(part, here.start), batch.part(part).standardised(self._mean, self._scale)


def row_source(features: Array | RowSource) -> RowSource:
    """Return the rows of an array: mapped, where it is one that ``is_mapped``, else in memory."""
    if not isinstance(features, np.ndarray | Tensor):
        return features
    return MappedRows(features) if is_mapped(features) else ArrayRows(features)


def is_mapped(features: object) -> TypeGuard[np.ndarray]:
    """Return whether it is a table of real numbers that lies in a mapped file."""
    return (
        isinstance(features, np.memmap)
        and features.ndim == 2
        and features.dtype.kind in "biuf"
        and 0 not in features.shape
    )


def blocks(source: RowSource) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of a source as tensors of at most ``BLOCK`` numbers."""
    for here, batch in source.batches():
        for part in slices((len(batch), source.shape[1]), BLOCK):
            yield shifted(part, here.start), batch[part]


def parts(source: RowSource) -> Iterator[tuple[slice, Batch]]:
    """Yield the rows of a source as batches of at most ``BLOCK`` stored numbers."""
    for here, batch in source.batches():
        for part in batch.parts(BLOCK):
            yield shifted(part, here.start), batch.part(part)


def steps(source: RowSource, count: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of a source as tensors of exactly ``count`` rows each, the last one shorter."""
    taken: list[Tensor] = []
    start = have = 0
    for _, batch in source.batches():
        at = 0
        while at < len(batch):
            taken.append(batch[at : at + count - have])
            at, have = at + len(taken[-1]), have + len(taken[-1])
            if have == count:
                yield slice(start, start + have), taken[0] if len(taken) == 1 else torch.cat(taken)
                start, have, taken = start + have, 0, []
    if have:
        yield slice(start, start + have), torch.cat(taken)


def shifted(rows: slice, start: int) -> slice:
    """Return a range of rows, counted from another row."""
    return slice(rows.start + start, rows.stop + start)
