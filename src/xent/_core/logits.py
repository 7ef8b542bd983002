"""The sources of logits: `DenseLogits` that exist, or a `LinearHead` z = W x + b whose logits never do.

    inner logits u → softcap k·tanh(u/k) → ÷ temperature → − log Q (of sampled classes) → z

Both answer the same verbs. `load` brings a chunk of rows into the type of the computation, `tile` writes
the z of a chunk over some classes, and a gradient `sink` pulls a tile of ∂L/∂u back:

    ∂L/∂x += G W        ∂L/∂W += Gᵀ x        ∂L/∂b += Gᵀ 1        G (R, T)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from xent._core.collectives import ClassGroup
from xent._core.ops import FunctionalOps, TileOps, cut, take

Rows: TypeAlias = slice | Tensor  # consecutive rows, or (R,) int64
Tile: TypeAlias = tuple[Tensor, Tensor | None]  # z and slope, (R, T)
Tangents: TypeAlias = tuple[Tensor | None, ...]  # one for each of Scores.tensors, of its shape


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half types are computed and accumulated in float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@dataclass(frozen=True)
class Transform:
    """u → z, elementwise; `gain` is what is constant of dz/du, the slope what is not."""

    softcap: float | None = None
    temperature: float = 1.0

    @property
    def gain(self) -> float:
        return 1.0 / self.temperature

    @property
    def curved(self) -> bool:
        return self.softcap is not None

    def apply(self, ops: TileOps, u: Tensor, buffers: TileBuffers) -> tuple[Tensor, Tensor | None]:
        """Return z (R, T) and, where the transform is curved and the slope is wanted, dz/du ÷ gain."""
        z, slope = u, None
        if self.softcap is not None:
            z = ops.tanh(ops.div(z, self.softcap))
            if buffers.wants_slope:
                slope = ops.one_minus_square(z, buffers.slope)
            z = ops.mul(z, self.softcap)
        if self.temperature != 1.0:
            z = ops.div(z, self.temperature)
        return z, slope

    def bend(self, z: Tensor, slope: Tensor) -> Tensor:
        """Return d²z/du² ÷ gain, from z and the slope: −(2/k)·tanh(u/k)·slope."""
        assert self.softcap is not None
        return z * (-2.0 * self.temperature / self.softcap**2) * slope


class TileBuffers(NamedTuple):
    """The memory for a tile of logits, and for its slopes where they are wanted."""

    z: Tensor | None  # (R, T)
    slope: Tensor | None  # (R, T)
    wants_slope: bool


class Logits(Protocol):
    """The logits of N rows over C classes, as a sweep uses them."""

    @property
    def transform(self) -> Transform: ...

    @property
    def log_q(self) -> Tensor | None: ...

    @property
    def make(self) -> Callable[..., Logits]:
        """The same scores of other tensors, which `make` does not hold."""
        ...

    @property
    def tensors(self) -> tuple[Tensor | None, ...]: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def depth(self) -> int: ...

    @property
    def least_resident_rows(self) -> int: ...

    @property
    def gradient_in_forward(self) -> bool: ...

    def bytes_per_row(self, gathered: bool) -> int: ...

    def bytes_per_class(self) -> int: ...

    @property
    def bytes_per_logit(self) -> int:
        """Bytes per logit of a tile while it is worked on, beside the tile itself."""
        ...

    def load(self, rows: Rows) -> Tensor: ...

    def select(self, kept: Tensor) -> Logits: ...

    def tile(self, ops: TileOps, loaded: Tensor, classes: slice, buffers: TileBuffers) -> Tile: ...

    def bend(self, z: Tensor, slope: Tensor, classes: slice) -> Tensor:
        """Return d²z/du² ÷ gain of a tile."""
        ...

    def entries(self, loaded: Tensor, classes: Tensor) -> Tensor: ...

    def push(
        self,
        ops: TileOps,
        rows: Rows,
        loaded: Tensor,
        tangents: Tangents,
        classes: slice,
        out: Tensor | None,
    ) -> Tensor: ...

    def accumulator(self, ops: TileOps, wants: tuple[bool, ...]) -> GradientAccumulator: ...


class GradientAccumulator(Protocol):
    """Accumulates tiles of ∂L/∂u; `finish` gives one gradient for each of `Scores.tensors`."""

    def add(self, rows: Rows, loaded: Tensor, classes: slice, g: Tensor) -> None: ...

    def crosses(self, tangents: Tangents) -> bool: ...

    def add_tangent(self, rows: Rows, tangents: Tangents, classes: slice, g: Tensor) -> None: ...

    def share(self, rows: Rows, ranks: ClassGroup) -> None: ...

    def finish(self, scale: Tensor | None) -> tuple[Tensor | None, ...]: ...


def _corrected(ops: TileOps, z: Tensor, log_q: Tensor | None, classes: slice) -> Tensor:
    """Return z − log Q of a tile."""
    return z if log_q is None else ops.sub(z, cut(log_q, classes).to(z.dtype))


def _before(z: Tensor, log_q: Tensor | None, classes: slice) -> Tensor:
    """Return the logits before the correction."""
    return z if log_q is None else z + cut(log_q, classes).to(z.dtype)


@dataclass(frozen=True)
class DenseLogits:
    """Scores that are given: u = input."""

    u: Tensor  # (N, C)
    log_q: Tensor | None = None  # (C,) subtracted from z; no gradient
    transform: Transform = Transform()

    @property
    def make(self) -> Callable[..., DenseLogits]:
        return partial(DenseLogits, transform=self.transform)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.u,) if self.log_q is None else (self.u, self.log_q)

    @property
    def shape(self) -> tuple[int, int]:
        return self.u.shape[0], self.u.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.u.dtype)

    @property
    def device(self) -> torch.device:
        return self.u.device

    @property
    def depth(self) -> int:
        """Multiplications behind one logit."""
        return 0

    @property
    def least_resident_rows(self) -> int:
        return 1  # nothing is multiplied, so a chunk of one row is as good as any

    @property
    def gradient_in_forward(self) -> bool:
        # a half gradient must not be rounded before it is scaled, and in float32 it would be twice the input
        return self.u.dtype == self.dtype

    def bytes_per_row(self, gathered: bool) -> int:
        return 8 * self.u.shape[1] if gathered else 0

    def bytes_per_class(self) -> int:
        return 0

    @property
    def bytes_per_logit(self) -> int:
        return 0

    def load(self, rows: Rows) -> Tensor:
        return take(self.u, rows)

    def select(self, kept: Tensor) -> DenseLogits:
        """Return the same with zeros in the rows that are not kept (N,), whatever they held."""
        return replace(self, u=torch.where(kept[:, None], self.u, 0.0))

    def tile(self, ops: TileOps, loaded: Tensor, classes: slice, buffers: TileBuffers) -> Tile:
        z, slope = self.transform.apply(ops, ops.copy(loaded[:, classes].to(self.dtype), buffers.z), buffers)
        return _corrected(ops, z, self.log_q, classes), slope

    def bend(self, z: Tensor, slope: Tensor, classes: slice) -> Tensor:
        return self.transform.bend(_before(z, self.log_q, classes), slope)

    def entries(self, loaded: Tensor, classes: Tensor) -> Tensor:
        """Return z of some classes (R, K) of each row."""
        z = loaded.gather(1, classes).to(self.dtype)
        return self.transform.apply(FunctionalOps(), z, TileBuffers(None, None, False))[0]

    def push(
        self,
        ops: TileOps,
        rows: Rows,
        loaded: Tensor,
        tangents: Tangents,
        classes: slice,
        out: Tensor | None,
    ) -> Tensor:
        """Return the tangent of u over a tile."""
        du, *_ = tangents
        assert du is not None
        return ops.copy(du[rows, classes].to(self.dtype), out)

    def accumulator(self, ops: TileOps, wants: tuple[bool, ...]) -> GradientAccumulator:
        return _DenseLogitsAccumulator(self, ops)


class _DenseLogitsAccumulator:
    def __init__(self, logits: DenseLogits, ops: TileOps) -> None:
        # every entry is written once, so it may be rounded at once
        self.dtype = logits.u.dtype
        self.nothing = (None,) * (len(logits.tensors) - 1)
        self.du = ops.total(logits.shape, self.dtype, logits.device, dim=1)

    def add(self, rows: Rows, loaded: Tensor, classes: slice, g: Tensor) -> None:
        self.du.put((rows, classes), g)

    def crosses(self, tangents: Tangents) -> bool:
        return False  # u̇ depends on no other tensor

    def add_tangent(self, rows: Rows, tangents: Tangents, classes: slice, g: Tensor) -> None:
        pass

    def share(self, rows: Rows, ranks: ClassGroup) -> None:
        pass  # each process has logits of its own

    def finish(self, scale: Tensor | None) -> tuple[Tensor | None, ...]:
        return self.du.finish(scale, self.dtype), *self.nothing


@dataclass(frozen=True)
class LinearHead:
    """Scores of a linear classifier on features: u = x Wᵀ + b."""

    x: Tensor  # (N, D)
    w: Tensor  # (C, D)
    b: Tensor | None  # (C,)
    log_q: Tensor | None = None  # (C,) subtracted from z; no gradient
    transform: Transform = Transform()
    product_dtype: torch.dtype | None = None  # to which products round their factors; None means dtype

    @property
    def make(self) -> Callable[..., LinearHead]:
        return partial(LinearHead, transform=self.transform, product_dtype=self.product_dtype)

    @property
    def factor_dtype(self) -> torch.dtype:
        return self.product_dtype or self.dtype

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.x, self.w, self.b) if self.log_q is None else (self.x, self.w, self.b, self.log_q)

    @property
    def shape(self) -> tuple[int, int]:
        return self.x.shape[0], self.w.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.x.dtype)

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def depth(self) -> int:
        return self.x.shape[1]

    @property
    def least_resident_rows(self) -> int:
        return 128  # fewer rows make the products slower than a fourth product costs

    @property
    def gradient_in_forward(self) -> bool:
        return True

    def bytes_per_row(self, gathered: bool) -> int:
        factor = self.factor_dtype
        rows = factor.itemsize * (gathered or self.x.dtype != factor)
        # products of half factors come out in their own type first
        return self.x.shape[1] * (
            rows + self.dtype.itemsize * gathered + factor.itemsize * (factor != self.dtype)
        )

    def bytes_per_class(self) -> int:
        factor = self.factor_dtype
        return self.w.shape[1] * factor.itemsize * ((self.w.dtype != factor) + (factor != self.dtype))

    @property
    def bytes_per_logit(self) -> int:
        return self.factor_dtype.itemsize if self.factor_dtype != self.dtype else 0

    def load(self, rows: Rows) -> Tensor:
        return take(self.x, rows).to(self.factor_dtype)

    def select(self, kept: Tensor) -> LinearHead:
        """Return the same with zeros in the rows that are not kept (N,), whatever they held."""
        return replace(self, x=torch.where(kept[:, None], self.x, 0.0))

    def tile(self, ops: TileOps, loaded: Tensor, classes: slice, buffers: TileBuffers) -> Tile:
        u = ops.product(loaded, cut(self.w, classes).to(self.factor_dtype).t(), self.dtype, buffers.z)
        if self.b is not None:
            u = ops.add(u, cut(self.b, classes).to(self.dtype))
        z, slope = self.transform.apply(ops, u, buffers)
        return _corrected(ops, z, self.log_q, classes), slope

    def bend(self, z: Tensor, slope: Tensor, classes: slice) -> Tensor:
        return self.transform.bend(_before(z, self.log_q, classes), slope)

    def entries(self, loaded: Tensor, classes: Tensor) -> Tensor:
        """Return z of some classes (R, K) of each row, whose weights are gathered: (R, K, D)."""
        factors = self.w[classes].to(self.factor_dtype)
        u = (factors @ loaded[:, :, None])[:, :, 0].to(self.dtype)
        if self.b is not None:
            u = u + self.b[classes].to(self.dtype)
        return self.transform.apply(FunctionalOps(), u, TileBuffers(None, None, False))[0]

    def push(
        self,
        ops: TileOps,
        rows: Rows,
        loaded: Tensor,
        tangents: Tangents,
        classes: slice,
        out: Tensor | None,
    ) -> Tensor:
        """Return the tangent of u over a tile: ẋ Wᵀ + x Ẇᵀ + ḃ, a term for each tangent that there is."""
        dx, dw, db, *_ = tangents
        v = None
        if dx is not None:
            x, w = take(dx, rows).to(self.factor_dtype), cut(self.w, classes).to(self.factor_dtype)
            v = ops.product(x, w.t(), self.dtype, out)
        if dw is not None:
            w = cut(dw, classes).to(self.factor_dtype).t()
            v = ops.product(loaded, w, self.dtype, out) if v is None else ops.add_product(v, loaded, w)
        if db is not None:
            b = db[classes].to(self.dtype)
            v = ops.copy(b.expand(loaded.shape[0], -1), out) if v is None else ops.add(v, b)
        assert v is not None
        return v

    def accumulator(self, ops: TileOps, wants: tuple[bool, ...]) -> GradientAccumulator:
        return _LinearHeadAccumulator(self, ops, wants)


class _LinearHeadAccumulator:
    """Accumulates in the type of the computation; a gradient is rounded to its own type once, at the end."""

    def __init__(self, logits: LinearHead, ops: TileOps, wants: tuple[bool, ...]) -> None:
        self.logits = logits
        self.dx, self.dw, self.db = (
            ops.total(tuple(tensor.shape), logits.dtype, logits.device)
            if want and tensor is not None
            else None
            for want, tensor in zip(wants[:3], logits.tensors[:3], strict=True)
        )

    def add(self, rows: Rows, loaded: Tensor, classes: slice, g: Tensor) -> None:
        factor = g.to(self.logits.factor_dtype)
        if self.dx is not None:
            self.dx.add_product(rows, factor, cut(self.logits.w, classes).to(factor.dtype))
        if self.dw is not None:
            self.dw.add_product(classes, factor.t(), loaded)
        if self.db is not None:
            self.db.add(classes, g.sum(0))

    def crosses(self, tangents: Tangents) -> bool:
        """Return whether `add_tangent` has anything to add."""
        dx, dw, *_ = tangents
        return (self.dx is not None and dw is not None) or (self.dw is not None and dx is not None)

    def add_tangent(self, rows: Rows, tangents: Tangents, classes: slice, g: Tensor) -> None:
        """Add the part of a tile of ∂L/∂u̇ that comes from u̇ = ẋ Wᵀ + x Ẇᵀ + ḃ as a function of x and W."""
        dx, dw, *_ = tangents
        factor = g.to(self.logits.factor_dtype)
        if self.dx is not None and dw is not None:
            self.dx.add_product(rows, factor, cut(dw, classes).to(factor.dtype))
        if self.dw is not None and dx is not None:
            self.dw.add_product(classes, factor.t(), take(dx, rows).to(factor.dtype))

    def share(self, rows: Rows, ranks: ClassGroup) -> None:
        """Sum the features' gradient over ranks, for rows to which all classes here have been added.

        It is sent in the background, so nothing may be added to these rows any more.
        """
        if self.dx is not None:
            self.dx.send(rows, ranks.sum_later)

    def finish(self, scale: Tensor | None) -> tuple[Tensor | None, ...]:
        found = tuple(
            None if total is None or tensor is None else total.finish(scale, tensor.dtype)
            for total, tensor in zip((self.dx, self.dw, self.db), self.logits.tensors[:3], strict=True)
        )
        return found + (None,) * (len(self.logits.tensors) - 3)
