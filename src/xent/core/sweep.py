"""Visit the tiles of rows × classes: row statistics, loss, and the gradient.

With row coefficients α, γ from what came after the loss (γ = ∂L/∂ℓ, α = a·γ + ∂L/∂lse):

    ∂L/∂z = α·p − γ·t        p = exp(z − m) / (1 + r)        ∂L/∂q = γ·(∂t/∂q)·(−log p)

and at the target's own class α·expm1(log p_y) + γ·(a − t_y) + ∂L/∂lse, which is the same number without
the cancellation. `statistics` is one product a tile, `gradient` up to three more, and `fused` forms the
gradient while the probabilities are still in the workspace: three in all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from xent.core.matmul import fast_products
from xent.core.plan import Footprint, Plan
from xent.core.scores import Rows, Scores, Sink
from xent.core.statistics import (
    OwnColumns,
    Statistics,
    finite_base,
    statistics_dtype,
    summarise_,
)
from xent.core.targets import Targets


@dataclass(frozen=True)
class Coefficients:
    """∂L/∂(row outputs) of M rows: `loss` (M,) float64 and `logsumexp` (M,) or None where it is zero."""

    loss: Tensor
    logsumexp: Tensor | None

    def rows(self, rows: slice) -> Coefficients:
        return Coefficients(self.loss[rows], None if self.logsumexp is None else self.logsumexp[rows])


def statistics(scores: Scores, targets: Targets, budget: int) -> Statistics:
    """Row statistics of the M rows that take part, each (M,)."""
    plan = _plan(scores, targets, budget, gradient=False)
    workspace = _Workspace(scores, targets, plan, slopes=False)
    parts = []
    with fast_products(scores.device, scores.dtype):
        for chunk in plan.row_chunks(targets.count):
            found, _ = _chunk_statistics(scores, targets, plan, workspace, chunk)
            parts.append(found)
    return _concatenate(parts, scores)


def fused(
    scores: Scores,
    targets: Targets,
    coefficients: Callable[[Statistics, slice], Coefficients],
    wants: tuple[bool, ...],
    budget: int,
) -> tuple[Statistics, Sink]:
    """Statistics and gradient in one sweep; `coefficients` is asked as each chunk's statistics are known."""
    plan = _plan(scores, targets, budget, gradient=True)
    if not plan.resident:
        found = statistics(scores, targets, budget)
        return found, gradient(scores, targets, found, coefficients(found, slice(None)), wants, budget)[0]
    workspace = _Workspace(scores, targets, plan, slopes=scores.transform.curved)
    sink = scores.sink(wants, targets.rows is not None)
    parts = []
    with fast_products(scores.device, scores.dtype):
        for chunk in plan.row_chunks(targets.count):
            found, tiles = _chunk_statistics(scores, targets, plan, workspace, chunk)
            parts.append(found)
            picked = targets.pick(chunk)
            loaded = scores.load(picked)
            asked = coefficients(found, chunk)
            for tile in tiles:
                _differentiate_(scores, targets, chunk, picked, tile, found, asked)
                sink.add(picked, loaded, tile.classes, tile.z)
    return _concatenate(parts, scores), sink


def gradient(
    scores: Scores,
    targets: Targets,
    found: Statistics,
    coefficients: Coefficients,
    wants: tuple[bool, ...],
    budget: int,
    *,
    wants_target: bool = False,
) -> tuple[Sink, Tensor | None]:
    """The gradient from saved statistics: the logits are computed once more, classes outermost."""
    plan = _plan(scores, targets, budget, gradient=False)
    workspace = _Workspace(scores, targets, plan, slopes=scores.transform.curved)
    sink = scores.sink(wants, targets.rows is not None)
    dq = _target_gradient(targets) if wants_target else None
    with fast_products(scores.device, scores.dtype):
        for classes in plan.class_tiles(targets.classes):
            for chunk in plan.row_chunks(targets.count):
                picked = targets.pick(chunk)
                loaded = scores.load(picked)
                rows = found.rows(chunk)
                asked = coefficients.rows(chunk)
                z, slope = workspace.tile(0, chunk, classes)
                scores.tile(loaded, classes, z, slope)
                own = _own_columns(targets, chunk, classes)
                own_z = None if own is None else own.take(z, 0.0).to(rows.m.dtype)
                z.sub_(finite_base(rows.m).to(z.dtype)[:, None])
                if dq is not None:
                    _target_tile(targets, dq, picked, classes, z, rows, asked)
                z.exp_()
                tile = _Tile(classes, z, slope, rows.m, own, own_z)
                _differentiate_(scores, targets, chunk, picked, tile, rows, asked)
                sink.add(picked, loaded, classes, z)
    return sink, dq


@dataclass
class _Tile:
    classes: slice
    z: Tensor  # (R, T) exp(z − base), then the gradient
    slope: Tensor | None  # (R, T)
    base: Tensor  # (R,) what was subtracted before exp
    own: OwnColumns | None
    own_z: Tensor | None  # (R, K) logits of the own classes, where this tile holds them


