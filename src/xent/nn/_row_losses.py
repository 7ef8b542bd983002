"""Focal and poly loss as modules, of logits or with a classifier: options when made, tensors at the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from xent._arguments.linear_layer import weight_and_bias
from xent._core.validators import FINITE, ReductionName, valid
from xent.losses._focal import focal_loss, focal_of, linear_focal_loss
from xent.losses._poly import linear_poly_loss, poly_loss
from xent.nn._options import changed, keep

DEFAULTS: dict[str, Any] = {
    "ignore_index": -100,
    "reduction": "mean",
    "temperature": 1.0,
    "check_targets": None,
}


class _RowLoss(nn.Module):
    """A loss of logits that is a function of each row's cross-entropy, with the options that all share."""

    own: tuple[str, ...]  # the names of the options that are this loss's alone
    _of_logits: Callable[..., Tensor]

    def __init__(
        self,
        ignore_index: int | None,
        reduction: ReductionName,
        temperature: float,
        check_targets: bool | None,
    ) -> None:
        super().__init__()
        self.ignore_index = valid("ignore_index", ignore_index)
        self.reduction = valid("reduction", reduction)
        self.temperature = valid("temperature", temperature)
        self.check_targets = valid("check_targets", check_targets)

    def extra_repr(self) -> str:
        own = {name: getattr(self, name) for name in self.own}
        shown = (
            f"{n}={v!r}" for n, v in own.items() if not (isinstance(v, Tensor) or (n, v) == ("alpha", 1.0))
        )
        return ", ".join(filter(None, (*shown, changed(self, **DEFAULTS))))

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        temperature: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        """Return the loss of logits and class indices, in nats.

        Args:
            input: logits, (C,), (N, C) or (N, C, d1, ...).
            target: class indices, of the shape of the unreduced loss.
            sample_weight, denominator: as in :func:`xent.cross_entropy`.
            temperature: a tensor with a number for each row, in place of the module's.

        Returns:
            A scalar, or for ``"none"`` a tensor of the shape of the target.
        """
        tensors = {"sample_weight": sample_weight, "denominator": denominator}
        return self._of_logits(input, target, **self._options(temperature, **tensors))

    def _options(self, temperature: Tensor | None, **tensors: Any) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in (*self.own, *DEFAULTS)}
        return options | tensors | ({} if temperature is None else {"temperature": temperature})


class FocalLoss(_RowLoss):
    """The module of ``xent.focal_loss``, with options at construction and tensors at the call.

    Args:
        gamma, ignore_index, reduction, temperature, check_targets: as in :func:`xent.focal_loss`.
        alpha: α, a number, or a tensor (C,) that is kept as a buffer; None means 1.

    Raises:
        ValueError, TypeError: an option outside its values.

    Example:
        >>> import torch, xent
        >>> loss = xent.nn.FocalLoss(gamma=2.0)
        >>> round(loss(torch.tensor([[0.6, 0.4]]).log(), torch.tensor([0])).item(), 6)
        0.081732
    """

    own = ("gamma", "alpha")
    _of_logits = staticmethod(focal_loss)
    alpha: Tensor | float | None

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: float | Tensor | None = None,
        *,
        ignore_index: int | None = -100,
        reduction: ReductionName = "mean",
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


class PolyLoss(_RowLoss):
    """The module of ``xent.poly_loss``, with options at construction and tensors at the call.

    Args:
        epsilon, ignore_index, reduction, temperature, check_targets: as in :func:`xent.poly_loss`.

    Raises:
        ValueError, TypeError: an option outside its values.

    Example:
        >>> import torch, xent
        >>> loss = xent.nn.PolyLoss()
        >>> round(loss(torch.tensor([[0.6, 0.4]]).log(), torch.tensor([0])).item(), 6)
        0.910826
    """

    own = ("epsilon",)
    _of_logits = staticmethod(poly_loss)

    def __init__(
        self,
        epsilon: float = 1.0,
        *,
        ignore_index: int | None = -100,
        reduction: ReductionName = "mean",
        temperature: float = 1.0,
        check_targets: bool | None = None,
    ) -> None:
        super().__init__(ignore_index, reduction, temperature, check_targets)
        number = FINITE("epsilon", epsilon)
        assert number is not None
        self.epsilon = float(number)


