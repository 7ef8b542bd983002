"""The margins of a row and the bounds on its cross-entropy that they give, in one sweep.

    m_j = z_j − z_y        CE = log(1 + Σ_{j≠y} exp m_j)        C − 1 rivals j of the own class y

    (1/C) Σ max(m_j + log C, 0)  ≤  (1/C) Σ softplus(m_j + log C)
        ≤  1/(C−1) Σ softplus(m_j + log(C−1))  ≤  CE  ≤  Σ softplus(m_j)
    softplus(max m)  ≤  CE  ≤  softplus(max m + log(C−1))

A softplus is taken in two parts, neither of which cancels or overflows,

    softplus(m + log s) = max(m + log s, 0) + log1p(u)        v = s·exp m        u = min(v, 1/v) ≤ 1

so all bounds share one exponential, a row with a tiny loss keeps its relative accuracy (u = v is as exact as
exp m), and Σ log1p(u) is the logarithm of a product of up to 64 factors that are at most 2.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from xent._core.ops import TileOps, cut
from xent._core.problem import Problem
from xent._core.statistics import NEG_INF, PairwiseMerge, TargetColumns, finite_base, statistics_dtype
from xent._core.tiles.sweep import Workspace
from xent._util import html

FAR = 80.0  # beyond it exp m nears the end of float32's range, and log1p(1/v) < 2e-35 is negligible beside m
HALVINGS = 6  # the product of 2⁶ factors 1 + u is at most 2⁶⁴, within float32's range
PIECE = 1 << 19  # elements of a tile processed at a time, so that intermediate results stay in the cache


class Bounds(NamedTuple):
    """Bounds on the cross-entropy of each row, or on its reduction, in nats.

    ``hinge ≤ smooth ≤ tight ≤ loss ≤ union`` and ``hardest_low ≤ loss ≤ hardest_high``. The sums run over the
    C − 1 rivals of the target class, with their margins m, and ``softplus(u) = log(1 + exp(u))``.

    Example:
        >>> import torch, xent
        >>> found = xent.triplets.bounds(torch.zeros(1, 2), torch.tensor([0]))  # of two classes: equal
        >>> [round(getattr(found, name).item(), 6) for name in ("tight", "loss", "union")]
        [0.693147, 0.693147, 0.693147]
    """

    hinge: Tensor  # (1/C) Σ max(m + log C, 0): the triplet loss with margin log C
    smooth: Tensor  # (1/C) Σ softplus(m + log C)
    tight: Tensor  # 1/(C−1) Σ softplus(m + log(C−1)): the loss where all m are equal
    loss: Tensor  # the cross-entropy itself
    union: Tensor  # Σ softplus(m)
    hardest_low: Tensor  # softplus(max m)
    hardest_high: Tensor  # softplus(max m + log(C−1))

    def _repr_html_(self) -> str:
        """Return the bounds of the first rows as a table for a notebook.

        >>> "<td>3</td>" in Bounds(*torch.arange(7.0))._repr_html_()
        True
        """
        return html.shown(
            self,
            self,
            lambda: html.table_by_row(
                "Bounds on the cross-entropy, in nats",
                self.loss.shape,
                {name: html.first(value) for name, value in self._asdict().items()},
            ),
        )


class Sums(NamedTuple):
    """Sums over a set of rivals from which the bounds are made; every field has shape (R,)."""

    hinge: Tensor  # Σ max(m + log C, 0)
    smooth: Tensor  # Σ softplus(m + log C)
    tight: Tensor  # Σ softplus(m + log(C−1))
    union: Tensor  # Σ softplus(m)
    near: Tensor  # Σ exp m over tiles whose margins are all at most FAR
    far: Tensor  # log Σ exp m over the other tiles
    top: Tensor  # max m

    def merge(self, other: Sums) -> Sums:
        """Return the sums over the union of two disjoint sets of rivals."""
        return Sums(
            hinge=self.hinge + other.hinge,
            smooth=self.smooth + other.smooth,
            tight=self.tight + other.tight,
            union=self.union + other.union,
            near=self.near + other.near,
            far=torch.logaddexp(self.far, other.far),
            top=torch.maximum(self.top, other.top),
        )

    def bounds(self, classes: int, own_z: Tensor) -> Bounds:
        """Return the bounds of rows whose target has the logit own_z (R,)."""
        rivals = max(classes - 1, 1)
        found = Bounds(
            hinge=self.hinge / classes,
            smooth=self.smooth / classes,
            tight=self.tight / rivals,
            loss=torch.logaddexp(self.far, torch.log1p(self.near)),
            union=self.union,
            hardest_low=softplus(self.top, 1),
            hardest_high=softplus(self.top, rivals),
        )
        # a masked target is infinitely far behind, unless every class is masked
        masked, lost = own_z == NEG_INF, torch.where(self.top == NEG_INF, math.nan, math.inf)
        return Bounds(*(torch.where(masked, lost, value) for value in found))


def softplus(m: Tensor, by: Tensor | float) -> Tensor:
    """Return softplus(m + log by)."""
    return (m + _log(by)).clamp_min(0) + torch.log1p(_below_one(torch.exp(m.clamp_max(FAR)) * by))


def _log(by: Tensor | float) -> Tensor | float:
    if isinstance(by, Tensor):
        return torch.log(by)
    return math.log(by) if by else NEG_INF


def _below_one(v: Tensor) -> Tensor:
    """Return min(v, 1/v)."""
    return v.reciprocal().clamp_max_(v)


Buffers: TypeAlias = list[Tensor] | None
"""Three buffers for the intermediate results of a piece, allocated once; None for fresh tensors.

