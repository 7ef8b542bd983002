"""The objective of features of more columns than rows, in the coordinates that the rows span.

    X̃ = X − 1μᵀ = R Qᵀ,  QᵀQ = I        W = W_r Qᵀ,  ‖W‖ = ‖W_r‖

    M^½ X̃X̃ᵀ M^½ = U S² Uᵀ      Q = X̃ᵀ M^½ U S⁻¹      R = X̃X̃ᵀ M^½ U S⁻¹         M: the rows' masses

A gradient in W is a sum of rows less their mean (the gradient in b is 0 at a minimum), so a minimum lies in
their span. The problem in R has at most N columns, which are uncorrelated, and the same minimum. Q is never
formed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xent.data.rows import ArrayRows
from xent.linear_model.hessian import KEPT, standardised
from xent.linear_model.labelled_rows import LabelledRows
from xent.linear_model.objective import Objective

ROWS_A_CLASS = 64
"""Rows, in multiples of the classes, up to which products of all pairs of rows cost less than they save."""

FEATURES = 1 << 10
"""Features from which on it is worth while."""

BLOCK = 1 << 22
"""Numbers of which a float64 copy is made at a time."""


def make_objective(
    rows: LabelledRows, n_classes: int, C: float, fit_intercept: bool, **options: Any
) -> Objective:
    """Return the objective over some rows, in the coordinates in which it is minimised soonest.

    The arguments are those of `Objective`.
    """
    made = Objective(rows, n_classes, C, fit_intercept, **options)
    return WideObjective(made, C) if WideObjective.pays(made) else made


class WideObjective(Objective):
    """An objective in W_r, (K, r); ``to_solver`` and ``to_model`` take and return W, (K, D)."""

    def __init__(self, plain: Objective, C: float) -> None:
        self.plain = plain
        ((_, x),) = standardised(plain.rows.source, plain.center, plain.own_scale).batches()
        self._x = x[:].to(plain.device)  # (N, D), less their mean
        gram = _gram(self._x)
        root = torch.from_numpy(plain.mass(slice(None))).to(plain.device).sqrt()[:, None]
        values, vectors = torch.linalg.eigh(gram * root * root.t())
        kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1].clamp(min=1e-300)
        basis = root * vectors[:, kept] / values[kept].sqrt()  # (N, r): x̃ᵀ times it is Q
        self._basis = basis.to(self._x.dtype)
        source = ArrayRows((gram @ basis).to(self._x.dtype))
        rows = dataclasses.replace(plain.rows, source=source)
        super().__init__(rows, plain.n_classes, C, plain.fit_intercept, workers=plain.workers)

    @staticmethod
    def pays(plain: Objective) -> bool:
        """Return whether the rows are few enough for it, in memory, and of one process."""
        n_rows, n_features = plain.rows.source.shape
        small = n_rows * n_features * plain.dtype.itemsize <= KEPT
        if plain.is_sparse:  # whose products are cheaper than those of dense coordinates
            return False
        few = 2 <= n_rows < n_features >= FEATURES and n_rows <= ROWS_A_CLASS * plain.n_classes
        return few and small and plain.ranks.size == 1

    def to_solver(self, coef: np.ndarray, intercept: np.ndarray) -> np.ndarray:
        """Return θ (K, r + 1) of W and b."""
        W = torch.from_numpy(coef).to(self._x)
        of_rows = (W @ self._x.t()) @ self._basis
        b = intercept + coef.astype(np.float64) @ self.plain.mean
        return self.scaled(of_rows.double().cpu().numpy(), b)

    def to_model(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return W (K, D) and b (K,) of θ, in the features' precision."""
        of_rows, b = self.unscaled(theta)
        W = self._of_columns(of_rows)
        return W.astype(self.dtype), (b - W @ self.plain.mean).astype(self.dtype)

    def _of_columns(self, of_rows: np.ndarray) -> np.ndarray:
        """Return W_r Qᵀ, (K, D), in float64."""
        mixed = torch.from_numpy(of_rows).to(self._x) @ self._basis.t()
        return (mixed @ self._x).double().cpu().numpy()

    def _outward(self, to_W: np.ndarray, to_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._of_columns(to_W) + np.outer(to_b, self.plain.mean), to_b

    def loss(self, model: np.ndarray, rows: LabelledRows) -> np.ndarray:
        """Return the sum of other rows' losses, (1,), for (W | b), flat."""
        return self.plain.loss(model, rows)

    def logits(
        self, coef: np.ndarray, intercept: np.ndarray, rows: LabelledRows
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield logits (n, C), targets and weights of some rows at a time, for W (K, D) and b (K,)."""
        return self.plain.logits(coef, intercept, rows)

    def runs_away(self, coef: np.ndarray, intercept: np.ndarray) -> bool:
        """Return whether W (K, D) and b (K,) put every row on its class's side, and nothing bounds them."""
        return self.plain.runs_away(coef, intercept)


def _gram(x: Tensor) -> Tensor:
    """Return x xᵀ, (N, N) in float64."""
    total = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)
    step = max(1, BLOCK // len(x))
    for start in range(0, x.shape[1], step):
        part = x[:, start : start + step].double()
        total.addmm_(part, part.t())
    return total
