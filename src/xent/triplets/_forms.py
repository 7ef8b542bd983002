"""The parts of a triplet loss: φ of a row's margins, its negatives, and the geometry of the scores.

    (1/(K+1)) Σ_j φ(m_j + margin)        φ = max(·, 0) or softplus        m_j = z_j − z_y over K negatives

Every score is an inner product. Another geometry is the inner product of other vectors,

    cosine: x/‖x‖, w/‖w‖        squared L2: 2x, w, bias −‖w‖²        −‖x − w‖² = 2⟨x, w⟩ − ‖w‖² − ‖x‖²

so squared L2 ranks the classes like the inner product where all ‖w‖ are equal, or where the bias is −‖w‖²/2
(its margins are then twice as large).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from xent._core.statistics import NEG_INF, statistics_dtype

EXACT = 40.0  # from here on log(1 + exp v) equals v in float64


def softplus(v: Tensor) -> Tensor:
    return F.softplus(v, threshold=EXACT)


@dataclass(frozen=True)
class Form:
    """The function φ and the margin of a loss (1/(K + 1)) Σ φ(m + margin) over K negatives."""

    phi: Callable[[Tensor], Tensor]
    margin: float | None  # None: log(K + 1)

    def shift(self, negatives: int | Tensor) -> float | Tensor:
        """Return the margin for K negatives, a number or (M,)."""
        if self.margin is not None:
            return self.margin
        if isinstance(negatives, Tensor):
            return torch.log1p(negatives.to(statistics_dtype(negatives.device)))
        return math.log1p(negatives)

    def sum(self, m: Tensor, shift: float | Tensor) -> Tensor:
        """Return Σ φ(m + margin) over m (R, T), −inf at no negative; the margin is one number or (R,)."""
        by = shift[:, None].to(m.dtype) if isinstance(shift, Tensor) else shift
        return self.phi(m + by).sum(1).to(statistics_dtype(m.device))

    def sum_over_negatives(
        self, z: Tensor, y: Tensor, negatives: int | Tensor
    ) -> tuple[Tensor, int | Tensor]:
        """Return Σ φ over the negatives of each row, (M,), and their number; z (M, C), y (M, 1)."""
        classes = z.shape[1]
        count: int | Tensor
        inside = (y >= 0) & (y < classes)
        y = torch.where(inside, y, 0)
        z_y = torch.where(inside, z.gather(1, y), math.nan)
        if isinstance(negatives, Tensor):
            used = negatives != y
            m, count = torch.where(used, z.gather(1, negatives) - z_y, NEG_INF), used.sum(1)
        else:
            own = torch.arange(classes, device=z.device) == y
            m, count = torch.where(own, NEG_INF, z - z_y), min(negatives, classes - 1)
            m = m if count == classes - 1 else m.topk(count, dim=1).values
        return self.sum(m, self.shift(count)), count


def in_geometry(
    geometry: str, x: Tensor, w: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return features, weight and bias of the inner-product head whose margins are those of the geometry.

    For the cosine the rows have length 1 already: they are normalised before any type is lowered.
    """
    if geometry != "squared_l2":
        return x, w, b
    norm = w.square().sum(1)  # −‖x‖² is the same for every class, so no margin changes
    return 2 * x, w, -norm if b is None else b - norm
