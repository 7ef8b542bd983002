"""Losses of two classes, and of a distribution given by its logarithms, as modules."""

from __future__ import annotations

from torch import Tensor, nn

from xent._arguments.validation import check_tensors
from xent._core.validators import KlReductionName, ReductionName
from xent.losses import _binary
from xent.nn._options import changed, keep


class BCELoss(nn.Module):
    """The module of ``xent.binary_cross_entropy``.

    It loads the state dict of :class:`torch.nn.BCELoss`.

    Args:
        weight: a factor for each element, of a shape that broadcasts to that of the input, kept as a buffer.
        reduction, clamp: as in :func:`xent.binary_cross_entropy`.

    Raises:
        ValueError, TypeError: an option outside its values.

    Example:
        >>> import torch, xent
        >>> loss = xent.nn.BCELoss()
        >>> round(loss(torch.tensor([0.7, 0.2]), torch.tensor([1.0, 0.0])).item(), 6)
        0.289909
    """

    weight: Tensor | None
    reduction: ReductionName
    clamp: bool

    def __init__(
        self, weight: Tensor | None = None, *, reduction: ReductionName = "mean", clamp: bool = False
    ) -> None:
        super().__init__()
        check_tensors(weight=weight)
        self.register_buffer("weight", weight)
        keep(self, reduction=reduction, clamp=clamp)

    def extra_repr(self) -> str:
        return changed(self, reduction="mean", clamp=False)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of probabilities, in nats.

        Args:
            input: probabilities, of any shape.
            target: target probabilities, of the shape of ``input``.

        Returns:
            A scalar, or for ``"none"`` a tensor of the shape of ``input``.
        """
        return _binary.binary_cross_entropy(
            input, target, self.weight, reduction=self.reduction, clamp=self.clamp
        )


class BCEWithLogitsLoss(nn.Module):
    """The module of ``xent.binary_cross_entropy_with_logits``.

    It loads the state dict of :class:`torch.nn.BCEWithLogitsLoss`.

    Args:
        weight: a factor for each element, of a shape that broadcasts to that of the input, kept as a buffer.
        reduction: as in :func:`xent.binary_cross_entropy_with_logits`.
        pos_weight: a factor for the positive class, of a shape that broadcasts to that of the input, kept as
            a buffer.

    Raises:
        ValueError, TypeError: an option outside its values.

    Example:
        >>> import torch, xent
        >>> loss = xent.nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0]))
        >>> round(loss(torch.zeros(1), torch.ones(1)).item(), 6)  # 3 log 2
        2.079442
    """

    weight: Tensor | None
    pos_weight: Tensor | None
    reduction: ReductionName

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        reduction: ReductionName = "mean",
        pos_weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_tensors(weight=weight)
        self.register_buffer("weight", weight)
        check_tensors(pos_weight=pos_weight)
        self.register_buffer("pos_weight", pos_weight)
        keep(self, reduction=reduction)

    def extra_repr(self) -> str:
        return changed(self, reduction="mean")

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits, in nats.

        Args:
            input: logits, of any shape.
            target: target probabilities, of the shape of ``input``.

        Returns:
            A scalar, or for ``"none"`` a tensor of the shape of ``input``.
        """
        return _binary.binary_cross_entropy_with_logits(
            input, target, self.weight, reduction=self.reduction, pos_weight=self.pos_weight
        )


class KLDivLoss(nn.Module):
    """The module of ``xent.kl_div``.

    Args:
        reduction, log_target: as in :func:`xent.kl_div`.

    Raises:
        ValueError, TypeError: an option outside its values.

    Example:
        >>> import torch, xent
        >>> loss = xent.nn.KLDivLoss(reduction="batchmean")
        >>> round(loss(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.6, 0.4]])).item(), 6)
        0.020136
    """

    reduction: KlReductionName
    log_target: bool

    def __init__(self, *, reduction: KlReductionName = "mean", log_target: bool = False) -> None:
        super().__init__()
        _binary.KL_REDUCTIONS("reduction", reduction)
        self.reduction = reduction
        keep(self, log_target=log_target)

    def extra_repr(self) -> str:
        return changed(self, reduction="mean", log_target=False)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the divergence from log-probabilities, in nats.

        Args:
            input: log-probabilities, of any shape.
            target: probabilities, or with ``log_target`` their logarithms.

        Returns:
            A scalar, or for ``"none"`` a tensor of the common shape.
        """
        return _binary.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)
