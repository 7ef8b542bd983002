"""The targets of a row: a class index, probabilities, or the probabilities of k classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from xent._core.class_indices import check_top_k, holds_integers, widened
from xent._core.functorch import thawed
from xent._core.validators import Whole, valid


@dataclass(frozen=True, eq=False)
class TopKTarget:
    """A sparse soft target: the probabilities of k classes a row, as stored from a large teacher.

    Accepted wherever a target is, from logits and from features, without a tensor of all classes.

    Args:
        indices: (..., k) of any integer type: different classes of one row, in any order.
        probabilities: (..., k) floating, of any mass. No gradient.
        remainder: what becomes of the mass 1 − Σ probabilities that the teacher gave to the classes which are
            not stored: ``"drop"`` (the target's mass is then below 1) or ``"spread"`` evenly over them.

    Example:
        >>> import torch, xent
        >>> teacher = xent.TopKTarget(torch.tensor([[2, 0]]), torch.tensor([[0.7, 0.2]]), remainder="spread")
        >>> round(xent.cross_entropy(torch.zeros(1, 4), teacher).item(), 6)  # log 4: equal logits
        1.386294
    """

    indices: Tensor
    probabilities: Tensor
    remainder: str = "drop"
    name: ClassVar[str] = "TopKTarget.indices"  # of the indices, in messages

    def __post_init__(self) -> None:
        for name in ("indices", "probabilities"):
            tensor = getattr(self, name)
            if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
                kind = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{name} must be a dense tensor, got {kind}")
        shapes = tuple(self.indices.shape), tuple(self.probabilities.shape)
        if shapes[0] != shapes[1] or not shapes[0] or not shapes[0][-1]:
            raise ValueError(
                "indices and probabilities must both be (..., k), k at least 1; "
                f"got {shapes[0]} and {shapes[1]}"
            )
        if not holds_integers(self.indices):
            raise TypeError(f"indices must be of an integer type, got {self.indices.dtype}")
        if not self.probabilities.is_floating_point():
            raise TypeError(f"probabilities must be floating, got {self.probabilities.dtype}")
        valid("remainder", self.remainder)
        if self.probabilities.requires_grad:
            raise ValueError("a TopKTarget takes no gradient: pass probabilities.detach()")

    @classmethod
    def from_top_k(cls, probabilities: Tensor, indices: Tensor, remainder: str = "drop") -> TopKTarget:
        """Return the target of what :func:`xent.top_k` and :func:`xent.linear_top_k` return, in their order.

        Example:
            >>> import torch, xent
            >>> teacher = xent.TopKTarget.from_top_k(*xent.top_k(torch.randn(3, 10), 2))
            >>> teacher.indices.shape
            torch.Size([3, 2])
        """
        return cls(indices, probabilities, remainder)

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> TopKTarget:
        """Return the same target on a device."""
        i, q = (t.to(device, non_blocking=non_blocking) for t in (self.indices, self.probabilities))
        return replace(self, indices=i, probabilities=q)

    def to_dense(self, classes: int) -> Tensor:
        """Return the same target as a probability for every class: (..., classes)."""
        classes = Whole("at least 1", 1)("classes", classes) or 0
        check_top_k(widened(self.indices), classes, None)
        q, others = self.probabilities, classes - self.indices.shape[-1]
        rest = torch.zeros_like(q[..., :1])
        if self.remainder == "spread" and others > 0:
            rest = (1 - q.sum(-1, keepdim=True)) / others
        return rest.expand(*q.shape[:-1], classes).scatter(-1, widened(self.indices), q)


@dataclass(frozen=True, eq=False)
class ChosenClasses(TopKTarget):
    """The classes of each row whose log-probability is wanted: a target without mass.

    One that is there twice in a row, or not wanted, is `NO_CLASS` in the others' place.
    """

    name = "indices"

    @classmethod
    def of(cls, indices: Tensor) -> ChosenClasses:
        """Return the classes (..., k), int64, without mass."""
        return cls(indices, torch.zeros(indices.shape, dtype=torch.float32, device=indices.device))


Target: TypeAlias = Tensor | TopKTarget | None


def with_wide_indices(target: Target) -> Target:
    """Return the target with its class indices, if it has any, as int64; what is no target passes."""
    if isinstance(target, TopKTarget):
        return replace(target, indices=widened(target.indices))
    return widened(target) if isinstance(target, Tensor) and holds_integers(target) else target


T = TypeVar("T")


def thawed_target(target: T) -> T:
    """Return the target with ordinary tensors for those made under inference mode."""
    if isinstance(target, TopKTarget):
        i, q = thawed(target.indices), thawed(target.probabilities)
        return cast(T, replace(target, indices=i, probabilities=q))
    return thawed(target)


def at_positions(target: Target, n: int, classes: int, places: int) -> Sequence[Target]:
    """Split a target into one for each position of a head."""
    if target is None:
        return (None,) * places
    if isinstance(target, TopKTarget):
        k = target.indices.shape[-1]
        both = (t.reshape(n, places, k).unbind(1) for t in (target.indices, target.probabilities))
        return [replace(target, indices=i, probabilities=p) for i, p in zip(*both, strict=True)]
    if target.is_floating_point():
        # a view where there is one position, so that its gradient is no stack of one
        return (target.reshape(n, classes),) if places == 1 else target.reshape(n, classes, places).unbind(2)
    return (target.reshape(n),) if places == 1 else target.reshape(n, places).unbind(1)


def tensors_of(target: Target) -> tuple[Tensor, ...]:
    """Return the tensors of a target."""
    if isinstance(target, TopKTarget):
        return target.indices, target.probabilities
    return () if target is None else (target,)
