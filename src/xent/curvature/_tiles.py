"""The curvature of a row's loss in its inner logits u, and its products through a head, tile by tile.

    H_u = s∘[α·(diag(p) − p pᵀ) + β·p pᵀ]∘s + diag(ε)                 (C, C), one row; s = dz/du

    form             α                    β      ε                     p
    Hessian          γ(a + 2λ·lse)        2λγ    ∂L/∂z∘d²z/du²         softmax(z)
    Gauss–Newton     γ·a                  2λγ    0                     softmax(z)
    outer products   0                    γ      0                     ∂ℓ/∂u, with s = 1

γ is a row's weight over the divisor, λ the z-loss. Tangents of x, W, b are pushed to T = Ẋ Wᵀ + X Vᵀ + v_b:

    ρ = ⟨p∘s, T⟩        R = p∘s∘(α·(s∘T − ρ) + β·ρ) + ε∘T        W-part Rᵀx    x-part R W    b-part Rᵀ1

and in x and W together the Hessian also has the terms Gᵀẋ and G V, G = ∂L/∂u. Where the budget holds P and T
of a chunk of rows, a product costs three matrix products, each further right-hand side two; else five.

Where p_k rounds to 1 for a row's largest class k, 1 − p_k and ζ_k − ρ, ζ = s∘T, have no digits left. So k is
treated apart: with p̂ the other classes' probabilities and m = Σ p̂ = r/(1 + r),

    1 − p_k = m        ρ − ζ_k = ⟨p̂, ζ⟩ − m·ζ_k        Var_p(ζ) = ⟨p̂, (ζ − ζ_k)²⟩ − (ρ − ζ_k)²
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from xent._core.coefficients import Coefficients
from xent._core.logits import GradientAccumulator, LinearHead, Tangents
from xent._core.ops import cut
from xent._core.plan import Plan
from xent._core.problem import Problem
from xent._core.statistics import RequestedOutputs, Statistics, TargetColumns, statistics_dtype
from xent._core.tiles.formulas import differentiate, differentiate_logits
from xent._core.tiles.sweep import Workspace, revisit, statistics


class Form(Enum):
    HESSIAN = "Hessian"
    GAUSS_NEWTON = "Gauss–Newton"
    OUTER = "outer products"


class Rows(NamedTuple):
    """The coefficients of a chunk of rows, each (R,)."""

    found: Statistics
    alpha: Tensor  # times dz/du's constant factor, squared
    beta: Tensor
    asked: Coefficients  # of G, or of ∂ℓ/∂u where outer products are taken

    @property
    def others(self) -> Tensor:
        """m = 1 − p_k, (R,), computed without cancellation."""
        return self.found.r / (1 + self.found.r)


class Tile(NamedTuple):
    classes: slice
    top: TargetColumns  # the rows' most probable classes
    p: Tensor  # (R, T)
    slope: Tensor | None  # (R, T) the part of s that is not constant
    epsilon: Tensor | None  # (R, T)
    g: Tensor | None  # (R, T) ∂L/∂u, if requested

    @property
    def q(self) -> Tensor:
        """p∘s, (R, T)."""
        return self.p if self.slope is None else self.p * self.slope


@dataclass(frozen=True)
class Curvature:
    """The curvature of the M rows of a head's problem, whose statistics are known."""

    problem: Problem
    found: Statistics  # with k
    form: Form
    weight: Tensor  # (M,) γ, float64
    z_loss: float = 0.0

    @classmethod
    def of(
        cls,
        problem: Problem,
        form: Form,
        scale: float | Tensor = 1.0,
        row_weight: Tensor | None = None,  # (M,)
        z_loss: float = 0.0,
    ) -> Curvature:
        """Return the curvature of rows with weights scale·row_weight."""
        if problem.ranks is not None:
            raise NotImplementedError(
                "curvature is of a head whose classes are all here, not spread over processes: gather the "
                "weight and the bias, or the logits, first"
            )
        found = statistics(problem.request(RequestedOutputs(argmax=True)))
        weight = torch.ones_like(found.m) * scale
        return cls(problem, found, form, weight if row_weight is None else weight * row_weight, z_loss)

    def products(
        self, tangents: Sequence[Tangents], wants: tuple[bool, ...]
    ) -> list[tuple[Tensor | None, ...]]:
        """Return H·(ẋ, V, v_b) for each tangent: a tensor for each of features, weight and bias wanted."""
        logits, targets, ops = self.problem.logits, self.problem.targets, self.problem.ops
        accumulators = [logits.accumulator(ops, wants) for _ in tangents]
        crosses = self.form is Form.HESSIAN and any(
            accumulator.crosses(along) for accumulator, along in zip(accumulators, tangents, strict=True)
        )
        plan = self.plan(resident=True, crosses=crosses)
        visit = Visit(self, plan, crosses)
        with self.problem.products():
            for chunk in plan.row_chunks(targets.count):
                visit.enter(chunk)
                for along, accumulator in zip(tangents, accumulators, strict=True):
                    visit.product(along, accumulator)
        return [accumulator.finish(None) for accumulator in accumulators]

    def diagonal(self, wants: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """Return the diagonal of H in features, weight and bias, in their shapes, where wanted.

        W: hᵀ x² and b: hᵀ 1 with h the diagonal of H_u; x: the quadratic forms of H_u along W's columns.
        """
        logits, targets, ops = self.problem.logits, self.problem.targets, self.problem.ops
        assert isinstance(logits, LinearHead)
        dx, dw, db = (
            ops.total(tuple(t.shape), logits.dtype, logits.device) if want and t is not None else None
            for want, t in zip(wants, logits.leaves, strict=True)
        )
        plan = self.plan(resident=False)
        visit = Visit(self, plan, crosses=False)
        with self.problem.products():
            for chunk in plan.row_chunks(targets.count):
                rows = visit.enter(chunk)
                squares = visit.loaded.x.square()
                forms = None if dx is None else Forms(self, rows, logits.w)
                for classes in visit.classes:
                    tile = visit.tile(classes)
                    if dw is not None or db is not None:
                        h = self.tile_diagonal(tile, rows)
                    if dw is not None:
                        dw.add_product(classes, h.t(), squares)
                    if db is not None:
                        db.add(classes, h.sum(0))
                    if forms is not None:
                        forms.add(tile)
                if dx is not None and forms is not None:
                    dx.put(targets.pick(chunk), forms.value())
        return tuple(None if total is None else total.finish(None, logits.dtype) for total in (dx, dw, db))

    def feature_block(self, row: int) -> Tensor:
        """Return ∂²L/∂x∂x of the row-th of the M rows, (D, D).

        α·Σ p (ζ − ρ)(ζ − ρ)ᵀ + β·⟨p, ζ⟩⟨p, ζ⟩ᵀ + Wᵀ ε W with ζ = s∘W, (C, D), and ρ = Σ p ζ: a sum of
        squares, which rounding does not make negative.
        """
        logits = self.problem.logits
        assert isinstance(logits, LinearHead)
        visit = Visit(self, self.plan(resident=True), crosses=False)
        rows = visit.enter(slice(row, row + 1))
        assert rows.found.k is not None
        numbers = range(len(visit.classes))

        def seen(number: int) -> tuple[Tile, Tensor, Tensor]:
            tile = visit.seen(number)
            w = cut(logits.w, tile.classes).to(logits.dtype)
            return tile, w, w if tile.slope is None else w * tile.slope.t()

        zero = torch.zeros(logits.w.shape[1], dtype=logits.dtype, device=logits.device)
        at_top, away, mean = zero, zero, zero
        with self.problem.products():
            for number in numbers:
                tile, _, zeta = seen(number)
                at_top = at_top + tile.top.here(zeta[tile.top.local[:, 0]])[0]
            for number in numbers:
                tile, _, zeta = seen(number)
                away, mean = away + tile.p[0] @ (zeta - at_top), mean + tile.p[0] @ zeta
            block = torch.outer(mean, mean) * rows.beta.to(mean.dtype)
            for number in numbers:
                tile, w, zeta = seen(number)
                apart = zeta - at_top - away
                block.addmm_(apart.t() * (tile.p[0] * rows.alpha.to(mean.dtype)), apart)
                if tile.epsilon is not None:
                    block.addmm_(w.t() * tile.epsilon[0], w)
        return block

    def logit_traces(self) -> Tensor:
        """Return the trace of H_u, (M,) float64."""
        if self.form is Form.OUTER:
            return self.weight * self.gradient_norms().square()
        found = torch.zeros_like(self.weight)
        for chunk, rows, tile in self._tiles():
            found[chunk] += self.tile_diagonal(tile, rows).sum(1).to(found.dtype)
        return found

    def gradients(self) -> Tensor:
        """Return ∂ℓ/∂u, (M, C); for the form of outer products."""
        assert self.form is Form.OUTER
        logits, targets = self.problem.logits, self.problem.targets
        whole = torch.empty(targets.count, targets.n_classes, dtype=logits.dtype, device=logits.device)
        for chunk, _, tile in self._tiles():
            whole[chunk, tile.classes] = tile.p
        return whole

    def gradient_norms(self) -> Tensor:
        """Return ‖∂ℓ/∂u‖, (M,) float64, without squaring small numbers."""
        assert self.form is Form.OUTER
        found = torch.zeros_like(self.weight)
        for chunk, _, tile in self._tiles():
            found[chunk] = torch.hypot(found[chunk], norms(tile.p))
        return found

    def _tiles(self) -> Iterator[tuple[slice, Rows, Tile]]:
        plan = self.plan(resident=False)
        visit = Visit(self, plan, crosses=False)
        with self.problem.products():
            for chunk in plan.row_chunks(self.problem.targets.count):
                rows = visit.enter(chunk)
                for classes in visit.classes:
                    yield chunk, rows, visit.tile(classes)

    def class_diagonal(self, c: int) -> Tensor:
        """Return ∂²L/∂u_c² for one class c, (M,)."""
        classes = slice(c, c + 1)
        plan = self.plan(resident=False)
        visit = Visit(self, plan, crosses=False)
        parts = [
            self.tile_diagonal(visit.tile(classes), rows)[:, 0].clone()
            for rows in map(visit.enter, plan.row_chunks(self.problem.targets.count))
        ]
        return torch.cat(parts) if parts else self.weight.to(self.problem.logits.dtype)

    def tile_diagonal(self, tile: Tile, rows: Rows) -> Tensor:
        """Return h of a tile, (R, T): s²∘(α·p(1 − p) + β·p²) + ε."""
        dtype, p = tile.p.dtype, tile.p
        beta = rows.beta.to(dtype)[:, None]
        if self.form is Form.OUTER:
            return p.square() * beta
        h = tile.top.put(self.problem.ops, 1 - p, rows.others.to(dtype)[:, None])
        h.mul_(p).mul_(rows.alpha.to(dtype)[:, None])
        if self.z_loss:
            h.add_(p.square() * beta)
        if tile.slope is not None:
            h.mul_(tile.slope.square())
        return h if tile.epsilon is None else h.add_(tile.epsilon)

    def _bent(self, tile: Tile, t: Tensor, rows: Rows, mean: Tensor, away: Tensor) -> Tensor:
        """Compute R of a tile in the memory of T; mean is ρ, (R,), and away ρ − ζ_k."""
        ops, dtype = self.problem.ops, t.dtype
        alpha, beta, mean, away = (v.to(dtype)[:, None] for v in (rows.alpha, rows.beta * mean, mean, away))
        if self.form is Form.OUTER:
            return torch.mul(tile.p, beta, out=t)
        curved = None if tile.epsilon is None else t * tile.epsilon
        if tile.slope is not None:
            t.mul_(tile.slope)
        t = tile.top.put(ops, t.sub_(mean), -away).mul_(alpha)
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
        square = self.problem.logits.map.rows(self.problem.selection.pick(chunk)).gain ** 2
        mass = found.a + kappa * lse if self.form is Form.HESSIAN else found.a
        asked = Coefficients(gamma, kappa * lse * gamma if kappa else None)
        return Rows(found, gamma * mass * square, gamma * kappa * square, asked)

    def plan(self, *, resident: bool, crosses: bool = False) -> Plan:
        curved = self.problem.logits.map.curved
        # P and T, further tensors for the full Hessian, and temporaries
        extra = (1 + curved) * (self.form is Form.HESSIAN and (curved or crosses))
        return self.problem.plan(
            resident=resident, buffers=2 + extra, temporaries=2 + 4 * curved + crosses, least_rows=2
        )


class Visit:
    """One sweep by chunks of rows; a chunk's tiles are stored where the plan has memory for them."""

    def __init__(self, curvature: Curvature, plan: Plan, crosses: bool) -> None:
        self.of, self.plan, self.crosses = curvature, plan, crosses
        problem = curvature.problem
        self.classes = list(plan.class_tiles(problem.targets.n_classes))
        self.workspace = Workspace(problem, plan, slopes=problem.logits.map.curved, buffers=2, slope_at=2)

    def enter(self, chunk: slice) -> Rows:
        self.chunk = chunk
        self.loaded = self.of.problem.logits.load(self.of.problem.targets.pick(chunk))
        self.rows = self.of.rows(chunk)
        self.kept = [self.tile(classes) for classes in self.classes] if self.plan.resident else None
        return self.rows

    def seen(self, number: int) -> Tile:
        """Return the number-th of a chunk's tiles; the next one may overwrite it."""
        return self.tile(self.classes[number]) if self.kept is None else self.kept[number]

    def product(self, along: Tangents, accumulator: GradientAccumulator) -> None:
        picked, count = self.of.problem.targets.pick(self.chunk), len(self.classes)
        ops = self.of.problem.ops
        others = own = at_top = torch.zeros_like(self.rows.alpha)
        held = []
        for number in range(count):
            tile, t = self._pushed(number, along)
            share = tile.q * t  # vecdot is many times slower
            own = own + tile.top.take(share, 0.0)[:, 0]
            others = others + tile.top.put(ops, share, 0.0).sum(1)
            zeta = tile.top.take(t, 0.0)
            at_top = at_top + (zeta if tile.slope is None else zeta * tile.top.take(tile.slope, 0.0))[:, 0]
            if self.kept is not None:
                held.append((tile, t))
        mean, away = others + own, others - self.rows.others * at_top
        for number in range(count):
            tile, t = held[number] if held else self._pushed(number, along)
            if tile.g is not None:
                accumulator.add_tangent(picked, along, tile.classes, tile.g)
            accumulator.add(picked, self.loaded, tile.classes, self.of._bent(tile, t, self.rows, mean, away))

    def _pushed(self, number: int, along: Tangents) -> tuple[Tile, Tensor]:
        classes = self.classes[number]
        tile = self.seen(number)
        buffers = self.workspace.tile(self.chunk, classes, 1)
        problem = self.of.problem
        t = problem.logits.push(
            problem.ops, problem.targets.pick(self.chunk), self.loaded, along, classes, buffers
        )
        return tile, t

    def tile(self, classes: slice) -> Tile:
        of, problem, rows, chunk = self.of, self.of.problem, self.rows, self.chunk
        found = rows.found
        seen, shifted = revisit(problem, self.workspace, chunk, self.loaded, classes, found)
        bend = None
        if seen.slope is not None and of.form is Form.HESSIAN:
            z = shifted + found.m.to(shifted.dtype)[:, None]
            bend = self.loaded.map.bend(z, seen.slope, classes)
        seen = seen._replace(z=shifted.exp_())
        assert found.k is not None
        whole = classes == slice(0, problem.targets.n_classes)
        top = TargetColumns.locate(found.k[:, None], classes, holds_all=whole)
        if of.form is Form.OUTER:
            return Tile(
                classes, top, differentiate(problem, chunk, seen, found, rows.asked), None, None, None
            )
        epsilon = g = None
        if bend is not None or (self.crosses and of.form is Form.HESSIAN):
            g = differentiate_logits(problem, chunk, seen._replace(z=seen.z.clone()), found, rows.asked)
            epsilon = None if bend is None else bend.mul_(g)
            g = (g if seen.slope is None else g.mul_(seen.slope)) if self.crosses else None
        p = seen.z.mul_((1 / (1 + found.r)).to(seen.z.dtype)[:, None])
        return Tile(classes, top, p, seen.slope, epsilon, g)


def norms(rows: Tensor) -> Tensor:
    """Return the 2-norms of rows (R, T), (R,) in the statistics' type, without over- or underflow."""
    wide = statistics_dtype(rows.device)
    if rows.shape[1] == 0:
        return torch.zeros(rows.shape[0], dtype=wide, device=rows.device)
    size = rows.abs().amax(1, keepdim=True)
    scaled: Tensor = torch.linalg.vector_norm(rows / torch.where(size > 0, size, 1.0), dim=1, dtype=wide)
    return scaled * size[:, 0].to(wide)


class Forms:
    """The quadratic forms uᵀ H_u u of a chunk of rows and the columns u of a matrix (C, K): (R, K).

    Two matrix products a tile:

    α·Var_p(ζ) + β·⟨p, ζ⟩² + ⟨ε, u²⟩ with ζ = s∘u, and Var_p(ζ) = ⟨p̂, ζ²⟩ − 2ζ_k⟨p̂, ζ⟩ + m·ζ_k² − (ρ − ζ_k)².
    """

    def __init__(self, curvature: Curvature, rows: Rows, columns: Tensor) -> None:
        logits, dtype = curvature.problem.logits, curvature.problem.logits.dtype
        self.ops, self.rows, self.columns = curvature.problem.ops, rows, columns
        # H_u·1 = 0 here, so subtract the mean: a large common part would cancel the digits of differences
        self.curved, seen = logits.map.curved, curvature.form is Form.OUTER or logits.map.curved
        self.centre = torch.zeros_like(columns[0], dtype=dtype) if seen else columns.mean(0, dtype=dtype)
        assert rows.found.k is not None
        self.at_top = columns[rows.found.k].to(dtype).sub_(self.centre)  # (R, K), without the factor s_k
        self.own = self.slope = torch.zeros_like(self.at_top[:, :1])
        self.first = self.second = torch.zeros((), dtype=dtype, device=columns.device)

    def add(self, tile: Tile) -> None:
        dtype, top = tile.p.dtype, tile.top
        u = cut(self.columns, tile.classes).to(dtype) - self.centre
        q = tile.p.clone() if tile.slope is None else tile.q
        self.own = self.own + top.take(q, 0.0)
        q = top.put(self.ops, q, 0.0)
        self.first = self.first + q @ u
        if tile.slope is not None:
            self.slope = self.slope + top.take(tile.slope, 0.0)
            q = q.mul_(tile.slope)
        q = q.mul_(self.rows.alpha.to(dtype)[:, None])
        self.second = self.second + (q if tile.epsilon is None else q.add_(tile.epsilon)) @ u.square()

    def value(self) -> Tensor:
        dtype = self.at_top.dtype
        alpha, beta, m = (v.to(dtype)[:, None] for v in (self.rows.alpha, self.rows.beta, self.rows.others))
        mean = self.first + self.own * self.at_top + self.centre
        zeta = self.at_top * self.slope if self.curved else self.at_top
        spread = m * zeta.square() - 2 * zeta * self.first - (self.first - m * zeta).square()
        return self.second + alpha * spread + beta * mean.square()
