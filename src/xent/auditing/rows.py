"""Rows of a classifier's predictions with their measures.

    ℓ = −Σ t log p      H = −Σ p log p      ‖p − t‖² = (Σ_{j≠y} p_j)² + Σ_{j≠y} p_j²      tr J = Σ p (1 − p)

with t the masses of the classes, for one class its indicator, and J = diag(p) − p pᵀ the Jacobian of the
softmax. One less a probability is the sum of the others, so that a sure row keeps its digits. Probabilities
are of the caller's type, in either memory layout; numbers of a row are float64.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property, lru_cache

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Batch:
    """Some consecutive rows: their probabilities over C classes, C at least 2, and each row's measures.

    A measure, (n,) float64 unless it is a class or a count, is made when it is first used.

    Example:
        >>> p = torch.tensor([[0.7, 0.2, 0.1]])
        >>> row = Batch(p, p.log(), torch.tensor([0]), torch.ones(1, dtype=torch.float64))
        >>> round(row.gradient_norm.item(), 6), round(row.curvature_trace.item(), 2)
        (0.374166, 0.46)
    """

    p: Tensor  # (n, C)
    log_p: Tensor  # (n, C), −inf where p is 0
    label: Tensor  # (n,) int64, the class of the row, or that of the largest mass
    weight: Tensor  # (n,) float64
    mass: Tensor | None = None  # (n, C) of soft labels, which sum to 1; None means that of one class
    start: int = 0  # number of the first row among all, from 0
    likely: Tensor | None = None  # (n,) int64, the most probable class where it is known

    def __len__(self) -> int:
        """Return n."""
        return len(self.label)

    @property
    def classes(self) -> int:
        """The number of classes, C."""
        return self.p.shape[1]

    @cached_property
    def own_log(self) -> Tensor:
        """The log-probability of the class, in the type of the probabilities."""
        return self.log_p.gather(1, self.label[:, None])[:, 0]

    @cached_property
    def own(self) -> Tensor:
        """The probability of the class."""
        return self.p.gather(1, self.label[:, None])[:, 0].double()

    @cached_property
    def loss(self) -> Tensor:
        """−Σ t log p, nats."""
        if self.mass is None:
            return -self.own_log.double()
        return -(self.mass * self.log_p).nansum(1).double()  # 0·(−inf) is nan, and counts as 0

    @cached_property
    def top_log(self) -> Tensor:
        """The largest log-probability, in the type of the probabilities."""
        if self.likely is not None:
            return self.log_p.gather(1, self.likely[:, None])[:, 0]
        return self.log_p.amax(1)

    @cached_property
    def prediction(self) -> Tensor:
        """The lowest of the most probable classes, int64."""
        if self.likely is not None:
            return self.likely
        return first_equal(self.log_p, self.top_log)

    @cached_property
    def confidence(self) -> Tensor:
        """The largest probability."""
        return self.p.gather(1, self.prediction[:, None])[:, 0].double()

    @cached_property
    def right(self) -> Tensor:
        """A flag for each row: whether its prediction is its class."""
        return self.prediction == self.label

    @cached_property
    def hit(self) -> Tensor:
        """The mass of the predicted class: 1 or 0 without soft labels."""
        if self.mass is None:
            return self.right.double()
        return self.mass.gather(1, self.prediction[:, None])[:, 0].double()

    @cached_property
    def _beside_top(self) -> tuple[Tensor, Tensor]:
        """The log-probabilities with −inf at the prediction, (n, C), and the largest of each row."""
        beside = self.log_p.clone().scatter_(1, self.prediction[:, None], -math.inf)
        return beside, beside.amax(1)

    @cached_property
    def runner_up(self) -> Tensor:
        """The most probable of the classes beside the prediction, int64."""
        return first_equal(*self._beside_top)

    @cached_property
    def margin(self) -> Tensor:
        """The log-probability of the class less that of the most probable other class."""
        return (self.own_log - torch.where(self.right, self._beside_top[1], self.top_log)).double()

    @cached_property
    def rank(self) -> Tensor:
        """The number of classes that are more probable than the row's own."""
        more = torch.gt(self.log_p, self.own_log[:, None], out=torch.empty_like(self.log_p))
        return more.sum(1).long()

    @cached_property
    def _beside_prediction(self) -> tuple[Tensor, Tensor]:
        """Σ p and Σ p² over the classes beside the prediction."""
        q = self.p.clone().scatter_(1, self.prediction[:, None], 0.0)
        return q.sum(1).double(), q.square_().sum(1).double()

    @cached_property
    def _beside_label(self) -> tuple[Tensor, Tensor]:
        """Σ p and Σ p² over the classes beside the row's own."""
        # the prediction's p enters for the own one; it is at least as large, so that nothing is lost
        pairs = zip(
            self._beside_prediction,
            (self.own, self.own**2),
            (self.confidence, self.confidence**2),
            strict=True,
        )
        return tuple(torch.where(self.right, rest, (rest - own) + most) for rest, own, most in pairs)  # type: ignore[return-value]

    @property
    def rest(self) -> Tensor:
        """1 − confidence, the sum of the other probabilities."""
        return self._beside_prediction[0]

    @property
    def others(self) -> Tensor:
        """1 − p of the class, the sum of the other probabilities."""
        return self._beside_label[0]

    @cached_property
    def entropy(self) -> Tensor:
        """−Σ p log p, nats."""
        product = self.p * self.log_p
        total = product.sum(1)
        return -(product.nansum(1) if total.isnan().any() else total).double()  # 0·(−inf) counts as 0

    @cached_property
    def brier(self) -> Tensor:
        """‖p − t‖²."""
        if self.mass is not None:
            return (self.p - self.mass).square_().sum(1).double()
        others, squares = self._beside_label
        return others.square() + squares

    @cached_property
    def curvature_trace(self) -> Tensor:
        """The trace of the loss's Hessian in the logits, Σ p (1 − p)."""
        rest, squares = self._beside_prediction
        # of the other probabilities at most one is above ½, so that the difference keeps its digits
        return self.confidence * rest + (rest - squares)

    @property
    def gradient_norm(self) -> Tensor:
        """‖p − t‖, the length of the loss's gradient in the logits."""
        return self.brier.sqrt()


