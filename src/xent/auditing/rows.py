"""The measures of rows of predictions, and what follows from them.

    ‖p − t‖² = (Σ_{j≠y} p_j)² + Σ_{j≠y} p_j²      tr J = Σ p (1 − p)      margin = log p_y − max_{j≠y} log p_j

with t the indicator of the class y and J = diag(p) − p pᵀ the Jacobian of the softmax. Sums over the classes
beside one are formed as such, and not as one less its probability, so that a sure row keeps its digits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some consecutive rows, with what both sweeps need, (n,) each, in float64 but for the classes."""

    start: int  # number of the first row among all, from 0
    label: Tensor  # int64, the class of the row, or that of the largest mass
    weight: Tensor
    prediction: Tensor  # int64, the lowest of the most probable classes
    own_log: Tensor  # the log-probability of the class
    own: Tensor  # the probability of the class
    top_log: Tensor  # the log-probability of the prediction
    confidence: Tensor  # the probability of the prediction
    rest: Tensor  # Σ p over the classes beside the prediction
    rest_log: Tensor  # its logarithm, finite where the sum is too small for a number
    loss: Tensor  # −Σ t log p, nats

    def __len__(self) -> int:
        """Return n."""
        return len(self.label)

    @cached_property
    def right(self) -> Tensor:
        """A flag for each row: whether its prediction is its class."""
        return self.prediction == self.label

    @cached_property
    def saving(self) -> Tensor:
        """The nats that the prediction would save as the label; 0 where it is the label."""
        return self.top_log - self.own_log

    @cached_property
    def others(self) -> Tensor:
        """1 − p of the class, the sum of the other probabilities."""
        # the prediction's p enters for the own one; it is at least as large, so that nothing is lost
        return torch.where(self.right, self.rest, (self.rest - self.own) + self.confidence)


@dataclasses.dataclass(frozen=True)
class MeasuredRows(Rows):
    """Some consecutive rows, with all their measures, (n,) each, in float64 but for classes."""

    runner_up: Tensor  # int64, the most probable class beside the prediction
    second_log: Tensor  # the log-probability of the runner-up
    second: Tensor  # the probability of the runner-up
    squares: Tensor  # Σ p² over the classes beside the prediction
    entropy: Tensor  # −Σ p log p, nats
    rank: (
        Tensor  # int64, at most 100: the number of classes more probable than the row's, or as much and lower
    )
    hit: Tensor  # the mass of the predicted class: 1 or 0 without soft labels
    soft_top: Tensor | None = None  # (n, K) of soft labels: the mass of the 1, 2, ... K most probable classes
    soft_brier: Tensor | None = None  # ‖p − t‖² of soft labels
    by_class: Tensor | None = (
        None  # (3, C) of soft labels: weight, that of finite loss, and loss of each class
    )

    @cached_property
    def margin(self) -> Tensor:
        """The log-probability of the class less that of the most probable other class."""
        return self.own_log - torch.where(self.right, self.second_log, self.top_log)

    @cached_property
    def brier(self) -> Tensor:
        """‖p − t‖²."""
        if self.soft_brier is not None:
            return self.soft_brier
        beside = (self.squares - self.own**2) + self.confidence**2
        return self.others.square() + torch.where(self.right, self.squares, beside)

    @cached_property
    def gradient_norm(self) -> Tensor:
        """‖p − t‖, the length of the loss's gradient in the logits."""
        return self.brier.sqrt()

    @cached_property
    def curvature_trace(self) -> Tensor:
        """The trace of the loss's Hessian in the logits, Σ p (1 − p)."""
        # of the other probabilities at most one is above ½, so that the difference keeps its digits
        return self.confidence * self.rest + (self.rest - self.squares)


AnyRows = TypeVar("AnyRows", Rows, MeasuredRows)


def joined(parts: Sequence[AnyRows]) -> AnyRows:
    """Return rows that follow each other as one."""
    first, *others = parts
    if not others:
        return first
    values: dict[str, Any] = {}
    for field in dataclasses.fields(first):
        of = [getattr(part, field.name) for part in parts]
        if field.name == "by_class":
            values[field.name] = None if of[0] is None else torch.stack(of).sum(0)
        else:
            values[field.name] = torch.cat(of) if isinstance(of[0], Tensor) else of[0]
    return type(first)(**values)
