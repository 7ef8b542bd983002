"""A classifier with a low-rank term: W + κ·B A, which is never formed.

    u = x Wᵀ + κ (x Aᵀ) Bᵀ        x (N, D)    W (C, D)    A (R, D)    B (C, R)

Source: Hu et al., "LoRA: low-rank adaptation of large language models", 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from xent._core.validators import FINITE, FLOATING


@dataclass(frozen=True, eq=False)
class LowRank:
    """The weight of a linear head with a low-rank adapter, ``W + κ·B A``, without the sum in memory.

    The logits are ``u = x Wᵀ + κ·(x Aᵀ) Bᵀ``. Every loss from features takes a ``LowRank`` as its
    ``linear_weight``, with every option but ``normalize`` and with every derivative. The adapter costs the
    products with its two factors. Where ``weight`` requires no gradient, no tensor of shape (C, D) is made.
    :mod:`xent.curvature` and :mod:`xent.triplets` take ``to_dense()``. Source: Hu et al., "LoRA: low-rank
    adaptation of large language models", 2021.

    Args:
        weight: W, (C, D).
        down: A, (R, D), which maps the features to R numbers.
        up: B, (C, R), which maps these R numbers to the classes. ``down`` and ``up`` have one floating type:
            that of ``weight``, or float32 beside a half type.
        scale: κ, a finite number; LoRA's alpha / R.

    Raises:
        TypeError: tensors of types that do not fit together.
        ValueError: shapes that do not fit together, a scale that is not finite.

    Example:
        >>> import torch, xent
        >>> weight = torch.randn(1000, 16)  # frozen
        >>> down, up = torch.randn(4, 16, requires_grad=True), torch.zeros(1000, 4, requires_grad=True)
        >>> head = xent.LowRank(weight, down, up, scale=2.0)
        >>> loss = xent.linear_cross_entropy(torch.randn(8, 16), head, torch.randint(1000, (8,)))
        >>> loss.backward()
        >>> down.grad.shape, up.grad.shape
        (torch.Size([4, 16]), torch.Size([1000, 4]))
    """

    weight: Tensor  # W, (C, D)
    down: Tensor  # A, (R, D)
    up: Tensor  # B, (C, R)
    scale: float = 1.0  # κ

    def __post_init__(self) -> None:
        for name in ("weight", "down", "up"):
            tensor: Any = getattr(self, name)
            if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
                kind = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{name} must be a dense tensor, got {kind}")
            if tensor.dtype not in FLOATING:
                raise TypeError(f"{name} must be of a floating type of 16, 32 or 64 bits, got {tensor.dtype}")
        shapes = tuple(tuple(t.shape) for t in self.tensors)
        if any(len(shape) != 2 for shape in shapes):
            raise ValueError(f"weight, down and up must be (C, D), (R, D) and (C, R); got {_and(shapes)}")
        (classes, features), (rank, inner), (outer, of_up) = shapes
        if (inner, outer, of_up) != (features, classes, rank):
            raise ValueError(
                f"weight, down and up must be (C, D), (R, D) and (C, R); got {_and(shapes)}, where weight "
                f"says C = {classes}, D = {features}"
            )
        if self.down.dtype != self.up.dtype:
            raise TypeError(f"down is {self.down.dtype} but up is {self.up.dtype}: convert one of them")
        wide = torch.float32 if self.weight.dtype in (torch.float16, torch.bfloat16) else self.weight.dtype
        if self.up.dtype not in (self.weight.dtype, wide):
            also = "" if wide == self.weight.dtype else f" or {wide}"
            raise TypeError(
                f"down and up must be {self.weight.dtype}{also}, as weight is {self.weight.dtype}; "
                f"got {self.up.dtype}"
            )
        object.__setattr__(self, "scale", FINITE("scale", self.scale))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors: weight, down and up."""
        return self.weight, self.down, self.up

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight that this stands for, (C, D)."""
        return self.weight.shape

    def mapped(self, f: Callable[[Tensor], Tensor]) -> LowRank:
        """Return the same weight with a function applied to each of its tensors.

        Args:
            f: a function from a tensor to a tensor of the same shape.

        Returns:
            The new weight.
        """
        return replace(self, weight=f(self.weight), down=f(self.down), up=f(self.up))

    def to_dense(self) -> Tensor:
        """Return the weight that this object stands for, ``W + κ·B A``; differentiable.

        Returns:
            (C, D), of the type of ``weight``.

        Example:
            >>> import torch, xent
            >>> head = xent.LowRank(torch.zeros(2, 3), torch.ones(1, 3), torch.ones(2, 1), scale=0.5)
            >>> head.to_dense()[0]
            tensor([0.5000, 0.5000, 0.5000])
        """
        return (self.weight + self.scale * (self.up @ self.down)).to(self.weight.dtype)


def _and(shapes: tuple[tuple[int, ...], ...]) -> str:
    first, second, third = shapes
    return f"{first}, {second} and {third}"


Weight: TypeAlias = Tensor | LowRank  # of a linear head


def tensors_of_weight(weight: Weight) -> tuple[Tensor, ...]:
    """Return the tensors of a head's weight."""
    return weight.tensors if isinstance(weight, LowRank) else (weight,)


def mapped_weight(f: Callable[[Tensor], Tensor], weight: Weight) -> Weight:
    """Return the weight with f of each of its tensors."""
    return weight.mapped(f) if isinstance(weight, LowRank) else f(weight)
