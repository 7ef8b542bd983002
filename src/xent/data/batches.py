"""Rows in memory as a pass over them takes them, whatever holds them: two products, a tile at a time.

    z = (x − m) Wᵀ + b        ∂L/∂W = Gᵀ (x − m)        G = ∂L/∂z

A batch can give any slice of its rows dense. `Batch` is what all kinds have in common; `DenseBatch` is rows
of a tensor, and `sparse_rows` has those of which only what is not 0 is stored.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 20
"""Numbers of which float64 intermediates are formed at a time."""

Array: TypeAlias = np.ndarray | Tensor


class Tile(Protocol):
    """Some rows of a batch less a center, as factors of the two products of a pass over them."""

    def __len__(self) -> int:
        """Return R, how many rows."""
        ...

    def times(self, W: Tensor, axis: int, memory: Tensor) -> Tensor:
        """Return x Wᵀ for W (C, D): (R, C), or where ``axis`` is 0 (C, R), in a memory of R·C numbers."""
        ...

    def add_product(self, g: Tensor, axis: int, total: Tensor) -> None:
        """Add gᵀ x to a total (C, D), g being (R, C) or (C, R)."""
        ...


class Batch(Protocol):
    """Rows (n, D), of which a slice is dense; a pass over them takes them a tile at a time."""

    def __len__(self) -> int:
        """Return n."""
        ...

    def __getitem__(self, here: slice) -> Tensor:
        """Return some of the rows, dense."""
        ...

    def part(self, here: slice) -> Batch:
        """Return some of the rows, not yet gathered."""
        ...

    def parts(self, numbers: int) -> Iterator[slice]:
        """Yield consecutive ranges of the rows, each of at most as many stored numbers, or of one row."""
        ...

    def at(self, positions: np.ndarray) -> Batch:
        """Return the rows at some positions, (n,)."""
        ...

    def to(self, device: torch.device) -> Batch:
        """Return the rows on a device, themselves where they are on it."""
        ...

    def joined(self, others: Sequence[Batch]) -> Batch:
        """Return these rows, then those of batches of the same kind."""
        ...

    def standardised(self, mean: np.ndarray, scale: np.ndarray) -> Batch:
        """Return the rows x as (x − mean)/scale, formed in float64."""
        ...

    def moments(self, share: Tensor, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Return Σ s x and Σ s (x − Σ s x)², (D,) each in float64, for shares s (n,) of sum 1."""
        ...

    def tiles(self, rows: int, dtype: torch.dtype, center: Tensor | None) -> Iterator[tuple[slice, Tile]]:
        """Yield some rows at a time less a center (D,), in a type; the next tile may overwrite the last."""
        ...

    def as_features(self) -> Any:
        """Return the rows as an estimator takes them."""
        ...


class DenseBatch:
    """Rows of a tensor (M, D): all of them, or those at some positions, (n,) int64."""

    def __init__(self, x: Tensor, rows: Tensor | None = None) -> None:
        self._x, self._rows = x, rows

    def __len__(self) -> int:
        """Return n."""
        return len(self._x if self._rows is None else self._rows)

    def __getitem__(self, here: slice) -> Tensor:
        """Return some of the rows, a view where all rows of the tensor are meant."""
        return self._x[here] if self._rows is None else self._x.index_select(0, self._rows[here])

    def part(self, here: slice) -> DenseBatch:
        """Return some of the rows, not yet gathered."""
        if self._rows is None:
            return DenseBatch(self._x[here])
        return DenseBatch(self._x, self._rows[here])

    def parts(self, numbers: int) -> Iterator[slice]:
        """Yield consecutive ranges of the rows, each of at most as many numbers, or of one row."""
        return slices((len(self), self._x.shape[1]), numbers)

    def at(self, positions: np.ndarray) -> DenseBatch:
        """Return the rows at some positions, (n,), not yet gathered."""
        chosen = torch.from_numpy(positions).to(self._x.device)
        return DenseBatch(self._x, chosen if self._rows is None else self._rows[chosen])

    def to(self, device: torch.device) -> DenseBatch:
        """Return the rows on a device, themselves where they are on it."""
        return self if self._x.device == device else DenseBatch(self[:].to(device))

    def joined(self, others: Sequence[Batch]) -> DenseBatch:
        """Return these rows, then those of other batches."""
        return DenseBatch(torch.cat([self[:], *(batch[:] for batch in others)])) if others else self

    def standardised(self, mean: np.ndarray, scale: np.ndarray) -> DenseBatch:
        """Return the rows x as (x − mean)/scale, formed in float64."""
        return DenseBatch(standardise(self[:], mean, scale))

    def moments(self, share: Tensor, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Return Σ s x and Σ s (x − Σ s x)², (D,) each, formed in a type."""
        x, s = self[:].to(dtype), share.to(dtype)
        center = s @ x
        squares = s @ (x - center).square_()
        return center.double().cpu().numpy(), squares.double().cpu().numpy()

    def tiles(
        self, rows: int, dtype: torch.dtype, center: Tensor | None
    ) -> Iterator[tuple[slice, DenseTile]]:
        """Yield some rows at a time less a center (D,), in a type; the next tile may overwrite the last."""
        memory: Tensor | None = None
        for start in range(0, len(self), rows):
            here = slice(start, start + rows)
            x = self[here]
            if center is not None:
                # the first tile is the longest
                memory = x.new_empty(x.shape, dtype=dtype) if memory is None else memory
                x = torch.sub(x, center, out=memory[: len(x)])
            yield here, DenseTile(x.to(dtype))

    def as_features(self) -> Array:
        """Return an array, or of a type or device that NumPy does not have a tensor."""
        x = self[:]
        return x if x.device.type != "cpu" or x.dtype == torch.bfloat16 else x.numpy()


class DenseTile:
    """Rows (R, D) of a tensor in the type in which they are computed with."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        """Return R."""
        return len(self.x)

    def times(self, W: Tensor, axis: int, memory: Tensor) -> Tensor:
        """Return x Wᵀ for W (C, D): (R, C), or where ``axis`` is 0 (C, R)."""
        if axis == 1:
            return torch.mm(self.x, W.t(), out=memory.view(len(self.x), len(W)))
        return torch.mm(W, self.x.t(), out=memory.view(len(W), len(self.x)))

    def add_product(self, g: Tensor, axis: int, total: Tensor) -> None:
        """Add gᵀ x to a total (C, D), g being (R, C) or (C, R)."""
        total.addmm_(g if axis == 0 else g.t(), self.x)


def computed_dtype(dtype: np.dtype | torch.dtype) -> np.dtype:
    """Return the type in which features are computed with: float32 for it and half types, else float64."""
    if isinstance(dtype, torch.dtype):
        return np.dtype(np.float32 if dtype.itemsize <= 4 else np.float64)
    return np.dtype(np.float32 if dtype.kind == "f" and dtype.itemsize <= 4 else np.float64)


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


def as_array(x: Tensor) -> np.ndarray:
    """Return a tensor on the CPU as an array: its memory, or of bfloat16, which NumPy lacks, float32."""
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


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
