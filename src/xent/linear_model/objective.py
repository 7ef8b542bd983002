"""The objective of ``SoftmaxRegression`` in the solver's variables, on the fused cross-entropy.

    min over W, b of   Σ_n s_n ℓ(W x_n + b, t_n) / Σ_n s_n a_n  +  λ/2 ‖W‖²         W = V/σ,  b = c − W μ

Sums over the N rows are formed a chunk at a time. Where several processes hold the rows, the sums are over
all of them (``Leader``). Where they share the classes, each has the gradient of its own slice of W and b.
The solver moves θ = (V | c). With centred features and, by the choice of σ, a Hessian whose diagonal is
constant at W = 0, it needs tens of iterations where it would need thousands in (W, b).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from xent._core.matmul import fast_products
from xent._processes.group import Share
from xent._processes.leader import Leader
from xent.data.rows import (
    BLOCK,
    Chunk,
    LabelledRows,
    as_tensor,
    slices,
    standardised,
)
from xent.linear_model.class_blocks import Sample, class_blocks
from xent.linear_model.hessian import HessianSums, SummedHessian
from xent.linear_model.row_pass import RowPass
from xent.linear_model.workers import Workers
from xent.losses._cross_entropy import linear_cross_entropy

SAMPLE = 1 << 24
"""Numbers of a sample's features, and of its probabilities, at most: 64 MiB of float32 each."""


