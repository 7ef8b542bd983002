"""In which of its modes torch is at work, and the small wiring that every Function of ours shares.

    eager backward · create_graph · torch.func · forward mode · vmap · a graph being made · tensors of no data

A Function asks here before it takes a shortcut, so that no mode is ever answered with a silent zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from xent._core.functorch import followed as followed
from xent._core.functorch import has_tangent as has_tangent
from xent._core.functorch import is_frozen as is_frozen
from xent._core.functorch import thawed as thawed
from xent._core.ops import is_batched

DERIVED = (
    "in a graph, and on tensors without data, xent's losses have a plain backward and no forward mode, "
    "torch.func.grad or dual numbers: take that derivative of the eager loss"
)


_ORDINARY = (Tensor, torch.nn.Parameter)


def is_plain(*tensors: object) -> bool:
    """Return whether all are ordinary dense tensors with data, or None, and no transform of torch is at work.

    Where it holds, no other function of this module, and no check for tensors of several processes, finds
    anything.
    """
    if (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack()
    ):
        return False
    for t in tensors:
        if t is None:
            continue
        if type(t) not in _ORDINARY:
            return False
        assert isinstance(t, Tensor)
        if t.layout is not torch.strided or t.is_meta or t.is_inference():
            return False
        if torch._C._functorch.is_legacy_batchedtensor(t):
            return False
    return True


def is_opaque(*tensors: Tensor | None) -> bool:
    """Return whether a graph is being made, or a tensor has a shape but no data."""
    if torch.compiler.is_compiling():
        return True
    fake = torch._subclasses.fake_tensor.FakeTensor
    return any(t is not None and (t.is_meta or isinstance(t, fake)) for t in tensors)


def derived() -> bool:
    """Return whether a derivative is taken for which an operator would give a silent zero."""
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    vmap = torch._C._functorch.TransformType.Vmap
    return forward_ad._current_level >= 0 or any(t.key() != vmap for t in transforms)


# what torch.compiler.assume_constant_result does, without the second that importing torch's compiler takes
derived._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refuse_derivatives() -> None:
    """Raise where a derivative is taken that an operator of a graph does not have."""
    if derived():
        raise NotImplementedError(DERIVED)


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Raise where an operator of a graph, made before, now meets dual numbers."""
    if has_tangent(*tensors):
        raise NotImplementedError(DERIVED)


def transformed(*tensors: Tensor | None) -> bool:
    """Return whether torch.func is at work, or forward mode differentiates in any of the tensors."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return (
            True  # at these tensors or not: under a transform torch takes a Function with a rule of its own
        )
    return has_tangent(*tensors)


def batched(*tensors: Tensor | None) -> bool:
    """Return whether `vmap` has batched any of the tensors, at any level."""
    functorch = torch._C._functorch
    for t in tensors:
        while t is not None and not is_batched(t) and functorch.is_functorch_wrapped_tensor(t):
            t = functorch.get_unwrapped(t)
        if t is not None and is_batched(t):
            return True
    return False


def gradients_of(
    loss: Callable[..., Tensor], tensors: Sequence[Tensor | None], wants: Sequence[bool], upstream: Tensor
) -> tuple[Tensor | None, ...]:
    """Return ∂loss(*tensors)/∂tensors where wanted, inside a backward; differentiable where that is.

    Each is taken in a view of its own. Of the tensors themselves it would come with what reaches them
    through one another (tied weights) or through their hooks, which the backward around this one adds too.
    """
    with torch.enable_grad():
        views = [
            t.view_as(t) if want and t is not None else t
            for t, want in zip(tensors, (*wants, *(False,) * (len(tensors) - len(wants))), strict=True)
        ]
        value = loss(*views)
    leaves = [t for t, want in zip(views, wants, strict=False) if want and t is not None]
    found = torch.autograd.grad(value, leaves, upstream, create_graph=torch.is_grad_enabled())
    return spread(found, tuple(wants), len(wants))


def split(given: Sequence[Any], *lengths: int) -> tuple[Any, ...]:
    """Split `given` into groups of these lengths, and the rest."""
    groups, start = [], 0
    for length in lengths:
        groups.append(tuple(given[start : start + length]))
        start += length
    return *groups, tuple(given[start:])


def spread(
    given: tuple[Tensor | None, ...], wants: tuple[bool, ...], length: int
) -> tuple[Tensor | None, ...]:
    """Put the tensors of the wanted ones into their places, None elsewhere, `length` in all."""
    rest = iter(given)
    return tuple(next(rest) if want else None for want in wants) + (None,) * (length - len(wants))


class plain:
    """The sweep's own arithmetic: no graph, and no autocast of products whose types are already chosen."""

    def __init__(self, device: torch.device) -> None:
        self.no_grad = torch.no_grad() if torch.is_grad_enabled() else None
        kind = device.type
        self.autocast = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else None

    def __enter__(self) -> None:
        if self.no_grad is not None:
            self.no_grad.__enter__()
        if self.autocast is not None:
            self.autocast.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self.autocast is not None:
            self.autocast.__exit__(*error)
        if self.no_grad is not None:
            self.no_grad.__exit__(*error)
