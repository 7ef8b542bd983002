"""The registry of identities, and the deviation of a computed number from one.

    deviation = |computed − expected| / max(eps·scale, smallest number)

eps is that of the type in which `computed` was computed, `scale` the size of the terms that it is the sum of.
So the deviation is in units of the rounding error, comparable between types. An identity is a function of a
`Setting` that yields deviations, registered under a name by a decorator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from xent.verify.data import Batch, Head


class Deviation(NamedTuple):
    """The largest deviation among some numbers, and its place.

    Example:
        >>> from xent.verify import Deviation
        >>> Deviation(0.5, "row 3").units
        0.5
    """

    units: float  # the deviation in units of the type's rounding error; inf for nan
    where: str  # the batch, the kind of target and the row


@dataclass(frozen=True)
class Setting:
    """The type, the device and the rows on which an identity is checked.

    Example:
        >>> import torch
        >>> from xent.verify import Setting
        >>> setting = Setting(torch.float32, torch.device("cpu"), ())
        >>> setting.compare(setting.tensor([1.0]), 1.0, 1.0, "one").units
        0.0
    """

    dtype: torch.dtype  # the type that is checked
    device: torch.device  # the device that is checked
    batches: tuple[Batch, ...]  # rows of logits, targets and heads

    @property
    def targets(self) -> Iterator[tuple[str, Batch, Tensor, Tensor]]:
        """The batches with each kind of target: its name, the batch, the target, and the same as rows t."""
        for batch in self.batches:
            for kind, target, t in batch.targets:
                yield f"{batch.name}, {kind} targets", batch, target, t

    @property
    def heads(self) -> Iterator[tuple[Batch, Head]]:
        """The batches that have features, each with its head."""
        return ((batch, batch.head) for batch in self.batches if batch.head is not None)

    def tensor(self, values: object) -> Tensor:
        """Return a tensor of the checked type on the device.

        Args:
            values: numbers, in lists.
        """
        return torch.tensor(values, dtype=self.dtype, device=self.device)

    def compare(
        self,
        computed: Tensor,  # (N, ...)
        expected: Tensor | float,  # broadcasts to it
        scale: Tensor | float,  # the same
        where: str,
        dtype: torch.dtype | None = None,  # in which `computed` was computed, if not its own
    ) -> Deviation:
        """Return the largest deviation of computed numbers from expected ones, and its row.

        The deviation is ``|computed − expected| / max(eps·scale, smallest number)``. Equal infinities agree;
        nan deviates by inf.

        Args:
            computed: (N, ...).
            expected: the numbers that the identity predicts, of a shape that broadcasts to that of
                ``computed``.
            scale: the size of the terms whose sum ``computed`` is, of such a shape.
            where: the place, for messages.
            dtype: the type in which ``computed`` was computed; None is its own.

        Returns:
            A :class:`Deviation`.
        """
        info = torch.finfo(dtype or computed.dtype)
        computed = computed.detach().cpu().double()
        expected = torch.as_tensor(expected, dtype=torch.float64).detach().cpu().expand(computed.shape)
        scale = torch.as_tensor(scale, dtype=torch.float64).detach().cpu().expand(computed.shape)
        error = torch.where(computed == expected, 0.0, (computed - expected).abs())
        units = error / (scale * info.eps).clamp_min(info.smallest_normal * info.eps)
        units = torch.where(error == 0, 0.0, units).nan_to_num(nan=math.inf, posinf=math.inf)
        if units.numel() == 0:
            return Deviation(math.inf, f"{where}: nothing was compared")
        worst = int(units.flatten().argmax())
        row = worst // (units.numel() // units.shape[0]) if units.dim() else None
        return Deviation(
            float(units.flatten()[worst]), where if row is None or len(units) == 1 else f"{where}, row {row}"
        )


Check = Callable[[Setting], Iterator[Deviation]]


@dataclass(frozen=True)
class Identity:
    """A formula, the deviation that it is allowed, and the function that checks it.

    Example:
        >>> from xent.verify import IDENTITIES
        >>> IDENTITIES["the gradient"].formula
        '∂ℓ/∂z = a·p − t'
    """

    name: str  # the name of the identity
    formula: str  # the identity, in plain Unicode
    section: int  # the number that groups and orders the identities in the report
    allowed: float  # the largest deviation at which the identity holds, in units of the rounding error
    because: str  # the reason for that number
    check: Check  # the function that yields the deviations of a setting


IDENTITIES: dict[str, Identity] = {}
"""All identities by name, in the order in which they are registered."""


def identity(
    name: str, formula: str, *, section: int, allowed: float, because: str
) -> Callable[[Check], Check]:
    """Register a function that yields deviations as an identity."""

    def register(check: Check) -> Check:
        assert name not in IDENTITIES, f"{name} is there already"
        IDENTITIES[name] = Identity(name, formula, section, allowed, because, check)
        return check

    return register
