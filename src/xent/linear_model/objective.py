"""The objective of ``SoftmaxRegression`` in the solver's variables, on the fused cross-entropy.

    min over W, b of   Σ_n s_n ℓ(W x̃_n + b, t_n) / Σ_n s_n a_n  +  l2/2 ‖W‖²        x̃ = (x − m)/s

    W x̃ + b = V (x̃ − μ)/σ + c         W = V/σ,  b = c − W μ

Sums over the N rows are formed a chunk at a time, from the rows x as they are stored: x̃ is never formed.
Where several processes hold the rows, the sums are over all of them (``Leader``). Where they share the
classes, each has the gradient of its own slice of V and c. The solver moves θ = (V | c). With centred
features and, by the choice of σ, a Hessian whose diagonal is constant at W = 0, it needs tens of iterations
where it would need thousands in (W, b).
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
from xent.data.batches import BLOCK, Batch, slices
from xent.data.rows import BATCH, SelectedRows, blocks, parts
from xent.data.sparse_rows import SparseBatch
from xent.linear_model.class_blocks import Sample, class_blocks
from xent.linear_model.hessian import HessianSums, SummedHessian, standardised
from xent.linear_model.labelled_rows import Chunk, LabelledRows
from xent.linear_model.row_pass import RowPass
from xent.linear_model.scaling import moments
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
        standardisation: m and s, (D,) each; None is 0 and 1.

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
        standardisation: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        self.workers = Workers() if workers is None else workers
        leader = Leader() if leader is None else leader
        self.ranks = leader.ranks
        self.rows, self.dtype, self.fit_intercept = rows, rows.source.dtype, fit_intercept
        self.device = rows.device
        n_rows, self.n_features = rows.source.shape
        self.binary = n_classes == 2
        self.n_classes, self.n_vectors = n_classes, 1 if self.binary else n_classes  # C, K
        self._place(standardisation)
        self.n_rows = int(self.ranks.sum(n_rows if self.ranks.counts else 0))
        self._sums = leader.register(self._loss_and_gradient)
        self._moments = leader.register(self._own_moments)
        self._blocks_of = leader.register(lambda theta: self._own_share(self._formed(theta)))
        shape = (self.n_vectors, self.n_features + 1)
        self._hessian = HessianSums(self._standardised, shape, self.binary, fit_intercept, self.total, leader)
        self._value, self._gradient = 0.0, np.empty(0)
        self._second: tuple[np.ndarray, np.ndarray] | None = None
        self.sampled = torch.float32  # the type of a sample of the rows, and of what is made of it
        self._last: tuple[np.ndarray, np.ndarray, float, np.ndarray, np.ndarray] | None = None
        self.penalise(C)

    def _place(self, standardisation: tuple[np.ndarray, np.ndarray] | None) -> None:
        """Set what lies between the rows as they are stored, x, and the features x̃ that W is of.

        m and s are given. Products are with rows less their mean, the anchor, rounded to the type of the
        features, so that the difference is exact where it matters. The center is where c is the logits: the
        anchor, and without an intercept m. μ is the center in x̃.
        """
        zero, one = np.zeros(self.n_features), np.ones(self.n_features)
        m, s = (zero, one) if standardisation is None else (v.astype(np.float64) for v in standardisation)
        found = moments(self._masses(), self.n_features, self.dtype, self.ranks)
        if self.dtype == np.float32 and not (np.isfinite(found.squares) & (found.squares > 0)).all():
            found = moments(self._masses(), self.n_features, np.dtype(np.float64), self.ranks)
        self.total = found.mass
        if not self.total > 0:
            raise ValueError(
                "nothing is left to fit: sample_weight times class_weight times label mass sums to 0"
            )
        self.anchor = found.mean.astype(self.dtype).astype(np.float64)
        self.center = self.anchor if self.fit_intercept else m
        self._shift = self.anchor - self.center  # 0 with an intercept
        self.own_scale, self.mean = s, (self.center - m) / s
        with np.errstate(over="ignore"):  # a scale that is not finite is replaced
            self._variance = found.about(self.center) / s**2

    def penalise(self, C: float) -> None:
        """Set the inverse strength of the penalty, and with it l2 and σ: another objective, of the same rows.

        The Hessian's diagonal at W = 0 is h·E[(x̃_j − μ_j)²] + l2 for a weight, h for an intercept. Dividing
        by h σ_j² with σ_j² = E[(x̃_j − μ_j)²] + l2/h makes it constant (Jacobi's preconditioner). The loss and
        the gradient of the last point are not computed again.
        """
        self.penalty = 1.0 / (C * self.total)  # l2
        h = (self.n_classes - 1) / self.n_classes**2
        scale = np.sqrt(self._variance + self.penalty / h)
        self.scale = np.where(np.isfinite(scale) & (scale > 0), scale, 1.0)
        self.unit = self.scale * self.own_scale
        self._hessian.forget()
        self._theta: np.ndarray | None = None
        self.duality_gap = np.inf  # at the last θ; see `__call__`
        self._norm: float | None = np.inf
        if self._last is not None:
            self._arrive(self.scaled(*self._last[:2]).ravel(), *self._last)

    def mass(self, rows: slice | np.ndarray) -> np.ndarray:
        """Return s·a of some rows, (n,): their weights times the sums of their targets."""
        return self.rows.mass(rows)

    def _masses(self) -> Iterator[tuple[Tensor, Batch]]:
        """Yield the masses (n,) and the features (n, D) of some rows at a time, on the device."""
        for here, x in parts(self.rows.source):
            yield torch.from_numpy(self.mass(here)).to(self.device), x.to(self.device)

    def second_moment(self, most: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return Σ m x̃ x̃ᵀ / Σ m, (D + 1, D + 1), of about as many rows of all ranks.

        It is formed once, and again where a wider type is asked for, in which class blocks are formed from
        then on; another σ, of another penalty, scales it.
        """
        side = self.n_features + 1
        if self._second is None or dtype.itemsize > self.sampled.itemsize:
            self.sampled = max(dtype, self.sampled, key=lambda kind: kind.itemsize)
            asked = np.array([most, self.sampled.itemsize])
            self._second = self._moments(asked).reshape(side, side), self.scale
        moment, scale = self._second
        ratio = np.append(scale / self.scale, 1.0)
        return torch.from_numpy(moment * np.outer(ratio, ratio)).to(self.device, self.sampled)

    def _own_moments(self, asked: np.ndarray) -> np.ndarray:
        most, size = asked.astype(np.int64).tolist()
        self.sampled = torch.float64 if size == torch.float64.itemsize else torch.float32
        return self._own_share(self._sample(most).second_moment())

    def class_blocks(self, theta: np.ndarray) -> Tensor:
        """Return the diagonal blocks of the Hessian at θ (P,), without the penalty, (K, D + 1, D + 1)."""
        if self.ranks.size == 1:
            return self._formed(theta)
        side = self.n_features + 1
        formed = torch.from_numpy(self._blocks_of(theta)).reshape(-1, side, side)
        return formed.to(self.device, self.sampled)

    def _formed(self, theta: np.ndarray) -> Tensor:
        most = SAMPLE // max(self.n_features + 1, self.n_vectors) * max(1, self.n_rows // self._own_rows)
        sample = self._sample(most)
        alone = self.ranks.size == 1 and self._second is not None
        moment = self.second_moment(0) if alone else sample.second_moment()
        at = torch.from_numpy(theta.reshape(self.n_vectors, -1)).to(self.device, self.sampled)
        return class_blocks(sample, moment, at, self.binary, self.workers)

    @property
    def is_sparse(self) -> bool:
        """Return whether rows store less than all their features, so that a pass is cheap beside these."""
        return self.rows.source.width < self.n_features

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
        n_rows, n_features = self.rows.source.shape
        chosen = np.linspace(0, n_rows - 1, min(n_rows, most)).round().astype(np.int64)
        shape, ones = (len(chosen), n_features + 1), float(self.fit_intercept)
        x = torch.full(shape, ones, device=self.device, dtype=self.sampled)
        center, unit = (
            torch.from_numpy(v.astype(self.dtype)).to(self.device) for v in (self.center, self.unit)
        )
        for here, picked in blocks(SelectedRows(self.rows.source, chosen)):
            x[here, :-1] = (picked.to(self.device) - center).to(self.sampled).div_(unit)
        mass = self.mass(chosen) * (self.n_rows / self.total)
        return Sample(x, torch.from_numpy(mass).to(x))

    def _standardised(self) -> LabelledRows:
        """Return the rows as the solver sees them, (x̃ − μ)/σ."""
        return dataclasses.replace(self.rows, source=standardised(self.rows.source, self.center, self.unit))

    def to_solver(self, coef: np.ndarray, intercept: np.ndarray) -> np.ndarray:
        """Return θ (K, D + 1) of W and b, a model's."""
        return self.scaled(coef, intercept)

    def scaled(self, coef: np.ndarray, intercept: np.ndarray) -> np.ndarray:
        """Return θ (K, D + 1) of W and b; the inverse of ``unscaled``."""
        W = coef.astype(np.float64)
        return np.concatenate([W * self.scale, (intercept + W @ self.mean)[:, None]], axis=1)

    def to_model(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return W (K, D) and b (K,) of θ, in the features' precision."""
        W, b = self.unscaled(theta)
        return W.astype(self.dtype), b.astype(self.dtype)

    def unscaled(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return W (K, D) and b (K,) of θ, in float64."""
        theta = theta.reshape(self.n_vectors, -1)
        W = theta[:, :-1] / self.scale
        return W, theta[:, -1] - W @ self.mean

    def __call__(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the value, and the gradient (P,), at θ (P,), P = K·(D + 1).

        Set ``gradient_norm`` and ``duality_gap``. With the dual variables t − p(W, c) the gap is the bound of
        strong convexity,

            F − F* ≤ ‖∂F/∂W‖² / (2·l2)        where ∂F/∂c = 0

        An intercept is not penalised. Its gradient is taken to reach over 1 + max|c| at most.
        """
        if self._theta is not None and np.array_equal(theta, self._theta):
            return self._value, self._gradient
        sums = self._sums(theta) / self.total
        loss, gradient = float(sums[0]), sums[1:].reshape(self.n_vectors, -1)
        self._arrive(
            theta.copy(), *self.unscaled(theta), loss, gradient[:, :-1] * self.scale, gradient[:, -1]
        )
        return self._value, self._gradient

    def _arrive(
        self,
        theta: np.ndarray,
        W: np.ndarray,
        b: np.ndarray,
        loss: float,
        of_loss: np.ndarray,
        to_b: np.ndarray,
    ) -> None:
        """Set the value and what belongs to it; ``of_loss`` is the loss's gradient in W where c stays."""
        self._theta, self._last = theta, (W, b, loss, of_loss, to_b)
        to_W = of_loss + np.outer(to_b, self.mean) + self.penalty * W
        self._of_model = to_W, to_b
        self._norm = None
        self.duality_gap = np.inf
        if self.penalty:
            of_centred = of_loss + self.penalty * W
            reach = float(np.abs(to_b).sum()) * (1 + float(np.abs(b + W @ self.mean).max()))
            self.duality_gap = float(np.vdot(of_centred, of_centred)) / (2 * self.penalty) + reach
        self._value = loss + 0.5 * self.penalty * float(np.vdot(W, W))
        to_V = (of_loss + self.penalty * W) / self.scale
        self._gradient = np.concatenate([to_V, to_b[:, None]], axis=1).ravel()

    @property
    def gradient_norm(self) -> float:
        """The largest component of the gradient in (W, b) at the last point."""
        if self._norm is None:
            to_W, to_b = self._outward(*self._of_model)
            self._norm = float(max(np.abs(to_W).max(), np.abs(to_b).max()))
        return self._norm

    def _outward(self, to_W: np.ndarray, to_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return a gradient in (W, b) of the model; they are what the objective is over."""
        return to_W, to_b

    @property
    def last_loss(self) -> float:
        """The mean loss at the last point, without the penalty."""
        return np.inf if self._last is None else self._last[2]

    def hessian(self, theta: np.ndarray) -> SummedHessian:
        """Return the Hessian of the mean loss at θ, an operator in V and, where there is one, c.

        The penalty, l2/σ² on the diagonal of V, is not in it. Two classes have two rows, of which the first
        has the logit 0 and does not move.
        """
        return self._hessian.at(theta)

    def _loss_and_gradient(self, theta: np.ndarray) -> np.ndarray:
        """Return the sum of these rows' losses, then its gradient, at θ; all flat."""
        total, head = np.zeros(1 + theta.size), self._head(theta)

        def part(rows: Chunk) -> tuple[float, np.ndarray]:
            loss, gradient = self._part(head, *rows)
            return self._counted(loss), gradient.cpu().numpy().ravel()

        for loss, gradient in self.workers.map(part, self._chunks(self.rows)):
            total[0] += loss
            total[1:] += gradient
        gradient = total[1:].reshape(self.n_vectors, -1)
        if not self.fit_intercept:
            gradient[:, :-1] += np.outer(gradient[:, -1], self._shift)
            gradient[:, -1] = 0
        gradient[:, :-1] /= self.unit
        return total

    def loss(self, model: np.ndarray, rows: LabelledRows) -> np.ndarray:
        """Return the sum of other rows' losses, (1,), for (W | b), flat."""
        model = model.reshape(self.n_vectors, -1)
        head = self._head(self.to_solver(model[:, :-1], model[:, -1]))

        def part(rows: Chunk) -> float:
            return self._counted(self._part(head, *rows, with_gradient=False)[0])

        return np.array([sum(self.workers.map(part, self._chunks(rows)))])

    def logits(
        self, coef: np.ndarray, intercept: np.ndarray, rows: LabelledRows
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield logits (n, C), targets and weights of some rows at a time, for W (K, D) and b (K,)."""
        head = self._of_all_classes(self._head(self.to_solver(coef, intercept)))
        weights, bias = head[:, :-1].contiguous(), head[:, -1]
        for x, target, weight in rows.chunks():
            step = max(1, BLOCK // (rows.source.width + len(head)))
            for here, tile in x.tiles(step, head.dtype, torch.from_numpy(self.anchor).to(head)):
                z = tile.times(weights, 1, head.new_empty(len(tile) * len(head))) + bias
                yield z, target[here], None if weight is None else weight[here]

    def _head(self, theta: np.ndarray) -> Tensor:
        """Return what rows less the anchor are multiplied with, (K, D + 1), in their type.

        It is (V/unit | c), and without an intercept (V/unit | the logits of the anchor).
        """
        head = theta.reshape(self.n_vectors, -1).copy()
        head[:, :-1] /= self.unit
        if not self.fit_intercept:
            head[:, -1] = head[:, :-1] @ self._shift
        return torch.from_numpy(head.astype(self.dtype)).to(self.device)

    def _centred(self, x: Tensor, head: Tensor) -> Tensor:
        return x - torch.from_numpy(self.anchor).to(head)

    def _chunks(self, rows: LabelledRows) -> Iterator[Chunk]:
        """Yield the rows in the parts that workers take."""
        n_rows, _ = rows.source.shape
        return rows.chunks(self.workers.shares(n_rows, n_rows * rows.source.width * self.n_vectors))

    def runs_away(self, coef: np.ndarray, intercept: np.ndarray) -> bool:
        """Return whether W (K, D) and b (K,) put every row on its class's side, and nothing bounds them."""
        if self.penalty or self.rows.target.ndim == 2 or self.ranks.size > 1:
            return False
        return all(
            bool(((z.argmax(1) == y) | (weight == 0 if weight is not None else False)).all())
            for z, y, weight in self.logits(coef, intercept, self.rows)
        )

    def _counted(self, loss: Tensor) -> float:
        """Return the loss on one of the ranks that hold the same rows and 0 on the others."""
        return loss.item() if self.ranks.counts else 0.0

    def _part(
        self, head: Tensor, x: Batch, target: Tensor, weight: Tensor | None, with_gradient: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses of some rows, and its gradient in the head, (K, D + 1)."""
        if self.ranks.group is None and (target.ndim == 1 or isinstance(x, SparseBatch)):
            return self._pass(head, x, target, weight, with_gradient)
        total, gradient = torch.zeros((), dtype=torch.float64), torch.zeros_like(head)
        for here in slices((len(x), self.n_features), BATCH):
            with torch.set_grad_enabled(with_gradient):
                leaf = head.detach().requires_grad_(with_gradient)
                of_rows = None if weight is None else weight[here]
                loss = self._fused(leaf, self._centred(x[here], head), target[here], of_rows)
                if with_gradient:
                    gradient += torch.autograd.grad(loss, [leaf])[0]
            total += loss.detach().cpu()
        return total, gradient

    def _pass(
        self, head: Tensor, x: Batch, target: Tensor, weight: Tensor | None, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        logits = self._of_all_classes(head)
        anchor = torch.from_numpy(self.anchor).to(head) if self.anchor.any() else None
        rows = RowPass(logits[:, :-1].contiguous(), logits[:, -1], anchor, self.rows.source.width)
        with fast_products(self.device, logits.dtype, len(x) * self.rows.source.width * len(logits)):
            if not with_gradient:
                return rows.loss(x, target, weight), head
            loss, to_W, to_b = rows.loss_and_gradient(x, target, weight)
        return loss, torch.cat([to_W, to_b[:, None]], dim=1)[-self.n_vectors :]

    def _of_all_classes(self, head: Tensor) -> Tensor:
        """Return (W | b) of C classes: two of them have the logits (0, s)."""
        return torch.cat([torch.zeros_like(head), head]) if self.binary else head

    def _fused(self, head: Tensor, x: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """Return the sum of the losses of rows less the anchor, of any targets and of classes in slices."""
        head = self._of_all_classes(head)
        head = head[Share(self.ranks.slice, self.ranks.slices).of(len(head))]
        return linear_cross_entropy(
            x,
            head[:, :-1].contiguous(),
            target,
            linear_bias=head[:, -1],
            sample_weight=weight,
            reduction="sum",
            group=self.ranks.group,
        )
