"""The product of two matrices in the type of the computation, whatever they are stored in.

    C = A B        ∂L/∂A = G Bᵀ        ∂L/∂B = Aᵀ G

Half types are multiplied and summed in float32, and what is saved for the derivatives is the half tensors
themselves. Each derivative is such a product again, so there are any number of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xent._autograd.transforms import is_opaque, plain
from xent._core.logits import compute_dtype


def project(x: Tensor, down: Tensor) -> Tensor:
    """Return x Aᵀ (N, R), float32 for half types, of x (N, D) and A (R, D); differentiable in both."""
    if is_opaque(x, down):  # where the compiler writes the derivatives
        kind = "cpu" if x.is_meta else x.device.type  # which the meta device is no type of
        with torch.autocast(kind, enabled=False):
            return x.to(compute_dtype(x.dtype)) @ down.to(compute_dtype(down.dtype)).t()
    product: Tensor = _Product.apply(x, down.t())
    return product


class _Product(torch.autograd.Function):
    """The product of (M, K) and (K, N), of the type of the computation."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with plain(a.device):
            return a.to(compute_dtype(a.dtype)) @ b.to(compute_dtype(b.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        of_a, of_b = ctx.needs_input_grad
        return (
            _Product.apply(g, b.t()).to(a.dtype) if of_a else None,
            _Product.apply(a.t(), g).to(b.dtype) if of_b else None,
        )

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, db: Tensor | None) -> Tensor | None:
        a, b = ctx.saved_tensors
        parts = [] if da is None else [_Product.apply(da, b)]
        parts += [] if db is None else [_Product.apply(a, db)]
        return sum(parts[1:], start=parts[0]) if parts else None
