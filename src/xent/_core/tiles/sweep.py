"""Visit the tiles of rows × classes: row statistics, loss, and the gradient.

`statistics` is one product a tile, `gradient` up to three more, and `fused` forms the gradient while the
probabilities are still in the workspace: three in all. What is computed in a tile is in `formulas`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from xent._core.coefficients import Coefficients
from xent._core.logit_map import TileBuffers
from xent._core.logits import GradientAccumulator, Loaded
from xent._core.ops import Accumulator, cut
from xent._core.plan import Plan
from xent._core.problem import Problem
from xent._core.statistics import PairwiseMerge, Statistics, finite_base, statistics_dtype, summarise
from xent._core.tiles.formulas import (
    Tile,
    absent_logit,
    differentiate,
    row_tile,
    takes_whole_rows,
    target_columns,
    target_statistics,
)


class TileGradients(NamedTuple):
    """Gradients in the making, of probabilities and of the logits' tensors."""

    of_target: Accumulator | None
    dtype: torch.dtype | None  # of probabilities
    of_logits: GradientAccumulator

    def finish(self, scale: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradient of each leaf, times `scale`, a number or one for each of N rows."""
        q = None
        if self.of_target is not None and self.dtype is not None:
            q = self.of_target.finish(scale, self.dtype)
        return q, *self.of_logits.finish(scale)


def statistics(problem: Problem) -> Statistics:
    """Return the row statistics of the M rows that count, each (M,)."""
    problem.check_sent()
    plan = problem.plan(resident=False)
    workspace = Workspace(problem, plan, slopes=False)
    logits, targets = problem.logits, problem.targets
    tiles = list(plan.class_tiles(targets.n_classes))
    with problem.products():
        parts = [
            chunk_statistics(
                problem, chunk, logits.load(targets.pick(chunk)), tiles, partial(workspace.buffers, chunk)
            )[0]
            for chunk in plan.row_chunks(targets.count)
        ]
    found = _concatenate(parts, problem)
    return found if problem.ranks is None else problem.ranks.join(found)


def fused(
    problem: Problem, coefficients: Callable[[Statistics, slice], Coefficients], wants: tuple[bool, ...]
) -> tuple[Statistics, TileGradients]:
    """Return statistics and gradient of one sweep; `coefficients` are called for as each chunk is known."""
    assert problem.ranks is None  # whose statistics come after the last tile
    logits, targets, ops = problem.logits, problem.targets, problem.ops
    plan = problem.plan(resident=True)
    if not plan.resident:
        found = statistics(problem)
        return found, gradient(problem, found, coefficients(found, slice(0, targets.count)), wants)
    workspace = Workspace(problem, plan, slopes=logits.map.curved)
    accumulator = logits.accumulator(ops, wants[1:])
    parts, class_tiles = [], list(plan.class_tiles(targets.n_classes))
    with problem.products():
        for chunk in plan.row_chunks(targets.count):
            picked = targets.pick(chunk)
            loaded = logits.load(picked)
            place = accumulator.place(picked) if len(class_tiles) == 1 else None
            buffers = partial(workspace.buffers, chunk, place=place)
            found, tiles = chunk_statistics(problem, chunk, loaded, class_tiles, buffers, keep=True)
            parts.append(found)
            upstream = coefficients(found, chunk)
            for tile in tiles:
                g = differentiate(problem, chunk, tile, found, upstream)
                accumulator.add(picked, loaded, tile.classes, g)
    return _concatenate(parts, problem), TileGradients(None, None, accumulator)


def gradient(
    problem: Problem,
    found: Statistics,
    coefficients: Coefficients,
    wants: tuple[bool, ...],  # of probabilities, then of the logits' tensors
) -> TileGradients:
    """Return the gradient from saved statistics; the logits are computed once more, classes outermost."""
    problem = problem.completed(found)
    logits, targets, ops = problem.logits, problem.targets, problem.ops
    plan = problem.plan(resident=False)
    workspace = Workspace(problem, plan, slopes=logits.map.curved)
    accumulator = logits.accumulator(ops, wants[1:])
    q = targets.probabilities
    dq = target_total(problem) if wants[0] else None
    with problem.products():
        for block in problem.blocks():
            for classes in plan.class_tiles(targets.n_classes):
                for chunk in plan.row_chunks(block.stop, block.start):
                    picked = targets.pick(chunk)
                    loaded = logits.load(picked)
                    rows = found.rows(chunk)
                    upstream = coefficients.rows(chunk)
                    tile, shifted = revisit(problem, workspace, chunk, loaded, classes, rows)
                    if dq is not None:
                        # −log p, before exp overwrites the shifted logits
                        surprise = rows.log_partition.to(shifted.dtype)[:, None] - shifted
                        factor = targets.probability_factor(classes, shifted.dtype)
                        dq.put(
                            (picked, classes), surprise * factor * upstream.loss.to(surprise.dtype)[:, None]
                        )
                    tile = tile._replace(z=ops.exp(shifted))
                    g = differentiate(problem, chunk, tile, rows, upstream)
                    accumulator.add(picked, loaded, classes, g)
            if problem.ranks is not None:
                accumulator.share(targets.pick(block), problem.ranks)
    return TileGradients(dq, None if q is None else q.dtype, accumulator)


class Workspace:
    """The one buffer of a sweep, cut into contiguous tiles: products write into it, nothing is allocated."""

    def __init__(
        self, problem: Problem, plan: Plan, *, slopes: bool, buffers: int = 1, slope_at: int = 1
    ) -> None:
        self.slopes = slopes
        self.slope_at = slope_at
        classes, logits = problem.targets.n_classes, problem.logits
        self.width = classes if plan.resident else min(plan.class_tile, classes)
        self.rows = plan.row_chunk
        self.resident = plan.resident
        self.buffered = problem.ops.buffered
        self.size = self.rows * self.width * (buffers + slopes)
        self.dtype, self.device = logits.dtype, logits.device
        self.buffer: Tensor | None = None  # made when the first tile needs it

    def tile(self, chunk: slice, classes: slice, number: int = 0) -> Tensor | None:
        """Return the memory of one tile; `number` tells apart those that are held at once."""
        if not self.buffered:
            return None
        if self.buffer is None:
            self.buffer = torch.empty(self.size, dtype=self.dtype, device=self.device)
        rows, width = chunk.stop - chunk.start, classes.stop - classes.start
        start = number * self.rows * self.width + (classes.start * self.rows if self.resident else 0)
        return self.buffer[start : start + rows * width].view(rows, width)

    def buffers(self, chunk: slice, classes: slice, place: Tensor | None = None) -> TileBuffers:
        """Return the memory of a tile and its slopes; `place` is memory of all classes that may serve."""
        slope = self.tile(chunk, classes, self.slope_at) if self.slopes else None
        return TileBuffers(self.tile(chunk, classes) if place is None else place, slope, self.slopes)


def chunk_statistics(
    problem: Problem,
    chunk: slice,
    loaded: Loaded,
    class_tiles: Sequence[slice],
    buffers: Callable[[slice], TileBuffers],  # of a tile
    *,
    keep: bool = False,
) -> tuple[Statistics, list[Tile]]:
    """Return the statistics of a chunk of rows over all classes; and the tiles, which hold exp(z − base)."""
    logits, targets, ops = problem.logits, problem.targets, problem.ops
    if len(class_tiles) == 1 and takes_whole_rows(problem):
        found, tile = row_tile(problem, chunk, loaded, buffers(class_tiles[0]))
        return found, [tile]
    union: PairwiseMerge[Statistics] = PairwiseMerge()
    own_z = None
    tiles = []
    absent = absent_logit(targets, chunk)
    for classes in class_tiles:
        z, slope = logits.tile(ops, loaded, classes, buffers(classes))
        own = target_columns(targets, chunk, classes)
        here = None
        if own is not None:
            here = own.take(z, absent).to(statistics_dtype(z.device))
            own_z = here if own_z is None or own.inside is None else torch.where(own.inside, here, own_z)
            z = own.put(ops, z, -torch.inf)
        t = targets.tile(chunk, classes, z.dtype)
        z, part = summarise(ops, z, t, own, problem.requested, problem.first + classes.start)
        union.add(part)
        if keep:
            tiles.append(Tile(classes, z, slope, loaded.map.gain, part.m, own, here))
    if not union.parts:  # a process that holds no class
        rows = chunk.stop - chunk.start
        return Statistics.identity(rows, logits.device, problem.requested, targets.n_own), tiles
    found = union.whole()
    if own_z is not None:
        mass = None if targets.index_mass is None else cut(targets.index_mass, chunk)
        assert targets.index is not None
        index = cut(targets.index, chunk) + problem.first
        own_part, others = target_statistics(ops, own_z, mass, index, problem.requested), found
        found = others.merge(own_part)
        if problem.requested.log_rest:
            found = replace(found, lse_own=own_part.logsumexp, lse_others=others.logsumexp)
        if problem.requested.log_prob:
            elsewhere = targets.elsewhere(chunk)
            own_z = own_z if elsewhere is None else own_z.masked_fill(elsewhere, 0.0)
            found = replace(found, own=own_z)
        if problem.requested.mass:
            assert mass is not None
            found = replace(found, mass=mass[:, 0])
    return found, tiles


def revisit(
    problem: Problem, workspace: Workspace, chunk: slice, loaded: Loaded, classes: slice, found: Statistics
) -> tuple[Tile, Tensor]:
    """Return a tile of rows whose statistics are known, and z − m, to which `exp` is still to be applied."""
    logits, targets, ops = problem.logits, problem.targets, problem.ops
    buffers = workspace.buffers(chunk, classes)
    z, slope = logits.tile(ops, loaded, classes, buffers, borrow=True)
    own = target_columns(targets, chunk, classes)
    own_z = None if own is None else own.take(z, 0.0).to(found.m.dtype)
    base = found.m
    if found.lse_others is not None:  # far below m where the own classes have all the probability
        base = finite_base(found.lse_others.to(z.dtype)).to(found.m.dtype)
    shifted = ops.difference(z, finite_base(base.to(z.dtype))[:, None], buffers.z)
    return Tile(classes, shifted, slope, loaded.map.gain, base, own, own_z), shifted


def target_total(problem: Problem) -> Accumulator:
    """Return the accumulator of ∂L/∂q."""
    q = problem.targets.probabilities
    assert q is not None
    return problem.ops.total(tuple(q.shape), q.dtype, q.device, dim=1)


def _concatenate(parts: list[Statistics], problem: Problem) -> Statistics:
    return (
        Statistics.concatenate(parts)
        if parts
        else Statistics.identity(0, problem.logits.device, problem.requested, problem.targets.n_own)
    )