Fresh tensors would cost as much time as the arithmetic, in pages that the system maps anew.
"""


def _piece(buffers: Buffers, number: int, like: Tensor, classes: int | None = None) -> Tensor | None:
    """Return a buffer for a tensor like (R, T), or of fewer classes; None where there are no buffers."""
    if buffers is None:
        return None
    rows, classes = like.shape[0], classes or like.shape[1]
    return buffers[number][: rows * classes].view(rows, classes)


def sum_of_log1p(u: Tensor, buffers: Buffers = None, free: tuple[int, int] = (1, 2)) -> Tensor:
    """Return Σ_j log1p(u_j), 0 ≤ u ≤ 1, (R, T) -> (R,): log Π(1 + u) by (1 + a)(1 + b) − 1 = a + b + ab.

    `free` numbers the two buffers to use; neither holds u.
    """
    total = torch.zeros((), dtype=u.dtype, device=u.device)
    for halving in range(HALVINGS):
        half = u.shape[1] // 2
        if u.shape[1] % 2:
            total = total + torch.log1p(u[:, -1])
        if half == 0:
            return total.expand(u.shape[0])
        a, b = u[:, :half], u[:, half : 2 * half]
        out = _piece(buffers, free[halving % 2], u, half)
        u = torch.add(a, b, out=out).addcmul_(a, b)
    return total + torch.log1p(u).sum(1)


def chain(problem: Problem) -> Bounds:
    """Return the bounds of the M rows that count, float64; targets are one class a row, without weights."""
    logits, targets, ops = problem.logits, problem.targets, problem.ops
    assert targets.index is not None
    plan = problem.plan(resident=False, temporaries=3)
    workspace = Workspace(problem, plan, slopes=False)
    own_z = own_logits(problem)
    parts: list[Bounds] = []
    buffers: Buffers = None
    with problem.products():
        for chunk in plan.row_chunks(targets.count):
            loaded = logits.load(targets.pick(chunk))
            z_y, own = cut(own_z, chunk), cut(targets.index, chunk)
            union: PairwiseMerge[Sums] = PairwiseMerge()
            for classes in plan.class_tiles(targets.n_classes):
                z, _ = logits.tile(ops, loaded, classes, workspace.buffers(chunk, classes))
                m = ops.sub(z, finite_base(z_y))
                m = TargetColumns.locate(own, classes).put(ops, m, NEG_INF)
                pieces = m.split(max(1, PIECE // m.shape[1])) if ops.buffered else (m,)
                if ops.buffered and buffers is None:  # the first tile is the largest
                    size = max(min(PIECE, m.numel()), m.shape[1])
                    buffers = [m.new_empty(size) for _ in range(3)]
                found = [_sums(ops, piece, targets.n_classes, buffers) for piece in pieces]
                union.add(Sums(*map(torch.cat, zip(*found, strict=True))))
            parts.append(union.whole().bounds(targets.n_classes, z_y[:, 0]))
    if not parts:
        return Bounds(*(torch.zeros(0, dtype=statistics_dtype(logits.device), device=logits.device),) * 7)
    return Bounds(*map(torch.cat, zip(*parts, strict=True)))


def own_logits(problem: Problem) -> Tensor:
    """Return z_y of the M rows, (M, 1); nan where y is outside 0..C−1."""
    logits, targets, ops = problem.logits, problem.targets, problem.ops
    assert targets.index is not None
    count = targets.count
    a_row = logits.bytes_per_row(gathered=True) + 4 * logits.dtype.itemsize * (logits.depth + 4)
    rows = max(1, problem.budget // a_row) if ops.buffered else max(1, count)
    found = []
    for start in range(0, count, rows):
        chunk = slice(start, min(start + rows, count))
        own = cut(targets.index, chunk)
        inside = (own >= 0) & (own < targets.n_classes)
        z = logits.entries(logits.load(targets.pick(chunk)), torch.where(inside, own, 0))
        found.append(torch.where(inside, z, math.nan))
    return torch.cat(found) if found else torch.zeros(0, 1, dtype=logits.dtype, device=logits.device)


def _sums(ops: TileOps, m: Tensor, classes: int, buffers: Buffers) -> Sums:
    """Return the sums over a tile of margins m (R, T), −inf where there is no rival."""
    dtype = statistics_dtype(m.device)
    top = m.amax(1)
    e = ops.exp(torch.clamp_max(m, FAR, out=_piece(buffers, 0, m)))
    near, far = e.sum(1).to(dtype), torch.full_like(top, NEG_INF, dtype=dtype)
    beyond = top > FAR
    if ops.possible(beyond):
        wide = ops.exp(m - finite_base(top)[:, None]).sum(1).to(dtype).log_() + top
        wide = torch.where(top == math.inf, math.inf, wide)  # a difference of finite logits may be infinite
        near, far = torch.where(beyond, 0.0, near), torch.where(beyond, wide, far)
    hinge, smooth = _softplus_sums(m, e, classes, buffers)
    return Sums(
        hinge=hinge.to(dtype),
        smooth=smooth.to(dtype),
        tight=_softplus_sums(m, e, classes - 1, buffers)[1].to(dtype),
        union=_softplus_sums(m, e, 1, buffers)[1].to(dtype),
        near=near,
        far=far,
        top=top.to(dtype),
    )


def _softplus_sums(m: Tensor, e: Tensor, by: int, buffers: Buffers) -> tuple[Tensor, Tensor]:
    """Return Σ max(m + log by, 0) and Σ softplus(m + log by), (R,) each, from m (R, T) and e = exp m."""
    hinge = torch.add(m, _log(by), out=_piece(buffers, 1, m)).clamp_min_(0).sum(1)
    v = e if by == 1 else torch.mul(e, by, out=_piece(buffers, 1, m))
    u = torch.reciprocal(v, out=_piece(buffers, 2, m)).clamp_max_(v)  # min(v, 1/v)
    return hinge, hinge + sum_of_log1p(u, buffers)
