"""Cross-entropy of logits, and a linear classifier with its cross-entropy, as modules."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from xent import _log_prob, _row_statistics
from xent._arguments.linear_layer import weight_and_bias
from xent._arguments.validation import check_tensors
from xent._core.low_rank import LowRank, Weight
from xent._core.target import TopKTarget
from xent._core.validators import ReductionName, Whole, valid
from xent._log_prob import LogProb
from xent.losses import _cross_entropy
from xent.nn._options import changed, keep


class CrossEntropyLoss(nn.Module):
    """The module of ``xent.cross_entropy``, with options at construction and tensors at the call.

    Args:
        weight: w, (C,), a factor for each class, kept as a buffer.
        ignore_index, reduction, label_smoothing, z_loss: as in :func:`xent.cross_entropy`.
        softcap, temperature, check_targets: as in :func:`xent.cross_entropy`.

    Raises:
        ValueError, TypeError: an option outside its values.

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
        reduction: ReductionName = "mean",
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
        """Return the loss of logits and targets, in nats.

        Args:
            input: logits, (C,), (N, C) or (N, C, d1, ...).
            target, sample_weight, denominator, data_group: as in :func:`xent.cross_entropy`.
            group: as in :func:`xent.cross_entropy`; the module's ``weight`` is then that of this process's
                classes.
            temperature: a tensor with a number for each row, in place of the module's.

        Returns:
            A scalar, or for ``"none"`` a tensor of the shape of an index target.
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
    """A linear classifier and its cross-entropy in one module, which does not store the logits.

    The module replaces ``nn.Linear`` followed by ``nn.CrossEntropyLoss``, and loads the state dict of
    :class:`torch.nn.LinearCrossEntropyLoss`. Its parameters are those of the layer ``linear``.

    The module reads the weight and bias of ``linear`` and does not call the layer. The layer may be
    parametrised or replaced by another ``torch.nn.Linear``. A layer whose call computes more than its product
    (a quantised layer, a layer with hooks) is a TypeError. ``logits``, ``log_prob``, ``predict`` and
    ``top_k`` evaluate the same head.

    Args:
        in_features: D, the number of features. None with ``linear_weight``, which determines it.
        num_classes: C, the number of classes. None with ``linear_weight``, which determines it.
        out_features: (d1, ...), the positions of a loss in K dimensions.
        bias: whether the classifier has a bias.
        linear_weight: (C·d1·..., D), a ``torch.nn.Parameter`` that becomes ``linear.weight``. With the weight
            of an embedding the two are tied, and the gradient is the sum of both uses. ``device`` and
            ``dtype`` are then not given.
        linear_bias: (C·d1·...), a ``torch.nn.Parameter`` that becomes ``linear.bias``.
        device, dtype: the device and type of a new layer, as in :class:`torch.nn.Linear`.
        weight: w, (C,), a factor for each class, kept as a buffer.
        logit_scale, product_dtype, memory_budget: as in :func:`xent.linear_cross_entropy`.
        ignore_index, reduction, label_smoothing, z_loss: as in :func:`xent.cross_entropy`.
        softcap, temperature, check_targets: as in :func:`xent.cross_entropy`.

    Raises:
        ValueError: sizes or tensors that do not fit together; an option outside its values.
        TypeError: an option of the wrong kind.

    Example:
        >>> import torch, xent
        >>> head = xent.nn.LinearCrossEntropyLoss(16, 1000)
        >>> loss = head(torch.randn(8, 16), torch.randint(1000, (8,)))
        >>> loss.backward()
        >>> head.linear.weight.grad.shape
        torch.Size([1000, 16])
        >>> embedding = torch.nn.Embedding(1000, 16)
        >>> tied = xent.nn.LinearCrossEntropyLoss(linear_weight=embedding.weight)
        >>> tied.linear.weight is embedding.weight
        True
    """

    weight: Tensor | None
    logit_scale: float
    softcap: float | None
    temperature: float
    product_dtype: torch.dtype | None
    memory_budget: int | None

    def __init__(
        self,
        in_features: int | None = None,
        num_classes: int | None = None,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        linear_weight: nn.Parameter | None = None,
        linear_bias: nn.Parameter | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
        ignore_index: int | None = -100,
        reduction: ReductionName = "mean",
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
        bias = valid("bias", bias)
        self.out_features = _sizes(out_features)
        places = math.prod(self.out_features)
        if linear_weight is None and linear_bias is None:
            in_features = valid("in_features", in_features)
            self.num_classes = valid("num_classes", num_classes)
            self.linear = nn.Linear(
                in_features, self.num_classes * places, bias=bias, device=device, dtype=dtype
            )
        else:
            if bias:
                raise ValueError("bias makes a new one: pass linear_bias beside linear_weight")
            self.linear = _tied(linear_weight, linear_bias, device, dtype)
            rows, width = self.linear.weight.shape
            if rows % places or not rows:
                raise ValueError(
                    f"linear_weight has {rows} rows, which out_features {self.out_features} do not divide"
                )
            self.num_classes = rows // places
            for name, given, found in (
                ("in_features", in_features, width),
                ("num_classes", num_classes, self.num_classes),
            ):
                if given is not None and valid(name, given) != found:
                    raise ValueError(
                        f"{name} is {given}, and linear_weight {(rows, width)} has {found}; drop {name}"
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
        target: Tensor | TopKTarget | None = None,
        *,
        sample_weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
        group: Any = None,
        data_group: Any = None,
        temperature: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of features and targets, in nats.

        Args:
            input: features, (..., D).
            target, sample_weight, denominator, data_group: as in :func:`xent.linear_cross_entropy`.
            group: as in :func:`xent.linear_cross_entropy`. The module then holds this process's classes, and
                ``num_classes`` is their number.
            temperature: a tensor with a number for each row, in place of the module's.

        Returns:
            A scalar, or for ``"none"`` a tensor of the shape of an index target.
        """
        if target is None:
            raise TypeError(
                "target is missing: the module returns a loss, module(input, target); of the input alone "
                "there are module.logits(input), module.predict(input) and module.top_k(input, k)"
            )
        weight, bias = self._head()
        return _cross_entropy.linear_cross_entropy(
            input,
            weight,
            target,
            linear_bias=bias,
            sample_weight=sample_weight,
            denominator=denominator,
            group=group,
            data_group=data_group,
            **self._products(),
            **_options(self, temperature),
        )

    def logits(self, input: Tensor) -> Tensor:
        """Return the logits that enter the softmax: after scale, softcap and temperature.

        Args:
            input: features, (..., D).

        Returns:
            (..., C), or (..., C, d1, ...), as :func:`xent.cross_entropy` takes them for one batch dimension.
        """
        weight, _ = self._head()
        z = self.linear(input).unflatten(-1, weight.shape[:-1]) * self.logit_scale
        z = z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)
        return z if self.temperature == 1.0 else z / self.temperature

    @overload
    def log_prob(self, input: Tensor, indices: Tensor, *, return_entropy: Literal[False] = ...) -> Tensor: ...

    @overload
    def log_prob(self, input: Tensor, indices: Tensor, *, return_entropy: Literal[True]) -> LogProb: ...

    def log_prob(self, input: Tensor, indices: Tensor, *, return_entropy: bool = False) -> Tensor | LogProb:
        """Return the log-probabilities of given classes, without storing the logits.

        Args:
            input: features, (..., D).
            indices, return_entropy: as in :func:`xent.linear_log_prob`.

        Returns:
            A tensor of the shape of ``indices`` in nats, or with ``return_entropy`` a :class:`xent.LogProb`.
        """
        weight, bias = self._head()
        found: Tensor | LogProb = _log_prob.linear_log_prob(  # type: ignore[call-overload]
            input,
            weight,
            indices,
            linear_bias=bias,
            ignore_index=self.ignore_index,
            return_entropy=return_entropy,
            check_targets=self.check_targets,
            **self._products(),
            **self._of_logits(),
        )
        return found

    def predict(self, input: Tensor) -> Tensor:
        """Return the most probable class of each row, the lowest of equal ones, without storing the logits.

        Args:
            input: features, (..., D).

        Returns:
            Class indices, int64, of the shape of the unreduced loss.
        """
        weight, bias = self._head()
        with torch.no_grad():
            rows = _row_statistics.linear_row_statistics(
                input, weight, linear_bias=bias, **self._products(), **self._of_logits()
            )
        return rows.argmax

    def top_k(self, input: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k largest probabilities of each row and their classes.

        Args:
            input: features, (..., D).
            k: the number of classes, at most C.

        Returns:
            Probabilities and indices, as :func:`xent.linear_top_k`.
        """
        weight, bias = self._head()
        return _row_statistics.linear_top_k(
            input, weight, k, linear_bias=bias, **self._products(), **self._of_logits()
        )

    def _of_logits(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("softcap", "temperature")}

    def _products(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("logit_scale", "product_dtype", "memory_budget")}

    def _head(self) -> tuple[Weight, Tensor | None]:
        """Return the classifier, (C, D) or (C, d1, ..., D), and its bias."""
        shape = (self.num_classes, *self.out_features)
        weight, bias = weight_and_bias(self.linear, "linear")
        if len(weight.shape) != 2 or weight.shape[0] != math.prod(shape):
            raise ValueError(
                f"linear.weight is {tuple(weight.shape)} where num_classes and out_features, {shape}, ask "
                f"for {math.prod(shape)} rows: set num_classes to the new number of classes too"
            )
        if self.out_features:
            if isinstance(weight, LowRank):
                raise TypeError("linear has an adapter, which does not go with out_features: merge it")
            weight = weight.reshape(*shape, weight.shape[-1])
        return weight, None if bias is None else bias.reshape(shape)


def _tied(
    weight: nn.Parameter | None,
    bias: nn.Parameter | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Linear:
    """Return a layer of parameters that exist; none is made."""
    if weight is None:
        raise ValueError("linear_bias goes with linear_weight: pass both, or bias=True for a new one")
    for name, given in (("linear_weight", weight), ("linear_bias", bias)):
        if given is not None and not isinstance(given, nn.Parameter):
            raise TypeError(f"{name} must be a torch.nn.Parameter, got {type(given).__name__}")
    if weight.dim() != 2:
        raise ValueError(f"linear_weight must be (classes, features), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_bias must be {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    if device is not None or dtype is not None:
        raise ValueError("device and dtype are those of linear_weight: drop them")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer


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
