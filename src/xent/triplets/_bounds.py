"""Margins, and the bounds on a row's cross-entropy that its triplets give.

hinge(log C) ≤ smooth(log C) ≤ tight(log(C−1)) ≤ CE ≤ Σ softplus(m)        Jensen, with 1/C at softplus(0)
softplus(max m) ≤ CE ≤ softplus(max m + log(C−1))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xent._arguments.call import Call, resolve_logits
from xent._arguments.options import Options
from xent._core.logit_map import TileBuffers
from xent._core.logits import DenseLogits, LinearHead, compute_dtype
from xent._core.ops import FunctionalOps
from xent._core.validators import ReductionName
from xent.triplets._arguments import (
    class_indices,
    join_parts,
    no_autocast,
    report_options,
    report_rows,
    resolve_plain_head,
)
from xent.triplets._sweep import Bounds, chain


def margins(
    input: Tensor, target: Tensor, *, ignore_index: int | None = -100, check_targets: bool | None = None
) -> Tensor:
    r"""Return the margins ``m_j = z_j − z_y`` of each row, how far each rival's logit is above the target's.

    A rival is any class j other than the target class y. The margins are differentiable any number of times,
    under autograd, ``torch.func`` and forward mode.

    Args:
        input: logits z, (C,), (N, C) or (N, C, d1, ...).
        target: class indices y of any integer type, (), (N,) or (N, d1, ...).
        ignore_index: rows with this target have margins of 0. None means −100.
        check_targets: as in :func:`xent.cross_entropy`.

    Returns:
        (C − 1,), (N, C − 1) or (N, d1, ..., C − 1), in nats: the classes in order, without the target class.
        The type is that of ``input``, float32 for half types.

    Raises:
        IndexError: a target outside 0..C−1; the message names row and value.
        ValueError, TypeError: as :func:`xent.cross_entropy`; also a target that is not one class a row.

    Example:
        >>> import torch, xent
        >>> xent.triplets.margins(torch.tensor([[3.0, 1.0, 7.0]]), torch.tensor([1]))
        tensor([[2., 6.]])
    """
    options = Options.of(ignore_index=ignore_index, reduction="none", check_targets=check_targets)
    return _margins(resolve_logits(options, input, class_indices(target)), options.target.ignored)


def linear_margins(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = -100,
    check_targets: bool | None = None,
) -> Tensor:
    r"""Return the margins of each row under a linear classifier; they take as much memory as its logits.

    Args:
        input: features x, (..., D).
        linear_weight: W, (C, D), or (C, d1, ..., D).
        linear_bias: b, (C,), or (C, d1, ...).
        target: class indices of any integer type, (..., d1, ...).
        ignore_index, check_targets: as in :func:`margins`.

    Returns:
        (..., d1, ..., C − 1), as :func:`margins`.

    Raises:
        IndexError, ValueError, TypeError: as :func:`margins`.

    Example:
        >>> import torch, xent
        >>> x, w = torch.tensor([[1.0, 2.0]]), torch.eye(2)
        >>> xent.triplets.linear_margins(x, w, torch.tensor([0]))
        tensor([[1.]])
    """
    options = Options.of(ignore_index=ignore_index, reduction="none", check_targets=check_targets)
    call = resolve_plain_head(options, input, linear_weight, linear_bias, target)
    return _margins(call, options.target.ignored)


def _margins(call: Call, ignored: int) -> Tensor:
    assert isinstance(call.target, Tensor)
    ops, margins_by_part = FunctionalOps(), []
    n = call.rows_shape.numel() // len(call.problems)
    columns = call.target.reshape(n, len(call.problems)).unbind(1)
    for part, y in zip(call.problems, columns, strict=True):
        logits = part.logits
        assert isinstance(logits, DenseLogits | LinearHead)
        classes = logits.shape[1]
        counted = y != ignored
        logits = logits.select(counted)
        with no_autocast(logits.device):
            z, _ = logits.tile(
                ops, logits.load(slice(0, n)), slice(0, classes), TileBuffers(None, None, False)
            )
        inside = (y >= 0) & (y < classes)
        y = torch.where(inside, y, 0)[:, None]
        rivals = torch.arange(classes - 1, device=z.device).expand(n, -1)
        m = z.gather(1, rivals + (rivals >= y)) - z.gather(1, y)
        m = torch.where(inside[:, None], m, torch.nan)
        margins_by_part.append(torch.where(counted[:, None], m, torch.zeros_like(m)))
    return join_parts(call, margins_by_part)


def bounds(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int | None = -100,
    reduction: ReductionName = "none",
    sample_weight: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    check_targets: bool | None = None,
) -> Bounds:
    r"""Return lower and upper bounds on the cross-entropy of each row by triplet losses, in nats.

    ``hinge ≤ smooth ≤ tight ≤ loss ≤ union`` and ``hardest_low ≤ loss ≤ hardest_high``. :class:`Bounds` has
    the formulas, :doc:`/explanation/triplets` their derivation. The first three can lie far below the loss:
    they average over the rivals, while cross-entropy follows the hardest rival. With one class there is no
    triplet, and all fields are 0.

    Args:
        input: logits, (C,), (N, C) or (N, C, d1, ...). A rival masked by −inf adds nothing.
        target: class indices of any integer type, (), (N,) or (N, d1, ...).
        reduction: ``"none"``, ``"mean"`` or ``"sum"`` of each field, as in :func:`xent.cross_entropy`. The
            order of the fields stays.
        sample_weight: as in :func:`xent.cross_entropy`. Negative weights break the order of the fields.
        ignore_index, softcap, temperature, check_targets: as in :func:`xent.cross_entropy`.

    Returns:
        A :class:`Bounds` with fields of shape (), (N,) or (N, d1, ...), float32 or float64, without gradient.
        The losses for training are :func:`triplet_loss`, :func:`smooth_triplet_loss` and
        :func:`xent.cross_entropy`.

    Raises:
        IndexError: a target outside 0..C−1; the message names row and value.
        ValueError, TypeError: as :func:`xent.cross_entropy`; also a target that is not one class a row.
        NotImplementedError: a call under ``torch.func.grad``, in forward mode or in a compiled graph.

    Example:
        >>> import torch, xent
        >>> found = xent.triplets.bounds(torch.zeros(1, 10), torch.tensor([3]))
        >>> round(found.smooth.item(), 6), round(found.loss.item(), 6)
        (2.158106, 2.302585)
    """
    reducing: dict[str, Any] = {"reduction": reduction, "sample_weight": sample_weight}
    options = report_options(ignore_index, softcap, temperature, check_targets, **reducing)
    return _bounds(resolve_logits(options, input, class_indices(target)))


def linear_bounds(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: ReductionName = "none",
    sample_weight: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    check_targets: bool | None = None,
    product_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> Bounds:
    r"""Return the bounds on the cross-entropy of a linear classifier from its features, without storing the
    logits.

    The value is :func:`bounds` of ``input @ linear_weight.T + linear_bias``. Like the loss itself it costs
    one matrix product and one exponential a logit.

    Args:
        input, linear_weight, linear_bias: as in :func:`xent.linear_cross_entropy`.
        logit_scale, product_dtype, memory_budget: as in :func:`xent.linear_cross_entropy`.
        target, ignore_index, reduction, sample_weight: as in :func:`bounds`.
        softcap, temperature, check_targets: as in :func:`bounds`.

    Returns:
        A :class:`Bounds`, as :func:`bounds`.

    Raises:
        IndexError, ValueError, TypeError, NotImplementedError: as :func:`bounds`.

    Example:
        >>> import torch, xent
        >>> x, w, y = torch.randn(64, 16), torch.randn(1000, 16), torch.randint(1000, (64,))
        >>> found = xent.triplets.linear_bounds(x, w, y, reduction="mean")
        >>> bool(found.hinge <= found.smooth <= found.tight <= found.loss <= found.union)
        True
    """
    reducing: dict[str, Any] = {"reduction": reduction, "sample_weight": sample_weight}
    options = report_options(
        ignore_index,
        softcap,
        temperature,
        check_targets,
        product_dtype,
        memory_budget,
        logit_scale,
        **reducing,
    )
    return _bounds(resolve_plain_head(options, input, linear_weight, linear_bias, target))


def _bounds(call: Call) -> Bounds:
    reduction, dtype = call.reduction, compute_dtype(call.dtype)
    fields = zip(*report_rows(call, chain), strict=True)
    if reduction.kind == "none":
        return Bounds(*(call.stack(parts, dtype) for parts in fields))
    scale = reduction.scale(call.problems)
    return Bounds(*(reduction.total(torch.stack(parts), scale).to(dtype) for parts in fields))
