"""Right-hand sides of a symmetric map: in which shapes they come, and how torch follows them through it.

    one     the parameter's shape, or flat (P,); for several parameters a tuple of their shapes
    many    a matrix (P, K) is columns, whatever else it might be taken for; (K, *shape), a stack, has three
            dimensions at least: of parameters that are vectors themselves there is none

H v is linear in v, and H symmetric: its transpose and its tangent are the product again, in every mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

AT_ONCE = 64  # right-hand sides of one sweep, where the caller did not choose
Stacks: TypeAlias = tuple[Tensor, ...]  # (K, *shape), one for each parameter


class Sides(NamedTuple):
    """The parameters' shapes, and the type of their right-hand sides."""

    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype

    def through(self, v: Any, f: Callable[[Stacks], Stacks]) -> Any:
        """A symmetric map of right-hand sides, answered in the shape that they were given in."""
        given, stacks = self._stacked(v)
        for stack in stacks:
            if stack.dtype != self.dtype:
                raise TypeError(
                    f"the right-hand side is {stack.dtype}, the head {self.dtype}: convert one of them"
                )
        parts = [_Symmetric.apply(f, *some) for some in zip(*(s.split(AT_ONCE) for s in stacks), strict=True)]
        found = parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))
        if given == "tuple":
            return tuple(stack[0] for stack in found)
        if given == "one":
            return found[0][0]
        if given == "many":
            return found[0]
        columns = [stack.flatten(1) for stack in found]
        flat = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
        return flat[0] if given == "flat" else flat.t()

    def _stacked(self, v: Any) -> tuple[str, Stacks]:
        shapes = self.shapes
        if isinstance(v, tuple | list):
            if len(v) != len(shapes) or any(
                not isinstance(a, Tensor) or a.shape != s for a, s in zip(v, shapes, strict=True)
            ):
                raise ValueError(
                    f"a tuple must hold {', '.join(str(tuple(s)) for s in shapes)}; "
                    f"got {', '.join(str(tuple(getattr(a, 'shape', [type(a).__name__]))) for a in v)}"
                )
            return "tuple", tuple(a[None] for a in v)
        if not isinstance(v, Tensor):
            raise TypeError(
                f"the right-hand side must be a tensor, or a tuple of them; got {type(v).__name__}"
            )
        if v.layout is not torch.strided:
            raise TypeError("the right-hand side must be a dense tensor: pass its to_dense()")
        size = sum(shape.numel() for shape in shapes)
        if len(shapes) == 1 and v.shape == shapes[0]:
            return "one", (v[None],)
        if v.shape == (size,):
            return "flat", self.cut(v[None])
        if v.dim() == 2 and v.shape[0] == size:
            return "columns", self.cut(v.t())
        if len(shapes) == 1 and v.dim() > 2 and v.shape[1:] == shapes[0]:
            return "many", (v,)
        ways = [str(tuple(shapes[0]))] if len(shapes) == 1 and len(shapes[0]) > 1 else []
        ways = [*ways, f"({size},)", f"({size}, K)"]
        raise ValueError(
            f"the right-hand side must have shape {', '.join(ways[:-1])} or {ways[-1]}; got {tuple(v.shape)}"
            + ("; a matrix is columns: transpose it" if v.shape[1:] == shapes[0] else "")
        )

    def cut(self, flat: Tensor) -> Stacks:
        """(K, P) -> (K, *shape) each."""
        parts = flat.split([shape.numel() for shape in self.shapes], dim=1)
        return tuple(part.reshape(len(flat), *shape) for part, shape in zip(parts, self.shapes, strict=True))


class _Symmetric(torch.autograd.Function):
    """A symmetric linear map of stacks (K, *shape), of which torch sees no more than that."""

    @staticmethod
    def forward(f: Callable[[Stacks], Stacks], *stacks: Tensor) -> Stacks:
        return f(stacks) if len(stacks[0]) else tuple(torch.zeros_like(stack) for stack in stacks)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Stacks) -> None:
        ctx.f, *_ = inputs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if any(torch._C._functorch.is_legacy_batchedtensor(t) for t in upstream):
            raise NotImplementedError(
                "is_grads_batched (and vectorize=True) batches tensors in a way that an operator does not "
                "see: use torch.func.vmap, or pass the batch as a stack of right-hand sides"
            )
        return None, *_Symmetric.apply(ctx.f, *upstream)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor) -> Stacks:
        return _Symmetric.apply(ctx.f, *tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], f: Any, *stacks: Tensor) -> tuple[Stacks, tuple[int, ...]]:
        size = info.batch_size
        joined = [
            (stack.expand(size, *stack.shape) if dim is None else stack.movedim(dim, 0)).flatten(0, 1)
            for stack, dim in zip(stacks, in_dims[1:], strict=True)
        ]
        found = _Symmetric.apply(f, *joined)
        return tuple(stack.unflatten(0, (size, len(stack) // size)) for stack in found), (0,) * len(found)
