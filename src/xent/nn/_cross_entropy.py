"""Cross-entropy of logits, and a linear classifier with its cross-entropy, as modules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from xent._arguments.linear_layer import weight_and_bias
from xent._arguments.validation import check_tensors
from xent._core.validators import Whole, valid
from xent.losses import _cross_entropy
from xent.nn._options import changed, keep


class CrossEntropyLoss(nn.Module):
    """:func:`xent.cross_entropy` as a module.

    Args:
        weight: (C,), a factor for each class, kept as a buffer.
        ignore_index, reduction, label_smoothing, z_loss, softcap, temperature, check_targets: as in
            :func:`xent.cross_entropy`.

    Example:
        >>> import torch, xent
        >>> loss = xent.nn.CrossEntropyLoss(label_smoothing=0.1)
        >>> loss(torch.zeros(2, 4), torch.tensor([0, 3])).item() == torch.tensor(4.0).log().item()
        True
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int | None = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        check_targets: bool | None = None,
    ) -> None:
        super().__init__()
        check_tensors(weight=weight)
        self.register_buffer("weight", weight)
        keep(
            self,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            temperature=temperature,
            check_targets=check_targets,
        )

    def extra_repr(self) -> str:
        return changed(self, **_DEFAULTS)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
        group: Any = None,
        data_group: Any = None,
        temperature: Tensor | None = None,
    ) -> Tensor:
        """Return the loss; input (C,), (N, C) or (N, C, d1, ...) and target as in :func:`xent.cross_entropy`.

        With ``group``, the module's ``weight`` is of this process's classes. ``temperature`` is one for each
        row, in place of the module's.
        """
        return _cross_entropy.cross_entropy(
            input,
            target,
            sample_weight=sample_weight,
            denominator=denominator,
            group=group,
            data_group=data_group,
            **_options(self, temperature),
        )


class LinearCrossEntropyLoss(nn.Module):
    """A linear classifier and its cross-entropy in one module: the logits never exist.

    Takes the place of ``nn.Linear`` followed by ``nn.CrossEntropyLoss``, and loads the state dict of
    :class:`torch.nn.LinearCrossEntropyLoss`.

    The layer ``linear`` is read and not called. It may be parametrised or replaced by another
    ``torch.nn.Linear``; one whose call computes more than its product (an adapter, a quantised layer, a layer
    with hooks) is a TypeError.

    Args:
        in_features: D.
        num_classes: C.
        out_features: (d1, ...), the positions of a K-dimensional loss.
        bias: whether the classifier has one.
        weight: (C,), a factor for each class, kept as a buffer.
        logit_scale, product_dtype, memory_budget: as in :func:`xent.linear_cross_entropy`.
        ignore_index, reduction, label_smoothing, z_loss, softcap, temperature, check_targets: as in
            :func:`xent.cross_entropy`.

    Example:
        >>> import torch, xent
        >>> head = xent.nn.LinearCrossEntropyLoss(16, 1000)
        >>> loss = head(torch.randn(8, 16), torch.randint(1000, (8,)))
        >>> loss.backward()
        >>> head.linear.weight.grad.shape
        torch.Size([1000, 16])
    """

    weight: Tensor | None
    logit_scale: float
    product_dtype: torch.dtype | None
    memory_budget: int | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
        ignore_index: int | None = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        check_targets: bool | None = None,
        product_dtype: torch.dtype | None = None,
        memory_budget: int | None = None,
    ) -> None:
        super().__init__()
        in_features, bias = valid("in_features", in_features), valid("bias", bias)
        self.num_classes = num_classes = valid("num_classes", num_classes)
        self.out_features = _sizes(out_features)
        self.linear = nn.Linear(
            in_features, num_classes * math.prod(self.out_features), bias=bias, device=device, dtype=dtype
        )
        check_tensors(weight=weight)
        self.register_buffer("weight", weight)
        keep(
            self,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            logit_scale=logit_scale,
            softcap=softcap,
            temperature=temperature,
            check_targets=check_targets,
            product_dtype=product_dtype,
            memory_budget=memory_budget,
        )

    def extra_repr(self) -> str:
        return changed(
            self, out_features=(), logit_scale=1.0, product_dtype=None, memory_budget=None, **_DEFAULTS
        )

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
        group: Any = None,
        data_group: Any = None,
        temperature: Tensor | None = None,
    ) -> Tensor:
        """Return the loss; input (..., D) and target as in :func:`xent.linear_cross_entropy`.

        With ``group``, the module is of this process's classes: ``num_classes`` is how many these are.
        ``temperature`` is one for each row, in place of the module's.
        """
        shape = (self.num_classes, *self.out_features)
        weight, bias = weight_and_bias(self.linear, "linear")
        if weight.dim() != 2 or weight.shape[0] != math.prod(shape):
            raise ValueError(
                f"linear.weight is {tuple(weight.shape)} where num_classes and out_features, {shape}, ask "
                f"for {math.prod(shape)} rows: set num_classes to the new number of classes too"
            )
        return _cross_entropy.linear_cross_entropy(
            input,
            weight.reshape(*shape, weight.shape[-1]) if self.out_features else weight,
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            sample_weight=sample_weight,
            denominator=denominator,
            logit_scale=self.logit_scale,
            product_dtype=self.product_dtype,
            memory_budget=self.memory_budget,
            group=group,
            data_group=data_group,
            **_options(self, temperature),
        )


def _sizes(out_features: object) -> tuple[int, ...]:
    """Return the numbers of positions of a loss in K dimensions."""
    if not isinstance(out_features, tuple | list):
        raise TypeError(f"out_features must be a tuple of sizes, got {type(out_features).__name__}")
    sizes = [Whole("sizes of at least 1", 1)("out_features", size) for size in out_features]
    return tuple(size for size in sizes if size is not None)


_DEFAULTS: dict[str, Any] = {
    "ignore_index": -100,
    "reduction": "mean",
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "softcap": None,
    "temperature": 1.0,
    "check_targets": None,
}


def _options(module: CrossEntropyLoss | LinearCrossEntropyLoss, temperature: Tensor | None) -> dict[str, Any]:
    options = {name: getattr(module, name) for name in ("weight", *_DEFAULTS)}
    return options if temperature is None else options | {"temperature": temperature}
