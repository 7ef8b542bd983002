"""The losses as modules: options at construction, tensors at call."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from xent import triplets
from xent._arguments.linear_layer import weight_and_bias
from xent._arguments.validation import check_tensors
from xent._core.directions import cosines
from xent._core.margin import Margin
from xent._core.validators import Whole, valid
from xent.losses import _binary, _cross_entropy
from xent.nn._prototypes import PrototypeHead as PrototypeHead
from xent.triplets._losses import count_of_negatives


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
        _keep(
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
        return _changed(self, **_DEFAULTS)

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
        product_dtype, memory_budget: as in :func:`xent.linear_cross_entropy`.
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
        _keep(
            self,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            temperature=temperature,
            check_targets=check_targets,
            product_dtype=product_dtype,
            memory_budget=memory_budget,
        )

    def extra_repr(self) -> str:
        return _changed(self, out_features=(), product_dtype=None, memory_budget=None, **_DEFAULTS)

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
            product_dtype=self.product_dtype,
            memory_budget=self.memory_budget,
            group=group,
            data_group=data_group,
            **_options(self, temperature),
        )


class MarginLoss(nn.Module):
    """A cosine classifier with a margin, and its cross-entropy: CosFace, ArcFace, both, or neither.

    Features and class vectors are scaled to length 1, so that their product is the cosine of the angle θ
    between them; the loss is cross-entropy over ``scale·cos θ``, with ``scale·(cos(θ + angle) − cosine)`` for
    the target. The logits never exist, and the margin costs a few operations a row. Sources: Wang et al.,
    "CosFace", 2018; Deng et al., "ArcFace", 2019; without a margin, Zhai and Wu, "Classification is a strong
    baseline for deep metric learning" (normalised softmax), 2019.

    Args:
        in_features: D.
        num_classes: C.
        margin: a :class:`xent.Margin`, or a number that is subtracted from the target's cosine.
        scale: s, one over the temperature.
        weight: (C,), a factor for each class, kept as a buffer.
        memory_budget: as in :func:`xent.linear_cross_entropy`.
        sparse_grad: whether calls with ``classes`` give ``class_weight`` a sparse gradient.
        ignore_index, reduction, label_smoothing, check_targets: as in :func:`xent.cross_entropy`.

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
        reduction: str = "mean",
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
        _keep(
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
        """Directions spread evenly: their lengths do not matter."""
        nn.init.normal_(self.class_weight, std=self.class_weight.shape[1] ** -0.5)

    def extra_repr(self) -> str:
        size = f"in_features={self.class_weight.shape[1]}, num_classes={self.class_weight.shape[0]}"
        changed = _changed(self, **_MARGIN_DEFAULTS)
        return f"{size}, {changed}" if changed else size

    def cosines(self, input: Tensor) -> Tensor:
        """Return cos θ of features (..., D) with every class, (..., C): what to rank the classes by.

        A row of zeros has no direction, and cosines of 0.
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
        """Return the loss; input (..., D), target (...); the rest as in :func:`xent.linear_cross_entropy`."""
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


class BCELoss(nn.Module):
    """:func:`xent.binary_cross_entropy` as a module; loads the state dict of :class:`torch.nn.BCELoss`.

    Args:
        weight: a factor for each element, of a shape that broadcasts to that of the input, kept as a buffer.
        reduction, clamp: as in :func:`xent.binary_cross_entropy`.

    Example:
        >>> import torch, xent
        >>> loss = xent.nn.BCELoss()
        >>> round(loss(torch.tensor([0.7, 0.2]), torch.tensor([1.0, 0.0])).item(), 6)
        0.289909
    """

    weight: Tensor | None
    reduction: str
    clamp: bool

    def __init__(self, weight: Tensor | None = None, *, reduction: str = "mean", clamp: bool = False) -> None:
        super().__init__()
        check_tensors(weight=weight)
        self.register_buffer("weight", weight)
        _keep(self, reduction=reduction, clamp=clamp)

    def extra_repr(self) -> str:
        return _changed(self, reduction="mean", clamp=False)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss; input and target are probabilities, of one shape."""
        return _binary.binary_cross_entropy(
            input, target, self.weight, reduction=self.reduction, clamp=self.clamp
        )


class BCEWithLogitsLoss(nn.Module):
    """:func:`xent.binary_cross_entropy_with_logits` as a module.

    Loads the state dict of :class:`torch.nn.BCEWithLogitsLoss`.

    Args:
        weight: a factor for each element, of a shape that broadcasts to that of the input, kept as a buffer.
        reduction: as in :func:`xent.binary_cross_entropy_with_logits`.
        pos_weight: a factor for the positive class, of such a shape, kept as a buffer.

    Example:
        >>> import torch, xent
        >>> loss = xent.nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0]))
        >>> round(loss(torch.zeros(1), torch.ones(1)).item(), 6)  # 3 log 2
        2.079442
    """

    weight: Tensor | None
    pos_weight: Tensor | None
    reduction: str

    def __init__(
        self, weight: Tensor | None = None, *, reduction: str = "mean", pos_weight: Tensor | None = None
    ) -> None:
        super().__init__()
        check_tensors(weight=weight)
        self.register_buffer("weight", weight)
        check_tensors(pos_weight=pos_weight)
        self.register_buffer("pos_weight", pos_weight)
        _keep(self, reduction=reduction)

    def extra_repr(self) -> str:
        return _changed(self, reduction="mean")

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss; input: logits; target: of their shape."""
        return _binary.binary_cross_entropy_with_logits(
            input, target, self.weight, reduction=self.reduction, pos_weight=self.pos_weight
        )


class KLDivLoss(nn.Module):
    """:func:`xent.kl_div` as a module.

    Args:
        reduction, log_target: as in :func:`xent.kl_div`.

    Example:
        >>> import torch, xent
        >>> loss = xent.nn.KLDivLoss(reduction="batchmean")
        >>> round(loss(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.6, 0.4]])).item(), 6)
        0.020136
    """

    reduction: str
    log_target: bool

    def __init__(self, *, reduction: str = "mean", log_target: bool = False) -> None:
        super().__init__()
        self.reduction = str(_binary.KL_REDUCTIONS("reduction", reduction))
        _keep(self, log_target=log_target)

    def extra_repr(self) -> str:
        return _changed(self, reduction="mean", log_target=False)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the divergence; input: log-probabilities; target: probabilities, or their logarithms."""
        return _binary.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


