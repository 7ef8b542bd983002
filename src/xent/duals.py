"""Derivatives that forward mode and ``torch.func`` take in a tensor, which no flag of it shows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def has_tangent(*tensors: Tensor | None) -> bool:
    """Return whether forward mode is looking at any of the tensors."""
    return forward_ad._current_level >= 0 and any(
        t is not None and t.is_floating_point() and forward_ad.unpack_dual(t).tangent is not None
        for t in tensors
    )


def followed(*tensors: Tensor | None) -> bool:
    """Return whether `torch.func` or forward mode is to differentiate in any of the tensors, at any level."""
    if torch.compiler.is_compiling():  # where `modes.refuse_derivatives` asks
        return False
    functorch = torch._C._functorch
    for t in tensors:
        while t is not None and functorch.is_functorch_wrapped_tensor(t):
            if functorch.is_gradtrackingtensor(t) and (t.requires_grad or has_tangent(t)):
                return True
            t = functorch.get_unwrapped(t)
    return has_tangent(*tensors)
