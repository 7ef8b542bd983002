"""Right-hand sides of a symmetric linear map: their shapes, and the derivatives of the map.

    one        the parameter's shape, or flat (P,); for several parameters a tuple of their shapes
    several    columns (P, K), as a matrix of P rows always is read; or a stack (K, *shape) of at least three
               dimensions, which parameters that are vectors do not have

H v is linear in v and H is symmetric, so its transpose and its tangent are the same product, in every mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

MAX_AT_ONCE = 64  # right-hand sides in one sweep
Stacks: TypeAlias = tuple[Tensor, ...]  # (K, *shape), one for each parameter


class RightHandSides(NamedTuple):
    """The accepted shapes and the type of right-hand sides for given parameters."""

    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype

    def apply(self, v: Any, f: Callable[[Stacks], Stacks]) -> Any:
        """Apply a symmetric linear map to right-hand sides; the result has the shape of v."""
        layout, stacks = self._to_stacks(v)
        for stack in stacks:
            if stack.dtype != self.dtype:
                raise TypeError(
                    f"the right-hand side is {stack.dtype}, the head {self.dtype}: convert one of them"
                )
        chunks = zip(*(stack.split(MAX_AT_ONCE) for stack in stacks), strict=True)
        parts = [_Symmetric.apply(f, *chunk) for chunk in chunks]
        product = parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))
        if layout == "tuple":
            return tuple(stack[0] for stack in product)
        if layout == "one":
            return product[0][0]
        if layout == "many":
            return product[0]
        columns = [stack.flatten(1) for stack in product]
        flat = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
        return flat[0] if layout == "flat" else flat.t()

    def _to_stacks(self, v: Any) -> tuple[str, Stacks]:
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
            return "flat", self.split(v[None])
        if v.dim() == 2 and v.shape[0] == size:
            return "columns", self.split(v.t())
        if len(shapes) == 1 and v.dim() > 2 and v.shape[1:] == shapes[0]:
            return "many", (v,)
        accepted = [str(tuple(shapes[0]))] if len(shapes) == 1 and len(shapes[0]) > 1 else []
        accepted = [*accepted, f"({size},)", f"({size}, K)"]
        raise ValueError(
            f"the right-hand side must have shape {', '.join(accepted[:-1])} or {accepted[-1]}; "
            f"got {tuple(v.shape)}"
            + ("; a matrix is columns: transpose it" if v.shape[1:] == shapes[0] else "")
        )

    def split(self, flat: Tensor) -> Stacks:
        """Split (K, P) into one stack (K, *shape) for each parameter."""
        parts = flat.split([shape.numel() for shape in self.shapes], dim=1)
        return tuple(part.reshape(len(flat), *shape) for part, shape in zip(parts, self.shapes, strict=True))


class _Symmetric(torch.autograd.Function):
    """A symmetric linear map of stacks (K, *shape) with its derivatives in every mode."""

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
        flattened = [
            (stack.expand(size, *stack.shape) if dim is None else stack.movedim(dim, 0)).flatten(0, 1)
            for stack, dim in zip(stacks, in_dims[1:], strict=True)
        ]
        product = _Symmetric.apply(f, *flattened)
        return tuple(stack.unflatten(0, (size, len(stack) // size)) for stack in product), (0,) * len(product)
