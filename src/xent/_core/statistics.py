"""Running row statistics: all that a sweep keeps of the classes it has seen.

    m = max z, or z_y        r = Σ exp(z − m) − 1        d = Σ t (z − m)        a = Σ t

    lse(z) = m + log1p(r)        ℓ = a·lse(z) − ⟨t, z⟩ = a·log1p(r) − d        log p_c = (z_c − m) − log1p(r)

and where they are asked for

    e = Σ (z − m) exp(z − m)        k = argmax z        H(p) = log1p(r) − e/(1 + r)
    log P̄ = −log1p(exp(lse_K − lse_others))             of all classes but a row's own ones, K

Everything is relative to a logit m of the row, so a common offset of the logits that come here cancels before
it can round, and r leaves that logit's own term out, so a confident row keeps its digits where 1 + r would
lose them. m is the largest logit; of given logits of one class a row it is the target's (`summarise_beside`).
Sets of classes are joined by moving each to the largest maximum and adding: `merge` joins two of them, class
tiles and the target's own tile, and `ranks` as many as there are processes, by the same `shares`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from xent._core.ops import TileOps
from xent._core.record import record

NEG_INF = -math.inf
FEW = 64  # classes of a tile whose ⟨t, z⟩ is worth a wider type
CACHED = 1 << 16  # elements of it at a time


def statistics_dtype(device: torch.device) -> torch.dtype:
    """Return the type of statistics, which are O(N): float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def product_with_zero(a: Tensor, shift: Tensor) -> Tensor:
    """Return a·shift with 0·(−inf) = 0: a class without target mass costs nothing, however far it is."""
    return (a * shift).masked_fill_(a == 0, 0.0)


class RequestedOutputs(NamedTuple):
    """The outputs that are accumulated beside a loss."""

    entropy: bool = False
    argmax: bool = False
    log_prob: bool = False  # of the own classes
    log_rest: bool = False  # log of what the probabilities of the others add up to
    mass: bool = False  # of the target there, where processes share the classes

    @property
    def of_scores(self) -> bool:
        """The need for more of a tile than its part of a loss."""
        return self.entropy or self.argmax or self.log_prob or self.log_rest


LOSS_ONLY = RequestedOutputs()


