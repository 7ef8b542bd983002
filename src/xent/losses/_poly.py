"""Poly-1 loss, −log p + ε·(1 − p) of the target's probability p, of logits and straight from features.

Source: Leng et al., "PolyLoss", https://arxiv.org/abs/2204.12511, equation 6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xent._arguments.options import Execution, LogitOptions, Options, ReductionOptions, TargetOptions
from xent._core.low_rank import LowRank
from xent._core.row_losses import Poly
from xent._core.validators import FINITE, ReductionName
from xent.losses._loss import loss_of_head, loss_of_logits, refuse_smoothing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def poly_loss(
    input: Tensor,
    target: Tensor,
    *,
    epsilon: float = 1.0,
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
    r"""Return the poly-1 loss of logits and class indices, in nats.

    The loss of a row is ``−log p_y + ε·(1 − p_y)``, with p_y the probability of the target class y. It is
    twice differentiable under autograd, ``torch.func`` and forward mode, and rows whose p_y is near 1 keep
    their digits. Source: Leng et al., "PolyLoss", 2022, equation 6.

    Args:
        input, ignore_index, reduction, sample_weight, softcap: as in :func:`xent.cross_entropy`.
        temperature, denominator, check_targets, group, data_group: as in :func:`xent.cross_entropy`.
        target: class indices of any integer type, of the shape of the unreduced loss.
        epsilon: the factor ε of ``1 − p_y``, any finite number. At 0 the loss is cross-entropy.
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
        >>> round(xent.poly_loss(z, torch.tensor([0])).item(), 6)  # 0.510826 + 0.4
        0.910826
    """
    refuse_smoothing("poly_loss", label_smoothing)
    options = Options(
        TargetOptions(None, ignore_index, 0.0, sample_weight),
        LogitOptions(softcap, temperature),
        ReductionOptions(reduction, denominator, 0.0, data_group),
        Execution(check_targets=check_targets, group=group),
    )
    return loss_of_logits(options, input, target, _poly(epsilon))


def linear_poly_loss(
    input: Tensor,
    linear_weight: Tensor | LowRank,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    epsilon: float = 1.0,
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
    r"""Return the poly-1 loss of a linear classifier from its features, without storing the logits, in nats.

    The value is ``poly_loss(input @ linear_weight.T + linear_bias, target)``, computed in tiles of rows ×
    classes. Loss and gradients cost three matrix products.

    Args:
        input, linear_weight, linear_bias: as in :func:`xent.linear_cross_entropy`.
        logit_scale, product_dtype, memory_budget: as in :func:`xent.linear_cross_entropy`.
        target, epsilon, ignore_index, reduction, label_smoothing: as in :func:`poly_loss`.
        sample_weight, softcap, temperature, denominator, check_targets: as in :func:`poly_loss`.
        group, data_group: as in :func:`xent.linear_cross_entropy`.

    Returns:
        A scalar, or for ``"none"`` a tensor of the shape of the target, in nats, of the type of ``input``.

    Raises:
        IndexError, ValueError, TypeError: as :func:`poly_loss`.

    Example:
        >>> import torch, xent
        >>> x, w = torch.ones(1, 1), torch.tensor([[0.6], [0.4]]).log()
        >>> round(xent.linear_poly_loss(x, w, torch.tensor([0])).item(), 6)
        0.910826
    """
    refuse_smoothing("linear_poly_loss", label_smoothing)
    options = Options(
        TargetOptions(None, ignore_index, 0.0, sample_weight),
        LogitOptions(softcap, temperature, logit_scale=logit_scale),
        ReductionOptions(reduction, denominator, 0.0, data_group),
        Execution(product_dtype, memory_budget, check_targets, group),
    )
    return loss_of_head(options, input, linear_weight, linear_bias, target, _poly(epsilon))


def _poly(epsilon: Any) -> Poly:
    """Validate ε."""
    factor = FINITE("epsilon", epsilon)
    assert factor is not None
    return Poly(float(factor))
