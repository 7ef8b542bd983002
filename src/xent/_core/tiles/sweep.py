"""Visit the tiles of rows × classes: row statistics, loss, and the gradient.

With row coefficients from what came after the row's outputs (γ = ∂L/∂ℓ, η = ∂L/∂H, λ = ∂L/∂log p_y):

    ∂L/∂z = p∘(α − η·(z − m − ē)) − γ·t + λ·e_y        α = a·γ + ∂L/∂lse − λ        ∂L/∂q = γ·(∂t/∂q)·(−log p)

with p = exp(z − m) / (1 + r) and ē = e/(1 + r). At the target's own class, where α·p, γ·t and λ may cancel,
each upstream gradient has a factor of its own, none of which does (`own_residual`):

    γ·(a·p_y − t_y) + ∂L/∂lse·p_y − λ·expm1(log p_y) − η·p_y·(z_y − m − ē)

`statistics` is one product a tile, `gradient` up to three more, and `fused` forms the gradient while the
probabilities are still in the workspace: three in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from xent._core.coefficients import Coefficients
from xent._core.collectives import ClassGroup
from xent._core.logits import GradientAccumulator, Logits, TileBuffers
from xent._core.matmul import fast_products
from xent._core.ops import BATCHED, Accumulator, InPlaceOps, TileOps, cut
from xent._core.statistics import (
    LOSS_ONLY,
    PairwiseMerge,
    RequestedOutputs,
    Statistics,
    TargetColumns,
    finite_base,
    statistics_dtype,
    summarise,
    summarise_row,
)
from xent._core.targets import Targets
from xent._core.tiles.plan import Footprint, Plan

LOG_HALF = -0.69


class Problem(NamedTuple):
    """Scores, targets, the bytes of working memory, which body of a tile to use, and what is asked for."""

    logits: Logits
    targets: Targets
    budget: int
    ops: TileOps = InPlaceOps()
    requested: RequestedOutputs = LOSS_ONLY
    ranks: ClassGroup | None = None  # the processes that hold the other classes

    @property
    def first(self) -> int:
        """The first class here, of all."""
        return 0 if self.ranks is None else self.ranks.first

    def completed(self, found: Statistics) -> Problem:
        """Return the problem with what its targets lack until the statistics of all classes are known."""
        self.check_sent()
        return self if self.ranks is None else self._replace(targets=self.targets.completed(found.a))

    def check_sent(self) -> None:
        """Processes send tensors, not what `vmap` makes of them."""
        if self.ranks is not None and not self.ops.buffered:
            raise NotImplementedError(BATCHED)

    def blocks(self) -> Iterator[slice]:
        """Rows whose part of a gradient is finished before that of others is begun."""
        rows, logits = self.targets.count, self.logits
        if self.ranks is None:
            return iter((slice(0, rows),))
        return self.ranks.blocks(rows, logits.depth * logits.dtype.itemsize)

    def plan(self, *, resident: bool, buffers: int = 1, temporaries: int = 0, least_rows: int = 1) -> Plan:
        """Tiles within the budget; `buffers` tile-sized tensors are held at once and `temporaries` come and
        go, `least_rows` divides the fewest rows for which it pays to keep a chunk's tiles."""
        logits, targets = self.logits, self.targets
        size = logits.dtype.itemsize
        footprint = Footprint(
            kept=size * (buffers + logits.transform.curved),
            scratch=size
            * (temporaries + 2 * self.requested.entropy)  # E log E, and its product with a number
            + self._of_dense_targets(size)
            + logits.bytes_per_logit,
            per_row=logits.bytes_per_row(targets.rows is not None),
            per_class=logits.bytes_per_class(),
            resident_rows=max(1, logits.least_resident_rows // least_rows),
        )
        if not self.ops.buffered:
            return Plan.of_all_rows(self.budget, targets.count, targets.classes, footprint)
        return Plan.within(self.budget, targets.count, targets.classes, footprint, resident=resident)

    def _of_dense_targets(self, size: int) -> int:
        """Bytes an element: a converted tile of t, its product with z, the booleans of a selection."""
        if not self.targets.dense:
            return 0
        return (3 if self.targets.probabilities is not None else 2) * size + 1

    def products(self) -> AbstractContextManager[None]:
        rows, classes = self.logits.shape
        return fast_products(self.logits.device, self.logits.dtype, rows * classes * self.logits.depth)


def statistics(problem: Problem) -> Statistics:
    """Row statistics of the M rows that take part, each (M,)."""
    problem.check_sent()
    plan = problem.plan(resident=False)
    workspace = Workspace(problem, plan, slopes=False)
    with problem.products():
        parts = [
            chunk_statistics(
                problem, plan, workspace, chunk, problem.logits.load(problem.targets.pick(chunk))
            )[0]
            for chunk in plan.row_chunks(problem.targets.count)
        ]
    found = _concatenate(parts, problem)
    return found if problem.ranks is None else problem.ranks.join(found)


def fused(
    problem: Problem, coefficients: Callable[[Statistics, slice], Coefficients], wants: tuple[bool, ...]
) -> tuple[Statistics, GradientAccumulator]:
    """Statistics and gradient in one sweep; `coefficients` is asked as each chunk's statistics are known."""
    assert problem.ranks is None  # whose statistics come after the last tile
    logits, targets, ops = problem.logits, problem.targets, problem.ops
    plan = problem.plan(resident=True)
    if not plan.resident:
        found = statistics(problem)
        return found, gradient(problem, found, coefficients(found, slice(None)), wants)[0]
    workspace = Workspace(problem, plan, slopes=logits.transform.curved)
    accumulator = logits.accumulator(ops, wants)
    parts = []
    with problem.products():
        for chunk in plan.row_chunks(targets.count):
            loaded = logits.load(targets.pick(chunk))
            found, tiles = chunk_statistics(problem, plan, workspace, chunk, loaded)
            parts.append(found)
            asked = coefficients(found, chunk)
            for tile in tiles:
                g = differentiate(problem, chunk, tile, found, asked)
                accumulator.add(targets.pick(chunk), loaded, tile.classes, g)
    return _concatenate(parts, problem), accumulator


def gradient(
    problem: Problem,
    found: Statistics,
    coefficients: Coefficients,
    wants: tuple[bool, ...],
    *,
    wants_target: bool = False,
) -> tuple[GradientAccumulator, Accumulator | None]:
    """Return the gradient from saved statistics; the logits are computed once more, classes outermost."""
    problem = problem.completed(found)
    logits, targets, ops = problem.logits, problem.targets, problem.ops
    plan = problem.plan(resident=False)
    workspace = Workspace(problem, plan, slopes=logits.transform.curved)
    accumulator = logits.accumulator(ops, wants)
    dq = target_total(problem) if wants_target else None
    with problem.products():
        for block in problem.blocks():
            for classes in plan.class_tiles(targets.classes):
                for chunk in plan.row_chunks(block.stop, block.start):
                    picked = targets.pick(chunk)
                    loaded = logits.load(picked)
                    rows = found.rows(chunk)
                    asked = coefficients.rows(chunk)
                    tile, shifted = revisit(problem, workspace, chunk, loaded, classes, rows)
                    if dq is not None:
                        # −log p, before exp overwrites the shifted logits
                        surprise = rows.log_partition.to(shifted.dtype)[:, None] - shifted
                        factor = targets.probability_factor(classes, shifted.dtype)
                        dq.put((picked, classes), surprise * factor * asked.loss.to(shifted.dtype)[:, None])
                    tile = tile._replace(z=ops.exp(shifted))
                    g = differentiate(problem, chunk, tile, rows, asked)
                    accumulator.add(picked, loaded, classes, g)
            if problem.ranks is not None:
                accumulator.share(targets.pick(block), problem.ranks)
    return accumulator, dq


class Tile(NamedTuple):
    classes: slice
    z: Tensor  # (R, T) exp(z − base)
    slope: Tensor | None  # (R, T)
    base: Tensor  # (R,) what was subtracted before exp
    own: TargetColumns | None
    own_z: Tensor | None  # (R, K) logits of the own classes, where this tile holds them


class Workspace:
    """The one buffer of a sweep, cut into contiguous tiles: products write into it, nothing is allocated."""

    def __init__(
        self, problem: Problem, plan: Plan, *, slopes: bool, buffers: int = 1, slope_at: int = 1
    ) -> None:
        self.slopes = slopes
        self.slope_at = slope_at
        self.width = (
            problem.targets.classes if plan.resident else min(plan.class_tile, problem.targets.classes)
        )
        self.rows = plan.row_chunk
        self.resident = plan.resident
        self.buffer = None
        if problem.ops.buffered:
            size = self.rows * self.width * (buffers + slopes)
            self.buffer = torch.empty(size, dtype=problem.logits.dtype, device=problem.logits.device)

    def tile(self, chunk: slice, classes: slice, number: int = 0) -> Tensor | None:
        """Room for one tile; `number` tells apart those that are held at once."""
        if self.buffer is None:
            return None
        rows, width = chunk.stop - chunk.start, classes.stop - classes.start
        start = number * self.rows * self.width + (classes.start * self.rows if self.resident else 0)
        return self.buffer[start : start + rows * width].view(rows, width)

    def buffers(self, chunk: slice, classes: slice) -> TileBuffers:
        slope = self.tile(chunk, classes, self.slope_at) if self.slopes else None
        return TileBuffers(self.tile(chunk, classes), slope, self.slopes)


def chunk_statistics(
    problem: Problem, plan: Plan, workspace: Workspace, chunk: slice, loaded: Tensor
) -> tuple[Statistics, list[Tile]]:
    """Statistics of a chunk of rows over all classes; the tiles hold exp(z − base) if the plan keeps them."""
    logits, targets, ops = problem.logits, problem.targets, problem.ops
    union: PairwiseMerge[Statistics] = PairwiseMerge()
    own_z = None
    tiles = []
    elsewhere = targets.elsewhere(chunk)
    absent = (
        torch.nan if elsewhere is None else torch.where(elsewhere, -torch.inf, torch.nan).to(logits.dtype)
    )
    for classes in plan.class_tiles(targets.classes):
        z, slope = logits.tile(ops, loaded, classes, workspace.buffers(chunk, classes))
        own = _target_columns(targets, chunk, classes)
        whole_row = classes == slice(0, targets.classes)
        simple = not targets.dense and not problem.requested.of_scores
        if own is not None and own.local.shape[1] == 1 and simple and whole_row:
            mass = None if targets.index_mass is None else cut(targets.index_mass, chunk)
            z, row_own_z, whole = summarise_row(ops, z, own, mass, absent)
            if problem.requested.mass:
                whole = replace(whole, mass=whole.a)
            return whole, [Tile(classes, z, slope, whole.m, own, row_own_z)]
        here = None
        if own is not None:
            here = own.take(z, absent).to(statistics_dtype(z.device))
            own_z = here if own_z is None or own.inside is None else torch.where(own.inside, here, own_z)
            z = own.put(ops, z, -torch.inf)
        t = targets.tile(chunk, classes, z.dtype)
        z, part = summarise(ops, z, t, own, problem.requested, problem.first + classes.start)
        union.add(part)
        if plan.resident:
            tiles.append(Tile(classes, z, slope, part.m, own, here))
    if not union.parts:  # a process that holds no class
        rows = chunk.stop - chunk.start
        return Statistics.identity(rows, logits.device, problem.requested), tiles
    found = union.whole()
    if own_z is not None:
        mass = None if targets.index_mass is None else cut(targets.index_mass, chunk)
        assert targets.own is not None
        index = cut(targets.own, chunk) + problem.first
        found = found.merge(_target_statistics(ops, own_z, mass, index, problem.requested))
        if problem.requested.log_prob:
            own_z = own_z if elsewhere is None else own_z.masked_fill(elsewhere, 0.0)
            found = replace(found, own=own_z[:, 0])
        if problem.requested.mass:
            assert mass is not None
            found = replace(found, mass=mass[:, 0])
    return found, tiles


def revisit(
    problem: Problem, workspace: Workspace, chunk: slice, loaded: Tensor, classes: slice, found: Statistics
) -> tuple[Tile, Tensor]:
    """Return a tile of rows whose statistics are known, and z − m, to which `exp` is still to be applied."""
    logits, targets, ops = problem.logits, problem.targets, problem.ops
    z, slope = logits.tile(ops, loaded, classes, workspace.buffers(chunk, classes))
    own = _target_columns(targets, chunk, classes)
    own_z = None if own is None else own.take(z, 0.0).to(found.m.dtype)
    shifted = ops.sub(z, finite_base(found.m.to(z.dtype))[:, None])
    return Tile(classes, shifted, slope, found.m, own, own_z), shifted


def differentiate(
    problem: Problem, chunk: slice, tile: Tile, found: Statistics, asked: Coefficients
) -> Tensor:
    """Return ∂L/∂u (R, T) of a tile, in the memory of its exponentials."""
    g = differentiate_logits(problem, chunk, tile, found, asked)
    return g if tile.slope is None else problem.ops.mul(g, tile.slope)


def differentiate_logits(
    problem: Problem, chunk: slice, tile: Tile, found: Statistics, asked: Coefficients
) -> Tensor:
    """Return gain·(α·p − γ·t) (R, T) of a tile."""
    targets, ops = problem.targets, problem.ops
    asked = asked.scaled(problem.logits.transform.gain)
    alpha, gamma, eta = asked.alpha(found.a), asked.loss, asked.entropy
    share, bent = alpha / (1 + found.r), None
    # what lies between the row's maximum and the one that was subtracted from this tile
    behind = None if tile.base is found.m else torch.where(tile.base == found.m, 0.0, tile.base - found.m)
    if eta is not None:
        mean = _mean_shift(found)
        share = (alpha + eta * (mean if behind is None else mean - behind)) / (1 + found.r)
        bent = torch.special.entr(tile.z)  # −E log E, E = exp(z − base)
    if behind is not None:
        near = torch.exp(behind)
        share = share * near
        if eta is not None:
            share, eta = torch.where(behind == -torch.inf, 0.0, share), eta * near
    dtype = tile.z.dtype
    g = ops.mul(tile.z, share.to(dtype)[:, None])
    if bent is not None:
        assert eta is not None
        g = ops.add(g, bent * (eta / (1 + found.r)).to(dtype)[:, None])
    t = targets.tile(chunk, tile.classes, dtype)
    if t is not None:
        g = ops.subtract_scaled(g, t, gamma.to(dtype)[:, None])
    if tile.own is not None:
        assert tile.own_z is not None
        log_p = found.log_prob(tile.own_z)
        at_own = gamma[:, None] * target_residual(targets, chunk, found.a, log_p)
        if asked.logsumexp is not None:
            at_own = at_own + asked.logsumexp[:, None] * torch.exp(log_p)
        if asked.log_prob is not None:
            at_own = at_own - asked.log_prob[:, None] * torch.expm1(log_p)
        if asked.entropy is not None:
            distance = _mean_shift(found)[:, None] - (tile.own_z - found.m[:, None])
            of_entropy = asked.entropy[:, None] * torch.exp(log_p) * distance
            at_own = at_own + torch.where(tile.own_z == -torch.inf, 0.0, of_entropy)
        g = tile.own.put(ops, g, at_own.to(dtype))
    return g


def target_residual(targets: Targets, chunk: slice, a: Tensor, log_p: Tensor) -> Tensor:
    """Return a·p_y − t_y at the own classes of a chunk, (R, K), from a (R,) and log p_y (R, K).

    Where p_y is near 1 the difference is a·expm1(log p_y) + (a − t_y), elsewhere what it says.
    """
    near = a[:, None] * torch.expm1(log_p)
    if targets.other_mass is None:  # t_y = a
        return near
    mass = 1.0 if targets.index_mass is None else cut(targets.index_mass, chunk)
    far = a[:, None] * torch.exp(log_p) - mass
    return torch.where(log_p < LOG_HALF, far, near + cut(targets.other_mass, chunk))


def _mean_shift(found: Statistics) -> Tensor:
    """Return ē = ⟨p, z − m⟩, (R,)."""
    assert found.e is not None
    return found.e / (1 + found.r)


def target_total(problem: Problem) -> Accumulator:
    """Return the accumulator of ∂L/∂q."""
    q = problem.targets.probabilities
    assert q is not None
    return problem.ops.total(tuple(q.shape), q.dtype, q.device, dim=1)


def _target_columns(targets: Targets, chunk: slice, classes: slice) -> TargetColumns | None:
    if targets.own is None:
        return None
    holds_all = targets.index_checked and classes == slice(0, targets.classes)
    return TargetColumns.locate(cut(targets.own, chunk), classes, holds_all=holds_all)


def _target_statistics(
    ops: TileOps, z: Tensor, mass: Tensor | None, index: Tensor, requested: RequestedOutputs
) -> Statistics:
    """Return the statistics of the target's own tile, z, mass, index (R, K); of one class r = d = e = 0."""
    if z.shape[1] > 1:
        assert mass is not None
        part = summarise(ops, z.clone(), mass, None, requested)[1]
        if part.k is None:
            return part
        top = torch.where(z == part.m[:, None], index, torch.iinfo(index.dtype).max)
        return replace(part, k=torch.minimum(top.amin(1), index.gather(1, part.k[:, None])[:, 0]))
    z = z[:, 0]
    zero = torch.zeros_like(z)
    return Statistics(
        m=z,
        r=torch.where(z == -torch.inf, -1.0, zero),
        d=zero,
        a=torch.ones_like(z) if mass is None else mass[:, 0],
        e=zero if requested.entropy else None,
        k=index[:, 0] if requested.argmax else None,
    )


def _concatenate(parts: list[Statistics], problem: Problem) -> Statistics:
    return (
        Statistics.concatenate(parts)
        if parts
        else Statistics.identity(0, problem.logits.device, problem.requested)
    )
