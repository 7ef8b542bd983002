"""Tiles of predictions: some rows with the numbers of all classes, from which each row is measured.

    logits      u = z − max z    Z = 1 + Σ_{j≠top} e^{u_j}    p = e^u / Z    log p = u − log Z
    log-probs   u = log p        Z = 1
    probs       u = log p        Z = 1

    H = log Z · Σ p − Σ p u        ℓ = −Σ t log p

The largest exponential is 1, and is left out of the sum that log1p takes. A tile fits the processor's cache,
and tiles take turns in the same memory, so that the passes over the numbers are cheap. The rows or the
classes may lie side by side.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from xent.auditing.rows import MeasuredRows, Rows
from xent.auditing.top_two import TopTwo, top_two

Kind = Literal["probs", "log-probs", "logits"]

DEEPEST = 100
"""The largest k of a top-k accuracy."""


class Memory:
    """Memory for intermediate results, which the tiles of a thread take one after the other."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], Tensor] = {}

    def take(self, place: int, like: Tensor) -> Tensor:
        """Return a matrix of the shape, type and layout of another, until its place is taken again."""
        key = threading.get_ident(), place
        held = self._held.get(key)
        if held is None or held.numel() < like.numel() or held.dtype != like.dtype:
            held = self._held[key] = like.new_empty(like.numel())
        flat = held[: like.numel()]
        n, classes = like.shape
        return flat.view(n, classes) if like.stride(1) == 1 else flat.view(classes, n).t()


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
    memory: Memory = dataclasses.field(default_factory=Memory, repr=False)
    largest: TopTwo | None = None  # of the numbers, where they are known

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
        return self.largest or top_two(self.x)

    @property
    def prediction(self) -> Tensor:
        """The lowest of the most probable classes, (n,) int64."""
        return self.top.likely

    @cached_property
    def p(self) -> Tensor:
        """The probabilities, (n, C)."""
        return self._probabilities(self.x, self.top.top[:, None], self.others[:, None])

    def p_of(self, classes: Tensor) -> Tensor:
        """Return the probabilities of some classes (K,), (n, K)."""
        x = self.x
        x = x.index_select(1, classes) if x.stride(1) == 1 else x.t().index_select(0, classes).t()
        return self._probabilities(x, self.top.top[:, None], self.others[:, None])

    def p_at(self, rows: Tensor, classes: Tensor) -> Tensor:
        """Return the probability of a class (k,) in each of some rows (k,), (k,)."""
        return self._probabilities(self.x[rows, classes], self.top.top[rows], self.others[rows])

    def p_in(self, rows: Tensor) -> Tensor:
        """Return the probabilities of some rows (k,), (k, C), which the caller may change."""
        x = self._rows(rows)
        if self.kind == "logits":
            return x.sub_(self.top.top[rows, None]).exp_().div_(1 + self.others[rows, None])
        return x if self.kind == "probs" else x.exp_()

    def _probabilities(self, x: Tensor, top: Tensor, others: Tensor) -> Tensor:
        """Return the probabilities of numbers, beside the largest one and Σ e^u of their rows."""
        if self.kind == "probs":
            return x
        return (x - top).exp_().div_(1 + others) if self.kind == "logits" else x.exp()

    @property
    def log_p(self) -> Tensor:
        """The log-probabilities, (n, C)."""
        if self.kind == "logits":
            return (self.x - self.top.top[:, None]).sub_(self.others.log1p()[:, None])
        return self.x.log() if self.kind == "probs" else self.x

    @cached_property
    def others(self) -> Tensor:
        """Σ e^u over the classes beside the prediction, (n,)."""
        return self._beside(self.scores()).sum(1)

    def _beside(self, u: Tensor) -> Tensor:
        """Return e^u (n, C), 0 at the prediction, in the second place of the memory."""
        e = self.memory.take(1, self.x)
        torch.exp(u, out=e) if self.kind != "probs" else e.copy_(self.x)
        return e.scatter_(1, self.prediction[:, None], 0.0)

    def scores(self) -> Tensor:
        """Return u (n, C), in the first place of the memory; the caller may change it."""
        u = self.memory.take(0, self.x)
        if self.kind == "logits":
            return torch.sub(self.x, self.top.top[:, None], out=u)
        return torch.log(self.x, out=u) if self.kind == "probs" else u.copy_(self.x)

    @property
    def impossible(self) -> Tensor:
        """A flag for each row: whether a class of it has probability 0, so that its loss is infinite."""
        never = 0.0 if self.kind == "probs" else -math.inf
        if self.mass is not None:
            return ((self.mass > 0) & (self.x == never)).any(1)
        return self.x.gather(1, self.label[:, None])[:, 0] == never

    def chosen(self, rows: Tensor) -> Tile:
        """Return some of the rows (k,), as rows of no certain number."""

        mass = None if self.mass is None else self.mass[rows]
        return Tile(self._rows(rows), self.kind, self.label[rows], self.weight[rows], mass)

    def known(self) -> Rows:
        """Return what a second sweep needs of each row."""
        own_log, own = self._both(self.label)
        top_log, confidence = self._both(self.prediction)
        rest, rest_log = self._rest()
        return Rows(
            self.start,
            self.label,
            self.weight,
            self.prediction,
            own_log,
            own,
            top_log,
            confidence,
            rest,
            rest_log,
            -own_log if self.mass is None else self.soft_loss(self.mass).sum(1),
        )

    def _rest(self) -> tuple[Tensor, Tensor]:
        """Return Σ p over the classes beside the prediction and its logarithm, (n,) float64 each."""
        others = self.others.double()
        log = others.log()
        # numbers of few bits hold no smaller sum
        faint = ((others < 1e-30) & (self.top.second > -math.inf)).nonzero()[:, 0]
        if len(faint) and self.kind != "probs":
            u = self._rows(faint).double()
            if self.kind == "logits":
                u -= self.top.top[faint, None].double()
            log[faint] = u.scatter_(1, self.prediction[faint, None], -math.inf).logsumexp(1)
            others = others.clone()
            others[faint] = log[faint].exp()
        if self.kind == "logits":
            return others / (1 + others), log - others.log1p()
        return others, log

    def _rows(self, rows: Tensor) -> Tensor:
        """Return the numbers of some rows (k,), (k, C)."""
        return self.x[rows] if self.x.stride(1) == 1 else self.x.t().index_select(1, rows).t()

    def measured(self) -> MeasuredRows:
        """Return all that is measured of each row."""
        place = self.prediction[:, None]
        u = self.scores()
        beside = self._beside(u)
        self.__dict__["others"] = beside.sum(1)  # what would be formed once more
        known = self.known()
        second_log, second = self._both(self.top.runner_up)
        total = u.mul_(beside).sum(1)
        if total.isnan().any():  # 0·(−inf) counts as 0
            total = u.nansum(1)
        squares = beside.square_().sum(1).double()
        entropy = -total.double() - known.confidence * known.top_log
        if self.kind == "logits":
            z = 1 + self.others.double()
            squares /= z**2
            entropy = z.log() * known.rest - total / z - known.confidence * known.top_log
        if self.mass is None:
            hit, top, brier, by_class = known.right.double(), None, None, None
        else:
            hit = self.mass.gather(1, place)[:, 0].double()
            order = self.x.sort(dim=1, descending=True, stable=True).indices[:, :DEEPEST]
            top = self.mass.gather(1, order).double().cumsum(1)
            brier = torch.sub(self.p, self.mass, out=self.memory.take(1, self.x)).square_().sum(1).double()
            counted = self.weight * known.loss.isfinite()
            loss = self.soft_loss(self.mass).nan_to_num_(posinf=0.0)
            mass = self.mass.double()
            by_class = torch.stack([self.weight @ mass, counted @ mass, counted @ loss])
        return MeasuredRows(
            **{field.name: getattr(known, field.name) for field in dataclasses.fields(known)},
            runner_up=self.top.runner_up,
            second_log=second_log,
            second=second,
            squares=squares,
            entropy=entropy,
            rank=self._rank(),
            hit=hit,
            soft_top=top,
            soft_brier=brier,
            by_class=by_class,
        )

    def _rank(self) -> Tensor:
        """Return the number of classes before each row's own, (n,) int64, at most `DEEPEST`."""
        own = self.x.gather(1, self.label[:, None])
        before = (self.prediction != self.label).long()
        if self.top.blocks is not None:
            before *= (self.top.blocks > own).sum(1).clamp_(min=1)  # a block holds such a class at least
        rank = before.clamp_(max=DEEPEST)
        open_ = ((rank > 0) & (rank < DEEPEST)).nonzero()[:, 0]
        if len(open_):
            rank[open_] = self._counted(open_, own[open_]).clamp_(max=DEEPEST)
        return rank

    def _counted(self, rows: Tensor, own: Tensor) -> Tensor:
        """Return the number of classes before that of some rows (k,), whose own numbers are (k, 1)."""
        x = self._rows(rows) if len(rows) < len(self) else self.x
        compared = self.memory.take(0, x)
        count = torch.gt(x, own, out=compared).sum(1).long()
        tied = (torch.eq(x, own, out=compared).sum(1) > 1).nonzero()[:, 0]
        if len(tied):
            lower = torch.arange(self.classes) < self.label[rows[tied], None]
            count[tied] += ((self._rows(rows[tied]) == own[tied]) & lower).sum(1)
        return count

    def _both(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probability and probability of a class of each row (n,), in float64."""
        x = self.x.gather(1, classes[:, None])[:, 0].double()
        if self.kind == "probs":
            return x.log(), x
        if self.kind == "logits":
            x = x - self.top.top.double()
            others = self.others.double()
            return x - others.log1p(), x.exp() / (1 + others)
        return x, x.exp()

    def soft_loss(self, mass: Tensor) -> Tensor:
        """Return −t log p (n, C) in float64, 0 where there is no mass."""
        return torch.where(mass > 0, -mass * self.log_p, 0.0).double()
