"""Where logits come from: `Logits` that exist, or a `LinearHead` z = W x + b whose logits never do.

    inner logits u → softcap k·tanh(u/k) → ÷ temperature → z

Both answer the same verbs. `load` brings a chunk of rows into the type of the computation, `tile` writes
the z of a chunk over some classes, and a gradient `sink` pulls a tile of ∂L/∂u back:

    ∂L/∂x += G W        ∂L/∂W += Gᵀ x        ∂L/∂b += Gᵀ 1        G (R, T)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from xent.core.matmul import multiply_

Rows: TypeAlias = slice | Tensor  # consecutive rows, or (R,) int64


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

    def apply_(self, z: Tensor, slope: Tensor | None) -> None:
        """u (R, T) becomes z in place; where the transform is curved, `slope` receives dz/du ÷ gain."""
        if self.softcap is not None:
            z.div_(self.softcap).tanh_()
            if slope is not None:
                torch.mul(z, z, out=slope)
                slope.neg_().add_(1.0)
            z.mul_(self.softcap)
        if self.temperature != 1.0:
            z.div_(self.temperature)


class Scores(Protocol):
    """What a sweep asks of the logits of N rows over C classes."""

    @property
    def transform(self) -> Transform: ...

    @property
    def tensors(self) -> tuple[Tensor | None, ...]: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def least_resident_rows(self) -> int: ...

    @property
    def early(self) -> bool: ...

    def bytes_per_row(self, gathered: bool) -> int: ...

    def bytes_per_class(self) -> int: ...

    def load(self, rows: Rows) -> Tensor: ...

    def tile(self, loaded: Tensor, classes: slice, z: Tensor, slope: Tensor | None) -> None: ...

    def sink(self, wants: tuple[bool, ...], untouched_rows: bool) -> Sink: ...


class Sink(Protocol):
    """Accumulates tiles of ∂L/∂u; `finish` gives one gradient for each of `Scores.tensors`."""

    def add(self, rows: Rows, loaded: Tensor, classes: slice, g: Tensor) -> None: ...

    def finish(self, scale: Tensor | None) -> tuple[Tensor | None, ...]: ...


@dataclass(frozen=True)
class Logits:
    """Scores that are given: u = input."""

    u: Tensor  # (N, C)
    transform: Transform = Transform()

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
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
    def least_resident_rows(self) -> int:
        return 1  # nothing is multiplied, so a chunk of one row is as good as any

    @property
    def early(self) -> bool:
        # a half gradient must not be rounded before it is scaled, and in float32 it would be twice the input
        return self.u.dtype == self.dtype

    def bytes_per_row(self, gathered: bool) -> int:
        return 8 * self.u.shape[1] if gathered else 0

    def bytes_per_class(self) -> int:
        return 0

    def load(self, rows: Rows) -> Tensor:
        return self.u[rows]

    def tile(self, loaded: Tensor, classes: slice, z: Tensor, slope: Tensor | None) -> None:
        z.copy_(loaded[:, classes])
        self.transform.apply_(z, slope)

    def sink(self, wants: tuple[bool, ...], untouched_rows: bool) -> Sink:
        return _LogitsSink(self, untouched_rows)


class _LogitsSink:
    def __init__(self, scores: Logits, untouched_rows: bool) -> None:
        new = torch.zeros if untouched_rows else torch.empty
        self.du = new(scores.shape, dtype=scores.u.dtype, device=scores.device)

    def add(self, rows: Rows, loaded: Tensor, classes: slice, g: Tensor) -> None:
        self.du[rows, classes] = g

    def finish(self, scale: Tensor | None) -> tuple[Tensor | None, ...]:
        return (_finish(self.du, scale, self.du.dtype),)


@dataclass(frozen=True)
class LinearHead:
    """Scores of a linear classifier on features: u = x Wᵀ + b."""

    x: Tensor  # (N, D)
    w: Tensor  # (C, D)
    b: Tensor | None  # (C,)
    transform: Transform = Transform()

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.x, self.w, self.b

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
    def least_resident_rows(self) -> int:
        return 256  # fewer rows make the products slower than a fourth product costs

    @property
    def early(self) -> bool:
        return True

    def bytes_per_row(self, gathered: bool) -> int:
        copies = (
            gathered or self.x.dtype != self.dtype
        ) + gathered  # the rows, and their gradient to scatter
        return copies * self.x.shape[1] * self.dtype.itemsize

    def bytes_per_class(self) -> int:
        return 0 if self.w.dtype == self.dtype else self.w.shape[1] * self.dtype.itemsize

    def load(self, rows: Rows) -> Tensor:
        return self.x[rows].to(self.dtype)

    def tile(self, loaded: Tensor, classes: slice, z: Tensor, slope: Tensor | None) -> None:
        multiply_(z, loaded, self.w[classes].to(self.dtype).t(), accumulate=False)
        if self.b is not None:
            z.add_(self.b[classes])
        self.transform.apply_(z, slope)

    def sink(self, wants: tuple[bool, ...], untouched_rows: bool) -> Sink:
        return _HeadSink(self, wants)


class _HeadSink:
    """Accumulates in the type of the computation; a gradient is rounded to its own type once, at the end."""

    def __init__(self, scores: LinearHead, wants: tuple[bool, ...]) -> None:
        self.scores = scores
        new: Callable[[Tensor], Tensor] = lambda like: torch.zeros(  # noqa: E731
            like.shape, dtype=scores.dtype, device=scores.device
        )
        self.dx, self.dw, self.db = (
            new(tensor) if want and tensor is not None else None
            for want, tensor in zip(wants, scores.tensors, strict=True)
        )

    def add(self, rows: Rows, loaded: Tensor, classes: slice, g: Tensor) -> None:
        if self.dx is not None:
            w = self.scores.w[classes].to(self.scores.dtype)
            if isinstance(rows, slice):
                multiply_(self.dx[rows], g, w, accumulate=True)
            else:
                part = torch.empty_like(loaded)
                multiply_(part, g, w, accumulate=False)
                self.dx.index_add_(0, rows, part)
        if self.dw is not None:
            multiply_(self.dw[classes], g.t(), loaded, accumulate=True)
        if self.db is not None:
            self.db[classes] += g.sum(0)

    def finish(self, scale: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(
            None if gradient is None or tensor is None else _finish(gradient, scale, tensor.dtype)
            for gradient, tensor in zip((self.dx, self.dw, self.db), self.scores.tensors, strict=True)
        )


def _finish(gradient: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scale is not None:
        gradient.mul_(scale)
    return gradient.to(dtype)