class SoftTripletLoss(nn.Module):
    """:func:`xent.triplets.smooth_triplet_loss` as a module: of logits.

    Args:
        margin, ignore_index, reduction, check_targets: as in :func:`xent.triplets.smooth_triplet_loss`.
        negatives: ``"all"``, or how many of the hardest.

    Example:
        >>> import torch, xent
        >>> loss = xent.nn.SoftTripletLoss()
        >>> round(loss(torch.zeros(2, 10), torch.tensor([3, 4])).item(), 6)
        2.158106
    """

    margin: float | None
    negatives: str | int

    def __init__(
        self,
        *,
        margin: float | None = None,
        negatives: str | int = "all",
        ignore_index: int | None = -100,
        reduction: str = "mean",
        check_targets: bool | None = None,
    ) -> None:
        super().__init__()
        _keep_triplets(self, margin, negatives)
        _keep(self, ignore_index=ignore_index, reduction=reduction, check_targets=check_targets)

    def extra_repr(self) -> str:
        return _changed(self, **_TRIPLET_DEFAULTS)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        negatives: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss; input (C,), (N, C) or (N, C, d1, ...); ``negatives`` (N, ..., k) are sampled."""
        return triplets.smooth_triplet_loss(
            input, target, sample_weight=sample_weight, **_triplet_options(self, negatives)
        )


class LinearSoftTripletLoss(nn.Module):
    """A vector for each class and the smooth triplet loss of features: no logits are kept.

    Args:
        in_features: D.
        num_classes: C.
        bias: whether the classes have one.
        geometry: ``"inner"``, ``"cosine"`` or ``"squared_l2"``.
        memory_budget: as in :func:`xent.triplets.linear_triplet_loss`.
        margin, negatives, ignore_index, reduction, check_targets: as in :class:`SoftTripletLoss`.

    Example:
        >>> import torch, xent
        >>> head = xent.nn.LinearSoftTripletLoss(16, 1000, geometry="squared_l2", negatives=20)
        >>> head(torch.randn(8, 16), torch.randint(1000, (8,))).backward()
        >>> head.linear.weight.grad.shape
        torch.Size([1000, 16])
    """

    geometry: str
    memory_budget: int | None
    margin: float | None
    negatives: str | int

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        geometry: str = "inner",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        margin: float | None = None,
        negatives: str | int = "all",
        ignore_index: int | None = -100,
        reduction: str = "mean",
        check_targets: bool | None = None,
        memory_budget: int | None = None,
    ) -> None:
        super().__init__()
        in_features, num_classes = valid("in_features", in_features), valid("num_classes", num_classes)
        bias = valid("bias", bias)
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        _keep_triplets(self, margin, negatives)
        _keep(
            self,
            geometry=geometry,
            ignore_index=ignore_index,
            reduction=reduction,
            check_targets=check_targets,
            memory_budget=memory_budget,
        )

    def extra_repr(self) -> str:
        return _changed(self, geometry="inner", memory_budget=None, **_TRIPLET_DEFAULTS)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        negatives: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss; input (..., D), target (...); ``negatives`` (..., k) are sampled."""
        weight, bias = weight_and_bias(self.linear, "linear")
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


def _keep(module: nn.Module, **options: Any) -> None:
    """Make the options attributes of the module, each seen to be of its kind."""
    for name, value in options.items():
        setattr(module, name, valid(name, value))


def _keep_triplets(
    module: SoftTripletLoss | LinearSoftTripletLoss, margin: float | None, negatives: str | int
) -> None:
    module.margin = None if margin is None else valid("margin", margin)
    count = count_of_negatives(negatives)
    module.negatives = "all" if count is None else count


def _sizes(out_features: object) -> tuple[int, ...]:
    """Return the numbers of positions of a loss in K dimensions."""
    if not isinstance(out_features, tuple | list):
        raise TypeError(f"out_features must be a tuple of sizes, got {type(out_features).__name__}")
    sizes = [Whole("sizes of at least 1", 1)("out_features", size) for size in out_features]
    return tuple(size for size in sizes if size is not None)


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


def _changed(module: nn.Module, **defaults: object) -> str:
    """Return the options that differ from their defaults, for `repr`."""
    return ", ".join(f"{n}={getattr(module, n)!r}" for n, v in defaults.items() if getattr(module, n) != v)
