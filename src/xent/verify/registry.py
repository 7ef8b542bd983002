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
    """The largest deviation among some numbers, and its place."""

    units: float
    where: str


@dataclass(frozen=True)
class Setting:
    """The type, the device and the rows that an identity is checked on."""

    dtype: torch.dtype
    device: torch.device
    batches: tuple[Batch, ...]

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
        """Return a tensor of the checked type on the device."""
        return torch.tensor(values, dtype=self.dtype, device=self.device)

    def compare(
        self,
        computed: Tensor,  # (N, ...)
        expected: Tensor | float,  # broadcasts to it
        scale: Tensor | float,  # the same
        where: str,
        dtype: torch.dtype | None = None,  # in which `computed` was computed, if not its own
    ) -> Deviation:
        """Return the largest deviation and its row. Equal infinities agree; nan deviates by inf."""
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
    """A formula, the deviation it is allowed, and the function that checks it."""

    name: str
    formula: str
    section: int  # groups and orders the identities in the report
    allowed: float  # units in the last place
    because: str  # the reason for that number
    check: Check


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
