"""Focal loss, α·(1 − p)^γ·(−log p) of the target's probability p, of logits and straight from features.

Source: Lin et al., "Focal loss for dense object detection", https://arxiv.org/abs/1708.02002.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xent._arguments.options import Execution, LogitOptions, Options, ReductionOptions, TargetOptions
from xent._arguments.validation import check_tensors, is_readable
from xent._core.low_rank import LowRank
from xent._core.row_losses import Focal
from xent._core.validators import Number, ReductionName
from xent.losses._loss import loss_of_head, loss_of_logits, refuse_smoothing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def focal_loss(
    input: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    alpha: float | Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: ReductionName = "mean",
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    denominator: float | Tensor | None = None,
    check_targets: bool | None = None,
    group: ProcessGroup | DeviceMesh | None = None,
    data_group: ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    r"""Return the focal loss of logits and class indices, in nats.

    The loss of a row is ``α·(1 − p_y)^γ·(−log p_y)``, with p_y the probability of the target class y. The
    factor ``(1 − p_y)^γ`` lowers the weight of rows that are classified well. The loss is twice
    differentiable under autograd, ``torch.func`` and forward mode. Rows whose p_y is near 1 keep their
    digits; at ``p_y = 1`` the value and its derivatives are 0 for every γ > 0. Source: Lin et al., "Focal
    loss for dense object detection", 2017.

    Args:
        input, ignore_index, reduction, sample_weight, softcap: as in :func:`xent.cross_entropy`.
        temperature, denominator, check_targets, group, data_group: as in :func:`xent.cross_entropy`.
        target: class indices of any integer type, of the shape of the unreduced loss.
        gamma: γ, at least 0. At 0 the loss is α times cross-entropy.
        alpha: α, a number, or a tensor (C,) with a number for each class; None means 1. No gradient.
            ``"mean"`` divides by the number of rows that are not ignored (or by the sum of their sample
            weights), not by Σ α.
        label_smoothing: only 0 is allowed, as p_y is not defined for a target of several classes.

    Returns:
        A scalar, or for ``"none"`` a tensor of the shape of the target, in nats, of the type of ``input``.

    Raises:
        IndexError: a target outside 0..C−1; the message names row and value.
        ValueError, TypeError: as :func:`xent.cross_entropy`; also a target of probabilities, and label
            smoothing.

    Example:
        >>> import torch, xent
        >>> z = torch.tensor([[0.6, 0.4]]).log()
        >>> round(xent.focal_loss(z, torch.tensor([0])).item(), 6)  # 0.16·0.510826
        0.081732
    """
    refuse_smoothing("focal_loss", label_smoothing)
    options = Options(
        TargetOptions(None, ignore_index, 0.0, sample_weight),
        LogitOptions(softcap, temperature),
        ReductionOptions(reduction, denominator, 0.0, data_group),
        Execution(check_targets=check_targets, group=group),
    )
    return loss_of_logits(options, input, target, focal_of(gamma, alpha))


def linear_focal_loss(
    input: Tensor,
    linear_weight: Tensor | LowRank,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    gamma: float = 2.0,
    alpha: float | Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: ReductionName = "mean",
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    denominator: float | Tensor | None = None,
    check_targets: bool | None = None,
    product_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    group: ProcessGroup | DeviceMesh | None = None,
    data_group: ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    r"""Return the focal loss of a linear classifier from its features, without storing the logits, in nats.

    The value is ``focal_loss(input @ linear_weight.T + linear_bias, target)``, computed in tiles of rows ×
    classes. Loss and gradients cost three matrix products.

    Args:
        input, linear_weight, linear_bias: as in :func:`xent.linear_cross_entropy`.
        logit_scale, product_dtype, memory_budget: as in :func:`xent.linear_cross_entropy`.
        target, gamma, alpha, ignore_index, reduction, label_smoothing: as in :func:`focal_loss`.
        sample_weight, softcap, temperature, denominator, check_targets: as in :func:`focal_loss`.
        group, data_group: as in :func:`xent.linear_cross_entropy`.

    Returns:
        A scalar, or for ``"none"`` a tensor of the shape of the target, in nats, of the type of ``input``.

    Raises:
        IndexError, ValueError, TypeError: as :func:`focal_loss`.

    Example:
        >>> import torch, xent
        >>> x, w = torch.ones(1, 1), torch.tensor([[0.6], [0.4]]).log()
        >>> round(xent.linear_focal_loss(x, w, torch.tensor([0])).item(), 6)
        0.081732
    """
    refuse_smoothing("linear_focal_loss", label_smoothing)
    options = Options(
        TargetOptions(None, ignore_index, 0.0, sample_weight),
        LogitOptions(softcap, temperature, logit_scale=logit_scale),
        ReductionOptions(reduction, denominator, 0.0, data_group),
        Execution(product_dtype, memory_budget, check_targets, group),
    )
    return loss_of_head(options, input, linear_weight, linear_bias, target, focal_of(gamma, alpha))


def focal_of(gamma: Any, alpha: Any) -> Focal:
    """Validate γ and α."""
    exponent = Number("finite and not negative", 0.0, ends="low")("gamma", gamma)
    assert exponent is not None
    if alpha is None:
        return Focal(float(exponent))
    if isinstance(alpha, Tensor) and alpha.dim():
        check_tensors(alpha=alpha)
        if alpha.dim() != 1 or not alpha.is_floating_point():
            raise ValueError(
                f"alpha must be a number or a floating tensor (C,), got {alpha.dtype} of shape "
                f"{tuple(alpha.shape)}"
            )
        if alpha.requires_grad:
            raise ValueError("alpha takes no gradient: pass alpha.detach()")
        if is_readable(alpha):
            good = (alpha >= 0) & alpha.isfinite()
            if not good.all():
                at = int(good.logical_not().nonzero()[0])
                raise ValueError(
                    f"alpha must be finite and not negative, got {alpha[at].item()} for class {at}"
                )
        return Focal(float(exponent), alpha)
    factor = Number("finite and not negative", 0.0, ends="low")("alpha", alpha)
    assert factor is not None
    return Focal(float(exponent), float(factor))
