"""The targets of a row: a class index, probabilities, or the probabilities of k classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from xent._core.class_indices import check_top_k, holds_integers, widened
from xent._core.functorch import thawed
from xent._core.validators import RemainderName, Whole, valid


@dataclass(frozen=True, eq=False)
class TopKTarget:
    """A sparse soft target that holds the probabilities of k classes of each row, from a teacher model.

    Every loss that takes a target takes it, from logits and from features, without a tensor of all classes.
    ``remainder`` decides on the mass ``1 − Σ q`` that the teacher gave to the classes that are not stored.
    With ``"bucket"`` these classes count as one class more, in the target and in the model. The loss is then
    the cross-entropy of k + 1 classes, ``−Σ_j q_j·log p_j − Q̄·log P̄``, where q are the stored
    probabilities, Q̄ is the mass of the bucket in the target and P̄ the sum of the model's p over the classes
    not stored. The divergence is that of the k + 1 classes too, and never negative.

    Args:
        indices: (..., k) of any integer type: different classes of one row, in any order.
        probabilities: q, (..., k) floating, of any mass. No gradient.
        remainder: ``"drop"`` leaves the remaining mass out, so that the target's mass is below 1.
            ``"spread"`` distributes it evenly over the classes not stored. ``"bucket"`` makes them one class.
        rest: Q̄, (...), the mass of the bucket; None means 1 − Σ q. A value from −1e-6 to 0 counts as 0, and
            so does one up to 1e-6 where every class is stored. Values beyond are a ValueError in a loss,
            where the data can be read.

    Raises:
        ValueError: shapes that do not fit together, an unknown ``remainder``, ``rest`` without a bucket,
            tensors that require gradient.
        TypeError: tensors of the wrong type.

    Example:
        >>> import torch, xent
        >>> teacher = xent.TopKTarget(torch.tensor([[2, 0]]), torch.tensor([[0.7, 0.2]]), remainder="spread")
        >>> round(xent.cross_entropy(torch.zeros(1, 4), teacher).item(), 6)  # log 4: equal logits
        1.386294
        >>> bucket = xent.TopKTarget(torch.tensor([[2, 0]]), torch.tensor([[0.7, 0.2]]), remainder="bucket")
        >>> round(xent.cross_entropy(torch.zeros(1, 4), bucket).item(), 6)  # 0.9 log 4 + 0.1 log 2
        1.31698
    """

    indices: Tensor  # (..., k) integers, different classes of each row
    probabilities: Tensor  # (..., k) floating, the mass of each of them
    remainder: RemainderName = "drop"  # the treatment of the remaining mass
    rest: Tensor | None = None  # (...) floating, the mass of the bucket; None means 1 − Σ probabilities
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
        self._check_rest()

    def _check_rest(self) -> None:
        rest: object = self.rest
        if rest is None:
            return
        if self.remainder != "bucket":
            raise ValueError(f"rest is the mass of a bucket: pass remainder='bucket', not {self.remainder!r}")
        if not isinstance(rest, Tensor) or not rest.is_floating_point():
            kind = rest.dtype if isinstance(rest, Tensor) else type(rest).__name__
            raise TypeError(f"rest must be a floating tensor, got {kind}")
        if rest.shape != self.indices.shape[:-1]:
            raise ValueError(
                f"rest must have the shape of the rows, {tuple(self.indices.shape[:-1])}; "
                f"got {tuple(rest.shape)}"
            )
        if rest.requires_grad:
            raise ValueError("a TopKTarget takes no gradient: pass rest.detach()")

    @classmethod
    def from_top_k(
        cls,
        probabilities: Tensor,
        indices: Tensor,
        remainder: RemainderName = "drop",
        rest: Tensor | None = None,
    ) -> TopKTarget:
        """Return the target of probabilities and indices, in the order in which ``top_k`` returns them.

        Args:
            probabilities: (..., k), as :func:`xent.top_k` and :func:`xent.linear_top_k` return them.
            indices: (..., k).
            remainder: as in the constructor.
            rest: as in the constructor.

        Returns:
            The target.

        Example:
            >>> import torch, xent
            >>> teacher = xent.TopKTarget.from_top_k(*xent.top_k(torch.randn(3, 10), 2))
            >>> teacher.indices.shape
            torch.Size([3, 2])
        """
        return cls(indices, probabilities, remainder, rest)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors: indices, probabilities, and the rest where it is given."""
        return tuple(t for t in (self.indices, self.probabilities, self.rest) if t is not None)

    def mapped(self, f: Callable[[Tensor], Tensor]) -> TopKTarget:
        """Return the target with a function applied to each of its tensors.

        Args:
            f: a function from a tensor to a tensor of the same kind, such as an index or a transfer to a
                device.

        Returns:
            The new target.
        """
        rest = None if self.rest is None else f(self.rest)
        return replace(self, indices=f(self.indices), probabilities=f(self.probabilities), rest=rest)

    def as_dict(self) -> dict[str, Tensor]:
        """Return the tensors by the names of the constructor's arguments, ready for a safetensors file.

        Returns:
            ``{"indices": ..., "probabilities": ...}``, with ``"rest"`` where it is given; all are contiguous.

        Example:
            >>> import torch, xent
            >>> teacher = xent.TopKTarget.from_top_k(*xent.top_k(torch.randn(3, 10), 2))
            >>> stored = teacher.as_dict()  # safetensors.torch.save_file(stored, path), load_file(path)
            >>> xent.TopKTarget(**stored, remainder="bucket").indices.shape
            torch.Size([3, 2])
        """
        named = (("indices", self.indices), ("probabilities", self.probabilities), ("rest", self.rest))
        return {name: t.contiguous() for name, t in named if t is not None}

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> TopKTarget:
        """Return the same target on a device.

        Args:
            device: as in :meth:`torch.Tensor.to`.
            non_blocking: as in :meth:`torch.Tensor.to`.

        Returns:
            The target, its tensors on the device.
        """
        return self.mapped(lambda t: t.to(device, non_blocking=non_blocking))

    def to_dense(self, classes: int) -> Tensor:
        """Return the same target with a probability for every class.

        Args:
            classes: C, the number of classes.

        Returns:
            (..., C), of the type of ``probabilities``.

        Raises:
            ValueError: the target has a bucket, whose mass belongs to no class.
            IndexError: an index outside 0..C−1.
        """
        if self.remainder == "bucket":
            raise ValueError("a bucket is no probability of a class: a TopKTarget with one has no dense form")
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
        return cast(T, target.mapped(thawed))
    return thawed(target)


def at_positions(target: Target, n: int, classes: int, places: int) -> Sequence[Target]:
    """Split a target into one for each position of a head."""
    if target is None:
        return (None,) * places
    if isinstance(target, TopKTarget):
        k, rest = target.indices.shape[-1], target.rest
        i, q = (t.reshape(n, places, k).unbind(1) for t in (target.indices, target.probabilities))
        r = (None,) * places if rest is None else rest.reshape(n, places).unbind(1)
        columns = zip(i, q, r, strict=True)
        return [replace(target, indices=i, probabilities=q, rest=r) for i, q, r in columns]
    if target.is_floating_point():
        # a view where there is one position, so that its gradient is no stack of one
        return (target.reshape(n, classes),) if places == 1 else target.reshape(n, classes, places).unbind(2)
    return (target.reshape(n),) if places == 1 else target.reshape(n, places).unbind(1)


def tensors_of(target: Target) -> tuple[Tensor, ...]:
    """Return the tensors of a target."""
    if isinstance(target, TopKTarget):
        return target.tensors
    return () if target is None else (target,)
