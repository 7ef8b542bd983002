"""A cosine classifier with a margin as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xent._arguments.validation import check_tensors
from xent._core.directions import cosines
from xent._core.margin import Margin
from xent._core.validators import ReductionName, valid
from xent.losses import _cross_entropy
from xent.nn._options import changed, keep


class MarginLoss(nn.Module):
    """A cosine classifier with a margin and its cross-entropy: CosFace, ArcFace, both, or neither.

    Features and class vectors are scaled to length 1. Their product is then the cosine of the angle θ between
    them. The loss is the cross-entropy over the logits ``s·cos θ``, with ``s·(cos(θ + angle) − cosine)`` for
    the target's class. The logits are not stored, and the margin costs a few operations a row. Sources: Wang
    et al., "CosFace", 2018; Deng et al., "ArcFace", 2019; without a margin, Zhai and Wu, "Classification is a
    strong baseline for deep metric learning" (normalised softmax), 2019.

    Args:
        in_features: D, the number of features.
        num_classes: C, the number of classes.
        margin: a :class:`xent.Margin`, or a number that is subtracted from the target's cosine.
        scale: s, the reciprocal of the temperature.
        device, dtype: the device and type of ``class_weight``.
        weight: w, (C,), a factor for each class, kept as a buffer.
        memory_budget: as in :func:`xent.linear_cross_entropy`.
        sparse_grad: whether calls with ``classes`` give ``class_weight`` a sparse gradient.
        ignore_index, reduction, label_smoothing, check_targets: as in :func:`xent.cross_entropy`.

    Attributes:
        class_weight: (C, D), the parameter: a vector for each class, of any length.

    Raises:
        ValueError, TypeError: an option outside its values.

    Example:
        >>> import torch, xent
        >>> head = xent.nn.MarginLoss(16, 1000, margin=xent.Margin(angle=0.5), scale=64.0)
        >>> head(torch.randn(8, 16), torch.randint(1000, (8,))).backward()
        >>> head.class_weight.grad.shape
        torch.Size([1000, 16])
    """

    weight: Tensor | None
    scale: float

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        margin: Margin | float = 0.0,
        scale: float = 64.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
        ignore_index: int | None = -100,
        reduction: ReductionName = "mean",
        label_smoothing: float = 0.0,
        check_targets: bool | None = None,
        memory_budget: int | None = None,
        sparse_grad: bool = False,
    ) -> None:
        super().__init__()
        num_classes, in_features = valid("num_classes", num_classes), valid("in_features", in_features)
        self.class_weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        check_tensors(weight=weight)
        self.register_buffer("weight", weight)
        self.margin = margin if isinstance(margin, Margin) else valid("margin", margin)
        keep(
            self,
            scale=scale,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            check_targets=check_targets,
            memory_budget=memory_budget,
            sparse_grad=sparse_grad,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the class vectors from a normal distribution, so that their directions are uniform."""
        nn.init.normal_(self.class_weight, std=self.class_weight.shape[1] ** -0.5)

    def extra_repr(self) -> str:
        size = f"in_features={self.class_weight.shape[1]}, num_classes={self.class_weight.shape[0]}"
        others = changed(self, **_MARGIN_DEFAULTS)
        return f"{size}, {others}" if others else size

    def cosines(self, input: Tensor) -> Tensor:
        """Return the cosines of features with every class vector, by which classes are ranked.

        Args:
            input: features, (..., D). A row of zeros has no direction; its cosines are 0.

        Returns:
            cos θ, (..., C).
        """
        return cosines(input, self.class_weight)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
        classes: Tensor | None = None,
        log_q: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of features and class indices, in nats.

        Args:
            input: features, (..., D).
            target: class indices, (...).
            sample_weight, denominator, classes, log_q: as in :func:`xent.linear_cross_entropy`.

        Returns:
            A scalar, or for ``"none"`` a tensor of the shape of the target.
        """
        return _cross_entropy.linear_cross_entropy(
            input,
            self.class_weight,
            target,
            weight=self.weight,
            normalize=True,
            margin=self.margin,
            temperature=1 / self.scale,
            sample_weight=sample_weight,
            denominator=denominator,
            classes=classes,
            log_q=log_q,
            **{name: getattr(self, name) for name in _MARGIN_DEFAULTS if name not in ("margin", "scale")},
        )


_MARGIN_DEFAULTS: dict[str, Any] = {
    "margin": 0.0,
    "scale": 64.0,
    "ignore_index": -100,
    "reduction": "mean",
    "label_smoothing": 0.0,
    "check_targets": None,
    "memory_budget": None,
    "sparse_grad": False,
}
