"""Features (N, D) as rows that can be gone through again and again, a batch at a time.

An array in memory is one batch, and stays in its type; an array mapped from a file is read a batch at a time.
Rows chosen among others are gathered where they are used: of a batch a slice is asked for, and only that is
copied. So neither a split into training and validation rows nor another type ever copies the whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeAlias, TypeGuard

import numpy as np
import torch
from torch import Tensor

BATCH = 1 << 22
"""Numbers in a batch of a source that is not in memory."""

BLOCK = 1 << 20
"""Numbers of which float64 intermediates are formed at a time."""

Array: TypeAlias = np.ndarray | Tensor


class Batch:
    """Rows of a tensor (M, D): all of them, or those at some positions, (n,) int64."""

    def __init__(self, x: Tensor, rows: Tensor | None = None) -> None:
        self._x, self._rows = x, rows

    def __len__(self) -> int:
        """Return n."""
        return len(self._x if self._rows is None else self._rows)

    def __getitem__(self, here: slice) -> Tensor:
        """Return some of the rows, a view where all rows of the tensor are meant."""
        return self._x[here] if self._rows is None else self._x.index_select(0, self._rows[here])

    def part(self, here: slice) -> Batch:
        """Return some of the rows, not yet gathered."""
        return Batch(self._x[here]) if self._rows is None else Batch(self._x, self._rows[here])

    def at(self, positions: np.ndarray) -> Batch:
        """Return the rows at some positions, (n,), not yet gathered."""
        chosen = torch.from_numpy(positions).to(self._x.device)
        return Batch(self._x, chosen if self._rows is None else self._rows[chosen])

    def to(self, device: torch.device) -> Batch:
        """Return the rows on a device, themselves where they are on it."""
        return self if self._x.device == device else Batch(self[:].to(device))


class RowSource(Protocol):
    """Features (N, D) that can be gone through again and again."""

    shape: tuple[int, int]
    dtype: np.dtype  # float32 or float64, in which they are computed with
    in_memory: bool  # then the only batch is the whole

    def batches(self) -> Iterator[tuple[slice, Batch]]:
        """Yield which rows they are, and their features, of ``dtype`` or a half type."""
        ...


class ArrayRows:
    """An array or a tensor in memory, (N, D) of a floating type."""

    in_memory = True

    def __init__(self, features: Array) -> None:
        self._batch = Batch(as_tensor(features).contiguous())
        rows, columns = features.shape
        self.shape, self.dtype = (rows, columns), computed_dtype(features.dtype)

    def batches(self) -> Iterator[tuple[slice, Batch]]:
        """Yield the whole array, also where it has no rows."""
        yield slice(0, self.shape[0]), self._batch


class MappedRows:
    """An array mapped from a file, (N, D) of real numbers in any layout.

    Args:
        features: the array.
        columns: the columns that are meant; None is all of them, in their order.
    """

    in_memory = False

    def __init__(self, features: np.ndarray, columns: Sequence[int] | None = None) -> None:
        self._features, self.dtype = features, computed_dtype(features.dtype)
        self._columns = None if columns is None else np.array(columns)
        self.shape = (len(features), features.shape[1] if columns is None else len(columns))
        native = features.dtype.isnative and features.dtype.itemsize <= self.dtype.itemsize
        self._stored = features.dtype if native and features.dtype.kind == "f" else self.dtype

    def batches(self) -> Iterator[tuple[slice, Batch]]:
        """Yield some rows at a time: views where type and layout fit, else copies."""
        for rows in slices(self._features.shape, BATCH):
            part = self._features[rows]
            part = part if self._columns is None else part[:, self._columns]
            with np.errstate(over="ignore"):  # what leaves the type is infinite, which a check finds
                yield rows, Batch(as_tensor(np.ascontiguousarray(part, dtype=self._stored)))


class SelectedRows:
    """The rows of another source at some positions, (n,) int64, ascending."""

    def __init__(self, source: RowSource, rows: np.ndarray) -> None:
        self._source, self._rows = source, rows
        self.shape, self.dtype = (len(rows), source.shape[1]), source.dtype
        self.in_memory = source.in_memory

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

    def batches(self) -> Iterator[tuple[slice, Batch]]:
        """Yield the sources' batches, those of sources in memory in parts."""
        start = 0
        for source in self._sources:
            for here, batch in source.batches():
                for part in slices((len(batch), self.shape[1]), BATCH):
                    yield shifted(part, start + here.start), batch.part(part)
            start += source.shape[0]


class StandardisedRows:
    """The rows x of another source as (x − mean)/scale, computed anew for each batch."""

    in_memory = False

    def __init__(self, source: RowSource, mean: np.ndarray, scale: np.ndarray) -> None:
        self._source, self._mean, self._scale = source, mean, scale
        self.shape, self.dtype = source.shape, source.dtype

    def batches(self) -> Iterator[tuple[slice, Batch]]:
        """Yield the source's rows, standardised."""
        for here, batch in self._source.batches():
            for part in slices((len(batch), self.shape[1]), BATCH):
                made = standardise(batch[part], self._mean, self._scale)
                yield shifted(part, here.start), Batch(made)


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


def computed_dtype(dtype: np.dtype | torch.dtype) -> np.dtype:
    """Return the type in which features are computed with: float32 for it and half types, else float64."""
    if isinstance(dtype, torch.dtype):
        return np.dtype(np.float32 if dtype.itemsize <= 4 else np.float64)
    return np.dtype(np.float32 if dtype.kind == "f" and dtype.itemsize <= 4 else np.float64)


def blocks(source: RowSource) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of a source as tensors of at most ``BLOCK`` numbers."""
    for here, batch in source.batches():
        for part in slices((len(batch), source.shape[1]), BLOCK):
            yield shifted(part, here.start), batch[part]


def steps(source: RowSource, count: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of a source as tensors of exactly ``count`` rows each, the last one shorter."""
    parts: list[Tensor] = []
    start = have = 0
    for _, batch in source.batches():
        at = 0
        while at < len(batch):
            parts.append(batch[at : at + count - have])
            at, have = at + len(parts[-1]), have + len(parts[-1])
            if have == count:
                yield slice(start, start + have), parts[0] if len(parts) == 1 else torch.cat(parts)
                start, have, parts = start + have, 0, []
    if have:
        yield slice(start, start + have), torch.cat(parts)


def standardise(x: Tensor, mean: np.ndarray, scale: np.ndarray) -> Tensor:
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


def shifted(rows: slice, start: int) -> slice:
    """Return a range of rows, counted from another row."""
    return slice(rows.start + start, rows.stop + start)


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
