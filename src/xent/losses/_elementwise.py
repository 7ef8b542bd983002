"""The reduced loss of elements that do not depend on one another.

A loss is given twice: as a composition of torch's operations, which torch differentiates in every mode and
any number of times, and as a function that writes values and slopes of a piece into buffers. The second
serves a plain call on a CPU: the tensors are gone through once, in pieces that stay in the cache. All else
goes to the first: a second backward, `create_graph`, transforms, graphs, targets that require a gradient, and
losses that are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xent._autograd import transforms

PIECE = 1 << 18  # elements: a few tensors of them stay in a cache; smaller losses are no faster in pieces
BUFFERS = 6

_ORDINARY = (Tensor, torch.nn.Parameter)


class Into(NamedTuple):
    """Memory for the terms of one piece."""

    value: Tensor
    slope: Tensor | None
    """For the derivatives in x, times ``factor``; None where none are wanted."""
    factor: Tensor | float | None
    """The weights over the divisor; None is 1."""
    spare: Sequence[Tensor]
    """Buffers of the piece's shape: one for the weights, one for the value, four for the terms."""

    def scale(self, slope: Tensor) -> Tensor:
        """Multiply by the factor in place."""
        return slope if self.factor is None else slope.mul_(self.factor)


def loss(
    of: Callable[..., Tensor],
    write: Callable[..., None] | None,
    reduction: str,
    x: Tensor,
    t: Tensor,
    weight: Tensor | None = None,
    *factors: Tensor | None,
) -> Tensor:
    """Return the weighted and reduced loss of elements, of the type of x.

    Args:
        of: maps (x, t, *factors) to the loss of each element by differentiable operations.
        write: writes the same for a piece, given an `Into` and pieces of (x, t, *factors). None: no pieces.
        reduction: "none", "sum", "mean" or "batchmean".
        x: the input, of a floating type.
        t: the target, of that type. In pieces it takes no gradient.
        weight: a factor of each element, of a shape that broadcasts to that of x.
        factors: what else ``of`` takes, of such shapes.
    """
    given = tuple(None if f is None else f.to(x.dtype) for f in (weight, *factors))
    in_x, in_t = (torch.is_grad_enabled() and v.requires_grad for v in (x, t))
    if write is None or in_t or not _is_plain(x, t, *given):
        return _composed(of, reduction, x, t, *given)
    found = _in_pieces(write, reduction, in_x, x.detach(), t, *given)
    if found is None:
        return _composed(of, reduction, x, t, *given)
    return _Formed.apply(partial(_composed, of, reduction), found, x, t, *given) if in_x else found[0]


def _composed(
    of: Callable[..., Tensor],
    reduction: str,
    x: Tensor,
    t: Tensor,
    weight: Tensor | None = None,
    *factors: Tensor | None,
) -> Tensor:
    """Return the loss as a composition of torch's operations."""
    values = of(x, t, *factors)
    if weight is not None:
        values = values * weight
    if reduction == "none":
        return values
    total = values.sum()
    return total if reduction == "sum" else total / _divisor(reduction, values.numel(), x)


def _divisor(reduction: str, elements: int, x: Tensor) -> int:
    """Return the number that divides the sum over the elements."""
    if reduction == "batchmean":
        return max(1, x.shape[0] if x.dim() else 1)
    return max(1, elements) if reduction == "mean" else 1


def _is_plain(x: Tensor, t: Tensor, *factors: Tensor | None) -> bool:
    """Return whether nothing but a plain backward in x can follow: CPU tensors, no transform, no graph."""
    given = [f for f in (x, t, *factors) if f is not None]
    return (
        not transforms.is_opaque(*given)
        and x.numel() > PIECE
        and all(type(f) in _ORDINARY and f.device.type == "cpu" and f.dtype == x.dtype for f in given)
        and x.shape == t.shape
        and not transforms.transformed(*given)
        and not transforms.batched(*given)
        and not torch._C._len_torch_dispatch_stack()
    )


def _in_pieces(
    write: Callable[..., None],
    reduction: str,
    wants_gradient: bool,
    x: Tensor,
    t: Tensor,
    weight: Tensor | None,
    *factors: Tensor | None,
) -> tuple[Tensor, Tensor | None] | None:
    """Return the loss and, where wanted, its gradient in x; None where a term is not finite.

    No case of 0·∞ is looked for here: it makes a nan, and the composition knows what to do with it.
    """
    divisor = _divisor(reduction, x.numel(), x)
    losses = torch.empty_like(x) if reduction == "none" else None
    gradient = torch.empty_like(x) if wants_gradient else None
    pieces = _split(x, t, losses, gradient, weight, *factors)
    buffers, total = x.new_empty(BUFFERS, *pieces[0][0].shape).unbind(), 0.0
    with torch.no_grad():
        for a, b, value, slope, w, *others in pieces:
            if a.shape != buffers[0].shape:  # the last piece
                buffers = x.new_empty(BUFFERS, *a.shape).unbind()
            spare, factor = list(buffers), w
            if divisor > 1:
                factor = 1.0 / divisor if w is None else torch.div(w, divisor, out=spare.pop())
            value = spare.pop() if value is None else value
            write(Into(value, slope, factor, spare), a, b, *others)
            total += (value if w is None else value.mul_(w)).sum().item()
            if not math.isfinite(total):
                return None
    return x.new_tensor(total / divisor) if losses is None else losses, gradient


def _split(x: Tensor, *others: Tensor | None) -> list[tuple[Any, ...]]:
    """Return pieces of x, and of what broadcasts to its shape, side by side."""
    given = [x, *(None if t is None else t.expand_as(x) for t in others)]
    shape = x.shape
    if all(t is None or t.is_contiguous() for t in given):
        given, shape = [None if t is None else t.view(-1) for t in given], torch.Size([x.numel()])
    axis = max(range(len(shape)), key=shape.__getitem__)
    size = max(1, PIECE * shape[axis] // x.numel())
    parts = [t if t is None else t.split(size, axis) for t in given]
    return list(zip(*(repeat(None) if part is None else part for part in parts), strict=False))


class _Formed(torch.autograd.Function):
    """A loss whose gradient in x was formed beside it, for one plain backward."""

    @staticmethod
    def forward(
        ctx: Any,
        composed: Callable[..., Tensor],
        found: tuple[Tensor, Tensor],
        *tensors: Tensor | None,  # x, and what the loss was computed from beside it
    ) -> Tensor:
        loss, ctx.gradient = found
        ctx.composed = composed
        ctx.save_for_backward(*tensors)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # taken even where unused: it is what notices a freed graph, and tensors that have changed
        tensors = ctx.saved_tensors
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None or torch.is_grad_enabled():
            wants = ctx.needs_input_grad[2:]
            return None, None, *transforms.gradients_of(ctx.composed, tensors, wants, upstream)
        if transforms.batched(upstream) or transforms.transformed(upstream):
            gradient = gradient * upstream
        elif any(upstream.stride()) or upstream[(0,) * upstream.dim()].item() != 1.0:
            gradient.mul_(upstream)
        return None, None, gradient, *(None,) * (len(tensors) - 1)
