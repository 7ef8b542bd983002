"""Two linear heads over the same rows and classes, as the sweeps of a divergence use them.

    log p → τ = tanh(κu/k) = (log p + lse)·T/k → ∂/∂u = gain·(1 − τ²)·∂/∂z        behind a softcap k

A pair flattens to tensors and a form, and back. Tiles of both heads are worked on a piece at a time (`over`).
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
from xent._core.plan import Footprint, Plan, grain_of
from xent._core.problem import Problem
from xent._core.record import record
from xent._core.selection import Selection
from xent._core.statistics import Statistics, statistics_dtype
from xent._core.targets import no_targets
from xent._core.tiles.divergences import Divergence, divergence
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

    def harmless(self, kept: Tensor) -> Pair:
        """Return the pair with zeros in the rows that are not kept (N,), whatever they held."""
        return replace(self, student=self.student.select(kept), teacher=self.teacher.select(kept))

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
        grain, shape = grain_of(self.student.device), (self.selection.count, self.n_classes)
        return Plan.within(self.budget, *shape, footprint, resident=resident, grain=grain)

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
