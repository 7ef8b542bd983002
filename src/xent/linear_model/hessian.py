"""The Hessian of the objective over the rows of all ranks, as Newton's method asks for it.

    H v = Σ_ranks H_r v        A = Σ_ranks A_r        G = Σ_ranks G_r

Products, diagonal, blocks and the sums that Kronecker factors are made of add up over rows; each rank has an
operator of its own rows, on a standardised copy of their features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from xent.curvature._heads import HeadHessian
from xent.curvature._kronecker import HeadKronecker
from xent.linear_model.objective import Objective


class Curvature:
    """Of an objective: every rank makes one, the first asks for ``at``."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.lead = objective, objective.lead
        self._features: Tensor | None = None
        self._here: SummedHessian | None = None
        for name, answer in (
            ("hessian at", self._move),
            ("hessian product", lambda v: HeadHessian.__matmul__(self.here, self._tensor(v)).numpy()),
            ("hessian diagonal", lambda _: _flat(HeadHessian.diagonal(self.here)).numpy()),
            ("hessian block", lambda c: HeadHessian.block(self.here, int(c[0])).numpy()),
            ("hessian factors", self._factor_sums),
        ):
            self.lead.teach(name, answer)

    @property
    def here(self) -> SummedHessian:
        assert self._here is not None
        return self._here

    def at(self, theta: np.ndarray) -> SummedHessian:
        """The Hessian at θ, in the solver's variables on standardised features."""
        self.lead.ask("hessian at", theta)
        return self.here

    def _move(self, theta: np.ndarray) -> np.ndarray:
        objective = self.objective
        if self._features is None:
            self._features = torch.from_numpy(objective.standardised())  # (N, D)
        at = self._tensor(theta).reshape(objective.rows, -1)
        if objective.binary:  # logits (0, s)
            at = torch.cat([torch.zeros_like(at), at])
        self._here = SummedHessian(
            self,
            self._features,
            at[:, :-1].contiguous(),
            objective.target,
            bias=at[:, -1].contiguous() if objective.fit_intercept else None,
            wrt=("weight", "bias") if objective.fit_intercept else ("weight",),
            sample_weight=objective.weight,
            denominator=objective.total,
        )
        return np.empty(0)

    def _factor_sums(self, _: np.ndarray) -> np.ndarray:
        """Σ γ·tr M·x̃ x̃ᵀ, Σ γ·M and Σ γ, flat."""
        found = self.here.own_factors()
        self.here.factors = found
        curved = found.G * found.total
        sums = (
            found.A * curved.trace(),
            curved,
            torch.tensor(found.total, dtype=torch.float64, device="cpu"),
        )
        return np.concatenate([t.double().numpy().ravel() for t in sums])

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(self.objective.dtype))


class SummedHessian(HeadHessian):
    """An operator of this rank's rows, which asks all ranks when it is applied."""

    def __init__(self, curvature: Curvature, features: Tensor, weight: Tensor, target: Tensor, **given: Any):
        self._curvature, self._given = curvature, (features, weight, target, given)
        self.factors: HeadKronecker | None = None
        super().__init__(features, weight, target, **given)

    def _ask(self, name: str, argument: np.ndarray) -> Tensor:
        return self._curvature._tensor(self._curvature.lead.ask(name, argument))

    def __matmul__(self, v: Any) -> Any:
        assert isinstance(v, tuple)  # as Newton's system gives it
        return self._cut(self._ask("hessian product", _flat(v).numpy()).ravel())

    def diagonal(self) -> Any:
        return self._cut(self._ask("hessian diagonal", np.empty(0)).ravel())

    def block(self, index: int) -> Tensor:
        return self._ask("hessian block", np.array([index]))

    def kronecker(self) -> HeadKronecker:
        """The Kronecker factors over all rows."""
        sums = self._curvature.lead.ask("hessian factors", np.empty(0))
        found, self.factors = self.factors, None
        assert found is not None
        a, g = found.A.numel(), found.G.numel()
        curved, total = sums[a : a + g].reshape(found.G.shape), float(sums[-1])
        counted = float(np.trace(curved))
        tensor = self._curvature._tensor
        found.A = tensor(sums[:a].reshape(found.A.shape) / (counted or 1.0))
        found.G, found.total = tensor(curved / (total or 1.0)), total
        return found

    def own_factors(self) -> HeadKronecker:
        features, weight, target, given = self._given
        return HeadKronecker(features, weight, target, weighting="curvature", **given)


def _flat(parts: Any) -> Tensor:
    """Tensors, or one, as one flat tensor."""
    return torch.cat([part.reshape(-1) for part in (parts if isinstance(parts, tuple) else (parts,))])
