"""The derivatives of a loss in the outputs of its rows, from which a sweep makes the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from xent._core.ops import cut


class Coefficients(NamedTuple):
    """∂L/∂(row outputs) of M rows: `loss` (M,) float64, the others (M,) or None where they are zero."""

    loss: Tensor
    logsumexp: Tensor | None = None
    entropy: Tensor | None = None
    log_prob: Tensor | None = None

    def rows(self, rows: slice) -> Coefficients:
        return self._mapped(lambda t: cut(t, rows))

    def alpha(self, a: Tensor) -> Tensor:
        """Return the factor of p, without the entropy's: a·γ + ∂L/∂lse − λ."""
        alpha = a * self.loss
        alpha = alpha if self.logsumexp is None else alpha + self.logsumexp
        return alpha if self.log_prob is None else alpha - self.log_prob

    def scaled(self, by: float | Tensor) -> Coefficients:
        one = isinstance(by, float) and by == 1.0
        return self if one else self._mapped(lambda t: t * by)

    def _mapped(self, f: Callable[[Tensor], Tensor]) -> Coefficients:
        return Coefficients(f(self.loss), *(None if t is None else f(t) for t in self[1:]))
