"""Smooth triplet losses as modules, of logits and of features."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from xent import triplets
from xent._arguments.linear_layer import weight_and_bias
from xent._core.low_rank import LowRank
from xent._core.validators import GeometryName, ReductionName, valid
from xent.nn._options import changed, keep
from xent.triplets._losses import count_of_negatives


class SoftTripletLoss(nn.Module):
    """The module of ``xent.triplets.smooth_triplet_loss``, with options at construction.

    Args:
        margin, ignore_index, reduction, check_targets: as in :func:`xent.triplets.smooth_triplet_loss`.
        negatives: ``"all"``, or a number k for the k hardest of each row.

    Raises:
        ValueError, TypeError: an option outside its values.

    Example:
        >>> import torch, xent
        >>> loss = xent.nn.SoftTripletLoss()
        >>> round(loss(torch.zeros(2, 10), torch.tensor([3, 4])).item(), 6)
        2.158106
    """

    margin: float | None
    negatives: Literal["all"] | int

    def __init__(
        self,
        *,
        margin: float | None = None,
        negatives: Literal["all"] | int = "all",
        ignore_index: int | None = -100,
        reduction: ReductionName = "mean",
        check_targets: bool | None = None,
    ) -> None:
        super().__init__()
        _keep_triplets(self, margin, negatives)
        keep(self, ignore_index=ignore_index, reduction=reduction, check_targets=check_targets)

    def extra_repr(self) -> str:
        return changed(self, **_TRIPLET_DEFAULTS)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        negatives: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of logits and class indices, in nats.

        Args:
            input: logits, (C,), (N, C) or (N, C, d1, ...).
            target: class indices, (), (N,) or (N, d1, ...).
            negatives: sampled negatives, class indices (N, ..., k), in place of the module's.
            sample_weight: as in :func:`xent.cross_entropy`.

        Returns:
            A scalar, or for ``"none"`` a tensor of the shape of the target.
        """
        return triplets.smooth_triplet_loss(
            input, target, sample_weight=sample_weight, **_triplet_options(self, negatives)
        )


class LinearSoftTripletLoss(nn.Module):
    """A vector for each class and the smooth triplet loss of features in one module, without stored logits.

    Args:
        in_features: D, the number of features.
        num_classes: C, the number of classes.
        bias: whether the classes have a bias.
        geometry: the score of a row and a class, as in :func:`xent.triplets.linear_triplet_loss`.
        device, dtype: the device and type of the parameters, as in :class:`torch.nn.Linear`.
        memory_budget: as in :func:`xent.triplets.linear_triplet_loss`.
        margin, negatives, ignore_index, reduction, check_targets: as in :class:`SoftTripletLoss`.

    Raises:
        ValueError, TypeError: an option outside its values.

    Example:
        >>> import torch, xent
        >>> head = xent.nn.LinearSoftTripletLoss(16, 1000, geometry="squared_l2", negatives=20)
        >>> head(torch.randn(8, 16), torch.randint(1000, (8,))).backward()
        >>> head.linear.weight.grad.shape
        torch.Size([1000, 16])
    """

    geometry: GeometryName
    memory_budget: int | None
    margin: float | None
    negatives: Literal["all"] | int

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        geometry: GeometryName = "inner",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        margin: float | None = None,
        negatives: Literal["all"] | int = "all",
        ignore_index: int | None = -100,
        reduction: ReductionName = "mean",
        check_targets: bool | None = None,
        memory_budget: int | None = None,
    ) -> None:
        super().__init__()
        in_features, num_classes = valid("in_features", in_features), valid("num_classes", num_classes)
        bias = valid("bias", bias)
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        _keep_triplets(self, margin, negatives)
        keep(
            self,
            geometry=geometry,
            ignore_index=ignore_index,
            reduction=reduction,
            check_targets=check_targets,
            memory_budget=memory_budget,
        )

    def extra_repr(self) -> str:
        return changed(self, geometry="inner", memory_budget=None, **_TRIPLET_DEFAULTS)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        negatives: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of features and class indices, in nats.

        Args:
            input: features, (..., D).
            target: class indices, (...).
            negatives: sampled negatives, class indices (..., k), in place of the module's.
            sample_weight: as in :func:`xent.cross_entropy`.

        Returns:
            A scalar, or for ``"none"`` a tensor of the shape of the target.
        """
        weight, bias = weight_and_bias(self.linear, "linear")
        if isinstance(weight, LowRank):
            raise TypeError("linear has an adapter, which triplets do not take: merge it into the weight")
        return triplets.linear_smooth_triplet_loss(
            input,
            weight,
            target,
            linear_bias=bias,
            geometry=self.geometry,
            sample_weight=sample_weight,
            memory_budget=self.memory_budget,
            **_triplet_options(self, negatives),
        )


def _keep_triplets(
    module: SoftTripletLoss | LinearSoftTripletLoss, margin: float | None, negatives: Literal["all"] | int
) -> None:
    module.margin = None if margin is None else valid("margin", margin)
    count = count_of_negatives(negatives)
    module.negatives = "all" if count is None else count


_TRIPLET_DEFAULTS: dict[str, Any] = {
    "margin": None,
    "negatives": "all",
    "ignore_index": -100,
    "reduction": "mean",
    "check_targets": None,
}


def _triplet_options(
    module: SoftTripletLoss | LinearSoftTripletLoss, negatives: Tensor | None
) -> dict[str, Any]:
    options = {name: getattr(module, name) for name in _TRIPLET_DEFAULTS}
    return options if negatives is None else options | {"negatives": negatives}
