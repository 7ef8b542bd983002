"""KL(t ‖ p) of two linear heads over the same classes, tile by tile; neither's logits are kept.

With t = softmax(z_T) and p = softmax(z_S), the teacher's and the student's, and δ = log p − log t:

    KL = ⟨t, −δ⟩ = Σ_c t_c·φ(δ_c)        φ(δ) = e^δ − 1 − δ ≥ 0        (because Σ p = Σ t = 1)
    ∂KL/∂z_S = p − t = t∘expm1(δ)        ∂KL/∂z_T = t∘(−δ − KL)

The sum of φ cancels nowhere: equal heads are at 0 exactly, near ones keep their digits, and nothing is ever
negative. Far from δ = 0 the term is written p − t − t·δ, which is p where t = 0. Row statistics of both heads
are one product each a tile; the terms and gradients come from log p and log t, kept where the budget holds
all classes of a chunk of rows for both heads, computed again where it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from xent.core.arithmetic import Arithmetic, InPlace
from xent.core.plan import Footprint, Plan
from xent.core.scores import LinearHead, Room, Sink
from xent.core.statistics import RunningUnion, Statistics, finite_base, statistics_dtype, summarise
from xent.core.sweep import Problem, Workspace
from xent.core.targets import Targets

NEAR = 0.5  # |δ| below which e^δ − 1 and δ cancel
PIECE = 1 << 16  # elements of a tile at a time: what is made on the way stays in the cache
TEMPORARIES = 12  # tensors of a piece that are alive at once

# 1/(2n + 3)!, as many as float64 asks for up to |δ| = NEAR; of float32 four
ODD = [1 / 6, 1 / 120, 1 / 5040, 1 / 362880, 1 / 39916800, 1 / 6227020800, 1 / 1307674368000]

Wants: TypeAlias = tuple[bool, bool, bool]  # of features, weight and bias
Tile: TypeAlias = tuple[Tensor, Tensor]  # (R, T) of the student and of the teacher


def phi(delta: Tensor) -> Tensor:
    """e^δ − 1 − δ to a few units in the last place, of any sign and size; any number of derivatives.

    Near 0 as (cosh δ − 1) + (sinh δ − δ) = 2 sinh²(δ/2) + δ³·(1/3! + δ²/5! + δ⁴/7! + …).
    """
    near = delta.abs() < NEAR
    x = torch.where(near, delta, 0.0)
    square = x * x
    *rest, last = ODD if x.dtype == torch.float64 else ODD[:4]
    odd = torch.full_like(x, last)
    for coefficient in reversed(rest):
        odd = odd * square + coefficient
    far = torch.where(near, 0.0, delta)
    return torch.where(near, 2 * torch.sinh(x / 2).square() + x * square * odd, torch.expm1(far) - far)


class Pair(NamedTuple):
    """A student and a teacher, whose problems name the same rows and no target."""

    student: LinearHead
    teacher: LinearHead
    targets: Targets
    budget: int
    arithmetic: Arithmetic = InPlace()

    @property
    def heads(self) -> tuple[LinearHead, LinearHead]:
        return self.student, self.teacher

    @property
    def problem(self) -> Problem:
        """The student's own, for what asks about one head."""
        return Problem(self.student, self.targets, self.budget, self.arithmetic)

    @property
    def piece(self) -> int:
        """Elements of a tile that are worked on at a time, within a quarter of the budget."""
        return max(1, min(PIECE, self.budget // (4 * TEMPORARIES * self.student.dtype.itemsize)))

    def plan(self, *, resident: bool, buffers: int = 2, least_rows: int = 1) -> Plan:
        """Tiles within the budget; `buffers` of their size are held at once."""
        size = self.student.dtype.itemsize
        gathered = self.targets.rows is not None
        footprint = Footprint(
            kept=size * buffers,
            # a copy that becomes exp(z − m), with booleans where a row is wholly masked
            scratch=2 * size + 1 + max(head.bytes_per_logit for head in self.heads),
            per_row=sum(head.bytes_per_row(gathered) for head in self.heads),
            per_class=max(head.bytes_per_class() for head in self.heads),
            resident_rows=max(1, self.student.least_resident_rows // least_rows),
            fixed=TEMPORARIES * size * self.piece,
        )
        if not self.arithmetic.buffered:
            return Plan.of_all_rows(self.budget, self.targets.count, self.targets.classes, footprint)
        return Plan.within(
            self.budget, self.targets.count, self.targets.classes, footprint, resident=resident
        )

    @contextmanager
    def products(self) -> Iterator[None]:
        with ExitStack() as stack:
            for head in self.heads:
                problem = Problem(head, self.targets, self.budget, self.arithmetic)
                stack.enter_context(problem.products())
            yield

    def load(self, chunk: slice) -> Tile:
        """The features of both, in the types of their products."""
        picked = self.targets.pick(chunk)
        return self.student.load(picked), self.teacher.load(picked)

    def workspace(self, plan: Plan, buffers: int = 2) -> Workspace:
        return Workspace(self.problem, plan, slopes=False, buffers=buffers)

    def tile(self, workspace: Workspace, chunk: slice, loaded: Tile, classes: slice) -> Tile:
        """The logits of both over some classes."""
        student, teacher = (
            head.tile(self.arithmetic, x, classes, Room(workspace.tile(chunk, classes, number), None, False))[
                0
            ]
            for number, (head, x) in enumerate(zip(self.heads, loaded, strict=True))
        )
        return student, teacher

    def sinks(self, wants: tuple[Wants, Wants]) -> tuple[Sink, Sink]:
        first, second = (
            head.sink(self.arithmetic, want) for head, want in zip(self.heads, wants, strict=True)
        )
        return first, second


class Found(NamedTuple):
    """What a sweep keeps of M rows."""

    student: Statistics
    teacher: Statistics
    kl: Tensor  # (M,)

    def rows(self, chunk: slice) -> Found:
        return Found(self.student.rows(chunk), self.teacher.rows(chunk), self.kl[chunk])

    @staticmethod
    def concatenate(parts: list[Found], pair: Pair) -> Found:
        if not parts:
            nothing = Statistics.identity(0, pair.student.device)
            return Found(nothing, nothing, nothing.m)
        student, teacher, kl = zip(*parts, strict=True)
        return Found(Statistics.concatenate(student), Statistics.concatenate(teacher), torch.cat(kl))


def values(pair: Pair) -> Found:
    """KL of each row, and the statistics of both heads: two products a tile, or four."""
    return _values(pair, pair.plan(resident=True))


def _values(pair: Pair, plan: Plan, *, statistics_alone: bool = False) -> Found:
    workspace = pair.workspace(plan)
    with pair.products():
        parts = [
            _chunk(pair, plan, workspace, chunk, pair.load(chunk), statistics_alone=statistics_alone)[0]
            for chunk in plan.row_chunks(pair.targets.count)
        ]
    return Found.concatenate(parts, pair)


def fused(
    pair: Pair, coefficients: Callable[[slice], Tensor], wants: tuple[Wants, Wants]
) -> tuple[Found, tuple[Sink, Sink]]:
    """Values and gradients in one sweep; `coefficients` gives γ = ∂L/∂KL (R,) of a chunk of rows."""
    plan = pair.plan(resident=True)
    if not plan.resident:
        # the teacher's gradient starts from the row's value, the student's does not
        frozen = not any(wants[1])
        found = _values(pair, plan, statistics_alone=frozen)
        return gradient(pair, found, coefficients(slice(0, pair.targets.count)), wants, wants_value=frozen)
    workspace = pair.workspace(plan)
    sinks = pair.sinks(wants)
    parts = []
    with pair.products():
        for chunk in plan.row_chunks(pair.targets.count):
            loaded = pair.load(chunk)
            found, tiles = _chunk(pair, plan, workspace, chunk, loaded)
            parts.append(found)
            gamma = coefficients(chunk)
            for classes, logs in tiles:
                _pull_back(pair, sinks, wants, chunk, loaded, classes, logs, found.kl, gamma)
    return Found.concatenate(parts, pair), sinks


def gradient(
    pair: Pair,
    found: Found,
    gamma: Tensor,  # (M,) ∂L/∂KL
    wants: tuple[Wants, Wants],
    *,
    wants_value: bool = False,
) -> tuple[Found, tuple[Sink, Sink]]:
    """Gradients from saved statistics, classes outermost; with `wants_value` the values by the way."""
    plan = pair.plan(resident=False)
    workspace = pair.workspace(plan)
    sinks = pair.sinks(wants)
    kl = torch.zeros_like(found.kl) if wants_value else found.kl
    with pair.products():
        for classes in plan.class_tiles(pair.targets.classes):
            for chunk in plan.row_chunks(pair.targets.count):
                rows, loaded = found.rows(chunk), pair.load(chunk)
                logs = log_probabilities(pair, pair.tile(workspace, chunk, loaded, classes), rows)
                if wants_value:
                    kl[chunk] += _divergence(pair, logs)
                _pull_back(pair, sinks, wants, chunk, loaded, classes, logs, rows.kl, gamma[chunk])
    return found._replace(kl=kl), sinks


def _chunk(
    pair: Pair,
    plan: Plan,
    workspace: Workspace,
    chunk: slice,
    loaded: Tile,
    *,
    statistics_alone: bool = False,
) -> tuple[Found, list[tuple[slice, Tile]]]:
    """A chunk of rows over all classes; if the plan keeps its tiles, log p and log t of each."""
    o, unions, kept = pair.arithmetic, (RunningUnion(), RunningUnion()), []
    for classes in plan.class_tiles(pair.targets.classes):
        tile = pair.tile(workspace, chunk, loaded, classes)
        for union, z in zip(unions, tile, strict=True):
            union.add(summarise(o, z.clone() if plan.resident else z, None, None)[1])
        if plan.resident:
            kept.append((classes, tile))
    student, teacher = (union.whole() for union in unions)
    found = Found(student, teacher, torch.zeros_like(student.m))
    if statistics_alone:
        return found, []
    kl = found.kl
    if plan.resident:
        kept = [(classes, log_probabilities(pair, tile, found)) for classes, tile in kept]
        for _, logs in kept:
            kl = kl + _divergence(pair, logs)
    else:
        for classes in plan.class_tiles(pair.targets.classes):
            tile = pair.tile(workspace, chunk, loaded, classes)
            kl = kl + _divergence(pair, log_probabilities(pair, tile, found))
    return found._replace(kl=kl), kept


def log_probabilities(pair: Pair, tile: Tile, found: Found) -> Tile:
    """log p and log t in the places of the logits; m is subtracted first: a common offset must cancel."""
    o = pair.arithmetic
    student, teacher = (
        o.sub(o.sub(z, finite_base(part.m.to(z.dtype))[:, None]), part.log_partition.to(z.dtype)[:, None])
        for z, part in zip(tile, (found.student, found.teacher), strict=True)
    )
    return student, teacher


def _divergence(pair: Pair, logs: Tile) -> Tensor:
    """What a tile adds to KL, (R,)."""
    (here,) = sums(pair, lambda log_p, log_t: (divergence_terms(log_p, log_t),), logs, ())
    return here


def divergence_terms(log_p: Tensor, log_t: Tensor) -> Tensor:
    """t·φ(δ)."""
    t, delta = log_t.exp(), log_p - log_t  # nan where a class is masked in both: then its probabilities tell
    far = log_p.exp() - t - torch.where(t == 0, 0.0, t * delta)
    return torch.where(delta.abs() < NEAR, t * phi(delta), far)


def slopes(log_p: Tensor, log_t: Tensor, kl: Tensor) -> tuple[Tensor, Tensor]:
    """∂KL/∂z_S = p − t and ∂KL/∂z_T = t∘(−δ − KL)."""
    t, delta = log_t.exp(), log_p - log_t
    of_student = torch.where(delta.abs() < NEAR, t * torch.expm1(delta), log_p.exp() - t)
    return of_student, torch.where(t == 0, 0.0, t * (-delta - kl))


def _pull_back(
    pair: Pair,
    sinks: tuple[Sink, Sink],
    wants: tuple[Wants, Wants],
    chunk: slice,
    loaded: Tile,
    classes: slice,
    logs: Tile,
    kl: Tensor,  # (R,)
    gamma: Tensor,  # (R,)
) -> None:
    """A tile's gradients, in the places of log p and log t, into the sinks."""
    gain = pair.student.transform.gain

    def of_logits(log_p: Tensor, log_t: Tensor, kl: Tensor, gamma: Tensor) -> Tile:
        of_student, of_teacher = slopes(log_p, log_t, kl)
        return of_student * gamma, of_teacher * gamma

    tiles = into(pair, of_logits, logs, (kl, gamma * gain))
    picked = pair.targets.pick(chunk)
    for sink, want, x, g in zip(sinks, wants, loaded, tiles, strict=True):
        if any(want):
            sink.add(picked, x, classes, g)


def into(
    pair: Pair,
    f: Callable[..., tuple[Tensor, ...]],
    tiles: tuple[Tensor, ...],  # (R, T)
    columns: tuple[Tensor, ...],  # (R,)
) -> tuple[Tensor, ...]:
    """f of tiles and columns in the places of as many of the first tiles, a piece at a time."""
    columns = tuple(column.to(tiles[0].dtype)[:, None] for column in columns)
    if not pair.arithmetic.buffered:
        return f(*tiles, *columns)
    results = 0
    for rows, classes in _pieces(tiles[0], pair.piece):
        places = [tile[rows, classes] for tile in tiles]
        found = f(*places, *(column[rows] for column in columns))
        results = len(found)
        for place, value in zip(places, found, strict=False):
            place.copy_(value)
    return tiles[:results]


def sums(
    pair: Pair,
    f: Callable[..., tuple[Tensor, ...]],
    tiles: tuple[Tensor, ...],  # (R, T)
    columns: tuple[Tensor, ...],  # (R,)
) -> tuple[Tensor, ...]:
    """The row sums of f of tiles and columns, (R,) each, a piece at a time."""
    dtype = statistics_dtype(tiles[0].device)
    columns = tuple(column.to(tiles[0].dtype)[:, None] for column in columns)
    if not pair.arithmetic.buffered:
        return tuple(value.sum(1).to(dtype) for value in f(*tiles, *columns))
    totals: list[Tensor] = []
    for rows, classes in _pieces(tiles[0], pair.piece):
        found = f(*(tile[rows, classes] for tile in tiles), *(column[rows] for column in columns))
        totals = totals or [torch.zeros(len(tiles[0]), dtype=dtype, device=tiles[0].device) for _ in found]
        for total, value in zip(totals, found, strict=True):
            total[rows] += value.sum(1)
    return tuple(totals)


def _pieces(tile: Tensor, size: int) -> Iterator[tuple[slice, slice]]:
    """A tile (R, T) cut into parts of at most `size` elements."""
    rows, classes = tile.shape
    width = min(classes, size)
    height = max(1, size // width)
    for row in range(0, rows, height):
        for column in range(0, classes, width):
            yield slice(row, row + height), slice(column, column + width)
