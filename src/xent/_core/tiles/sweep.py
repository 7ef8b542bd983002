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
from xent._core.collectives import Ranks
from xent._core.logits import Room, Scores, Sink
from xent._core.matmul import fast_products
from xent._core.ops import BATCHED, Arithmetic, InPlace, Total, cut
from xent._core.statistics import (
    LOSS_ALONE,
    Extras,
    OwnColumns,
    RunningUnion,
    Statistics,
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

    scores: Scores
    targets: Targets
    budget: int
    arithmetic: Arithmetic = InPlace()
    extras: Extras = LOSS_ALONE
    ranks: Ranks | None = None  # the processes that hold the other classes

    @property
    def first(self) -> int:
        """The first class here, of all."""
        return 0 if self.ranks is None else self.ranks.first

    def completed(self, found: Statistics) -> Problem:
        """With what the targets lack until the statistics of all classes are known."""
        self.check_sent()
        return self if self.ranks is None else self._replace(targets=self.targets.completed(found.a))

    def check_sent(self) -> None:
        """Processes send tensors, not what `vmap` makes of them."""
        if self.ranks is not None and not self.arithmetic.buffered:
            raise NotImplementedError(BATCHED)

    def blocks(self) -> Iterator[slice]:
        """Rows whose part of a gradient is finished before that of others is begun."""
        rows, scores = self.targets.count, self.scores
        if self.ranks is None:
            return iter((slice(0, rows),))
        return self.ranks.blocks(rows, scores.depth * scores.dtype.itemsize)

    def plan(self, *, resident: bool, buffers: int = 1, temporaries: int = 0, least_rows: int = 1) -> Plan:
        """Tiles within the budget; `buffers` tile-sized tensors are held at once and `temporaries` come and
        go, `least_rows` divides the fewest rows for which it pays to keep a chunk's tiles."""
        scores, targets = self.scores, self.targets
        size = scores.dtype.itemsize
        footprint = Footprint(
            kept=size * (buffers + scores.transform.curved),
            scratch=size * (temporaries + 2 * self.extras.entropy)  # E log E, and its product with a number
            + self._of_dense_targets(size)
            + scores.bytes_per_logit,
            per_row=scores.bytes_per_row(targets.rows is not None),
            per_class=scores.bytes_per_class(),
            resident_rows=max(1, scores.least_resident_rows // least_rows),
        )
        if not self.arithmetic.buffered:
            return Plan.of_all_rows(self.budget, targets.count, targets.classes, footprint)
        return Plan.within(self.budget, targets.count, targets.classes, footprint, resident=resident)

    def _of_dense_targets(self, size: int) -> int:
        """Bytes an element: a converted tile of t, its product with z, the booleans of a selection."""
        if not self.targets.dense:
            return 0
        return (3 if self.targets.probabilities is not None else 2) * size + 1

    def products(self) -> AbstractContextManager[None]:
        rows, classes = self.scores.shape
        return fast_products(self.scores.device, self.scores.dtype, rows * classes * self.scores.depth)


def statistics(problem: Problem) -> Statistics:
    """Row statistics of the M rows that take part, each (M,)."""
    problem.check_sent()
    plan = problem.plan(resident=False)
    workspace = Workspace(problem, plan, slopes=False)
    with problem.products():
        parts = [
            chunk_statistics(
                problem, plan, workspace, chunk, problem.scores.load(problem.targets.pick(chunk))
            )[0]
            for chunk in plan.row_chunks(problem.targets.count)
        ]
    found = _concatenate(parts, problem)
    return found if problem.ranks is None else problem.ranks.join(found)


def fused(
    problem: Problem, coefficients: Callable[[Statistics, slice], Coefficients], wants: tuple[bool, ...]
) -> tuple[Statistics, Sink]:
    """Statistics and gradient in one sweep; `coefficients` is asked as each chunk's statistics are known."""
    assert problem.ranks is None  # whose statistics come after the last tile
    scores, targets, o = problem.scores, problem.targets, problem.arithmetic
    plan = problem.plan(resident=True)
    if not plan.resident:
        found = statistics(problem)
        return found, gradient(problem, found, coefficients(found, slice(None)), wants)[0]
    workspace = Workspace(problem, plan, slopes=scores.transform.curved)
    sink = scores.sink(o, wants)
    parts = []
    with problem.products():
        for chunk in plan.row_chunks(targets.count):
            loaded = scores.load(targets.pick(chunk))
            found, tiles = chunk_statistics(problem, plan, workspace, chunk, loaded)
            parts.append(found)
            asked = coefficients(found, chunk)
            for tile in tiles:
                g = differentiate(problem, chunk, tile, found, asked)
                sink.add(targets.pick(chunk), loaded, tile.classes, g)
    return _concatenate(parts, problem), sink


def gradient(
    problem: Problem,
    found: Statistics,
    coefficients: Coefficients,
    wants: tuple[bool, ...],
    *,
    wants_target: bool = False,
) -> tuple[Sink, Total | None]:
    """The gradient from saved statistics: the logits are computed once more, classes outermost."""
    problem = problem.completed(found)
    scores, targets, o = problem.scores, problem.targets, problem.arithmetic
    plan = problem.plan(resident=False)
    workspace = Workspace(problem, plan, slopes=scores.transform.curved)
    sink = scores.sink(o, wants)
    dq = target_total(problem) if wants_target else None
    with problem.products():
        for block in problem.blocks():
            for classes in plan.class_tiles(targets.classes):
                for chunk in plan.row_chunks(block.stop, block.start):
                    picked = targets.pick(chunk)
                    loaded = scores.load(picked)
                    rows = found.rows(chunk)
                    asked = coefficients.rows(chunk)
                    tile, shifted = revisit(problem, workspace, chunk, loaded, classes, rows)
                    if dq is not None:
                        # −log p, before exp overwrites the shifted logits
                        surprise = rows.log_partition.to(shifted.dtype)[:, None] - shifted
                        factor = targets.probability_factor(classes, shifted.dtype)
                        dq.put((picked, classes), surprise * factor * asked.loss.to(shifted.dtype)[:, None])
                    tile = tile._replace(z=o.exp(shifted))
                    g = differentiate(problem, chunk, tile, rows, asked)
                    sink.add(picked, loaded, classes, g)
            if problem.ranks is not None:
                sink.share(targets.pick(block), problem.ranks)
    return sink, dq


class Tile(NamedTuple):
    classes: slice
    z: Tensor  # (R, T) exp(z − base)
    slope: Tensor | None  # (R, T)
    base: Tensor  # (R,) what was subtracted before exp
    own: OwnColumns | None
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
        if problem.arithmetic.buffered:
            size = self.rows * self.width * (buffers + slopes)
            self.buffer = torch.empty(size, dtype=problem.scores.dtype, device=problem.scores.device)

    def tile(self, chunk: slice, classes: slice, number: int = 0) -> Tensor | None:
        """Room for one tile; `number` tells apart those that are held at once."""
        if self.buffer is None:
            return None
        rows, width = chunk.stop - chunk.start, classes.stop - classes.start
        start = number * self.rows * self.width + (classes.start * self.rows if self.resident else 0)
        return self.buffer[start : start + rows * width].view(rows, width)

    def room(self, chunk: slice, classes: slice) -> Room:
        slope = self.tile(chunk, classes, self.slope_at) if self.slopes else None
        return Room(self.tile(chunk, classes), slope, self.slopes)


def chunk_statistics(
    problem: Problem, plan: Plan, workspace: Workspace, chunk: slice, loaded: Tensor
) -> tuple[Statistics, list[Tile]]:
    """Statistics of a chunk of rows over all classes; the tiles hold exp(z − base) if the plan keeps them."""
    scores, targets, o = problem.scores, problem.targets, problem.arithmetic
    union: RunningUnion[Statistics] = RunningUnion()
    own_z = None
    tiles = []
    elsewhere = targets.elsewhere(chunk)
    absent = (
        torch.nan if elsewhere is None else torch.where(elsewhere, -torch.inf, torch.nan).to(scores.dtype)
    )
    for classes in plan.class_tiles(targets.classes):
        z, slope = scores.tile(o, loaded, classes, workspace.room(chunk, classes))
        own = _own_columns(targets, chunk, classes)
        whole_row = classes == slice(0, targets.classes)
        simple = not targets.dense and not problem.extras.of_scores
        if own is not None and own.local.shape[1] == 1 and simple and whole_row:
            mass = None if targets.own_mass is None else cut(targets.own_mass, chunk)
            z, row_own_z, whole = summarise_row(o, z, own, mass, absent)
            if problem.extras.mass:
                whole = replace(whole, mass=whole.a)
            return whole, [Tile(classes, z, slope, whole.m, own, row_own_z)]
        here = None
        if own is not None:
            here = own.take(z, absent).to(statistics_dtype(z.device))
            own_z = here if own_z is None or own.inside is None else torch.where(own.inside, here, own_z)
            z = own.put(o, z, -torch.inf)
        t = targets.tile(chunk, classes, z.dtype)
        z, part = summarise(o, z, t, own, problem.extras, problem.first + classes.start)
        union.add(part)
        if plan.resident:
            tiles.append(Tile(classes, z, slope, part.m, own, here))
    if not union.parts:  # a process that holds no class
        rows = chunk.stop - chunk.start
        return Statistics.identity(rows, scores.device, problem.extras), tiles
    found = union.whole()
    if own_z is not None:
        mass = None if targets.own_mass is None else cut(targets.own_mass, chunk)
        assert targets.own is not None
        index = cut(targets.own, chunk) + problem.first
        found = found.merge(_own_statistics(o, own_z, mass, index, problem.extras))
        if problem.extras.log_prob:
            own_z = own_z if elsewhere is None else own_z.masked_fill(elsewhere, 0.0)
            found = replace(found, own=own_z[:, 0])
        if problem.extras.mass:
            assert mass is not None
            found = replace(found, mass=mass[:, 0])
    return found, tiles


def revisit(
    problem: Problem, workspace: Workspace, chunk: slice, loaded: Tensor, classes: slice, found: Statistics
) -> tuple[Tile, Tensor]:
    """A tile of rows whose statistics are known, and z − m, whose exponential the tile still wants."""
    scores, targets, o = problem.scores, problem.targets, problem.arithmetic
    z, slope = scores.tile(o, loaded, classes, workspace.room(chunk, classes))
    own = _own_columns(targets, chunk, classes)
    own_z = None if own is None else own.take(z, 0.0).to(found.m.dtype)
    shifted = o.sub(z, finite_base(found.m.to(z.dtype))[:, None])
    return Tile(classes, shifted, slope, found.m, own, own_z), shifted


def differentiate(
    problem: Problem, chunk: slice, tile: Tile, found: Statistics, asked: Coefficients
) -> Tensor:
    """∂L/∂u (R, T) of a tile, in the place of its exponentials."""
    g = differentiate_logits(problem, chunk, tile, found, asked)
    return g if tile.slope is None else problem.arithmetic.mul(g, tile.slope)


def differentiate_logits(
    problem: Problem, chunk: slice, tile: Tile, found: Statistics, asked: Coefficients
) -> Tensor:
    """gain·(α·p − γ·t) (R, T) of a tile."""
    targets, o = problem.targets, problem.arithmetic
    asked = asked.scaled(problem.scores.transform.gain)
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
    g = o.mul(tile.z, share.to(dtype)[:, None])
    if bent is not None:
        assert eta is not None
        g = o.add(g, bent * (eta / (1 + found.r)).to(dtype)[:, None])
    t = targets.tile(chunk, tile.classes, dtype)
    if t is not None:
        g = o.subtract_scaled(g, t, gamma.to(dtype)[:, None])
    if tile.own is not None:
        assert tile.own_z is not None
        log_p = found.log_prob(tile.own_z)
        at_own = gamma[:, None] * own_residual(targets, chunk, found.a, log_p)
        if asked.logsumexp is not None:
            at_own = at_own + asked.logsumexp[:, None] * torch.exp(log_p)
        if asked.log_prob is not None:
            at_own = at_own - asked.log_prob[:, None] * torch.expm1(log_p)
        if asked.entropy is not None:
            distance = _mean_shift(found)[:, None] - (tile.own_z - found.m[:, None])
            of_entropy = asked.entropy[:, None] * torch.exp(log_p) * distance
            at_own = at_own + torch.where(tile.own_z == -torch.inf, 0.0, of_entropy)
        g = tile.own.put(o, g, at_own.to(dtype))
    return g


def own_residual(targets: Targets, chunk: slice, a: Tensor, log_p: Tensor) -> Tensor:
    """Return a·p_y − t_y at the own classes of a chunk, (R, K), from a (R,) and log p_y (R, K).

    Where p_y is near 1 the difference is a·expm1(log p_y) + (a − t_y), elsewhere what it says.
    """
    near = a[:, None] * torch.expm1(log_p)
    if targets.own_rest is None:  # t_y = a
        return near
    mass = 1.0 if targets.own_mass is None else cut(targets.own_mass, chunk)
    far = a[:, None] * torch.exp(log_p) - mass
    return torch.where(log_p < LOG_HALF, far, near + cut(targets.own_rest, chunk))


def _mean_shift(found: Statistics) -> Tensor:
    """ē = ⟨p, z − m⟩, (R,)."""
    assert found.e is not None
    return found.e / (1 + found.r)


def target_total(problem: Problem) -> Total:
    """Where ∂L/∂q is collected."""
    q = problem.targets.probabilities
    assert q is not None
    return problem.arithmetic.total(tuple(q.shape), q.dtype, q.device, dim=1)


def _own_columns(targets: Targets, chunk: slice, classes: slice) -> OwnColumns | None:
    if targets.own is None:
        return None
    holds_all = targets.own_known and classes == slice(0, targets.classes)
    return OwnColumns.locate(cut(targets.own, chunk), classes, holds_all=holds_all)


def _own_statistics(
    o: Arithmetic, z: Tensor, mass: Tensor | None, index: Tensor, extras: Extras
) -> Statistics:
    """The own tile's statistics, z, mass and index (R, K); of one class r = 0, d = 0 and e = 0."""
    if z.shape[1] > 1:
        assert mass is not None
        part = summarise(o, z.clone(), mass, None, extras)[1]
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
        e=zero if extras.entropy else None,
        k=index[:, 0] if extras.argmax else None,
    )


def _concatenate(parts: list[Statistics], problem: Problem) -> Statistics:
    return (
        Statistics.concatenate(parts)
        if parts
        else Statistics.identity(0, problem.scores.device, problem.extras)
    )
