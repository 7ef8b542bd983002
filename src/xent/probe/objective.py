"""The objective of ``SoftmaxRegression`` in the solver's variables, on the fused cross-entropy.

    min over W, b of   Σ_n s_n ℓ(W x_n + b, t_n) / Σ_n s_n a_n  +  λ/2 ‖W‖²         W = V/σ,  b = c − W μ

The solver moves θ = (V | c). With centred features and, by the choice of σ, a Hessian whose diagonal is
constant at W = 0, it needs tens of iterations where it would need thousands in (W, b).
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

from xent.functional import linear_cross_entropy


class Objective:
    """The scaled objective and its gradient at θ = (V | c), flat; the last evaluation is remembered."""

    def __init__(
        self,
        X: np.ndarray,  # (N, D)
        target: np.ndarray,  # (N,) class numbers or (N, C) masses
        weight: np.ndarray | None,  # (N,)
        classes: int,
        C: float,
        fit_intercept: bool,
    ) -> None:
        mass = np.ones(len(X)) if weight is None else weight.astype(np.float64)
        if target.ndim == 2:
            mass = mass * target.sum(axis=1, dtype=np.float64)
        self.total = float(mass.sum())
        if not self.total > 0:
            raise ValueError("the weights leave nothing to fit: sample weight times label mass sums to 0")
        self.penalty = 1.0 / (C * self.total)  # λ
        self.binary = classes == 2
        self.rows = 1 if self.binary else classes
        self.fit_intercept = fit_intercept
        self.dtype = X.dtype
        self.X = X
        self.x = _tensor(X)
        self.target = _tensor(target)
        self.weight = None if weight is None else _tensor(weight)

        # The Hessian's diagonal at W = 0: h·E[(x_j − μ_j)²] + λ for a weight, h for an intercept. Dividing by
        # h σ_j² with σ_j² = E[(x_j − μ_j)²] + λ/h makes it constant (Jacobi's preconditioner).
        h = 0.25 if self.binary else (classes - 1) / classes**2
        self.mean = mass @ X / self.total if fit_intercept else np.zeros(X.shape[1])
        variance = np.zeros(X.shape[1])
        step = max(1, 2**20 // X.shape[1])
        with np.errstate(over="ignore"):  # a scale that is not finite is replaced below
            for i in range(0, len(X), step):
                variance += mass[i : i + step] @ np.square(X[i : i + step] - self.mean)
        scale = np.sqrt(variance / self.total + self.penalty / h)
        self.scale = np.where(np.isfinite(scale) & (scale > 0), scale, 1.0)

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
        head = torch.from_numpy(W.astype(self.dtype)).requires_grad_()
        bias = torch.from_numpy(b.astype(self.dtype)).requires_grad_() if self.fit_intercept else None
        full, full_bias = head, bias
        if self.binary:  # logits (0, s)
            full = torch.cat([torch.zeros_like(head), head])
            full_bias = None if bias is None else torch.cat([torch.zeros_like(bias), bias])
        loss = linear_cross_entropy(
            self.x, full, self.target, linear_bias=full_bias, sample_weight=self.weight, reduction="sum"
        )
        gradients = torch.autograd.grad(loss, [head] if bias is None else [head, bias])
        to_W, *rest = (g.numpy().astype(np.float64) / self.total for g in gradients)
        to_W = to_W + self.penalty * W
        to_b = rest[0] if rest else np.zeros(self.rows)
        self.gradient_norm = float(max(np.abs(to_W).max(), np.abs(to_b).max()))
        to_V = (to_W - np.outer(to_b, self.mean)) / self.scale
        self._value = loss.item() / self.total + 0.5 * self.penalty * float(np.vdot(W, W))
        self._gradient = np.concatenate([to_V, to_b[:, None]], axis=1).ravel()
        self._theta = theta.copy()
        return self._value, self._gradient


def _tensor(array: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        # a read-only array (a memory map) is only read here, so torch's warning about writing does not apply
        warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
        return torch.from_numpy(np.ascontiguousarray(array))