@record
class Statistics:
    """Row statistics over some set of classes; every field but ``own`` has shape (R,)."""

    m: Tensor  # (R,) the largest logit; of all classes it may be the target's (`summarise_beside`)
    r: Tensor  # (R,) Σ exp(z − m) over the classes, one of m left out; −1 over no classes
    d: Tensor | None  # (R,) Σ t (z − m); None means 0, and that every row has a softmax
    a: Tensor  # (R,) Σ t
    e: Tensor | None = None  # (R,) Σ (z − m) exp(z − m), never positive
    k: Tensor | None = None  # (R,) int64, the lowest class of the largest logit
    own: Tensor | None = None  # (R, K) the own classes' logits, 0 of one that is not among them
    mass: Tensor | None = None  # (R,) t there, else 0
    lse_own: Tensor | None = None  # (R,) logsumexp of the own classes
    lse_others: Tensor | None = None  # (R,) and of the others

    @classmethod
    def identity(
        cls, rows: int, device: torch.device, requested: RequestedOutputs = LOSS_ONLY, own: int = 1
    ) -> Statistics:
        """Return the statistics of no classes, for K = ``own``: the neutral element of `merge`."""
        zero = torch.zeros(rows, dtype=statistics_dtype(device), device=device)
        return cls(
            m=zero + NEG_INF,
            r=zero - 1,
            d=zero,
            a=zero,
            e=zero if requested.entropy else None,
            k=zero.to(torch.int64) if requested.argmax else None,
            own=zero[:, None].expand(-1, own) if requested.log_prob else None,
            mass=zero if requested.mass else None,
            lse_own=zero + NEG_INF if requested.log_rest else None,
            lse_others=zero + NEG_INF if requested.log_rest else None,
        )

    def merge(self, other: Statistics) -> Statistics:
        """Return the statistics of the union of two disjoint sets of classes."""
        m = torch.maximum(self.m, other.m)
        return (self.shares(m) + other.shares(m)).at(m, _lowest(self, other))

    def shares(self, m: Tensor) -> PartialSums:
        """Return what these classes add to a union whose largest logit is m (R,), no lower than theirs."""
        attained = self.m == m
        # −inf − (−inf) is no distance at all: two sets of masked classes lie at the same place
        shift = torch.where(attained, 0.0, self.m - m)
        near, whole = torch.exp(shift), 1 + self.r
        e = None
        if self.e is not None:
            e = torch.where(shift == NEG_INF, 0.0, near * (self.e + shift * whole))
        return PartialSums(
            attained.to(m.dtype),
            torch.where(attained, self.r, near * whole),
            product_with_zero(self.a, shift) if self.d is None else self.d + product_with_zero(self.a, shift),
            self.a,
            e,
            self.own,
            self.mass,
        )

    @property
    def entropy(self) -> Tensor:
        """H(p), (R,): two terms of one sign; nan where there is no softmax."""
        assert self.e is not None
        entropy = self.log_partition - self.e / (1 + self.r)
        return entropy.masked_fill(self.m.isinf(), math.nan)

    @property
    def log_partition(self) -> Tensor:
        """log Σ exp(z − m), (R,): never negative."""
        return torch.log1p(self.r)

    @property
    def logsumexp(self) -> Tensor:
        return self.m + self.log_partition

    @property
    def loss(self) -> Tensor:
        """a·lse − ⟨t, z⟩, (R,); nan where there is no softmax: every class is masked, or one lies at +inf."""
        loss: Tensor = torch.special.xlog1py(self.a, self.r)  # 0 where a = 0, as in ⟨t, z⟩
        return loss if self.d is None else loss - self.d + (self.m - self.m)

    @property
    def own_log_prob(self) -> Tensor:
        """log p of the own classes, (R, K)."""
        assert self.own is not None
        return self.log_prob(self.own)

    @property
    def log_rest(self) -> Tensor:
        """log P̄ = log Σ p of the classes that are not own, (R,)."""
        assert self.lse_own is not None
        assert self.lse_others is not None
        none = self.lse_own == NEG_INF  # whatever the others are
        apart = torch.where(none, NEG_INF, self.lse_own - torch.where(none, 0.0, self.lse_others))
        return -torch.logaddexp(apart, torch.zeros_like(apart))

    def log_prob(self, z: Tensor) -> Tensor:
        """Return log p of logits z, (R, K) -> (R, K). m is subtracted first: a common offset must cancel."""
        return (z - self.m[:, None]) - self.log_partition[:, None]

    @property
    def columns(self) -> tuple[Any, ...]:
        """The fields, each of R rows or None."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def rows(self, rows: slice) -> Statistics:
        if rows.start == 0 and rows.stop == self.m.shape[0]:
            return self
        return Statistics(*[None if t is None else t[rows] for t in self.columns])  # type: ignore[arg-type]

    @staticmethod
    def concatenate(parts: Sequence[Statistics]) -> Statistics:
        """Return the statistics of consecutive row chunks, one below the other."""
        if len(parts) == 1:
            return parts[0]
        if any(part.d is None for part in parts) and not all(part.d is None for part in parts):
            parts = [replace(part, d=torch.zeros_like(part.r)) if part.d is None else part for part in parts]
        columns = zip(*(part.columns for part in parts), strict=True)
        return Statistics(*[None if column[0] is None else torch.cat(column) for column in columns])  # type: ignore[arg-type]


class PartialSums(NamedTuple):
    """The parts that disjoint sets of classes add to a union of largest logit m; each (R,), own (R, K)."""

    top: Tensor  # how many of the sets attain m
    rest: Tensor  # Σ exp(z − m), one term of m left out of each set that attains it
    d: Tensor
    a: Tensor
    e: Tensor | None
    own: Tensor | None
    mass: Tensor | None

    def __add__(self, other: PartialSums) -> PartialSums:  # type: ignore[override]
        both = zip(self, other, strict=True)
        return PartialSums(*(None if x is None or y is None else x + y for x, y in both))  # type: ignore[arg-type]

    def at(self, m: Tensor, k: Tensor | None) -> Statistics:
        """Return the union's statistics: of all the terms of m that were left out, one stays so."""
        _, rest, d, a, e, own, mass = self
        return Statistics(m, rest + (self.top - 1), d, a, e, k, own, mass)


