"""A divergence of two linear heads over the same classes, tile by tile; neither's logits are kept.

    statistics of both heads → moments, sums over the classes → value, and slopes of each head's logits

Row statistics of both heads are one product each a tile; moments and slopes come from log p and log t
(`divergences`), kept where the budget holds all classes of a chunk of rows for both heads, computed again
where it does not. The student's slope of KL needs no moment, so that a frozen teacher costs two products less
where tiles are not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from xent._core.logit_map import LogitMap, TileBuffers
from xent._core.logits import GradientAccumulator, LinearHead, Loaded
from xent._core.ops import TileOps, any_batched, tile_ops
from xent._core.plan import Footprint, Plan
from xent._core.problem import Problem
from xent._core.record import record
from xent._core.selection import Selection
from xent._core.statistics import PairwiseMerge, Statistics, finite_base, statistics_dtype, summarise
from xent._core.targets import no_targets
from xent._core.tiles.divergences import Divergence, divergence, terms
from xent._core.tiles.sweep import Workspace

PIECE = 1 << 16  # elements of a tile at a time: what is made on the way stays in the cache
TEMPORARIES = 12  # tensors of a piece that are alive at once

Wants: TypeAlias = tuple[bool, ...]  # of a head's leaves
Tile: TypeAlias = tuple[Tensor, Tensor]  # (R, T) of the student and of the teacher
Both: TypeAlias = tuple[Loaded, Loaded]  # a chunk of rows of both


@record
class Pair:
    """A student and a teacher over the same rows and classes; both have the same temperature."""

    student: LinearHead
    teacher: LinearHead
    selection: Selection
    budget: int
    batched: bool = False  # whether vmap has batched a tensor
    beta: float = 0.0  # which divergence

    @property
    def divergence(self) -> Divergence:
        return divergence(self.beta)

    @property
    def ops(self) -> TileOps:
        return tile_ops(batched=self.batched)

    @property
    def heads(self) -> tuple[LinearHead, LinearHead]:
        return self.student, self.teacher

    @property
    def n_classes(self) -> int:
        return self.student.shape[1]

    def problem(self, head: LinearHead) -> Problem:
        """Return the problem of one of the heads, for what a head alone decides."""
        return Problem(head, no_targets(self.n_classes, self.selection), self.budget, batched=self.batched)

    def gains(self, chunk: slice) -> tuple[float | Tensor, float | Tensor]:
        """Return dz/du ÷ the slope of a softcap, of both heads, a number or (R,)."""
        picked = self.selection.pick(chunk)
        return self.student.map.rows(picked).gain, self.teacher.map.rows(picked).gain

    def curves(self, chunk: slice, found: Found) -> tuple[Tensor, ...]:
        """Return lse and T/k (R,) of each head with a softcap k: τ = tanh(κu/k) = (log p + lse)·T/k."""
        columns: list[Tensor] = []
        for head, part in zip(self.heads, (found.student, found.teacher), strict=True):
            if head.map.softcap is not None:
                t = head.map.rows(self.selection.pick(chunk)).temperature
                columns += part.logsumexp, torch.ones_like(part.m) * t / head.map.softcap
        return tuple(columns)

    def taus(self, logs: Tile, curves: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
        """Return τ (R, T) of both heads, None where there is no softcap."""
        columns = iter(curves)
        student, teacher = (
            (log + next(columns)) * next(columns) if head.map.curved else None
            for head, log in zip(self.heads, logs, strict=True)
        )
        return student, teacher

    def resolved(self) -> Pair:
        """Return the pair with its rows selected by index, for code that may look at data."""
        return replace(self, selection=self.selection.resolved())

    def flatten(self) -> tuple[PairForm, tuple[Tensor | None, ...]]:
        """Return the pair as a form and tensors, the leaves first."""
        temperature = self.student.map.temperature
        each = temperature if isinstance(temperature, Tensor) else None
        form = PairForm(
            self.student.product_dtype,
            self.teacher.product_dtype,
            1.0 if isinstance(temperature, Tensor) else temperature,
            (self.student.map.scale, self.teacher.map.scale),
            (self.student.map.softcap, self.teacher.map.softcap),
            self.budget,
            self.beta,
            len(self.student.leaves),
            len(self.teacher.leaves),
        )
        rest = (each, self.selection.index, self.selection.mask)
        return form, (*self.student.leaves, *self.teacher.leaves, *rest)

    @property
    def piece(self) -> int:
        """Elements of a tile that are worked on at a time, within a quarter of the budget."""
        fits = max(1, self.budget // (4 * TEMPORARIES * self.student.dtype.itemsize))
        return min(PIECE, fits) if self.student.device.type == "cpu" else fits

    def plan(self, *, resident: bool, buffers: int = 2, least_rows: int = 1) -> Plan:
        """Return tiles within the budget; `buffers` of their size are held at once."""
        size = self.student.dtype.itemsize
        gathered = self.selection.index is not None
        footprint = Footprint(
            kept=size * buffers,
            # a copy that becomes exp(z − m), with booleans where a row is wholly masked
            scratch=2 * size + 1 + max(head.bytes_per_logit for head in self.heads),
            per_row=sum(head.bytes_per_row(gathered) for head in self.heads),
            per_class=max(head.bytes_per_class() for head in self.heads),
            resident_rows=max(1, self.student.least_resident_rows // least_rows),
            fixed=TEMPORARIES * size * self.piece,
        )
        if not self.ops.buffered:
            return Plan.of_all_rows(self.budget, self.selection.count, self.n_classes, footprint)
        return Plan.within(self.budget, self.selection.count, self.n_classes, footprint, resident=resident)

    @contextmanager
    def products(self) -> Iterator[None]:
        with ExitStack() as stack:
            for head in self.heads:
                stack.enter_context(self.problem(head).products())
            yield

    def load(self, chunk: slice) -> Both:
        """Load the features of both heads, in the types of their products."""
        picked = self.selection.pick(chunk)
        return self.student.load(picked), self.teacher.load(picked)

    def workspace(self, plan: Plan, buffers: int = 2) -> Workspace:
        return Workspace(self.problem(self.student), plan, slopes=False, buffers=buffers)

    def tile(self, workspace: Workspace, chunk: slice, loaded: Both, classes: slice) -> Tile:
        """Compute the logits of both heads over some classes."""
        student, teacher = (
            head.tile(self.ops, x, classes, TileBuffers(workspace.tile(chunk, classes, number), None, False))[
                0
            ]
            for number, (head, x) in enumerate(zip(self.heads, loaded, strict=True))
        )
        return student, teacher

    def accumulators(self, wants: tuple[Wants, Wants]) -> PairGradients:
        return PairGradients(
            self.student.accumulator(self.ops, wants[0]), self.teacher.accumulator(self.ops, wants[1])
        )


@record
class PairForm:
    """Everything of a pair that is no tensor."""

    product_dtype: torch.dtype | None
    teacher_product_dtype: torch.dtype | None
    temperature: float  # 1 where each row has its own
    scales: tuple[float, float]
    softcaps: tuple[float | None, float | None]
    budget: int
    beta: float = 0.0
    student_leaves: int = 3  # which say whether a head has a low-rank term
    teacher_leaves: int = 3

    @property
    def n_leaves(self) -> int:
        return self.student_leaves + self.teacher_leaves

    def bind(self, tensors: tuple[Tensor | None, ...], *others: Tensor | None) -> Pair:
        """Return the pair made of the tensors; `others` are further ones that `vmap` may have batched."""
        of_student, of_teacher = tensors[: self.student_leaves], tensors[self.student_leaves : self.n_leaves]
        each, index, mask = tensors[self.n_leaves :]
        of_logits, of_teacher_logits = (
            LogitMap(softcap, self.temperature if each is None else each, scale=scale)
            for softcap, scale in zip(self.softcaps, self.scales, strict=True)
        )
        student = _head(of_student, of_logits, self.product_dtype)
        return Pair(
            student,
            _head(of_teacher, of_teacher_logits, self.teacher_product_dtype),
            Selection(student.shape[0], index, mask),
            self.budget,
            any_batched(*tensors, *others),
            self.beta,
        )


def _head(
    leaves: tuple[Tensor | None, ...], of_logits: LogitMap, product_dtype: torch.dtype | None
) -> LinearHead:
    x, w, b, *low_rank = leaves
    assert x is not None
    assert w is not None
    return LinearHead(x, w, b, of_logits, product_dtype, *low_rank)


class PairGradients(NamedTuple):
    """The gradients of both heads in the making."""

    student: GradientAccumulator
    teacher: GradientAccumulator

    def finish(self, scale: Tensor | None) -> tuple[Tensor | None, ...]:
        return *self.student.finish(scale), *self.teacher.finish(scale)


class Found(NamedTuple):
    """The statistics of both heads and the moments of M rows."""

    student: Statistics
    teacher: Statistics
    moments: tuple[Tensor, ...]  # (M,) each

    def rows(self, chunk: slice) -> Found:
        moments = tuple(moment[chunk] for moment in self.moments)
        return Found(self.student.rows(chunk), self.teacher.rows(chunk), moments)

    @staticmethod
    def concatenate(parts: list[Found], pair: Pair) -> Found:
        if not parts:
            nothing = Statistics.identity(0, pair.student.device)
            return Found(nothing, nothing, (nothing.m,) * pair.divergence.n_moments)
        student, teacher, moments = zip(*parts, strict=True)
        whole = tuple(torch.cat(each) for each in zip(*moments, strict=True))
        return Found(Statistics.concatenate(student), Statistics.concatenate(teacher), whole)


def values(pair: Pair) -> Found:
    """Return the moments of each row, and the statistics of both heads: two products a tile, or four."""
    return _values(pair, pair.plan(resident=True))


def _values(pair: Pair, plan: Plan, *, statistics_alone: bool = False, estimate: bool = False) -> Found:
    workspace = pair.workspace(plan)
    parts = []
    with pair.products():
        for chunk in plan.row_chunks(pair.selection.count):
            loaded = pair.load(chunk)
            found, kept = _chunk_statistics(pair, plan, workspace, chunk, loaded, estimate=estimate)
            if not statistics_alone:
                found = _chunk_values(pair, plan, workspace, chunk, loaded, found, kept)
            parts.append(found)
    return Found.concatenate(parts, pair)


def fused(
    pair: Pair, coefficients: Callable[[slice], Tensor], wants: tuple[Wants, Wants]
) -> tuple[Found, PairGradients]:
    """Return moments and gradients of one sweep; `coefficients` gives γ = ∂L/∂D (R,) of a chunk of rows."""
    plan = pair.plan(resident=True)
    # a slope may start from the row's moments; where none does, the moments come by the way
    frozen = pair.divergence.alone and not any(wants[1])
    if not plan.resident:
        estimated = pair.divergence.n_moments == 1 and not frozen
        found = _values(pair, plan, statistics_alone=frozen or estimated, estimate=estimated)
        gamma = coefficients(slice(0, pair.selection.count))
        return gradient(pair, found, gamma, wants, estimated=estimated)
    workspace = pair.workspace(plan)
    accumulators = pair.accumulators(wants)
    parts = []
    with pair.products():
        for chunk in plan.row_chunks(pair.selection.count):
            loaded = pair.load(chunk)
            found, kept = _chunk_statistics(pair, plan, workspace, chunk, loaded)
            if not frozen and any(wants[0]) != any(wants[1]):
                parts.append(
                    _one_learner(pair, accumulators, wants, chunk, loaded, found, kept, coefficients)
                )
                continue
            if not frozen:
                found = _chunk_values(pair, plan, workspace, chunk, loaded, found, kept)
            gamma, moments = coefficients(chunk), found.moments
            for classes, logs in kept:
                here = _pull_back(
                    pair,
                    accumulators,
                    wants,
                    chunk,
                    loaded,
                    classes,
                    logs,
                    found,
                    gamma,
                    formed=frozen,
                )
                moments = moments if here is None else (moments[0] + here,)
            parts.append(found._replace(moments=moments))
    return Found.concatenate(parts, pair), accumulators


def _one_learner(
    pair: Pair,
    accumulators: PairGradients,
    wants: tuple[Wants, Wants],
    chunk: slice,
    loaded: Both,
    found: Found,
    kept: list[tuple[slice, Tile]],
    coefficients: Callable[[slice], Tensor],
) -> Found:
    """Return the chunk with its moments; add the gradient of the one head that learns.

    Its slope f − μ·g is formed in two steps, f and g in the memory of log p and log t with the moments, so
    that no logarithm is formed twice.
    """
    student = any(wants[0])
    own = 0 if student else 1

    def apart(log_p: Tensor, log_t: Tensor, *curves: Tensor) -> tuple[Tensor, ...]:
        tau = pair.taus((log_p, log_t), curves)[own]
        f, g, *sums = pair.divergence.apart(log_p, log_t, student=student)
        return curved(f, tau), curved(g, tau), *sums

    moments, halves, curves = found.moments, [], pair.curves(chunk, found)
    for classes, logs in kept:
        pieces, here = over(pair, apart, logs, curves, places=2)
        halves.append((classes, pieces))
        moments = tuple(total + part for total, part in zip(moments, here, strict=True))
    gamma, mu = coefficients(chunk) * pair.gains(chunk)[own], moments[0 if student else -1]

    def joined(f: Tensor, g: Tensor, mu: Tensor, gamma: Tensor) -> tuple[Tensor, ...]:
        return ((f - mu * g) * gamma,)

    for classes, pieces in halves:
        slope = over(pair, joined, pieces, (mu, gamma), places=1)[0][0]
        accumulators[own].add(pair.selection.pick(chunk), loaded[own], classes, slope)
    return found._replace(moments=moments)


def gradient(
    pair: Pair,
    found: Found,
    gamma: Tensor,  # (M,) ∂L/∂D
    wants: tuple[Wants, Wants],
    *,
    estimated: bool = False,
) -> tuple[Found, PairGradients]:
    """Return gradients from saved statistics and moments, classes outermost.

    Where the one moment is ``estimated``, the slopes start from it and it is formed anew.
    """
    formed = estimated or (pair.divergence.alone and not any(wants[1]))
    plan = pair.plan(resident=False)
    workspace = pair.workspace(plan)
    accumulators = pair.accumulators(wants)
    of_rows = found.student.m
    value = pair.ops.total(tuple(of_rows.shape), of_rows.dtype, of_rows.device)
    with pair.products():
        for classes in plan.class_tiles(pair.n_classes):
            for chunk in plan.row_chunks(pair.selection.count):
                rows, loaded = found.rows(chunk), pair.load(chunk)
                logs = log_probabilities(pair, pair.tile(workspace, chunk, loaded, classes), rows)
                here = _pull_back(
                    pair,
                    accumulators,
                    wants,
                    chunk,
                    loaded,
                    classes,
                    logs,
                    rows,
                    gamma[chunk],
                    formed=formed,
                )
                if here is not None:
                    value.add(chunk, here)
    if not formed:
        return found, accumulators
    return found._replace(moments=(value.finish(None, of_rows.dtype),)), accumulators


def _chunk_statistics(
    pair: Pair, plan: Plan, workspace: Workspace, chunk: slice, loaded: Both, *, estimate: bool = False
) -> tuple[Found, list[tuple[slice, Tile]]]:
    """Return statistics of a chunk of rows over all classes; and log p, log t of the tiles kept.

    With ``estimate`` the moment is KL as ⟨t, z_T − z_S⟩ − lse_T + lse_S, as exact as δ is.
    """
    ops, kept = pair.ops, []
    unions: tuple[PairwiseMerge[Statistics], ...] = (PairwiseMerge(), PairwiseMerge())
    differences: list[tuple[Tensor, Tensor]] = []
    for classes in plan.class_tiles(pair.n_classes):
        tile = pair.tile(workspace, chunk, loaded, classes)
        if estimate:
            differences.append(_difference(pair, tile))
        for union, z in zip(unions, tile, strict=True):
            union.add(summarise(ops, z.clone() if plan.resident else z, None, None)[1])
        if plan.resident:
            kept.append((classes, tile))
    student, teacher = (union.whole() for union in unions)
    found = Found(student, teacher, (torch.zeros_like(student.m),) * pair.divergence.n_moments)
    if estimate:
        total = sum(part * torch.exp(m - teacher.m) for m, part in differences)
        mean = total / (1 + teacher.r) - teacher.logsumexp + student.logsumexp
        found = found._replace(moments=(mean,))
    return found, [(classes, log_probabilities(pair, tile, found)) for classes, tile in kept]


def _difference(pair: Pair, tile: Tile) -> tuple[Tensor, Tensor]:
    """Return m = max z_T of a tile and Σ exp(z_T − m)·(z_T − z_S), (R,) each, float64.

    Both heads are measured from their own largest logit first, so that a common offset cancels.
    """
    dtype = statistics_dtype(tile[0].device)
    student, teacher = (finite_base(z.amax(1)) for z in tile)

    def weighed(z_s: Tensor, z_t: Tensor, m_s: Tensor, m_t: Tensor) -> tuple[Tensor, ...]:
        far = z_t - m_t
        share = far.exp()
        return torch.where(share == 0, 0.0, share * (far - (z_s - m_s))), share

    _, (part, whole) = over(pair, weighed, tile, (student, teacher), places=0)
    student, teacher = student.to(dtype), teacher.to(dtype)
    return teacher, part + (teacher - student) * whole


def _chunk_values(
    pair: Pair,
    plan: Plan,
    workspace: Workspace,
    chunk: slice,
    loaded: Both,
    found: Found,
    kept: list[tuple[slice, Tile]],
) -> Found:
    """Return the chunk with its moments, from the tiles that were kept or from the logits once more."""
    moments = found.moments
    for number, classes in enumerate(plan.class_tiles(pair.n_classes)):
        if plan.resident:
            _, logs = kept[number]
        else:
            logs = log_probabilities(pair, pair.tile(workspace, chunk, loaded, classes), found)
        _, here = over(pair, pair.divergence.moments, logs, (), places=0)
        moments = tuple(sum_ + part for sum_, part in zip(moments, here, strict=True))
    return found._replace(moments=moments)


def log_probabilities(pair: Pair, tile: Tile, found: Found) -> Tile:
    """Turn logits into log p and log t in place; m is subtracted first: a common offset must cancel."""
    ops = pair.ops
    student, teacher = (
        ops.sub(ops.sub(z, finite_base(part.m.to(z.dtype))[:, None]), part.log_partition.to(z.dtype)[:, None])
        for z, part in zip(tile, (found.student, found.teacher), strict=True)
    )
    return student, teacher


def _pull_back(
    pair: Pair,
    accumulators: PairGradients,
    wants: tuple[Wants, Wants],
    chunk: slice,
    loaded: Both,
    classes: slice,
    logs: Tile,
    found: Found,  # of the chunk
    gamma: Tensor,  # (R,)
    *,
    formed: bool,
) -> Tensor | None:
    """Add a tile's gradients to the accumulators; return its part of the one moment (R,) if it is formed."""
    gammas = tuple(gamma * gain for gain in pair.gains(chunk))
    curves, known = pair.curves(chunk, found), pair.divergence.n_moments

    def of_student(log_p: Tensor, log_t: Tensor, gamma: Tensor, *curves: Tensor) -> Tile:
        here, slope = terms(log_p, log_t)
        return curved(slope, pair.taus((log_p, log_t), curves)[0]) * gamma, here

    def of_both(
        log_p: Tensor, log_t: Tensor, of_student: Tensor, of_teacher: Tensor, *columns: Tensor
    ) -> tuple[Tensor, ...]:
        student, teacher = pair.divergence.slopes(log_p, log_t, *columns[:known])
        tau_s, tau_t = pair.taus((log_p, log_t), columns[known:])
        here = pair.divergence.moments(log_p, log_t) if formed else ()
        return curved(student, tau_s) * of_student, curved(teacher, tau_t) * of_teacher, *here

    def of_first(log_p: Tensor, log_t: Tensor, gamma: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
        slope = pair.divergence.slope(log_p, log_t, *columns[:known], student=True)
        return (curved(slope, pair.taus((log_p, log_t), columns[known:])[0]) * gamma,)

    if any(wants[1]) or (formed and not pair.divergence.alone):
        gradients, added = over(pair, of_both, logs, (*gammas, *found.moments, *curves), places=2)
    elif not pair.divergence.alone:
        gradients, added = over(pair, of_first, logs, (gammas[0], *found.moments, *curves), places=1)
    else:
        gradients, added = over(pair, of_student, logs, (gammas[0], *curves), places=1)
    picked = pair.selection.pick(chunk)
    for accumulator, want, x, g in zip(accumulators, wants, loaded, gradients, strict=False):
        if any(want):
            accumulator.add(picked, x, classes, g)
    return added[0] if added else None


def curved(slope: Tensor, tau: Tensor | None) -> Tensor:
    """Return ∂/∂u ÷ gain (R, T) from ∂/∂z: times 1 − τ², where there is a softcap."""
    return slope if tau is None else slope * ((1 - tau) * (1 + tau))


def over(
    pair: Pair,
    f: Callable[..., tuple[Tensor, ...]],
    tiles: tuple[Tensor, ...],  # (R, T)
    columns: tuple[Tensor, ...],  # (R,)
    *,
    places: int,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Apply f to tiles and columns, a piece at a time.

    Its first `places` results in those of the first tiles, (R, T); the row sums of the others, (R,).
    """
    dtype = statistics_dtype(tiles[0].device)
    columns = tuple(column.to(tiles[0].dtype)[:, None] for column in columns)
    if not pair.ops.buffered:
        found = f(*tiles, *columns)
        return found[:places], tuple(value.sum(1).to(dtype) for value in found[places:])
    totals: list[Tensor] = []
    for rows, classes in _pieces(tiles[0], pair.piece):
        piece = [tile[rows, classes] for tile in tiles]
        found = f(*piece, *(column[rows] for column in columns))
        for place, value in zip(piece, found[:places], strict=False):
            place.copy_(value)
        if not totals:
            totals = [
                torch.zeros(len(tiles[0]), dtype=dtype, device=value.device) for value in found[places:]
            ]
        for total, value in zip(totals, found[places:], strict=True):
            total[rows] += value.sum(1)
    return tiles[:places], tuple(totals)


def _pieces(tile: Tensor, size: int) -> Iterator[tuple[slice, slice]]:
    """Cut a tile (R, T) into parts of at most `size` elements."""
    rows, classes = tile.shape
    width = min(classes, size)
    height = max(1, size // width)
    for row in range(0, rows, height):
        for column in range(0, classes, width):
            yield slice(row, row + height), slice(column, column + width)