def from_logits(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return probabilities, log-probabilities and the largest's class, of logits (n, C).

    Each row has a finite one.

    >>> p, log_p, _ = from_logits(torch.tensor([[40.0, 0.0]]))
    >>> log_p.tolist()
    [[-4.24835413113866e-18, -40.0]]
    """
    most = z.amax(1)
    u = z - most[:, None]
    e = u.exp()
    likely = first_equal(z, most)
    place = likely[:, None]
    # the largest is e⁰ = 1; it is left out of the sum
    others = e.scatter_(1, place, 0.0).sum(1, keepdim=True)
    return e.scatter_(1, place, 1.0).div_(1 + others), u.sub_(others.log1p()), likely


def first_equal(x: Tensor, value: Tensor) -> Tensor:
    """Return of each row (n, C) the lowest class whose entry is ``value`` (n,); each row has one.

    >>> first_equal(torch.tensor([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]]), torch.tensor([3.0, 2.0])).tolist()
    [1, 0]
    """
    equal = torch.eq(x, value[:, None], out=torch.empty_like(x))
    ties = equal.sum(1) > 1
    at = equal.mul_(_numbers(x.shape[1], x.dtype, x.device)).sum(1).long()
    if ties.any():
        rows = ties.nonzero()[:, 0]
        at[rows] = (x[rows] == value[rows, None]).int().argmax(1)
    return at


@lru_cache(maxsize=4)
def _numbers(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return 0 to count − 1 as floating numbers."""
    return torch.arange(count, dtype=dtype, device=device)
