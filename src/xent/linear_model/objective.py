"""The objective of ``SoftmaxRegression`` in the solver's variables, on the fused cross-entropy.

    min over W, b of   Σ_n s_n ℓ(W x_n + b, t_n) / Σ_n s_n a_n  +  λ/2 ‖W‖²         W = V/σ,  b = c − W μ

N rows lie with one process or are shared by several: sums over them are asked for, of all ranks (``Lead``).
So may the classes be: each rank then has the gradient of its own slice of W and b.
The solver moves θ = (V | c). With centred features and, by the choice of σ, a Hessian whose diagonal is
constant at W = 0, it needs tens of iterations where it would need thousands in (W, b).
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

from xent._processes.group import Share
from xent._processes.leader import Lead
from xent.losses._cross_entropy import linear_cross_entropy


class Objective:
    """The scaled objective and its gradient at θ = (V | c), flat; the last evaluation is remembered.

    Every rank makes one, of its own rows; the first calls it.
    """

    def __init__(
        self,
        X: np.ndarray,  # (N, D)
        target: np.ndarray,  # (N,) class numbers or (N, C) masses
        weight: np.ndarray | None,  # (N,)
        classes: int,
        C: float,
        fit_intercept: bool,
        lead: Lead | None = None,
    ) -> None:
        self.lead = Lead() if lead is None else lead
        ranks = self.lead.ranks
        mass = np.ones(len(X)) if weight is None else weight.astype(np.float64)
        if target.ndim == 2:
            mass = mass * target.sum(axis=1, dtype=np.float64)
        self.total = float(ranks.sum(mass.sum()))
        if not self.total > 0:
            raise ValueError(
                "nothing is left to fit: sample_weight times class_weight times label mass sums to 0"
            )
        self.penalty = 1.0 / (C * self.total)  # λ
        self.binary = classes == 2
        self.rows, self.columns = 1 if self.binary else classes, X.shape[1]
        self.fit_intercept = fit_intercept
        self.dtype = X.dtype
        self.X = X
        self.x = _tensor(X)
        self.target = _tensor(target)
        self.weight = None if weight is None else _tensor(weight)

        # The Hessian's diagonal at W = 0: h·E[(x_j − μ_j)²] + λ for a weight, h for an intercept. Dividing by
        # h σ_j² with σ_j² = E[(x_j − μ_j)²] + λ/h makes it constant (Jacobi's preconditioner).
        h = 0.25 if self.binary else (classes - 1) / classes**2
        self.mean = ranks.sum(mass @ X) / self.total if fit_intercept else np.zeros(X.shape[1])
        variance = np.zeros(X.shape[1])
        step = max(1, 2**20 // X.shape[1])
        with np.errstate(over="ignore"):  # a scale that is not finite is replaced below
            for i in range(0, len(X), step):
                variance += mass[i : i + step] @ np.square(X[i : i + step] - self.mean)
            scale = np.sqrt(ranks.sum(variance) / self.total + self.penalty / h)
        self.scale = np.where(np.isfinite(scale) & (scale > 0), scale, 1.0)

        self.lead.teach("gradient", self._part)
        self._theta: np.ndarray | None = None
        self._value = 0.0
        self._gradient = np.empty(0)
        self.gradient_norm = np.inf  # in (W, b), at the last θ

    def to_solver(self, coef: np.ndarray, intercept: np.ndarray) -> np.ndarray:
        """(W, b) -> θ, (K, D+1)."""
        W = coef.astype(np.float64)
        return np.concatenate([W * self.scale, (intercept + W @ self.mean)[:, None]], axis=1)

    def standardised(self) -> np.ndarray:
        """The features as the solver sees them, (X − μ)/σ, a copy (N, D)."""
        copied: np.ndarray = (self.X - self.mean) / self.scale
        return copied.astype(self.dtype, copy=False)

    def to_model(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """θ -> (W, b) in the features' precision."""
        W, b = self._unscale(theta)
        return W.astype(self.dtype), b.astype(self.dtype)

    def _unscale(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        theta = theta.reshape(self.rows, -1)
        W = theta[:, :-1] / self.scale
        return W, theta[:, -1] - W @ self.mean

    def __call__(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        if self._theta is not None and np.array_equal(theta, self._theta):
            return self._value, self._gradient
        W, b = self._unscale(theta)
        found = self.lead.ask("gradient", np.concatenate([W, b[:, None]], axis=1)) / self.total
        loss, gradient = float(found[0]), found[1:].reshape(self.rows, -1)
        to_W, to_b = gradient[:, :-1] + self.penalty * W, gradient[:, -1]
        self.gradient_norm = float(max(np.abs(to_W).max(), np.abs(to_b).max()))
        to_V = (to_W - np.outer(to_b, self.mean)) / self.scale
        self._value = loss + 0.5 * self.penalty * float(np.vdot(W, W))
        self._gradient = np.concatenate([to_V, to_b[:, None]], axis=1).ravel()
        self._theta = theta.copy()
        return self._value, self._gradient

    def _part(self, model: np.ndarray) -> np.ndarray:
        """(W | b), flat -> the sum of these rows' losses, then its gradient in (W | b), flat."""
        head = self._head(model).requires_grad_()
        loss = self._sum(head, self.x, self.target, self.weight)
        (gradient,) = torch.autograd.grad(loss, [head])
        return np.concatenate([[self._counted(loss)], gradient.numpy().ravel()])

    def loss(self, model: np.ndarray, x: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """(W | b), flat -> the sum of other rows' losses, (1,)."""
        with torch.no_grad():
            return np.array([self._counted(self._sum(self._head(model), _tensor(x), _tensor(codes), None))])

    def _counted(self, loss: torch.Tensor) -> float:
        """Of ranks with the same rows each has their loss, and one says it."""
        return loss.item() if self.lead.ranks.counts else 0.0

    def _head(self, model: np.ndarray) -> torch.Tensor:  # (K, D + 1)
        return torch.from_numpy(model.reshape(self.rows, -1).astype(self.dtype))

    def _sum(
        self, head: torch.Tensor, x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None
    ) -> torch.Tensor:
        if self.binary:  # logits (0, s)
            head = torch.cat([torch.zeros_like(head), head])
        ranks = self.lead.ranks
        head = head[Share(ranks.slice, ranks.slices).of(len(head))]
        return linear_cross_entropy(
            x,
            head[:, :-1].contiguous(),
            target,
            linear_bias=head[:, -1] if self.fit_intercept else None,
            sample_weight=weight,
            reduction="sum",
            group=ranks.group,
        )


def _tensor(array: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        # a read-only array (a memory map) is only read here, so torch's warning about writing does not apply
        warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
        return torch.from_numpy(np.ascontiguousarray(array))
