"""Visit the tiles of rows × classes: row statistics, loss, and the gradient.

`statistics` is one product a tile, `gradient` up to three more, and `fused` forms the gradient while the
probabilities are still in the workspace: three in all. What is computed in a tile is that of a `TileBody`.
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
from xent._core.problem import Problem
from xent._core.statistics import PairwiseMerge, Statistics
from xent._core.tiles.body import TORCH, TileBody, revisit
from xent._core.tiles.formulas import Tile, absent_logit, target_statistics
from xent._core.tiles.workspace import Workspace

__all__ = ["TileGradients", "Workspace", "fused", "gradient", "revisit", "statistics"]


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


def statistics(problem: Problem, body: TileBody = TORCH) -> Statistics:
    """Return the row statistics of the M rows that count, each (M,)."""
    problem.check_sent()
    plan = problem.plan(resident=False)
    workspace = Workspace(problem, plan, slopes=False)
    logits, targets = problem.logits, problem.targets
    tiles = list(plan.class_tiles(targets.n_classes))
    with problem.products():
        parts = [
            chunk_statistics(
                problem,
                chunk,
                logits.load(targets.pick(chunk)),
                tiles,
                partial(workspace.buffers, chunk),
                body,
            )[0]
            for chunk in plan.row_chunks(targets.count)
        ]
    found = _concatenate(parts, problem)
    return found if problem.ranks is None else problem.ranks.join(found)


def fused(
    problem: Problem,
    coefficients: Callable[[Statistics, slice], Coefficients],
    wants: tuple[bool, ...],
    body: TileBody = TORCH,
) -> tuple[Statistics, TileGradients]:
    """Return statistics and gradient of one sweep; `coefficients` are called for as each chunk is known."""
    assert problem.ranks is None  # whose statistics come after the last tile
    logits, targets, ops = problem.logits, problem.targets, problem.ops
    plan = problem.plan(resident=True)
    if not plan.resident:
        found = statistics(problem, body)
        return found, gradient(problem, found, coefficients(found, slice(0, targets.count)), wants, body)
    workspace = Workspace(problem, plan, slopes=logits.map.curved)
    accumulator = logits.accumulator(ops, wants[1:])
    parts, class_tiles = [], list(plan.class_tiles(targets.n_classes))
    with problem.products():
        for chunk in plan.row_chunks(targets.count):
            picked = targets.pick(chunk)
            loaded = logits.load(picked)
            place = accumulator.place(picked) if len(class_tiles) == 1 else None
            buffers = partial(workspace.buffers, chunk, place=place)
            found, tiles = chunk_statistics(problem, chunk, loaded, class_tiles, buffers, body, keep=True)
            parts.append(found)
            upstream = coefficients(found, chunk)
            for tile in tiles:
                slopes = body.differentiate(problem, chunk, loaded, tile, found, upstream)
                accumulator.add(picked, loaded, tile.classes, *slopes)
    return _concatenate(parts, problem), TileGradients(None, None, accumulator)


def gradient(
    problem: Problem,
    found: Statistics,
    coefficients: Coefficients,
    wants: tuple[bool, ...],  # of probabilities, then of the logits' tensors
    body: TileBody = TORCH,
) -> TileGradients:
    """Return the gradient from saved statistics; the logits are computed once more, classes outermost."""
    problem = problem.completed(found)
    logits, targets = problem.logits, problem.targets
    plan = problem.plan(resident=False)
    workspace = Workspace(problem, plan, slopes=logits.map.curved)
    accumulator = logits.accumulator(problem.ops, wants[1:])
    q = targets.probabilities
    dq = target_total(problem) if wants[0] else None
    with problem.products():
        for block in problem.blocks():
            for classes in plan.class_tiles(targets.n_classes):
                for chunk in plan.row_chunks(block.stop, block.start):
                    picked = targets.pick(chunk)
                    loaded = logits.load(picked)
                    rows = found.rows(chunk)
                    buffers = workspace.buffers(chunk, classes)
                    of_q = None if dq is None else partial(dq.put, (picked, classes))
                    slopes = body.revisit(
                        problem, buffers, chunk, loaded, classes, rows, coefficients.rows(chunk), of_q
                    )
                    accumulator.add(picked, loaded, classes, *slopes)
            if problem.ranks is not None:
                accumulator.share(targets.pick(block), problem.ranks)
    return TileGradients(dq, None if q is None else q.dtype, accumulator)


def chunk_statistics(
    problem: Problem,
    chunk: slice,
    loaded: Loaded,
    class_tiles: Sequence[slice],
    buffers: Callable[[slice], TileBuffers],  # of a tile
    body: TileBody = TORCH,
    *,
    keep: bool = False,
) -> tuple[Statistics, list[Tile]]:
    """Return the statistics of a chunk of rows over all classes; and its tiles, if they are kept."""
    logits, targets, ops = problem.logits, problem.targets, problem.ops
    if len(class_tiles) == 1:
        whole = body.whole_rows(problem, chunk, loaded, buffers(class_tiles[0]))
        if whole is not None:
            return whole[0], [whole[1]]
    union: PairwiseMerge[Statistics] = PairwiseMerge()
    own_z = None
    tiles = []
    absent = absent_logit(targets, chunk)
    for classes in class_tiles:
        part, tile = body.summarise(problem, chunk, loaded, classes, buffers(classes), absent)
        own, here = tile.own, tile.own_z
        if own is not None and here is not None:
            own_z = here if own_z is None or own.inside is None else torch.where(own.inside, here, own_z)
        union.add(part)
        if keep:
            tiles.append(tile)
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
