"""The curvature of a row's loss in its inner logits u, and what a head makes of it, tile by tile.

    H_u = s∘[α·(diag(p) − p pᵀ) + β·p pᵀ]∘s + diag(ε)                 (C, C), one row; s = dz/du

    form             α                    β      ε                     p
    Hessian          γ(a + 2λ·lse)        2λγ    ∂L/∂z∘d²z/du²         softmax(z)
    Gauss–Newton     γ·a                  2λγ    0                     softmax(z)
    outer products   0                    γ      0                     ∂ℓ/∂u, with s = 1

γ is a row's weight over the divisor, λ the z-loss. Tangents of x, W, b are pushed to T = Ẋ Wᵀ + X Vᵀ + v_b:

    ρ = ⟨p∘s, T⟩        R = p∘s∘(α·(s∘T − ρ) + β·ρ) + ε∘T        W-part Rᵀx    x-part R W    b-part Rᵀ1

and where x and W move together the Hessian has Gᵀẋ and G V beside it, G = ∂L/∂u. Where the budget holds P
and T of a chunk of rows, a product costs three matrix products, each further right-hand side two; else five.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from xent.core.arithmetic import cut
from xent.core.plan import Plan
from xent.core.scores import LinearHead, Sink, Tangents
from xent.core.statistics import Statistics
from xent.core.sweep import Coefficients, Problem, Workspace, differentiate, differentiate_logits, revisit


class Form(Enum):
    HESSIAN = "Hessian"
    GAUSS_NEWTON = "Gauss–Newton"
    OUTER = "outer products"


class Rows(NamedTuple):
    """What a chunk of rows contributes, each (R,)."""

    found: Statistics
    alpha: Tensor  # times dz/du's constant factor, squared
    beta: Tensor
    asked: Coefficients  # of G, or of ∂ℓ/∂u where outer products are taken


class Tile(NamedTuple):
    classes: slice
    p: Tensor  # (R, T)
    slope: Tensor | None  # (R, T) what is not constant of s
    epsilon: Tensor | None  # (R, T)
    g: Tensor | None  # (R, T) ∂L/∂u, where it was asked for

    @property
    def q(self) -> Tensor:
        """p∘s, (R, T)."""
        return self.p if self.slope is None else self.p * self.slope


@dataclass(frozen=True)
class Curvature:
    """Of the M rows of a head's problem, whose statistics are known."""

    problem: Problem
    found: Statistics
    form: Form
    weight: Tensor  # (M,) γ, float64
    z_loss: float = 0.0

    def products(
        self, tangents: Sequence[Tangents], wants: tuple[bool, ...]
    ) -> list[tuple[Tensor | None, ...]]:
        """H·(ẋ, V, v_b) for each of the tangents: one tensor for each of the scores' that is wanted."""
        scores, targets, o = self.problem.scores, self.problem.targets, self.problem.arithmetic
        sinks = [scores.sink(o, wants) for _ in tangents]
        crosses = self.form is Form.HESSIAN and any(
            sink.crosses(along) for sink, along in zip(sinks, tangents, strict=True)
        )
        plan = self.plan(resident=True, crosses=crosses)
        visit = Visit(self, plan, crosses)
        with self.problem.products():
            for chunk in plan.row_chunks(targets.count):
                visit.enter(chunk)
                for along, sink in zip(tangents, sinks, strict=True):
                    visit.product(along, sink)
        return [sink.finish(None) for sink in sinks]

    def diagonal(self, wants: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """The diagonal of H in features, weight and bias, of their shapes, where wanted.

        W: hᵀ x²    b: hᵀ 1    x: (α·p∘s² + ε) W² + (β − α)((p∘s) W)²    with h the diagonal of H_u.
        """
        scores, targets, o = self.problem.scores, self.problem.targets, self.problem.arithmetic
        assert isinstance(scores, LinearHead)
        dx, dw, db = (
            o.total(tuple(t.shape), scores.dtype, scores.device) if want and t is not None else None
            for want, t in zip(wants, scores.tensors[:3], strict=True)
        )
        plan = self.plan(resident=False)
        visit = Visit(self, plan, crosses=False)
        with self.problem.products():
            for chunk in plan.row_chunks(targets.count):
                rows = visit.enter(chunk)
                squares = visit.loaded.square()
                straight = squared = torch.zeros((), dtype=scores.dtype, device=scores.device)
                for classes in visit.classes:
                    tile = visit.tile(classes)
                    h = self.tile_diagonal(tile, rows)
                    if dw is not None:
                        dw.add_product(classes, h.t(), squares)
                    if db is not None:
                        db.add(classes, h.sum(0))
                    if dx is not None:
                        w = cut(scores.w, classes).to(scores.dtype)
                        straight = straight + self._rest(tile, rows) @ w.square()
                        squared = squared + tile.q @ w
                if dx is not None:
                    rank_one = (rows.beta - rows.alpha).to(scores.dtype)[:, None]
                    dx.put(targets.pick(chunk), straight + rank_one * squared.square())
        return tuple(None if total is None else total.finish(None, scores.dtype) for total in (dx, dw, db))

    def feature_block(self, row: int) -> Tensor:
        """∂²L/∂x∂x of the row-th of the M rows, (D, D)."""
        scores, targets = self.problem.scores, self.problem.targets
        assert isinstance(scores, LinearHead)
        visit = Visit(self, self.plan(resident=False), crosses=False)
        rows = visit.enter(slice(row, row + 1))
        straight = bent = torch.zeros((), dtype=scores.dtype, device=scores.device)
        with self.problem.products():
            for classes in visit.plan.class_tiles(targets.classes):
                tile, w = visit.tile(classes), cut(scores.w, classes).to(scores.dtype)
                straight = straight + (w * self._rest(tile, rows).t()).t() @ w
                bent = bent + tile.q[0] @ w
        return straight + (rows.beta - rows.alpha).to(scores.dtype) * bent[:, None] * bent

    def logit_traces(self) -> Tensor:
        """Σ_c of the diagonal of H_u, (M,) float64."""
        sums = []
        plan = self.plan(resident=False)
        visit = Visit(self, plan, crosses=False)
        with self.problem.products():
            for chunk in plan.row_chunks(self.problem.targets.count):
                rows = visit.enter(chunk)
                total = torch.zeros_like(rows.alpha)
                for classes in visit.classes:
                    total = total + self.tile_diagonal(visit.tile(classes), rows).sum(1).to(total.dtype)
                sums.append(total)
        return torch.cat(sums) if sums else torch.zeros_like(self.weight)

    def class_diagonal(self, c: int) -> Tensor:
        """∂²L/∂u_c², (M,), of one class."""
        classes = slice(c, c + 1)
        plan = self.plan(resident=False)
        visit = Visit(self, plan, crosses=False)
        parts = [
            self.tile_diagonal(visit.tile(classes), rows)[:, 0].clone()
            for rows in map(visit.enter, plan.row_chunks(self.problem.targets.count))
        ]
        return torch.cat(parts) if parts else self.weight.to(self.problem.scores.dtype)

    def tile_diagonal(self, tile: Tile, rows: Rows) -> Tensor:
        """h of a tile (R, T): s²∘(α·p(1 − p) + β·p²) + ε, with the digits of 1 − p where p is almost 1."""
        dtype, p = tile.p.dtype, tile.p
        beta = rows.beta.to(dtype)[:, None]
        if self.form is Form.OUTER:
            return p.square() * beta
        r = rows.found.r[:, None]
        largest = (1 / (1 + r)).to(dtype)
        others = torch.where(p == largest, (r / (1 + r)).to(dtype), 1 - p)
        h = p * others * rows.alpha.to(dtype)[:, None]
        if self.z_loss:
            h = h + p.square() * beta
        if tile.slope is not None:
            h = h * tile.slope.square()
        return h if tile.epsilon is None else h + tile.epsilon

    def _rest(self, tile: Tile, rows: Rows) -> Tensor:
        """What beside the part of rank one, (β − α)·q qᵀ, is diagonal: α·p∘s² + ε, (R, T)."""
        rest = tile.p * rows.alpha.to(tile.p.dtype)[:, None]
        if tile.slope is not None:
            rest = rest * tile.slope.square()
        return rest if tile.epsilon is None else rest + tile.epsilon

    def _bent(self, tile: Tile, t: Tensor, rows: Rows, rho: Tensor) -> Tensor:
        """R of a tile, in the place of T."""
        dtype = t.dtype
        alpha, beta, mean = (v.to(dtype)[:, None] for v in (rows.alpha, rows.beta * rho, rho))
        if self.form is Form.OUTER:
            return torch.mul(tile.p, beta, out=t)
        curved = None if tile.epsilon is None else t * tile.epsilon
        if tile.slope is not None:
            t.mul_(tile.slope)
        t.sub_(mean).mul_(alpha)
        if self.z_loss:
            t.add_(beta)
        t.mul_(tile.q)
        return t if curved is None else t.add_(curved)

    def rows(self, chunk: slice) -> Rows:
        found, gamma, kappa = self.found.rows(chunk), cut(self.weight, chunk), 2 * self.z_loss
        lse = found.logsumexp
        one = torch.ones_like(gamma)
        if self.form is Form.OUTER:
            return Rows(found, one * 0, gamma, Coefficients(one, kappa * lse if kappa else None))
        square = self.problem.scores.transform.gain**2
        mass = found.a + kappa * lse if self.form is Form.HESSIAN else found.a
        asked = Coefficients(gamma, kappa * lse * gamma if kappa else None)
        return Rows(found, gamma * mass * square, gamma * kappa * square, asked)

    def plan(self, *, resident: bool, crosses: bool = False) -> Plan:
        curved = self.problem.scores.transform.curved
        # P and T, and what the full Hessian wants beside them; then what comes and goes
        extra = (1 + curved) * (self.form is Form.HESSIAN and (curved or crosses))
        return self.problem.plan(
            resident=resident, buffers=2 + extra, temporaries=2 + 4 * curved + crosses, least_rows=2
        )


class Visit:
    """One sweep: a chunk of rows at a time, its tiles kept where the plan has room for them."""

    def __init__(self, curvature: Curvature, plan: Plan, crosses: bool) -> None:
        self.of, self.plan, self.crosses = curvature, plan, crosses
        problem = curvature.problem
        self.classes = list(plan.class_tiles(problem.targets.classes))
        self.workspace = Workspace(
            problem, plan, slopes=problem.scores.transform.curved, buffers=2, slope_at=2
        )

    def enter(self, chunk: slice) -> Rows:
        self.chunk = chunk
        self.loaded = self.of.problem.scores.load(self.of.problem.targets.pick(chunk))
        self.rows = self.of.rows(chunk)
        self.kept = [self.tile(classes) for classes in self.classes] if self.plan.resident else None
        return self.rows

    def seen(self, number: int) -> Tile:
        """The number-th of a chunk's tiles; the next one may be written in its place."""
        return self.tile(self.classes[number]) if self.kept is None else self.kept[number]

    def product(self, along: Tangents, sink: Sink) -> None:
        picked, count = self.of.problem.targets.pick(self.chunk), len(self.classes)
        rho, held = torch.zeros_like(self.rows.alpha), []
        for number in range(count):
            tile, t = self._pushed(number, along)
            rho = rho + (tile.q * t).sum(1).to(rho.dtype)  # vecdot takes many times as long
            if self.kept is not None:
                held.append((tile, t))
        for number in range(count):
            tile, t = held[number] if held else self._pushed(number, along)
            if tile.g is not None:
                sink.add_tangent(picked, along, tile.classes, tile.g)
            sink.add(picked, self.loaded, tile.classes, self.of._bent(tile, t, self.rows, rho))

    def _pushed(self, number: int, along: Tangents) -> tuple[Tile, Tensor]:
        classes = self.classes[number]
        tile = self.seen(number)
        room = self.workspace.tile(self.chunk, classes, 1)
        problem = self.of.problem
        t = problem.scores.push(
            problem.arithmetic, problem.targets.pick(self.chunk), self.loaded, along, classes, room
        )
        return tile, t

    def tile(self, classes: slice) -> Tile:
        of, problem, rows, chunk = self.of, self.of.problem, self.rows, self.chunk
        found = rows.found
        seen, shifted = revisit(problem, self.workspace, chunk, self.loaded, classes, found)
        bend = None
        if seen.slope is not None and of.form is Form.HESSIAN:
            z = shifted + found.m.to(shifted.dtype)[:, None]
            bend = problem.scores.bend(z, seen.slope, classes)
        seen = seen._replace(z=shifted.exp_())
        if of.form is Form.OUTER:
            return Tile(classes, differentiate(problem, chunk, seen, found, rows.asked), None, None, None)
        epsilon = g = None
        if bend is not None or (self.crosses and of.form is Form.HESSIAN):
            g = differentiate_logits(problem, chunk, seen._replace(z=seen.z.clone()), found, rows.asked)
            epsilon = None if bend is None else bend.mul_(g)
            g = (g if seen.slope is None else g.mul_(seen.slope)) if self.crosses else None
        p = seen.z.mul_((1 / (1 + found.r)).to(seen.z.dtype)[:, None])
        return Tile(classes, p, seen.slope, epsilon, g)
