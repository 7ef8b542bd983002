"""The plain loss of a problem that one tile holds, in as few steps as it takes.

    m = max z    r = Σ_{j≠y} exp(z_j − m) + expm1(z_y − m)    −ℓ = log p_y = (z_y − m) − log1p(r)
    ∂ℓ/∂z_j = exp(z_j − m) / (1 + r)        ∂ℓ/∂z_y = expm1(log p_y)

These are the sweep's own formulas for class indices without options, over one tile of all rows and classes.
A few thousand logits cost less than choosing tiles, rows and targets does, so here nothing is chosen.
Whatever is not one plain backward of a mean or a sum on a CPU goes to the sweep, a second derivative too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from xent._autograd.transforms import batched, gradients_of, is_frozen, transformed
from xent._core.statistics import finite_base

LARGEST = 1 << 17  # logits: beyond, the sweep's tiles are no slower

General: TypeAlias = Callable[[str, Tensor, Tensor | None, Tensor | None, Tensor], Tensor]

_ORDINARY = (Tensor, torch.nn.Parameter)


def loss(
    x: Tensor,  # (N, D) features, or (N, C) logits where there is no w
    w: Tensor | None,  # (C, D)
    b: Tensor | None,  # (C,)
    y: object,  # (N,) int64, or another kind of target
    ignore_index: int | None,
    reduction: str,
    general: General,
) -> Tensor | None:
    """Mean or sum of the rows' losses; None where this is not the way. ``general`` is the way."""
    # nobody looking on first: a graph would be guarded by the size
    if (
        not isinstance(x, Tensor)
        or not isinstance(y, Tensor)
        or reduction not in ("mean", "sum")
        or not _plain(x, w, b, y)
        or not _fits(x, w, b, y)
    ):
        return None
    classes = x.shape[1] if w is None else w.shape[0]
    low, high = (bound.item() for bound in y.aminmax())
    if low < 0 or high >= classes or low <= (-100 if ignore_index is None else ignore_index) <= high:
        return None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, b)):
        if is_frozen(x, w, b, y):
            return None
        return _Small.apply(general, reduction, x, w, b, y)
    with torch.no_grad():
        _, log_p, _ = _exponentials(x, w, b, y)
        return _total(log_p, _scale(reduction, y)).to(x.dtype)


def _fits(x: Tensor, w: Tensor | None, b: Tensor | None, y: Tensor) -> bool:
    """Shapes that belong together, and not too large."""
    if x.dim() != 2 or y.dim() != 1 or y.shape[0] != x.shape[0]:
        return False
    if w is None:
        classes = x.shape[1]
    elif w.dim() != 2 or w.shape[1] != x.shape[1] or (b is not None and b.shape != w.shape[:1]):
        return False
    else:
        classes = w.shape[0]
    return 0 < y.shape[0] * classes <= LARGEST


def _plain(x: Tensor, w: Tensor | None, b: Tensor | None, y: Tensor) -> bool:
    """Ordinary CPU tensors of one full floating type, and nobody looking on."""
    given = [t for t in (x, w, b) if t is not None]
    return (
        not torch.compiler.is_compiling()
        and all(
            type(t) in _ORDINARY and t.device.type == "cpu" and t.layout is torch.strided for t in (*given, y)
        )
        and y.dtype == torch.int64
        and x.dtype in (torch.float32, torch.float64)
        and all(t.dtype == x.dtype for t in given)
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._len_torch_dispatch_stack()
    )


def _scale(reduction: str, y: Tensor) -> float:
    return 1.0 / y.shape[0] if reduction == "mean" else 1.0


def _total(log_p: Tensor, scale: float) -> Tensor:
    """Return −scale·Σ log p_y, where a loss of nothing is 0 and not −0."""
    return torch.rsub(log_p.sum(), 0.0, alpha=scale)


def _exponentials(x: Tensor, w: Tensor | None, b: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return exp(z − m) (N, C) with 0 at the target; log p_y and 1 + r, (N, 1) float64."""
    if w is None:
        z = x.clone(memory_format=torch.contiguous_format)
    else:
        z = torch.mm(x, w.t()) if b is None else torch.addmm(b, x, w.t())
    own = y[:, None]
    own_z = z.gather(1, own)
    z.scatter_(1, own, -torch.inf)  # the own class apart, so that a row beyond doubt keeps its digits
    m = finite_base(torch.maximum(z.amax(1, keepdim=True), own_z))
    z.sub_(m).exp_()
    distance = own_z.double().sub_(m)
    r = z.sum(1, keepdim=True, dtype=torch.float64).add_(torch.expm1(distance))
    return z, distance.sub_(torch.log1p(r)), r.add_(1.0)


class _Small(torch.autograd.Function):
    """The gradient is formed at once and kept for one plain backward."""

    @staticmethod
    def forward(
        ctx: Any,
        general: General,
        reduction: str,
        x: Tensor,
        w: Tensor | None,
        b: Tensor | None,
        y: Tensor,
    ) -> Tensor:
        scale = _scale(reduction, y)
        z, log_p, whole = _exponentials(x, w, b, y)
        z.mul_((scale / whole).to(z.dtype))
        z.scatter_(1, y[:, None], torch.expm1(log_p).mul_(scale).to(z.dtype))
        if w is None:
            ctx.gradient_in_forward = (z, None, None)
        else:
            _, _, wants_x, wants_w, wants_b, _ = ctx.needs_input_grad
            ctx.gradient_in_forward = (
                torch.mm(z, w) if wants_x else None,
                torch.mm(z.t(), x) if wants_w else None,
                z.sum(0) if wants_b else None,
            )
        ctx.general, ctx.reduction = general, reduction
        ctx.save_for_backward(x, w, b, y)
        return _total(log_p, scale).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # asked for even where unused: it is what notices a freed graph, and tensors that have changed
        tensors = ctx.saved_tensors
        wants = ctx.needs_input_grad[2:5]
        gradient_in_forward, ctx.gradient_in_forward = ctx.gradient_in_forward, None
        if gradient_in_forward is not None and not torch.is_grad_enabled():
            if batched(upstream) or transformed(upstream):  # more than one number
                gradient_in_forward = tuple(None if g is None else g * upstream for g in gradient_in_forward)
            elif upstream.item() != 1.0:
                gradient_in_forward = tuple(
                    None if g is None else g.mul_(upstream) for g in gradient_in_forward
                )
            return None, None, *gradient_in_forward, None
        with torch.autocast("cpu", enabled=False):  # as it was on the way forward
            found = gradients_of(partial(ctx.general, ctx.reduction), tensors, wants, upstream)
        return None, None, *found, None