class Objective:
    """The scaled objective at θ = (V | c), flat: value, gradient and Hessian; the last value is remembered.

    Every rank makes one, of its own rows; rank 0 calls it.

    Args:
        rows: features (N, D), their targets and weights.
        n_classes: C.
        C: inverse strength of the penalty.
        fit_intercept: whether there is a b.
        leader: sums over the rows of several ranks; None is one process.
        workers: the threads that share the rows of a process; None is the calling thread.

    Raises:
        ValueError: the weights of all rows sum to 0.
    """

    def __init__(
        self,
        rows: LabelledRows,
        n_classes: int,
        C: float,
        fit_intercept: bool,
        leader: Leader | None = None,
        workers: Workers | None = None,
    ) -> None:
        self.workers = Workers() if workers is None else workers
        leader = Leader() if leader is None else leader
        self.ranks = leader.ranks
        self.rows, self.dtype, self.fit_intercept = rows, rows.source.dtype, fit_intercept
        self.device = rows.device
        n_rows, self.n_features = rows.source.shape
        self.binary = n_classes == 2
        self.n_classes, self.n_vectors = n_classes, 1 if self.binary else n_classes  # C, K
        self.total = float(self.ranks.sum(sum(self.mass(part).sum() for part in slices((n_rows, 1), BLOCK))))
        if not self.total > 0:
            raise ValueError(
                "nothing is left to fit: sample_weight times class_weight times label mass sums to 0"
            )
        self.mean, self._variance = self._moments_of_features()
        self.n_rows = int(self.ranks.sum(n_rows if self.ranks.counts else 0))
        self._sums = leader.register(self._loss_and_gradient)
        self._moments = leader.register(self._own_moments)
        self._blocks_of = leader.register(lambda theta: self._own_share(self._formed(theta)))
        shape = (self.n_vectors, self.n_features + 1)
        self._hessian = HessianSums(self._standardised, shape, self.binary, fit_intercept, self.total, leader)
        self._value, self._gradient = 0.0, np.empty(0)
        self._second: tuple[np.ndarray, np.ndarray] | None = None
        self.penalise(C)

    def penalise(self, C: float) -> None:
        """Set the inverse strength of the penalty, and with it λ and σ: another objective, of the same rows.

        The Hessian's diagonal at W = 0 is h·E[(x_j − μ_j)²] + λ for a weight, h for an intercept. Dividing by
        h σ_j² with σ_j² = E[(x_j − μ_j)²] + λ/h makes it constant (Jacobi's preconditioner).
        """
        self.penalty = 1.0 / (C * self.total)  # λ
        h = (self.n_classes - 1) / self.n_classes**2
        scale = np.sqrt(self._variance + self.penalty / h)
        self.scale = np.where(np.isfinite(scale) & (scale > 0), scale, 1.0)
        self._hessian.forget()
        self._theta: np.ndarray | None = None
        self.gradient_norm = self.duality_gap = np.inf  # at the last θ; see `__call__`

    def _moments_of_features(self) -> tuple[np.ndarray, np.ndarray]:
        """Return μ, which is 0 without an intercept, and E[(x − μ)²], (D,) each."""
        mean, squares = np.zeros(self.n_features), np.zeros(self.n_features)
        if self.fit_intercept:
            for mass, x in self._blocks():
                mean += (mass @ x).cpu().numpy()
            mean = self.ranks.sum(mean) / self.total
        center = torch.from_numpy(mean).to(self.device)
        with np.errstate(over="ignore"):  # a scale that is not finite is replaced
            for mass, x in self._blocks():
                squares += (mass @ x.sub_(center).square_()).cpu().numpy()
            return mean, self.ranks.sum(squares) / self.total

    def mass(self, rows: slice | np.ndarray) -> np.ndarray:
        """Return s·a of some rows, (n,): their weights times the sums of their targets."""
        target, weight = self.rows.target[rows], self.rows.weight
        mass = np.ones(len(target)) if weight is None else weight[rows].astype(np.float64)
        return mass if target.ndim == 1 else mass * target.sum(axis=1, dtype=np.float64)

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the masses (n,) and the features (n, D) of some rows at a time, copies in float64."""
        for rows, x in self.rows.source.chunks():
            for block in slices(x.shape, BLOCK):
                mass = self.mass(slice(rows.start + block.start, rows.start + block.stop))
                part = as_tensor(x[block]).to(self.device, torch.float64, copy=True)
                yield torch.from_numpy(mass).to(self.device), part

    def second_moment(self, most: int) -> Tensor:
        """Return Σ m x̃ x̃ᵀ / Σ m, (D + 1, D + 1) float32, of about as many rows of all ranks.

        It is formed once; another σ, of another penalty, scales it.
        """
        side = self.n_features + 1
        if self._second is None:
            self._second = self._moments(np.array([most])).reshape(side, side), self.scale
        moment, scale = self._second
        ratio = np.append(scale / self.scale, 1.0)
        return torch.from_numpy(moment * np.outer(ratio, ratio)).float().to(self.device)

    def _own_moments(self, most: np.ndarray) -> np.ndarray:
        return self._own_share(self._sample(int(most[0])).second_moment())

    def class_blocks(self, theta: np.ndarray) -> Tensor:
        """Return the diagonal blocks of the Hessian at θ (P,), without the penalty, (K, D + 1, D + 1)."""
        if self.ranks.size == 1:
            return self._formed(theta)
        side = self.n_features + 1
        return torch.from_numpy(self._blocks_of(theta)).float().reshape(-1, side, side).to(self.device)

    def _formed(self, theta: np.ndarray) -> Tensor:
        most = SAMPLE // max(self.n_features + 1, self.n_vectors) * max(1, self.n_rows // self._own_rows)
        sample = self._sample(most)
        alone = self.ranks.size == 1 and self._second is not None
        moment = self.second_moment(0) if alone else sample.second_moment()
        at = torch.from_numpy(theta.reshape(self.n_vectors, -1)).float().to(self.device)
        return class_blocks(sample, moment, at, self.binary, self.workers)

    @property
    def _own_rows(self) -> int:
        return max(1, len(self.rows.target))

    def _own_share(self, mean: Tensor) -> np.ndarray:
        """Return this rank's part of a mean over the rows of all ranks, flat."""
        return (mean * (self._own_rows / max(1, self.n_rows))).double().cpu().numpy().ravel()

    def _sample(self, most: int) -> Sample:
        """Return this rank's part of at most as many rows of all ranks; none where its rows do not count."""
        if not self.ranks.counts:
            return self.sample(0)
        return self.sample(max(1, most * self._own_rows // max(1, self.n_rows)))

    def sample(self, most: int) -> Sample:
        """Return at most as many rows of this process."""
        source = self.rows.source
        n_rows, n_features = source.shape
        chosen = np.linspace(0, n_rows - 1, min(n_rows, most)).round().astype(np.int64)
        x = torch.full((len(chosen), n_features + 1), float(self.fit_intercept), device=self.device).float()
        center, unit = (torch.from_numpy(v).float().to(self.device) for v in (self.mean, self.scale))
        done = 0
        for rows, features in source.chunks():
            stop = int(np.searchsorted(chosen, rows.stop))
            for part in slices((stop - done, n_features), BLOCK):
                here = slice(done + part.start, done + part.stop)
                picked = as_tensor(features[chosen[here] - rows.start]).to(self.device)
                torch.sub(picked, center, out=x[here, :-1]).div_(unit)
            done = stop
        mass = self.mass(chosen) * (self.n_rows / self.total)
        return Sample(x, torch.from_numpy(mass).float().to(self.device))

    def _standardised(self) -> LabelledRows:
        """Return the rows as the solver sees them, (x − μ)/σ."""
        return dataclasses.replace(self.rows, source=standardised(self.rows.source, self.mean, self.scale))

    def to_solver(self, coef: np.ndarray, intercept: np.ndarray) -> np.ndarray:
        """Return θ (K, D + 1) of W and b."""
        W = coef.astype(np.float64)
        return np.concatenate([W * self.scale, (intercept + W @ self.mean)[:, None]], axis=1)

    def to_model(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return W (K, D) and b (K,) of θ, in the features' precision."""
        W, b = self._unscale(theta)
        return W.astype(self.dtype), b.astype(self.dtype)

    def _unscale(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        theta = theta.reshape(self.n_vectors, -1)
        W = theta[:, :-1] / self.scale
        return W, theta[:, -1] - W @ self.mean

    def __call__(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the value, and the gradient (P,), at θ (P,), P = K·(D + 1).

        Set ``gradient_norm``, the largest component of the gradient in (W, b), and ``duality_gap``. With the
        dual variables t − p(W, b) the gap is the bound of strong convexity,

            F − F* ≤ ‖∂F/∂W‖² / 2λ        where ∂F/∂b = 0

        An intercept is not penalised. Its gradient is taken to reach over 1 + max|b| at most.
        """
        if self._theta is not None and np.array_equal(theta, self._theta):
            return self._value, self._gradient
        W, b = self._unscale(theta)
        sums = self._sums(np.concatenate([W, b[:, None]], axis=1).ravel()) / self.total
        loss, gradient = float(sums[0]), sums[1:].reshape(self.n_vectors, -1)
        to_W, to_b = gradient[:, :-1] + self.penalty * W, gradient[:, -1]
        self.gradient_norm = float(max(np.abs(to_W).max(), np.abs(to_b).max()))
        self.duality_gap = np.inf
        if self.penalty:
            reach = float(np.abs(to_b).sum()) * (1 + float(np.abs(b).max()))
            self.duality_gap = float(np.vdot(to_W, to_W)) / (2 * self.penalty) + reach
        to_V = (to_W - np.outer(to_b, self.mean)) / self.scale
        self._value = loss + 0.5 * self.penalty * float(np.vdot(W, W))
        self._gradient = np.concatenate([to_V, to_b[:, None]], axis=1).ravel()
        self._theta = theta.copy()
        return self._value, self._gradient

    def hessian(self, theta: np.ndarray) -> SummedHessian:
        """Return the Hessian of the mean loss at θ, an operator in V and, where there is one, c.

        The penalty is not in it: λ/σ² on the diagonal of V. Two classes have two rows, of which the first, of
        the logit 0, does not move.
        """
        return self._hessian.at(theta)

    def _loss_and_gradient(self, model: np.ndarray) -> np.ndarray:
        """Return the sum of these rows' losses, then its gradient in (W | b), for (W | b); all flat."""
        total = np.zeros(1 + model.size)

        def part(rows: Chunk) -> tuple[float, np.ndarray]:
            loss, gradient = self._part(model, *rows)
            return self._counted(loss), gradient.cpu().numpy().ravel()

        for loss, gradient in self.workers.map(part, self._chunks(self.rows)):
            total[0] += loss
            total[1:] += gradient
        return total

    def loss(self, model: np.ndarray, rows: LabelledRows) -> np.ndarray:
        """Return the sum of other rows' losses, (1,), for (W | b), flat."""

        def part(rows: Chunk) -> float:
            return self._counted(self._part(model, *rows, with_gradient=False)[0])

        return np.array([sum(self.workers.map(part, self._chunks(rows)))])

    def _chunks(self, rows: LabelledRows) -> Iterator[Chunk]:
        """Yield the rows in the parts that workers take."""
        n_rows, n_features = rows.source.shape
        return rows.chunks(self.workers.shares(n_rows, n_rows * n_features * self.n_vectors))

    def runs_away(self, coef: np.ndarray, intercept: np.ndarray) -> bool:
        """Return whether W (K, D) and b (K,) put every row on its class's side, and nothing bounds them."""
        if self.penalty or self.rows.target.ndim == 2 or self.ranks.size > 1:
            return False
        return all(bool((z.argmax(1) == y).all()) for z, y in self._logits(coef, intercept))

    def _logits(self, coef: np.ndarray, intercept: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        head = torch.from_numpy(np.concatenate([coef, intercept[:, None]], axis=1)).to(self.device)
        head = self._of_all_classes(head)
        for x, target, weight in self.rows.chunks():
            counts = slice(None) if weight is None else weight > 0
            yield torch.addmm(head[:, -1], x[counts].to(head.dtype), head[:, :-1].t()), target[counts]

    def _counted(self, loss: Tensor) -> float:
        """Return the loss on one of the ranks that hold the same rows and 0 on the others."""
        return loss.item() if self.ranks.counts else 0.0

    def _part(
        self, model: np.ndarray, x: Tensor, target: Tensor, weight: Tensor | None, with_gradient: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses of some rows, and its gradient in (W | b), (K, D + 1)."""
        head = torch.from_numpy(model.reshape(self.n_vectors, -1).astype(self.dtype)).to(self.device)
        if target.ndim == 1 and self.ranks.group is None:
            return self._pass(head, x, target, weight, with_gradient)
        with torch.set_grad_enabled(with_gradient):
            loss = self._fused(head.requires_grad_(with_gradient), x, target, weight)
            return loss, torch.autograd.grad(loss, [head])[0] if with_gradient else head

    def _pass(
        self, head: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        logits = self._of_all_classes(head)
        rows = RowPass(logits[:, :-1].contiguous(), logits[:, -1] if self.fit_intercept else None)
        with fast_products(x.device, logits.dtype, len(x) * self.n_features * len(logits)):
            if not with_gradient:
                return rows.loss(x, target, weight), head
            loss, to_W, to_b = rows.loss_and_gradient(x, target, weight)
        to_b = to_b if self.fit_intercept else torch.zeros_like(to_b)
        return loss, torch.cat([to_W, to_b[:, None]], dim=1)[-self.n_vectors :]

    def _of_all_classes(self, head: Tensor) -> Tensor:
        """Return (W | b) of C classes: two of them have the logits (0, s)."""
        return torch.cat([torch.zeros_like(head), head]) if self.binary else head

    def _fused(self, head: Tensor, x: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        head = self._of_all_classes(head)
        head = head[Share(self.ranks.slice, self.ranks.slices).of(len(head))]
        return linear_cross_entropy(
            x.to(head.dtype),
            head[:, :-1].contiguous(),
            target,
            linear_bias=head[:, -1] if self.fit_intercept else None,
            sample_weight=weight,
            reduction="sum",
            group=self.ranks.group,
        )
