"""The derivatives of a loss in the outputs of its rows, from which a sweep makes the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from xent._core.ops import cut


class Coefficients(NamedTuple):
    """∂L/∂(row outputs) of M rows, float64; None where they are zero."""

    loss: Tensor  # (M,)
    logsumexp: Tensor | None = None  # (M,)
    entropy: Tensor | None = None  # (M,)
    log_rest: Tensor | None = None  # (M,) of the classes that are not own
    log_prob: Tensor | None = None  # (M, K) of the own classes

    def rows(self, rows: slice) -> Coefficients:
        return self._mapped(lambda t: cut(t, rows))

    def alpha(self, a: Tensor) -> Tensor:
        """Return the factor of p, without those of H and log P̄: a·γ + ∂L/∂lse − Σ λ."""
        alpha = a * self.loss
        alpha = alpha if self.logsumexp is None else alpha + self.logsumexp
        return alpha if self.log_prob is None else alpha - self.log_prob.sum(1)

    def scaled(self, by: float | Tensor) -> Coefficients:
        """Return the coefficients times a number, or one for each row."""
        if isinstance(by, float) and by == 1.0:
            return self
        of_rows = isinstance(by, Tensor) and by.dim() == 1
        return self._mapped(lambda t: t * (by[:, None] if of_rows and t.dim() == 2 else by))  # type: ignore[index]

    def _mapped(self, f: Callable[[Tensor], Tensor]) -> Coefficients:
        return Coefficients(f(self.loss), *(None if t is None else f(t) for t in self[1:]))