class _Workspace:
    """The one buffer of a sweep, cut into contiguous tiles: products write into it, nothing is allocated."""

    def __init__(self, scores: Scores, targets: Targets, plan: Plan, *, slopes: bool) -> None:
        self.slopes = slopes
        self.width = targets.classes if plan.resident else min(plan.class_tile, targets.classes)
        self.rows = plan.row_chunk
        size = self.rows * self.width * (2 if slopes else 1)
        self.buffer = torch.empty(size, dtype=scores.dtype, device=scores.device)

    def tile(self, offset: int, chunk: slice, classes: slice) -> tuple[Tensor, Tensor | None]:
        """Logits and slopes of a tile whose classes start at column `offset` of the workspace."""
        rows, width = chunk.stop - chunk.start, classes.stop - classes.start
        start, size = offset * self.rows, rows * width
        z = self.buffer[start : start + size].view(rows, width)
        if not self.slopes:
            return z, None
        start += self.rows * self.width
        return z, self.buffer[start : start + size].view(rows, width)


def _chunk_statistics(
    scores: Scores, targets: Targets, plan: Plan, workspace: _Workspace, chunk: slice
) -> tuple[Statistics, list[_Tile]]:
    """Statistics of a chunk of rows over all classes; the tiles hold exp(z − base) if the plan keeps them."""
    picked = targets.pick(chunk)
    loaded = scores.load(picked)
    rows = chunk.stop - chunk.start
    found = None
    own_z = None
    tiles = []
    for classes in plan.class_tiles(targets.classes):
        z, slope = workspace.tile(classes.start if plan.resident else 0, chunk, classes)
        scores.tile(loaded, classes, z, slope)
        own = _own_columns(targets, chunk, classes)
        here = None
        if own is not None:
            here = own.take(z, torch.nan).to(statistics_dtype(z.device))
            own_z = here if own_z is None else torch.where(own.inside, here, own_z)
            own.put_(z, -torch.inf)
        part = summarise_(z, targets.tile(picked, classes, z.dtype), own)
        found = part if found is None else found.merge(part)
        if plan.resident:
            tiles.append(_Tile(classes, z, slope, part.m, own, here))
    if found is None:
        found = Statistics.identity(rows, scores.device)
    if own_z is not None:
        assert targets.own_mass is not None
        found = found.merge(_own_statistics(own_z, targets.own_mass[chunk]))
    return found, tiles


def _own_columns(targets: Targets, chunk: slice, classes: slice) -> OwnColumns | None:
    return None if targets.own is None else OwnColumns.locate(targets.own[chunk], classes)


def _own_statistics(z: Tensor, mass: Tensor) -> Statistics:
    """The own tile's statistics, z (R, 1) and mass (R, 1): one class, so r = 0 and d = 0."""
    z, mass = z[:, 0], mass[:, 0]
    zero = torch.zeros_like(z)
    return Statistics(m=z, r=torch.where(z == -torch.inf, -1.0, zero), d=zero, a=mass)


def _differentiate_(
    scores: Scores,
    targets: Targets,
    chunk: slice,
    picked: Rows,
    tile: _Tile,
    found: Statistics,
    asked: Coefficients,
) -> None:
    """exp(z − base) becomes ∂L/∂u in place."""
    z = tile.z
    gain = scores.transform.gain
    gamma = asked.loss * gain
    extra = None if asked.logsumexp is None else asked.logsumexp * gain
    alpha = found.a * gamma if extra is None else found.a * gamma + extra
    shift = torch.where(tile.base == found.m, 0.0, tile.base - found.m)
    z.mul_((alpha * torch.exp(shift) / (1 + found.r)).to(z.dtype)[:, None])
    t = targets.tile(picked, tile.classes, z.dtype)
    if t is not None:
        z.addcmul_(t, gamma.to(z.dtype)[:, None], value=-1)
    if tile.own is not None:
        assert tile.own_z is not None
        assert targets.own_rest is not None
        at_own = alpha[:, None] * torch.expm1(found.log_prob(tile.own_z))
        at_own += gamma[:, None] * targets.own_rest[chunk]
        if extra is not None:
            at_own += extra[:, None]
        tile.own.put_(z, at_own.to(z.dtype))
    if tile.slope is not None:
        z.mul_(tile.slope)


def _target_gradient(targets: Targets) -> Tensor:
    q = targets.probabilities
    assert q is not None
    return torch.zeros_like(q) if targets.rows is not None else torch.empty_like(q)


def _target_tile(
    targets: Targets,
    dq: Tensor,
    picked: Rows,
    classes: slice,
    z: Tensor,
    found: Statistics,
    asked: Coefficients,
) -> None:
    """∂L/∂q = γ·(∂t/∂q)·(−log p), z already relative to the maximum."""
    surprise = found.log_partition.to(z.dtype)[:, None] - z
    factor = targets.probability_factor(classes, z.dtype)
    dq[picked, classes] = (surprise * factor * asked.loss.to(z.dtype)[:, None]).to(dq.dtype)


def _plan(scores: Scores, targets: Targets, budget: int, *, gradient: bool) -> Plan:
    size = scores.dtype.itemsize
    gathered = targets.rows is not None
    dense = targets.dense
    footprint = Footprint(
        kept=size * (2 if scores.transform.curved else 1),
        # a converted tile of t, its product with z, and the booleans of a selection
        scratch=(3 * size + 1 if targets.probabilities is not None else 2 * size + 1) if dense else 0,
        per_row=scores.bytes_per_row(gathered),
        per_class=scores.bytes_per_class(),
        resident_rows=scores.least_resident_rows,
    )
    return Plan.within(budget, targets.count, targets.classes, footprint, gradient=gradient)


def _concatenate(parts: list[Statistics], scores: Scores) -> Statistics:
    return Statistics.concatenate(parts) if parts else Statistics.identity(0, scores.device)
