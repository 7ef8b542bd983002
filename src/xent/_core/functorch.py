"""The state of a tensor that no flag shows: derivatives by forward mode or ``torch.func``, inference mode."""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

T = TypeVar("T")


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


def is_frozen(*tensors: object) -> bool:
    """Return whether any of the tensors was made under inference mode, and a graph may be recorded here.

    Autograd cannot save such a tensor. One that requires grad is left to torch's own error.
    """
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return False
    return any(isinstance(t, Tensor) and t.is_inference() and not t.requires_grad for t in tensors)


def thawed(tensor: T) -> T:
    """Return an ordinary copy of a tensor that `is_frozen`; anything else as it is.

    A view would share its numbers without a version counter, which notices changes before the backward.
    """
    return cast(T, tensor.clone()) if isinstance(tensor, Tensor) and is_frozen(tensor) else tensor
