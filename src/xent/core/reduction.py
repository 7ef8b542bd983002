"""What becomes of the rows' losses: L = Σ s·(ℓ + λ·lse²) / divisor, and its derivatives in ℓ and lse.

    ∂L/∂ℓ = s / divisor        ∂L/∂lse = 2λ·lse·s / divisor

z-loss shares the divisor of `mean`: Σ s·w[y] (index targets) or Σ s (probabilities), unless a
denominator replaces it. The mean over no rows is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xent.core.statistics import Statistics, statistics_dtype
from xent.core.sweep import Coefficients
from xent.core.targets import Targets

Kind = Literal["none", "sum", "mean"]


@dataclass(frozen=True)
class Reduction:
    kind: Kind = "mean"
    z_loss: float = 0.0
    denominator: float | Tensor | None = None

    def values(self, nll: Tensor, logsumexp: Tensor, row_weight: Tensor | None) -> Tensor:
        """What each row adds, before the divisor: (M,)."""
        values = nll if self.z_loss == 0.0 else nll + self.z_loss * logsumexp.square()
        return values if row_weight is None else values * row_weight

    def scale(self, parts: Sequence[tuple[Targets, Tensor | None]], device: torch.device) -> Tensor:
        """One over the divisor of all parts (targets and row weights) together: a float64 scalar."""
        one = torch.ones((), dtype=statistics_dtype(device), device=device)
        if self.kind != "mean":
            return one
        if self.denominator is not None:
            return one / torch.as_tensor(self.denominator, dtype=one.dtype, device=device).detach()
        divisor = sum((_divisor(targets, weight, one) for targets, weight in parts), start=one * 0)
        return torch.where(divisor == 0, 0.0, 1.0 / torch.where(divisor == 0, 1.0, divisor))

    def coefficients(
        self, found: Statistics, targets: Targets, row_weight: Tensor | None, scale: Tensor, chunk: slice
    ) -> Coefficients:
        """∂L/∂(ℓ, lse) of a chunk of rows."""
        rows = len(range(*chunk.indices(targets.count)))
        loss = scale.expand(rows) if row_weight is None else row_weight[chunk] * scale
        return Coefficients(loss, 2 * self.z_loss * found.logsumexp * loss if self.z_loss != 0.0 else None)


def _divisor(targets: Targets, row_weight: Tensor | None, one: Tensor) -> Tensor:
    if targets.mean_weight is None:
        return one * targets.count if row_weight is None else row_weight.sum()
    return targets.mean_weight.sum() if row_weight is None else (row_weight * targets.mean_weight).sum()
