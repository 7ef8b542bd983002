"""Directions of rows, whatever their lengths:

    u = (x/s) / ‖x/s‖        s = max |x|        u = 0 of a row of zeros, which has no direction

Squares of x itself would overflow in float32 from 1e19 on and vanish below 1e-23. s is held constant, as u
does not depend on it; so autograd's derivative is (I − u uᵀ)/‖x‖, and 0 of a row of zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xent._core.logits import compute_dtype


def unit(rows: Tensor) -> Tensor:
    """Return rows (..., D) of length 1, or 0 where a row is all zeros, in the type of the computation."""
    x = rows.to(compute_dtype(rows.dtype))
    if x.shape[-1] == 0:
        return x
    size = x.detach().abs().amax(-1, keepdim=True)  # (..., 1)
    nothing = size == 0
    # a row of zeros is computed as one of ones, and then taken out: neither value nor slope is 0/0
    scaled = torch.where(nothing, 1.0, x / size.masked_fill(nothing, 1.0))
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return torch.where(nothing, 0.0, scaled / length)


def cosines(x: object, w: Tensor) -> Tensor:
    """Return the cosines (..., C) of features (..., D) with vectors (C, D), in their type."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"input must be a floating tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() == 0 or x.shape[-1] != w.shape[-1]:
        raise ValueError(f"input must be (..., {w.shape[-1]}), got {tuple(x.shape)}")
    return (unit(x) @ unit(w).mT).to(torch.promote_types(x.dtype, w.dtype))
