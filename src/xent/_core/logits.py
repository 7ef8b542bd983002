"""The sources of logits: `DenseLogits` that exist, or a `LinearHead` u = x Wᵀ + b whose logits never do.

    inner logits u → `LogitMap` → z

Both answer the same calls. `load` brings a chunk of rows into the type of the computation, `tile` writes z
of a chunk over some classes, and a gradient accumulator pulls a tile of G = ∂L/∂u back:

    ∂L/∂x += G W        ∂L/∂W += Gᵀ x        ∂L/∂b += Gᵀ 1        G (R, T)

A head with a low-rank term has a second pair of factors, u = x Wᵀ + b + l Bᵀ with l = κ x Aᵀ (N, rank), which
has the same formulas. What becomes of ∂L/∂l is left to whoever made l.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from xent._core.collectives import ClassGroup
from xent._core.logit_map import IDENTITY, LogitMap, Rows, TileBuffers
from xent._core.ops import TileOps, cut, take
from xent._core.record import record

T = TypeVar("T")

Tile: TypeAlias = tuple[Tensor, Tensor | None]  # z and slope, (R, T)
Tangents: TypeAlias = tuple[Tensor | None, ...]  # one for each of Logits.leaves, of its shape


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which one is computed and accumulated: float32 for half types."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class Loaded(NamedTuple):
    """A chunk of rows that a sweep works on."""

    x: Tensor  # (R, D) features or (R, C) logits
    map: LogitMap  # of these rows
    low: Tensor | None = None  # (R, rank), the features' low-rank image


class Logits(Protocol):
    """The logits of N rows over C classes, as a sweep uses them."""

    @property
    def map(self) -> LogitMap: ...

    @property
    def leaves(self) -> tuple[Tensor | None, ...]:
        """The tensors in which the logits are differentiable."""
        ...

    @property
    def of_rows(self) -> tuple[bool, ...]:
        """A flag for each leaf: whether it has a row for each of the N."""
        ...

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def depth(self) -> int:
        """Multiplications behind one logit."""
        ...

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

    def load(self, rows: Rows) -> Loaded: ...

    def select(self, kept: Tensor) -> Logits: ...

    def tile(
        self, ops: TileOps, loaded: Loaded, classes: slice, buffers: TileBuffers, *, borrow: bool = False
    ) -> Tile:
        """Return z and slope; with ``borrow``, z may be a caller's tensor, which nobody may write to."""
        ...

    def inner(self, ops: TileOps, loaded: Loaded, classes: slice, out: Tensor | None) -> Tensor:
        """Return u (R, T) of any type, which may be a view of a caller's tensor."""
        ...

    def entries(self, loaded: Loaded, classes: Tensor) -> Tensor:
        """Return z of some classes (R, K) of each row."""
        ...

    def push(
        self,
        ops: TileOps,
        rows: Rows,
        loaded: Loaded,
        tangents: Tangents,
        classes: slice,
        out: Tensor | None,
    ) -> Tensor:
        """Return the tangent of u over a tile."""
        ...

    def pull_back(self, loaded: Loaded, g: Tensor, wants: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """Return the gradients of the leaves from G (R, C) of all rows and classes at once."""
        ...

    def accumulator(self, ops: TileOps, wants: tuple[bool, ...]) -> GradientAccumulator: ...


class GradientAccumulator(Protocol):
    """An accumulator of tiles of ∂L/∂u; `finish` gives one gradient for each of `Logits.leaves`."""

    def add(
        self, rows: Rows, loaded: Loaded, classes: slice, g: Tensor, factor: Tensor | None = None
    ) -> None:
        """Add a tile of G; ``factor`` is G in the type in which products take it, where it is there."""
        ...

    def crosses(self, tangents: Tangents) -> bool: ...

    def add_tangent(self, rows: Rows, tangents: Tangents, classes: slice, g: Tensor) -> None: ...

    def share(self, rows: Rows, ranks: ClassGroup) -> None: ...

    def place(self, rows: Rows) -> Tensor | None:
        """Return the memory of some rows of the gradient, if G of all classes may be formed in it."""
        ...

    def finish(self, scale: Tensor | None) -> tuple[Tensor | None, ...]: ...


@record
class DenseLogits:
    """Logits that are given: u = input."""

    u: Tensor  # (N, C)
    map: LogitMap = IDENTITY

    of_rows = (True,)

    @property
    def leaves(self) -> tuple[Tensor | None, ...]:
        return (self.u,)

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

    def load(self, rows: Rows) -> Loaded:
        return Loaded(take(self.u, rows), self.map.rows(rows))

    def select(self, kept: Tensor) -> DenseLogits:
        """Return the same with zeros in the rows that are not kept (N,), whatever they held."""
        return replace(self, u=torch.where(kept[:, None], self.u, 0.0))

    def tile(
        self, ops: TileOps, loaded: Loaded, classes: slice, buffers: TileBuffers, *, borrow: bool = False
    ) -> Tile:
        x = self.inner(ops, loaded, classes, None)
        if borrow and x.dtype == self.dtype and loaded.map.is_identity:
            return x, None
        return loaded.map.apply(ops, ops.copy(x.to(self.dtype), buffers.z), classes, buffers)

    def inner(self, ops: TileOps, loaded: Loaded, classes: slice, out: Tensor | None) -> Tensor:
        x = loaded.x
        return x if classes.stop - classes.start == x.shape[1] else x[:, classes]

    def entries(self, loaded: Loaded, classes: Tensor) -> Tensor:
        return loaded.map.at(loaded.x.gather(1, classes).to(self.dtype))

    def push(
        self,
        ops: TileOps,
        rows: Rows,
        loaded: Loaded,
        tangents: Tangents,
        classes: slice,
        out: Tensor | None,
    ) -> Tensor:
        (du,) = tangents
        assert du is not None
        return ops.copy(du[rows, classes].to(self.dtype), out)

    def pull_back(self, loaded: Loaded, g: Tensor, wants: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        return (g,)

    def accumulator(self, ops: TileOps, wants: tuple[bool, ...]) -> GradientAccumulator:
        return _DenseLogitsAccumulator(self, ops)


class _DenseLogitsAccumulator:
    def __init__(self, logits: DenseLogits, ops: TileOps) -> None:
        # every entry is written once, so it may be rounded at once
        self.dtype, self.computed = logits.u.dtype, logits.dtype
        self.du = ops.total(logits.shape, self.dtype, logits.device, dim=1)

    def add(
        self, rows: Rows, loaded: Loaded, classes: slice, g: Tensor, factor: Tensor | None = None
    ) -> None:
        self.du.put((rows, classes), g)

    def crosses(self, tangents: Tangents) -> bool:
        return False  # u̇ depends on no other tensor

    def add_tangent(self, rows: Rows, tangents: Tangents, classes: slice, g: Tensor) -> None:
        pass

    def share(self, rows: Rows, ranks: ClassGroup) -> None:
        pass  # each process has logits of its own

    def place(self, rows: Rows) -> Tensor | None:
        return self.du.place(rows) if self.dtype == self.computed else None

    def finish(self, scale: Tensor | None) -> tuple[Tensor | None, ...]:
        return (self.du.finish(scale, self.dtype),)


@record
class LinearHead:
    """Logits of a linear classifier on features: u = x Wᵀ + b, and + l Bᵀ where there is a low-rank term."""

    x: Tensor  # (N, D)
    w: Tensor  # (C, D)
    b: Tensor | None  # (C,)
    map: LogitMap = IDENTITY
    product_dtype: torch.dtype | None = None  # to which products round their factors; None means dtype
    low: Tensor | None = None  # l, (N, rank)
    up: Tensor | None = None  # B, (C, rank)

    @property
    def factor_dtype(self) -> torch.dtype:
        return self.product_dtype or self.dtype

    @property
    def leaves(self) -> tuple[Tensor | None, ...]:
        whole = self.x, self.w, self.b
        return whole if self.up is None else (*whole, self.low, self.up)

    @property
    def of_rows(self) -> tuple[bool, ...]:
        return (True, False, False) if self.up is None else (True, False, False, True, False)

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
        return self.x.shape[1] + self.rank

    @property
    def rank(self) -> int:
        return 0 if self.up is None else self.up.shape[1]

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
        return self.depth * (rows + self.dtype.itemsize * gathered + factor.itemsize * (factor != self.dtype))

    def bytes_per_class(self) -> int:
        factor = self.factor_dtype
        return self.depth * factor.itemsize * ((self.w.dtype != factor) + (factor != self.dtype))

    @property
    def bytes_per_logit(self) -> int:
        return self.factor_dtype.itemsize if self.factor_dtype != self.dtype else 0

    def load(self, rows: Rows) -> Loaded:
        low = None if self.low is None else take(self.low, rows).to(self.factor_dtype)
        return Loaded(take(self.x, rows).to(self.factor_dtype), self.map.rows(rows), low)

    def select(self, kept: Tensor) -> LinearHead:
        """Return the same with zeros in the rows that are not kept (N,), whatever they held."""
        low = None if self.low is None else torch.where(kept[:, None], self.low, 0.0)
        return replace(self, x=torch.where(kept[:, None], self.x, 0.0), low=low)

    def tile(
        self, ops: TileOps, loaded: Loaded, classes: slice, buffers: TileBuffers, *, borrow: bool = False
    ) -> Tile:
        return loaded.map.apply(ops, self.inner(ops, loaded, classes, buffers.z), classes, buffers)

    def inner(self, ops: TileOps, loaded: Loaded, classes: slice, out: Tensor | None) -> Tensor:
        u = ops.product(loaded.x, cut(self.w, classes).to(self.factor_dtype).t(), self.dtype, out)
        if loaded.low is not None and self.up is not None:
            u = ops.add_product(u, loaded.low, cut(self.up, classes).to(self.factor_dtype).t())
        return u if self.b is None else ops.add(u, cut(self.b, classes).to(self.dtype))

    def entries(self, loaded: Loaded, classes: Tensor) -> Tensor:
        factors = self.w[classes].to(self.factor_dtype)  # (R, K, D)
        u = (factors @ loaded.x[:, :, None])[:, :, 0].to(self.dtype)
        if loaded.low is not None and self.up is not None:
            factors = self.up[classes].to(self.factor_dtype)
            u = u + (factors @ loaded.low[:, :, None])[:, :, 0].to(self.dtype)
        if self.b is not None:
            u = u + self.b[classes].to(self.dtype)
        return loaded.map.at(u)

    def push(
        self,
        ops: TileOps,
        rows: Rows,
        loaded: Loaded,
        tangents: Tangents,
        classes: slice,
        out: Tensor | None,
    ) -> Tensor:
        """Return ẋ Wᵀ + x Ẇᵀ + ḃ (+ l̇ Bᵀ + l Ḃᵀ) of a tile, a term for each tangent that there is."""
        db, v = tangents[2], None
        for (x, w), (dx, dw) in zip(self._factors(loaded), _of_factors(tangents), strict=True):
            for left, right in (
                (None if dx is None else take(dx, rows).to(self.factor_dtype), w),
                (x, dw),
            ):
                if left is None or right is None:
                    continue
                factor = cut(right, classes).to(self.factor_dtype).t()
                v = (
                    ops.product(left, factor, self.dtype, out)
                    if v is None
                    else ops.add_product(v, left, factor)
                )
        if db is not None:
            b = db[classes].to(self.dtype)
            v = ops.copy(b.expand(loaded.x.shape[0], -1), out) if v is None else ops.add(v, b)
        assert v is not None
        return v

    def pull_back(self, loaded: Loaded, g: Tensor, wants: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        factor = g.to(self.factor_dtype)
        (of_x, of_w), *of_low = (
            (
                torch.mm(factor, w.to(factor.dtype)) if wants_x else None,
                torch.mm(factor.t(), x) if wants_w else None,
            )
            for (x, w), (wants_x, wants_w) in zip(self._factors(loaded), _of_factors(wants), strict=True)
        )
        return of_x, of_w, g.sum(0) if wants[2] else None, *(t for pair in of_low for t in pair)

    def _factors(self, loaded: Loaded) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the factors (x, W) and, where there is a low-rank term, (l, B), of a chunk's rows."""
        yield loaded.x, self.w
        if loaded.low is not None and self.up is not None:
            yield loaded.low, self.up

    def accumulator(self, ops: TileOps, wants: tuple[bool, ...]) -> GradientAccumulator:
        return _LinearHeadAccumulator(self, ops, wants)


def _of_factors(values: tuple[T, ...]) -> Iterator[tuple[T, T]]:
    """Yield a value for each of the leaves by pairs of factors: those of x and W, of l and B."""
    yield values[0], values[1]
    if len(values) > 3:
        yield values[3], values[4]


class _LinearHeadAccumulator:
    """Accumulators in the type of the computation; a gradient is rounded to its own type once, at the end."""

    def __init__(self, logits: LinearHead, ops: TileOps, wants: tuple[bool, ...]) -> None:
        self.logits = logits
        self.totals = tuple(
            ops.total(tuple(tensor.shape), logits.dtype, logits.device)
            if want and tensor is not None
            else None
            for want, tensor in zip(wants, logits.leaves, strict=True)
        )

    def add(
        self, rows: Rows, loaded: Loaded, classes: slice, g: Tensor, factor: Tensor | None = None
    ) -> None:
        factor, db = g.to(self.logits.factor_dtype) if factor is None else factor, self.totals[2]
        for (x, w), (dx, dw) in zip(self.logits._factors(loaded), _of_factors(self.totals), strict=True):
            if dx is not None:
                dx.add_product(rows, factor, cut(w, classes).to(factor.dtype))
            if dw is not None:
                dw.add_product(classes, factor.t(), x)
        if db is not None:
            db.add(classes, g.sum(0))

    def crosses(self, tangents: Tangents) -> bool:
        """Return whether `add_tangent` has anything to add."""
        return any(
            (of_x is not None and dw is not None) or (of_w is not None and dx is not None)
            for (of_x, of_w), (dx, dw) in zip(_of_factors(self.totals), _of_factors(tangents), strict=True)
        )

    def add_tangent(self, rows: Rows, tangents: Tangents, classes: slice, g: Tensor) -> None:
        """Add the part of a tile of ∂L/∂u̇ that comes from u̇ = ẋ Wᵀ + x Ẇᵀ + ḃ as a function of x and W."""
        factor = g.to(self.logits.factor_dtype)
        for (of_x, of_w), (dx, dw) in zip(_of_factors(self.totals), _of_factors(tangents), strict=True):
            if of_x is not None and dw is not None:
                of_x.add_product(rows, factor, cut(dw, classes).to(factor.dtype))
            if of_w is not None and dx is not None:
                of_w.add_product(classes, factor.t(), take(dx, rows).to(factor.dtype))

    def share(self, rows: Rows, ranks: ClassGroup) -> None:
        """Sum the features' gradient over ranks, for rows to which all classes here have been added.

        It is sent in the background, so nothing may be added to these rows any more.
        """
        for of_x, _ in _of_factors(self.totals):
            if of_x is not None:
                of_x.send(rows, ranks.sum_later)

    def place(self, rows: Rows) -> Tensor | None:
        return None

    def finish(self, scale: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(
            None if total is None or tensor is None else total.finish(scale, tensor.dtype)
            for total, tensor in zip(self.totals, self.logits.leaves, strict=True)
        )
