"""Focal and poly loss as modules: options at construction, tensors at call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from xent._core.validators import FINITE, OneOf, valid
from xent.losses._focal import focal_loss, focal_of
from xent.losses._poly import poly_loss


class _RowLoss(nn.Module):
    """The options that a row loss of logits shares with the others."""

    def __init__(
        self, ignore_index: int | None, reduction: str, temperature: float, check_targets: bool | None
    ) -> None:
        super().__init__()
        self.ignore_index = valid("ignore_index", ignore_index)
        self.reduction = OneOf(("none", "sum", "mean"))("reduction", reduction)
        self.temperature = valid("temperature", temperature)
        self.check_targets = valid("check_targets", check_targets)

    def _options(self, temperature: Tensor | None) -> dict[str, Any]:
        return {
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "temperature": self.temperature if temperature is None else temperature,
            "check_targets": self.check_targets,
        }


class FocalLoss(_RowLoss):
    """:func:`xent.focal_loss` as a module.

    Args:
        gamma, ignore_index, reduction, temperature, check_targets: as in :func:`xent.focal_loss`.
        alpha: a number or (C,), kept as a buffer; None means 1.

    Example:
        >>> import torch, xent
        >>> loss = xent.nn.FocalLoss(gamma=2.0)
        >>> round(loss(torch.tensor([[0.6, 0.4]]).log(), torch.tensor([0])).item(), 6)
        0.081732
    """

    alpha: Tensor | float | None

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: float | Tensor | None = None,
        *,
        ignore_index: int | None = -100,
        reduction: str = "mean",
        temperature: float = 1.0,
        check_targets: bool | None = None,
    ) -> None:
        super().__init__(ignore_index, reduction, temperature, check_targets)
        validated = focal_of(gamma, alpha)
        self.gamma = validated.gamma
        if isinstance(validated.alpha, Tensor):
            self.register_buffer("alpha", validated.alpha)
        else:
            self.alpha = validated.alpha

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, reduction={self.reduction!r}"

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        temperature: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        """Return the loss; tensors as in :func:`xent.focal_loss`, ``temperature`` one for each row."""
        return focal_loss(
            input,
            target,
            gamma=self.gamma,
            alpha=self.alpha,
            sample_weight=sample_weight,
            denominator=denominator,
            **self._options(temperature),
        )


class PolyLoss(_RowLoss):
    """:func:`xent.poly_loss` as a module.

    Args:
        epsilon, ignore_index, reduction, temperature, check_targets: as in :func:`xent.poly_loss`.

    Example:
        >>> import torch, xent
        >>> loss = xent.nn.PolyLoss()
        >>> round(loss(torch.tensor([[0.6, 0.4]]).log(), torch.tensor([0])).item(), 6)
        0.910826
    """

    def __init__(
        self,
        epsilon: float = 1.0,
        *,
        ignore_index: int | None = -100,
        reduction: str = "mean",
        temperature: float = 1.0,
        check_targets: bool | None = None,
    ) -> None:
        super().__init__(ignore_index, reduction, temperature, check_targets)
        number = FINITE("epsilon", epsilon)
        assert number is not None
        self.epsilon = float(number)

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon}, reduction={self.reduction!r}"

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        temperature: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        """Return the loss; tensors as in :func:`xent.poly_loss`, ``temperature`` one for each row."""
        return poly_loss(
            input,
            target,
            epsilon=self.epsilon,
            sample_weight=sample_weight,
            denominator=denominator,
            **self._options(temperature),
        )