def _lowest(one: Statistics, other: Statistics) -> Tensor | None:
    """Return the class of the larger maximum, the lower one of two that are equal."""
    if one.k is None or other.k is None:
        return None
    equal = torch.minimum(one.k, other.k)
    return torch.where(one.m > other.m, one.k, torch.where(other.m > one.m, other.k, equal))


S = TypeVar("S", bound="Mergeable")


class Mergeable(Protocol):
    """Statistics over some set of classes, whatever they are."""

    def merge(self: S, other: S, /) -> S: ...


class PairwiseMerge(Generic[S]):
    """Disjoint sets of classes merged as they come, in pairs of as many sets each.

    So every number passes log₂ T merges on its way and not T: in float64, which no wider type stands
    behind, the rounding of a thousand tiles would add up to more than the bound on a loss allows.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[int, S]] = []  # of how many sets, fewer and fewer

    def add(self, part: S) -> None:
        sets = 1
        while self.parts and self.parts[-1][0] == sets:
            part = self.parts.pop()[1].merge(part)
            sets *= 2
        self.parts.append((sets, part))

    def whole(self) -> S:
        """Return the statistics of all sets, of which there is at least one."""
        *larger, (_, whole) = self.parts
        for _, part in reversed(larger):
            whole = part.merge(whole)
        return whole


def finite_base(m: Tensor) -> Tensor:
    """Return what to subtract from rows of maximum m: wholly masked ones stay at −inf, not nan."""
    return m.clamp_min(torch.finfo(m.dtype).min)


def summarise(
    ops: TileOps,
    z: Tensor,
    t: Tensor | float | None,
    own: TargetColumns | None,
    requested: RequestedOutputs = LOSS_ONLY,
    first: int = 0,
) -> tuple[Tensor, Statistics]:
    """Return exp(z − m) of a tile of logits z (R, T), m its own maximum, and the tile's statistics.

    t, a number or (R or 1, T), is the dense part of the target, None where there is none. Columns of `own`
    belong to the target's own tile: they arrive masked, contribute nothing, leave as zeros. `first` is the
    tile's first class.
    """
    dtype = statistics_dtype(z.device)
    if t is None and own is not None and not requested.of_scores:
        # the mass lies in the own tile, beside which 1 + r is all that is ever needed of this one
        m = z.amax(1)
        z = ops.exp(ops.sub(z, finite_base(m)[:, None]))
        zero = torch.zeros((), dtype=dtype, device=z.device).expand(z.shape[0])
        return z, Statistics(m.to(dtype), z.sum(1).to(dtype) - 1, zero, zero)
    if isinstance(t, float):
        t = torch.full((1, z.shape[1]), t, dtype=z.dtype, device=z.device)
    m, top = z.max(1)
    masked = m == NEG_INF
    all_masked = ops.possible(masked)
    z = ops.sub(z, finite_base(m)[:, None])
    if all_masked:
        # all of them equally far below: at no distance from their own maximum
        z = torch.where(masked[:, None], 0.0, z)
    if own is not None:
        z = own.put(ops, z, 0.0)
    a = d = torch.zeros((), dtype=dtype, device=z.device).expand(z.shape[0])
    if t is not None:
        a = t.to(dtype).sum(1).expand(z.shape[0])
        if own is not None:
            here = own.take(t.expand(z.shape), 0.0).to(dtype)
            # where no other class has mass nothing is left, not even rounding, which may lie at −inf
            others = (t != 0).sum(1) - (here != 0).sum(1)
            a = torch.where(others == 0, 0.0, a - here.sum(1))
        d = masked_dot(ops, t, z).to(dtype)
    z = ops.exp(z)
    if own is not None:
        z = own.put(ops, z, 0.0)
    z = ops.scatter(z, top[:, None], 0.0)
    r = torch.where(masked, -1.0, z.sum(1).to(dtype))
    e = -torch.special.entr(z).sum(1).to(dtype) if requested.entropy else None  # Σ E log E, E = exp(z − m)
    z = ops.scatter(z, top[:, None], (1 + (m - m))[:, None])  # nan of a row with +inf
    if all_masked:
        z = torch.where(masked[:, None], 0.0, z)
    return z, Statistics(m.to(dtype), r, d, a, e, first + top if requested.argmax else None)


def summarise_row(
    ops: TileOps,
    z: Tensor,  # (R, C), left as it is
    own: TargetColumns,  # (R, 1)
    t: Tensor | float | None,  # the dense part of the target, the same for every row: a number or (1, C)
    mass: Tensor | None,  # (R, 1) t_y; None means 1
    rest: Tensor | None,  # (R, 1) Σ_{j≠y} t_j; None means 0
    out: Tensor | None = None,  # (R, C) memory for the first result
    absent: float | Tensor = math.nan,
) -> tuple[Tensor, Tensor, Statistics]:
    """Summarise a tile that holds every class, merged with the target's own tile (K = 1) in one go.

    Return exp(z − m) with m the row's maximum, zero at the target's class; its logit (R, 1); the row's
    statistics. `absent` is that logit where no column is the target's class. With that class apart,
    Σ exp(z − m) = 1 + r for r = Σ_{j≠y} exp(z_j − m) + expm1(z_y − m).
    """
    dtype = statistics_dtype(z.device)
    own_z = own.take(z, absent).to(dtype)
    m = z.amax(1, keepdim=True)
    base = finite_base(m)
    z = ops.difference(z, base, out)
    distance = (own_z - base).squeeze(1)
    if mass is None:
        d, a = distance, torch.ones_like(distance)
    else:
        mass = mass[:, 0]
        d, a = product_with_zero(mass, distance), mass if rest is None else mass + rest[:, 0]
    if t is not None:
        z = own.put(ops, z, 0.0)
        d = d + masked_dot(ops, t, z).to(dtype)
    z = own.put(ops, ops.exp(z), 0.0)
    r = z.sum(1).to(dtype) + torch.expm1(distance)
    return z, own_z, Statistics(m=m[:, 0].to(dtype), r=r, d=d, a=a)


LEAST = 1e-12  # of p_y: exp(z − z_y) of the others is then at most 1e12, far from overflow in any sum

NARROW, MANY = 16, 1 << 12
"""torch.softmax takes rows of fewer classes one by one: 170 ns each, which many of them are to be spared."""


def softmax_pays(z: Tensor) -> bool:
    """Return whether the softmax of rows (R, C) is one fast operation."""
    return z.shape[1] >= NARROW or z.numel() <= MANY


def summarise_beside(
    ops: TileOps,
    z: Tensor,  # (R, C)
    own: TargetColumns,  # (R, 1), none of which lies elsewhere
    mass: Tensor | None,  # (R, 1) t_y, all there is of the target; None means 1
    out: Tensor | None,  # (R, C) memory for the softmax, which may be z's
) -> tuple[Tensor, Tensor, Statistics]:
    """Summarise a tile of every class by its softmax, one operation of torch, beside the target's class.

    Return p with zero at the target's class; its logit (R, 1); the row's statistics, measured from it:

        m = z_y        r = Σ_{j≠y} p_j / p_y        d = t_y·(z_y − m) = 0

    d is None where this is so of every row. Rows whose p_y is below `LEAST` are measured from their maximum:

        m = max z      r = 1 / max p − 1            d = t_y·(z_y − m)

    Nothing cancels in these: what they are added to is 27 nats or more.
    """
    dtype = statistics_dtype(z.device)
    own_z = own.take(z, 0.0).to(dtype)
    top = z.amax(1) if z is out else None  # before it is overwritten
    p = ops.softmax(z, out)
    p_y = own.take(p, 0.0)[:, 0]
    near = p_y >= LEAST
    all_near = ops.all_at_least(p_y, LEAST)
    p_top = None if all_near else p.amax(1)
    p = own.put(ops, p, 0.0)
    m, r, d = own_z[:, 0], (p.sum(1) / p_y).to(dtype), None
    if p_top is not None:
        highest = z.amax(1) if top is None else top
        m = torch.where(near, m, highest.to(dtype))
        r = torch.where(near, r, 1 / p_top.to(dtype) - 1)
        distance = torch.where(near, 0.0, own_z[:, 0] - m)
        d = distance if mass is None else product_with_zero(mass[:, 0], distance)
    a = torch.ones_like(r) if mass is None else mass[:, 0]
    return p, own_z, Statistics(m=m, r=r, d=d, a=a)


def masked_dot(ops: TileOps, t: Tensor | float, z: Tensor) -> Tensor:
    """Return Σ_c t_c z_c, a positive number or (R or 1, T) and (R, T) -> (R,), with 0·(−inf) = 0."""
    if isinstance(t, float):
        return z.sum(1, dtype=statistics_dtype(z.device) if z.shape[1] <= FEW else None) * t
    d = dot(t, z)
    if ops.possible(d.isnan()):
        d = dot(t, torch.where(t == 0, 0.0, z))
    return d


def dot(t: Tensor, z: Tensor) -> Tensor:
    """Return Σ_c t_c z_c. Targets of both signs cancel: the rounding of many terms averages out, of few need
    not, so few are multiplied and added in the statistics' own type. Some rows at a time, a third at most:
    that much the scratch of a plan holds."""
    (rows, classes), dtype = z.shape, statistics_dtype(z.device)
    if classes > FEW or z.dtype == dtype or rows == 0:
        return (t * z).sum(1)
    size = min(CACHED // classes, -(-rows // 3))
    parts = zip(t.expand(z.shape).split(size), z.split(size), strict=True)
    return torch.cat([(some_t * some_z.to(dtype)).sum(1) for some_t, some_z in parts])


@record
class TargetColumns:
    """The columns of the target's classes within one class tile; by selection, never by multiplication."""

    inside: Tensor | None  # (R, K) bool: this tile holds the class; None means that it holds them all
    local: Tensor  # (R, K) int64 column; where outside, that of one inside, or 0
    anchor: Tensor | None = None  # (R, 1) which of K > 1 that one is

    @classmethod
    def locate(cls, index: Tensor, classes: slice, *, holds_all: bool = False) -> TargetColumns:
        """Find the targets' classes, index (R, K), in a tile; `holds_all`: all are known to be there."""
        if holds_all:
            return cls(None, index)
        local = index - classes.start
        inside = (local >= 0) & (local < classes.stop - classes.start)
        local = torch.where(inside, local, 0)
        if index.shape[1] == 1:
            return cls(inside, local)
        # one that lies elsewhere does what another does that lies here, lest the two write different things
        anchor = inside.to(torch.uint8).argmax(1, keepdim=True)
        return cls(inside, torch.where(inside, local, local.gather(1, anchor)), anchor)

    def take(self, z: Tensor, default: float | Tensor) -> Tensor:
        """Return entries of z (R, T) at the columns, `default` where they lie elsewhere: (R, K)."""
        return self.take_from(z.gather(1, self.local), default)

    def take_from(self, entries: Tensor, default: float | Tensor) -> Tensor:
        """Return entries at the columns (R, K), `default` where they lie elsewhere."""
        return entries if self.inside is None else torch.where(self.inside, entries, default)

    def here(self, values: Tensor) -> Tensor:
        """Return values (R, K) of the columns, zero where they lie elsewhere."""
        return values if self.inside is None else torch.where(self.inside, values, 0.0)

    def put(self, ops: TileOps, z: Tensor, value: float | Tensor) -> Tensor:
        """Return z (R, T) with `value` at the columns that lie here."""
        if self.inside is not None:
            value = torch.where(self.inside, value, z.gather(1, self.local))
            if self.anchor is not None:
                value = torch.where(self.inside, value, value.gather(1, self.anchor))
        return ops.scatter(z, self.local, value)
