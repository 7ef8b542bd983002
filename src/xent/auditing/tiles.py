"""Tiles of predictions: some rows with the numbers of all classes, from which each row is measured.

    logits      u = z − max z    Z = 1 + Σ_{j≠top} e^{u_j}    p = e^u / Z    log p = u − log Z
    log-probs   u = log p        Z = 1
    probs       u = log p        Z = 1

    H = log Z · Σ p − Σ p u        ℓ = −Σ t log p

The largest exponential is 1, and is left out of the sum that log1p takes. A tile fits the processor's cache,
so that the passes over its numbers are cheap. Its memory may have the rows or the classes side by side.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from xent.auditing.rows import MeasuredRows, Rows
from xent.auditing.top_two import TopTwo, top_two

Kind = Literal["probs", "log-probs", "logits"]

FEW = 64
"""Classes up to which sums over them are faster with the rows of a class side by side in memory."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """Some consecutive rows, with the numbers of C classes each, C at least 2.

    Example:
        >>> tile = Tile(torch.tensor([[0.7, 0.2, 0.1]]), "probs", torch.tensor([0]), torch.ones(1).double())
        >>> rows = tile.measured()
        >>> round(rows.gradient_norm.item(), 6), round(rows.curvature_trace.item(), 2)
        (0.374166, 0.46)
    """

    x: Tensor  # (n, C) float32 or float64; of logits each row has a finite one
    kind: Kind
    label: Tensor  # (n,) int64, the class of the row, or that of the largest mass
    weight: Tensor  # (n,) float64
    mass: Tensor | None = None  # (n, C) of soft labels, which sum to 1; None means that of one class
    start: int = 0  # number of the first row among all, from 0

    def __len__(self) -> int:
        """Return n."""
        return len(self.label)

    @property
    def classes(self) -> int:
        """The number of classes, C."""
        return self.x.shape[1]

    @cached_property
    def top(self) -> TopTwo:
        """The two largest numbers of each row."""
        return top_two(self.x)

    @property
    def prediction(self) -> Tensor:
        """The lowest of the most probable classes, (n,) int64."""
        return self.top.likely

    @property
    def p(self) -> Tensor:
        """The probabilities, (n, C)."""
        return self._softmax[0]

    @property
    def log_p(self) -> Tensor:
        """The log-probabilities, (n, C)."""
        return self.scores().sub_(self.log_z[:, None].to(self.x.dtype))

    @cached_property
    def rest(self) -> Tensor:
        """The probabilities of the classes beside the prediction, summed, (n,) float64."""
        if self.kind == "logits":
            others = self._softmax[1].double()
            return others / (1 + others)
        return self.p.clone().scatter_(1, self.prediction[:, None], 0.0).sum(1).double()

    @cached_property
    def log_z(self) -> Tensor:
        """What the scores of a row are above its log-probabilities, (n,) float64."""
        return self._softmax[1].double().log1p()

    @cached_property
    def _softmax(self) -> tuple[Tensor, Tensor]:
        """The probabilities (n, C), and Z − 1 (n,)."""
        if self.kind != "logits":
            return self.x if self.kind == "probs" else self.x.exp(), self.x.new_zeros(len(self))
        place = self.top.likely[:, None]
        e = self.scores().exp_()
        others = e.scatter_(1, place, 0.0).sum(1)
        return e.scatter_(1, place, 1.0).div_((1 + others)[:, None]), others

    def scores(self) -> Tensor:
        """Return u (n, C), which the caller may change."""
        if self.kind == "logits":
            return self.x - self.top.top[:, None]
        return self.x.log() if self.kind == "probs" else self.x.clone()

    @property
    def impossible(self) -> Tensor:
        """A flag for each row: whether a class of it has probability 0, so that its loss is infinite."""
        never = 0.0 if self.kind == "probs" else -math.inf
        if self.mass is not None:
            return ((self.mass > 0) & (self.x == never)).any(1)
        return self.x.gather(1, self.label[:, None])[:, 0] == never

    def chosen(self, rows: Tensor) -> Tile:
        """Return some of the rows (k,), as rows of no certain number."""

        def of(x: Tensor) -> Tensor:
            return x[rows] if x.stride(1) == 1 else x.t().index_select(1, rows).t()

        mass = None if self.mass is None else of(self.mass)
        return Tile(of(self.x), self.kind, self.label[rows], self.weight[rows], mass)

    def known(self) -> Rows:
        """Return what a second sweep needs of each row."""
        own_log, own = self._both(self.label)
        top_log, confidence = self._both(self.prediction)
        return Rows(
            self.start,
            self.label,
            self.weight,
            self.prediction,
            own_log,
            own,
            top_log,
            confidence,
            self.rest,
            -own_log if self.mass is None else self.soft_loss(self.mass).sum(1),
        )

    def measured(self) -> MeasuredRows:
        """Return all that is measured of each row."""
        known = self.known()
        place = self.prediction[:, None]
        second_log, second = self._both(self.top.runner_up)
        u, beside = self.scores(), self.p.clone().scatter_(1, place, 0.0)
        total = u.mul_(beside).sum(1)
        if total.isnan().any():  # 0·(−inf) counts as 0
            total = u.nansum(1)
        at_top = known.confidence * (known.top_log + self.log_z)
        entropy = self.log_z * (known.confidence + known.rest) - total.double() - at_top
        squares = beside.square_().sum(1).double()
        own = self.x.gather(1, self.label[:, None])
        rank = torch.gt(self.x, own, out=u).sum(1).long()
        if self.mass is None:
            hit, brier, by_class = known.right.double(), None, None
        else:
            hit = self.mass.gather(1, place)[:, 0].double()
            brier = torch.sub(self.p, self.mass, out=beside).square_().sum(1).double()
            counted = self.weight * known.loss.isfinite()
            loss = self.soft_loss(self.mass).nan_to_num_(posinf=0.0)
            by_class = torch.stack([self.weight @ self.mass.double(), counted @ loss])
        return MeasuredRows(
            **{field.name: getattr(known, field.name) for field in dataclasses.fields(known)},
            runner_up=self.top.runner_up,
            second_log=second_log,
            second=second,
            squares=squares,
            entropy=entropy,
            rank=rank,
            hit=hit,
            soft_brier=brier,
            by_class=by_class,
        )

    def _both(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probability and probability of a class of each row (n,), in float64."""
        x, p = (of.gather(1, classes[:, None])[:, 0].double() for of in (self.x, self.p))
        if self.kind == "logits":
            return x - self.top.top.double() - self.log_z, p
        return p.log() if self.kind == "probs" else x, p

    def soft_loss(self, mass: Tensor) -> Tensor:
        """Return −t log p (n, C) in float64, 0 where there is no mass."""
        return torch.where(mass > 0, -mass * self.log_p, 0.0).double()
