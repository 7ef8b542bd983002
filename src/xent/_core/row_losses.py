"""The cost of a row as a function of its cross-entropy ℓ: cross-entropy itself, focal loss, poly loss.

    cross-entropy    ℓ
    focal            α·(1 − p)^γ·ℓ        1 − p = −expm1(−ℓ)      (Lin et al. 2017, https://arxiv.org/abs/1708.02002)
    poly-1           ℓ + ε·(1 − p)                                (Leng et al. 2022, https://arxiv.org/abs/2204.12511)

A row loss is a class with the value alone, in float64, of a few numbers a row. Its slopes, which the sweep
multiplies the row's gradient by, and its second slopes come from autograd. With one class of mass 1 as its
target, p_y = e^−ℓ, so that no digit of a sure row is lost, and no tile knows of any of this.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xent._core.ops import cut
from xent._core.statistics import statistics_dtype

SMALL = 1e-8  # ℓ below which (1 − p)^γ·ℓ = ℓ^(γ + 1)·(1 − γℓ/2) to float64 rounding


HALF = 0.7  # about where e^−x is ½


def one_minus_exp(x: Tensor) -> Tensor:
    """Return 1 − e^−x of x ≥ 0, which keeps its digits and those of its derivatives, e^−x, at both ends.

    torch's derivative of expm1 is its result plus 1, of which nothing is left where e^−x is small.
    """
    near = x < HALF
    small, large = torch.where(near, x, 0.0), torch.where(near, HALF, x)
    return torch.where(near, -torch.expm1(-small), 1 - torch.exp(-large))


class RowLoss(ABC):
    """The cost of each row, from its cross-entropy."""

    @abstractmethod
    def __call__(self, loss: Tensor) -> Tensor:
        """Return the cost (M,) of rows of cross-entropy ℓ (M,), by differentiable operations.

        Its slopes must be finite at every finite ℓ ≥ 0, at 0 too.
        """

    def check(self, n_classes: int) -> None:
        """Raise a ValueError where the loss is not one over so many classes."""
        return

    def for_rows(self, index: Tensor) -> RowLoss:
        """Return the loss of rows of these classes (M,), where it depends on the class."""
        return self

    def rows(self, rows: slice) -> RowLoss:
        """Return the loss of a slice of the M rows, where it has a number for each."""
        return self


@dataclass(frozen=True, eq=False)
class Focal(RowLoss):
    """α·(1 − p)^γ·ℓ."""

    gamma: float
    alpha: float | Tensor = 1.0  # a number, or (C,); (M,) float64 once the rows' classes are known

    def __call__(self, loss: Tensor) -> Tensor:
        if self.gamma == 0.0:
            return self._weighed(loss)
        # powers of 0 have no finite slopes, and 1 − p has none of its digits left in x² beside a tiny ℓ
        none, near, far = loss == 0, loss < SMALL, loss.isinf()
        small = torch.where(near & ~none, loss, 1.0)
        large = torch.where(near | far, 1.0, loss)
        of_small = small.pow(self.gamma + 1) * (1 - self.gamma / 2 * small)
        of_large = one_minus_exp(large).pow(self.gamma) * large
        value = torch.where(far, loss, torch.where(near, of_small, of_large))
        return self._weighed(value.masked_fill(none, 0.0))

    def _weighed(self, value: Tensor) -> Tensor:
        """Return α·value with 0·∞ = 0: a class of weight 0 costs nothing, be it masked."""
        return (self.alpha * value).masked_fill(value.isinf() & (self.alpha == 0), 0.0)

    def check(self, n_classes: int) -> None:
        if isinstance(self.alpha, Tensor) and self.alpha.shape != (n_classes,):
            raise ValueError(
                f"alpha must have shape ({n_classes},), one a class; got {tuple(self.alpha.shape)}"
            )

    def for_rows(self, index: Tensor) -> Focal:
        if not isinstance(self.alpha, Tensor):
            return self
        alpha = self.alpha.detach().to(statistics_dtype(index.device))
        return replace(self, alpha=alpha[index.clamp(0, len(alpha) - 1)])  # one outside has a loss of nan

    def rows(self, rows: slice) -> Focal:
        return replace(self, alpha=cut(self.alpha, rows)) if isinstance(self.alpha, Tensor) else self


@dataclass(frozen=True, eq=False)
class Poly(RowLoss):
    """ℓ + ε·(1 − p)."""

    epsilon: float

    def __call__(self, loss: Tensor) -> Tensor:
        return loss + self.epsilon * one_minus_exp(loss)