class _Classifier(_RowLoss):
    """A linear classifier before a row loss, read and not called."""

    _of_head: Callable[..., Tensor]  # the loss from features and a classifier

    def _classify(
        self,
        in_features: int,
        num_classes: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        product_dtype: torch.dtype | None,
        memory_budget: int | None,
    ) -> None:
        self.linear = nn.Linear(
            valid("in_features", in_features),
            valid("num_classes", num_classes),
            bias=valid("bias", bias),
            device=device,
            dtype=dtype,
        )
        keep(self, product_dtype=product_dtype, memory_budget=memory_budget)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        temperature: Tensor | None = None,
        denominator: float | Tensor | None = None,
        group: Any = None,
        data_group: Any = None,
    ) -> Tensor:
        """Return the loss of features and class indices, in nats.

        Args:
            input: features, (..., D).
            target: class indices, (...).
            sample_weight, denominator, group, data_group: as in :func:`xent.linear_cross_entropy`.
            temperature: a tensor with a number for each row, in place of the module's.

        Returns:
            A scalar, or for ``"none"`` a tensor of the shape of the target.
        """
        weight, bias = weight_and_bias(self.linear, "linear")
        tensors: dict[str, Any] = {"sample_weight": sample_weight, "denominator": denominator}
        tensors |= {"linear_bias": bias, "group": group, "data_group": data_group}
        tensors |= {"product_dtype": self.product_dtype, "memory_budget": self.memory_budget}
        return self._of_head(input, weight, target, **self._options(temperature, **tensors))


class LinearFocalLoss(_Classifier, FocalLoss):
    """A linear classifier and its focal loss in one module, which does not store the logits.

    The module reads the weight and bias of its layer ``linear`` and does not call it, as in
    :class:`LinearCrossEntropyLoss`.

    Args:
        in_features: D, the number of features.
        num_classes: C, the number of classes.
        bias: whether the classifier has a bias.
        device, dtype: the device and type of the parameters, as in :class:`torch.nn.Linear`.
        gamma, alpha, ignore_index, reduction, temperature, check_targets: as in :class:`FocalLoss`.
        product_dtype, memory_budget: as in :func:`xent.linear_cross_entropy`.

    Raises:
        ValueError, TypeError: an option outside its values.

    Example:
        >>> import torch, xent
        >>> head = xent.nn.LinearFocalLoss(16, 100, gamma=1.5)
        >>> head(torch.randn(8, 16), torch.randint(100, (8,))).backward()
        >>> head.linear.weight.grad.shape
        torch.Size([100, 16])
    """

    _of_head = staticmethod(linear_focal_loss)

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        gamma: float = 2.0,
        alpha: float | Tensor | None = None,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        ignore_index: int | None = -100,
        reduction: ReductionName = "mean",
        temperature: float = 1.0,
        check_targets: bool | None = None,
        product_dtype: torch.dtype | None = None,
        memory_budget: int | None = None,
    ) -> None:
        super().__init__(
            gamma,
            alpha,
            ignore_index=ignore_index,
            reduction=reduction,
            temperature=temperature,
            check_targets=check_targets,
        )
        self._classify(in_features, num_classes, bias, device, dtype, product_dtype, memory_budget)


class LinearPolyLoss(_Classifier, PolyLoss):
    """A linear classifier and its poly-1 loss in one module, which does not store the logits.

    The module reads the weight and bias of its layer ``linear`` and does not call it, as in
    :class:`LinearCrossEntropyLoss`.

    Args:
        in_features: D, the number of features.
        num_classes: C, the number of classes.
        bias: whether the classifier has a bias.
        device, dtype: the device and type of the parameters, as in :class:`torch.nn.Linear`.
        epsilon, ignore_index, reduction, temperature, check_targets: as in :class:`PolyLoss`.
        product_dtype, memory_budget: as in :func:`xent.linear_cross_entropy`.

    Raises:
        ValueError, TypeError: an option outside its values.

    Example:
        >>> import torch, xent
        >>> head = xent.nn.LinearPolyLoss(16, 100)
        >>> head(torch.randn(8, 16), torch.randint(100, (8,))).backward()
        >>> head.linear.weight.grad.shape
        torch.Size([100, 16])
    """

    _of_head = staticmethod(linear_poly_loss)

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        epsilon: float = 1.0,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        ignore_index: int | None = -100,
        reduction: ReductionName = "mean",
        temperature: float = 1.0,
        check_targets: bool | None = None,
        product_dtype: torch.dtype | None = None,
        memory_budget: int | None = None,
    ) -> None:
        super().__init__(
            epsilon,
            ignore_index=ignore_index,
            reduction=reduction,
            temperature=temperature,
            check_targets=check_targets,
        )
        self._classify(in_features, num_classes, bias, device, dtype, product_dtype, memory_budget)
