"""The measures of each row of a classifier's predictions, from its log-probabilities and its class.

    ℓ = −log p_y      H = −Σ p log p      ‖p − t‖² = (Σ_{j≠y} p_j)² + Σ_{j≠y} p_j²      tr J = Σ p (1 − p)

with t the class's indicator and J = diag(p) − p pᵀ the Jacobian of the softmax. One less a probability is the
sum of the others, so that a sure row keeps its digits. Numbers of a row are float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RowMeasures(NamedTuple):
    """The measures of n rows; everything else is made of these and of the probabilities."""

    label: Tensor  # (n,) int64, the class of the row
    weight: Tensor  # (n,) float64
    loss: Tensor  # (n,) nats
    prediction: Tensor  # (n,) int64, the lowest of the most probable classes
    confidence: Tensor  # (n,) the largest probability
    runner_up: Tensor  # (n,) int64, the most probable of the other classes
    margin: Tensor  # (n,) log p of the class less that of the most probable other
    rank: Tensor  # (n,) int64, classes that are more probable than the row's own
    entropy: Tensor  # (n,) nats
    brier: Tensor  # (n,) ‖p − t‖², t the class's indicator
    curvature_trace: Tensor  # (n,) of the loss's Hessian in the logits

    @property
    def correct(self) -> Tensor:
        """A flag for each row: whether its prediction is its class."""
        return self.prediction == self.label

    @property
    def gradient_norm(self) -> Tensor:
        """‖p − t‖, the length of the loss's gradient in the logits."""
        return self.brier.sqrt()


def measure_rows(log_p: Tensor, label: Tensor, weight: Tensor | None = None) -> RowMeasures:
    """Return the measures of rows of log-probabilities (n, C), C at least 2, and classes (n,).

    Example:
        >>> import torch
        >>> rows = measure_rows(torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([0]))
        >>> round(rows.gradient_norm.item(), 6), round(rows.curvature_trace.item(), 2)
        (0.374166, 0.46)
    """
    own = log_p.gather(1, label[:, None])
    top, classes = log_p.topk(2, dim=1)
    first = classes[:, 0] == label
    best_other = torch.where(first, top[:, 1], top[:, 0]).double()
    p = log_p.exp()
    wide = own[:, 0].double()
    # argmax and not topk, whose order among equal ones is not said
    prediction = log_p.argmax(1)
    runner_up = torch.where(classes[:, 0] == prediction, classes[:, 1], classes[:, 0])
    beside_own, beside_top = (p.scatter(1, y[:, None], 0.0) for y in (label, prediction))
    wrong, rest = (others.sum(1, dtype=torch.float64) for others in (beside_own, beside_top))
    most = p.gather(1, prediction[:, None])[:, 0].double()
    return RowMeasures(
        label=label,
        weight=torch.ones_like(wide) if weight is None else weight.double(),
        loss=-wide,
        prediction=prediction,
        confidence=top[:, 0].double().exp(),
        runner_up=runner_up,
        margin=wide - best_other,
        rank=(log_p > own).sum(1),
        entropy=-torch.where(p == 0, 0.0, p * log_p).sum(1, dtype=torch.float64),
        brier=wrong.square() + beside_own.square().sum(1, dtype=torch.float64),
        curvature_trace=most * rest + (beside_top * (1 - beside_top)).sum(1, dtype=torch.float64),
    )
