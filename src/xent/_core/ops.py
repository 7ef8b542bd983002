"""The two bodies of a tile: in place on a workspace, or functional.

A sweep writes its tiles into one buffer and changes them in place. Under `torch.func.vmap` that is not
allowed (no `out=`, no accumulation into a tensor made outside, no question whose answer is data), so there
the same steps make new tensors. Every step that differs has its two forms here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from xent._core.matmul import multiply_

BATCHED = "processes that share the classes send tensors, not batches of them: take group= out of vmap"

At: TypeAlias = slice | Tensor | tuple[slice | Tensor, slice]


def cut(t: Tensor, at: slice) -> Tensor:
    """Return t[at], or t itself where that is all of it: a view costs as much as a small product."""
    return t if at.start == 0 and at.stop == t.shape[0] else t[at]


def take(t: Tensor, rows: slice | Tensor) -> Tensor:
    """Return t[rows]."""
    return cut(t, rows) if isinstance(rows, slice) else t[rows]


class TileOps(Protocol):
    """Steps that return their result; they may overwrite their first tensor, or write into `out`."""

    buffered: bool

    def product(self, a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor: ...

    def copy(self, a: Tensor, out: Tensor | None) -> Tensor: ...

    def one_minus_square(self, a: Tensor, out: Tensor | None) -> Tensor: ...

    def add(self, z: Tensor, y: Tensor) -> Tensor: ...

    def add_product(self, z: Tensor, a: Tensor, b: Tensor) -> Tensor: ...

    def subtract_scaled(self, z: Tensor, t: Tensor, c: Tensor) -> Tensor: ...

    def sub(self, z: Tensor, y: Tensor) -> Tensor: ...

    def affine(self, z: Tensor, factor: Tensor, less: Tensor) -> Tensor:
        """Return factor∘z − less, of numbers a row (R, 1)."""
        ...

    def difference(self, z: Tensor, y: Tensor, out: Tensor | None) -> Tensor:
        """Return z − y without overwriting z, in the memory of `out` where that is given."""
        ...

    def mul(self, z: Tensor, y: Tensor | float) -> Tensor: ...

    def div(self, z: Tensor, y: Tensor | float) -> Tensor: ...

    def exp(self, z: Tensor) -> Tensor: ...

    def softmax(self, z: Tensor, out: Tensor | None) -> Tensor:
        """Return the softmax of rows without overwriting z, in the memory of `out` where that is given."""
        ...

    def tanh(self, z: Tensor) -> Tensor: ...

    def scatter(self, z: Tensor, index: Tensor, value: Tensor | float) -> Tensor: ...

    def possible(self, mask: Tensor) -> bool: ...

    def all_at_least(self, t: Tensor, bound: float) -> bool:
        """Return whether every entry is known to be no lower than a bound."""
        ...

    def total(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, dim: int = 0
    ) -> Accumulator: ...


class Sent(Protocol):
    """A sum over processes on its way."""

    def wait(self) -> Any: ...


class Accumulator(Protocol):
    """A gradient in the making: a tensor to whose parts tiles are added."""

    def add(self, at: slice, value: Tensor) -> None: ...

    def put(self, at: At, value: Tensor) -> None: ...

    def place(self, rows: slice | Tensor) -> Tensor | None:
        """Return the memory of some rows, in which a value may be formed that is then `put` there."""
        ...

    def add_product(self, at: slice | Tensor, a: Tensor, b: Tensor) -> None: ...

    def send(self, at: slice | Tensor, add_up: Callable[[Tensor], Sent]) -> None: ...

    def finish(self, scale: Tensor | None, dtype: torch.dtype) -> Tensor: ...


class InPlaceOps:
    """The steps on buffers, or on new tensors where there are none; what the data hold may decide."""

    buffered = True

    def product(self, a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        if out is None:
            out = torch.empty(a.shape[0], b.shape[1], dtype=dtype, device=a.device)
        multiply_(out, a, b, accumulate=False)
        return out

    def copy(self, a: Tensor, out: Tensor | None) -> Tensor:
        return a.clone(memory_format=torch.contiguous_format) if out is None else out.copy_(a)

    def one_minus_square(self, a: Tensor, out: Tensor | None) -> Tensor:
        return torch.addcmul(a.new_ones(()), a, a, value=-1, out=out)

    def add(self, z: Tensor, y: Tensor) -> Tensor:
        return z.add_(y)

    def add_product(self, z: Tensor, a: Tensor, b: Tensor) -> Tensor:
        multiply_(z, a, b, accumulate=True)
        return z

    def subtract_scaled(self, z: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return z.addcmul_(t, c, value=-1)

    def sub(self, z: Tensor, y: Tensor) -> Tensor:
        return z.sub_(y)

    def affine(self, z: Tensor, factor: Tensor, less: Tensor) -> Tensor:
        return torch.addcmul(less.neg(), z, factor, out=z)

    def difference(self, z: Tensor, y: Tensor, out: Tensor | None) -> Tensor:
        return torch.sub(z, y, out=out)

    def mul(self, z: Tensor, y: Tensor | float) -> Tensor:
        return z.mul_(y)

    def div(self, z: Tensor, y: Tensor | float) -> Tensor:
        return z.div_(y)

    def exp(self, z: Tensor) -> Tensor:
        return z.exp_()

    def softmax(self, z: Tensor, out: Tensor | None) -> Tensor:
        return torch.softmax(z, 1) if out is None else torch.softmax(z, 1, out=out)

    def tanh(self, z: Tensor) -> Tensor:
        return z.tanh_()

    def scatter(self, z: Tensor, index: Tensor, value: Tensor | float) -> Tensor:
        return z.scatter_(1, index, value)

    def possible(self, mask: Tensor) -> bool:
        return bool(mask.any())

    def all_at_least(self, t: Tensor, bound: float) -> bool:
        return t.numel() == 0 or t.amin().item() >= bound

    def total(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, dim: int = 0
    ) -> Accumulator:
        return _InPlaceAccumulator(shape, dtype, device)


class _InPlaceAccumulator:
    """A tensor whose parts are written where they come first and added to later: no zeros are filled in.

    A sweep visits all rows and classes in slices that do not change, or picks rows by index.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.value = torch.empty(shape, dtype=dtype, device=device)
        self.begun: dict[int, int] | None = {}  # slices that hold something, start → stop; None: all do
        self.sent: list[tuple[slice | Tensor, Tensor, Sent]] = []  # that processes are adding up

    def add(self, at: slice, value: Tensor) -> None:
        if self._begin(at):
            cut(self.value, at).copy_(value)
        else:
            cut(self.value, at).add_(value)

    def put(self, at: At, value: Tensor) -> None:
        rows, classes = at if isinstance(at, tuple) else (at, None)
        if isinstance(rows, slice) and (classes is None or value.shape[1] == self.value.shape[1]):
            self._begin(rows)
            place = cut(self.value, rows)
            if place.data_ptr() != value.data_ptr():  # else it was formed there
                place.copy_(value)
        else:
            self._fill()
            self.value[at] = value.to(self.value.dtype)

    def place(self, rows: slice | Tensor) -> Tensor | None:
        return cut(self.value, rows) if isinstance(rows, slice) else None

    def add_product(self, at: slice | Tensor, a: Tensor, b: Tensor) -> None:
        if isinstance(at, slice):
            multiply_(cut(self.value, at), a, b, accumulate=not self._begin(at))
        else:
            self._fill()
            part = torch.empty(a.shape[0], b.shape[1], dtype=self.value.dtype, device=a.device)
            multiply_(part, a, b, accumulate=False)
            self.value.index_add_(0, at, part)

    def send(self, at: slice | Tensor, add_up: Callable[[Tensor], Sent]) -> None:
        """Sum parts, to which nothing more is added here, over all processes in the background."""
        if not self.begun:
            self._fill()  # a process without a class has added nothing
        part = take(self.value, at)
        self.sent.append((at, part, add_up(part)))

    def finish(self, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        self._fill()
        for at, part, work in self.sent:
            work.wait()
            if isinstance(at, Tensor):
                self.value[at] = part
        if scale is not None:
            self.value.mul_(scale if scale.dim() == 0 else scale[:, None])
        return self.value.to(dtype)

    def _begin(self, at: slice) -> bool:
        """Note that these rows are written; return whether they are for the first time."""
        if self.begun is None:
            return False
        stop = self.begun.get(at.start)
        assert stop in (None, at.stop), "slices of one sweep must not change"
        self.begun[at.start] = at.stop
        return stop is None

    def _fill(self) -> None:
        """Write zeros wherever nothing has been written."""
        if self.begun is None:
            return
        start = 0
        for begin, stop in sorted(self.begun.items()):
            assert begin >= start, "slices of one sweep must not overlap"
            if begin > start:
                self.value[start:begin].zero_()
            start = stop
        if start < self.value.shape[0]:
            self.value[start:].zero_()
        self.begun = None


IN_PLACE = InPlaceOps()


class FunctionalOps:
    """The steps for tensors that `vmap` has batched: new ones, and the general case at a choice."""

    buffered = False

    def product(self, a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        return (a @ b).to(dtype)

    def copy(self, a: Tensor, out: Tensor | None) -> Tensor:
        return a

    def one_minus_square(self, a: Tensor, out: Tensor | None) -> Tensor:
        return 1.0 - a * a

    def add(self, z: Tensor, y: Tensor) -> Tensor:
        return z + y

    def add_product(self, z: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return z + (a @ b).to(z.dtype)

    def subtract_scaled(self, z: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return z - t * c

    def sub(self, z: Tensor, y: Tensor) -> Tensor:
        return z - y

    def affine(self, z: Tensor, factor: Tensor, less: Tensor) -> Tensor:
        return z * factor - less

    def difference(self, z: Tensor, y: Tensor, out: Tensor | None) -> Tensor:
        return z - y

    def mul(self, z: Tensor, y: Tensor | float) -> Tensor:
        return z * y

    def div(self, z: Tensor, y: Tensor | float) -> Tensor:
        return z / y

    def exp(self, z: Tensor) -> Tensor:
        return z.exp()

    def softmax(self, z: Tensor, out: Tensor | None) -> Tensor:
        return torch.softmax(z, 1)

    def tanh(self, z: Tensor) -> Tensor:
        return z.tanh()

    def scatter(self, z: Tensor, index: Tensor, value: Tensor | float) -> Tensor:
        return z.scatter(1, index, value)

    def possible(self, mask: Tensor) -> bool:
        return True

    def all_at_least(self, t: Tensor, bound: float) -> bool:
        return False

    def total(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, dim: int = 0
    ) -> Accumulator:
        return _FunctionalAccumulator(shape, dtype, device, dim)


class _FunctionalAccumulator:
    """Sums kept apart by where they start along one dimension, joined at the end."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, dim: int) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.dim = dim
        self.selected: Tensor | None = None  # (M,) which of the rows there are parts of, None for all
        self.parts: dict[int, Tensor] = {}

    def add(self, at: slice, value: Tensor) -> None:
        start = at.start or 0
        self.parts[start] = self.parts[start] + value if start in self.parts else value

    def put(self, at: At, value: Tensor) -> None:
        rows, *rest = at if isinstance(at, tuple) else (at,)
        self._select(rows)
        self.parts[rest[0].start or 0 if rest else 0] = value

    def place(self, rows: slice | Tensor) -> Tensor | None:
        return None

    def add_product(self, at: slice | Tensor, a: Tensor, b: Tensor) -> None:
        self._select(at)
        self.add(slice(0, None) if isinstance(at, Tensor) else at, (a @ b).to(self.dtype))

    def send(self, at: slice | Tensor, add_up: Callable[[Tensor], Sent]) -> None:
        raise NotImplementedError(BATCHED)

    def _select(self, rows: slice | Tensor) -> None:
        if isinstance(rows, Tensor):  # a functional sweep visits all of its rows at once
            self.selected = rows

    def finish(self, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        if not self.parts:
            return torch.zeros(self.shape, dtype=dtype, device=self.device)
        parts = [self.parts[start] for start in sorted(self.parts)]
        value = parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.dim)
        if self.selected is not None:
            value = value.new_zeros(self.shape[0], *value.shape[1:]).index_copy(0, self.selected, value)
        if scale is not None:
            value = value * (scale if scale.dim() == 0 else scale[:, None])
        return value.to(dtype)


FUNCTIONAL = FunctionalOps()


def is_batched(t: Tensor) -> bool:
    """Return whether a tensor's outermost wrapper is vmap's (that of `is_grads_batched` is its own kind)."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(t) or functorch.is_legacy_batchedtensor(t)


def any_batched(*tensors: Tensor | None) -> bool:
    """Return whether any of the tensors' outermost wrapper is vmap's."""
    return any(t is not None and is_batched(t) for t in tensors)


def tile_ops(*, batched: bool) -> TileOps:
    """Return the functional body of a tile where `vmap` has batched a tensor, else the one in place."""
    return FUNCTIONAL if batched else IN_PLACE
