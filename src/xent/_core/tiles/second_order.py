"""Second derivatives of the rows' losses in closed form, tile by tile; no logits are kept.

Along tangents (ẋ, Ẇ, ḃ) of the logits' tensors and q̇ of the probabilities, with u̇ pushed through the head,
ζ = (dz/du)·u̇, f = ∂t/∂q and the row coefficients α, γ of the gradient:

    ℓ̇ = a⟨p, ζ⟩ − ⟨t, ζ⟩ + ⟨f∘q̇, −log p⟩        lsė = ⟨p, ζ⟩
    Ḣ = ē⟨p, ζ⟩ − ⟨p∘(z − m), ζ⟩                   (log p_y)˙ = ζ_y − ⟨p, ζ⟩ of each own class

    R = dz/du·(α·p∘(ζ − ⟨p, ζ⟩) + γ·(p·⟨f, q̇⟩ − f∘q̇) + η·ṡ) + d²z/du²·u̇∘(∂L/∂z)
    ṡ = −p∘((ζ − ⟨p, ζ⟩)(z − m − ē) + ζ − ⟨p, ζ⟩ + Ḣ), the derivative of ∂H/∂z = −p∘(z − m − ē)
    x-part: R W + G Ẇ        W-part: Rᵀx + Gᵀẋ        b-part: Rᵀ1        q-part: γ·f∘(⟨p, ζ⟩ − ζ)

with G = ∂L/∂u. `tangent` gives the first line (a Jacobian product); `product` gives both: the derivative of
⟨gradient, tangents⟩ in everything that the gradient depends on, which is the Hessian product.

A row that is sure of a class k has p_k = 1 to the last digit, and none left of ζ_k − ⟨p, ζ⟩. So the target's
own class, and another with more than half of a row's probability, are apart; with p̂ of all but k,

    ⟨p, ζ⟩ − ζ_k = ⟨p̂, ζ⟩ − ζ_k·Σ p̂

Of log P̄, P̄ the sum of p over the classes that are not own, μ = ∂L/∂log P̄ and π = p/P̄ there:

    (log P̄)˙ = ⟨π, ζ⟩ − ⟨p, ζ⟩ = (1 − P̄)·⟨π, ζ⟩ − Σ_own p·ζ
    R = dz/du·π∘((α·P̄ + μ·(1 − P̄))·(ζ − ⟨π, ζ⟩) + (α − μ)·P̄·(log P̄)˙)
    R = dz/du·(α − μ)·p∘(ζ − ⟨p, ζ⟩)                                     of an own class
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xent._core.coefficients import Coefficients
from xent._core.collectives import ClassGroup
from xent._core.logit_map import Rows
from xent._core.logits import Loaded, Tangents
from xent._core.ops import cut
from xent._core.plan import Plan
from xent._core.problem import Problem
from xent._core.statistics import Statistics, TargetColumns
from xent._core.tiles.formulas import (
    Tile,
    beside_others,
    differentiate_logits,
    share_of_others,
    sum_of_others,
    target_residual,
)
from xent._core.tiles.sweep import TileGradients, Workspace, revisit, target_total


class RowTangent(NamedTuple):
    loss: Tensor  # (M,) ℓ̇
    logsumexp: Tensor  # (M,)
    mass: Tensor  # (M,) ⟨f, q̇⟩
    entropy: Tensor | None = None  # (M,) Ḣ
    log_rest: Tensor | None = None  # (M,) (log P̄)˙
    log_prob: Tensor | None = None  # (M, K)
    centred: Tensor | None = None  # (M, K) ζ_y − ⟨p, ζ⟩ of the own classes
    # where a class k that is no target is sure
    apart: Tensor | None = None  # (M,) ⟨p̂, ζ⟩
    left: Tensor | None = None  # (M,) Σ p̂
    at_sure: Tensor | None = None  # (M,) ζ_k
    sure: Tensor | None = None  # (M,) int64 k, −1 where it is not here
    of_rest: Tensor | None = None  # (M,) ⟨π, ζ⟩

    def rows(self, rows: slice) -> RowTangent:
        return RowTangent(*(None if t is None else cut(t, rows) for t in self))  # type: ignore[arg-type]

    @property
    def away(self) -> Tensor:
        """⟨p, ζ⟩ − ζ_k, (M,)."""
        assert self.apart is not None
        assert self.left is not None
        assert self.at_sure is not None
        return self.apart - self.left * self.at_sure

    @property
    def outputs(self) -> tuple[Tensor | None, ...]:
        return self.loss, self.logsumexp, self.entropy, self.log_rest, self.log_prob


class _Pushed(NamedTuple):
    tile: Tile  # z: exp(z − m)
    shifted: Tensor | None  # (R, T) z − m, where entropy or probabilities ask for it
    du: Tensor  # (R, T) tangent of u
    zeta: Tensor  # (R, T) tangent of z; in the place of du where the transform is straight
    bend: Tensor | None  # (R, T) d²z/du² ÷ gain


def tangent(problem: Problem, found: Statistics, tangents: Tangents, dq: Tensor | None) -> RowTangent:
    """Return the directional derivatives of the rows' ℓ and lse."""
    problem = problem.completed(found)
    plan = _plan(problem, resident=False)
    workspace = _workspace(problem, plan)
    with problem.products():
        parts = [
            _chunk_tangent(problem, plan, workspace, chunk, found.rows(chunk), tangents, dq)[0]
            for chunk in plan.row_chunks(problem.targets.count)
        ]
    part = _concatenate(parts, found, problem)
    return part if problem.ranks is None else _of_all_classes(part, problem.ranks)


def product(
    problem: Problem,
    found: Statistics,
    coefficients: Coefficients,
    tangents: Tangents,
    dq: Tensor | None,
    wants: tuple[bool, ...],  # of probabilities, then of the logits' tensors
) -> tuple[RowTangent, TileGradients]:
    """Return row tangents, and the derivative of ⟨gradient, tangents⟩ in q and in the logits' tensors."""
    problem = problem.completed(found)
    logits, targets, ops = problem.logits, problem.targets, problem.ops
    # where other processes hold classes too, a row's tangent is not known when its own tiles have been seen
    whole = None if problem.ranks is None else tangent(problem, found, tangents, dq)
    plan = _plan(problem, resident=whole is None)
    workspace = _workspace(problem, plan)
    accumulator = logits.accumulator(ops, wants[1:])
    q_part = target_total(problem) if wants[0] else None
    wants_g = logits.map.curved or accumulator.crosses(tangents)
    parts = []

    def visit(chunk: slice) -> None:
        picked = targets.pick(chunk)
        loaded = logits.load(picked)
        rows = found.rows(chunk)
        asked = coefficients.rows(chunk)
        if whole is None:
            part, kept = _chunk_tangent(problem, plan, workspace, chunk, rows, tangents, dq)
        else:
            part, kept = whole.rows(chunk), []
        parts.append(part)
        for number, classes in enumerate(plan.class_tiles(targets.n_classes)):
            if kept:
                pushed = kept[number]
            else:
                pushed = _push(problem, workspace, chunk, picked, loaded, classes, rows, tangents)
            if q_part is not None:
                factor = targets.probability_factor(classes, pushed.zeta.dtype)
                centred = part.logsumexp.to(pushed.zeta.dtype)[:, None] - pushed.zeta
                q_part.put((picked, classes), centred * factor * asked.loss.to(centred.dtype)[:, None])
            r = _hessian_tile(problem, picked, pushed, rows, asked, part, dq)
            if wants_g:
                g = differentiate_logits(problem, chunk, pushed.tile, rows, asked)
                slope = pushed.tile.slope
                if slope is not None:
                    assert pushed.bend is not None
                    r = r * slope + g * pushed.bend * pushed.du
                    g = g * slope
                accumulator.add_tangent(picked, tangents, classes, g)
            accumulator.add(picked, loaded, classes, r)

    with problem.products():
        for block in problem.blocks():
            for chunk in plan.row_chunks(block.stop, block.start):
                visit(chunk)
            if problem.ranks is not None:
                accumulator.share(targets.pick(block), problem.ranks)
    q = targets.probabilities
    gradients = TileGradients(q_part, None if q is None else q.dtype, accumulator)
    return _concatenate(parts, found, problem) if whole is None else whole, gradients


def _chunk_tangent(
    problem: Problem,
    plan: Plan,
    workspace: Workspace,
    chunk: slice,
    found: Statistics,
    tangents: Tangents,
    dq: Tensor | None,
) -> tuple[RowTangent, list[_Pushed]]:
    """Return the row tangents of a chunk; its tiles, where the plan keeps them."""
    logits, targets = problem.logits, problem.targets
    picked = targets.pick(chunk)
    loaded = logits.load(picked)
    p_zeta = slope = surprise = mass = p_zeta_z = torch.zeros_like(found.m)
    centred = p_zeta[:, None].expand(-1, targets.n_own)
    apart = left = at_sure = of_rest = own_zeta = p_zeta
    sure = torch.full_like(found.m, -1, dtype=torch.int64)
    kept = []
    for classes in plan.class_tiles(targets.n_classes):
        pushed = _push(problem, workspace, chunk, picked, loaded, classes, found, tangents)
        zeta, own, shifted = pushed.zeta, pushed.tile.own, pushed.shifted
        # the own class apart, as in the gradient: p_y − 1 of a row that is sure is smaller than p_y rounds
        pushed, part = _part_of_tile(problem, pushed, found)
        others = part.rest + part.of_sure * part.at_sure
        p_zeta, slope, centred = p_zeta + others, slope + found.a * others, centred - others[:, None]
        apart, left, at_sure = apart + part.rest, left + part.left, at_sure + part.at_sure
        if problem.requested.log_rest:
            assert pushed.tile.base is not None
            here = (pushed.tile.z * zeta).sum(1).to(found.m.dtype)
            of_rest = of_rest + here * beside_others(found, pushed.tile.base)
        sure = torch.where(part.sure >= 0, part.sure, sure)
        t = targets.tile(chunk, classes, zeta.dtype)
        if t is not None:
            slope = slope - _others(problem, own, t * zeta).to(found.m.dtype)
        if own is not None:
            assert pushed.tile.own_z is not None
            log_p = found.log_prob(pushed.tile.own_z)
            excess = target_residual(targets, chunk, found.a, log_p)
            here = own.take(zeta, 0.0).to(found.m.dtype)
            slope = slope + own.here(excess * here).sum(1)
            each = own.here(torch.exp(log_p) * here)
            of_own = each.sum(1)
            p_zeta, apart, own_zeta = p_zeta + of_own, apart + of_own, own_zeta + of_own
            left = left + own.here(torch.exp(log_p)).sum(1)
            # (1 − p_y)·ζ_y − Σ_{j≠y} p_j·ζ_j: of a row that is sure, all that is left of ζ_y − ⟨p, ζ⟩
            centred = centred - own.here(torch.expm1(log_p) * here)
            if targets.n_own > 1:
                centred = centred - sum_of_others(each)
        if problem.requested.entropy:
            bent = torch.special.entr(pushed.tile.z) * zeta  # −p∘(z − m)∘ζ, times 1 + r
            p_zeta_z = p_zeta_z - bent.sum(1).to(found.m.dtype) / (1 + found.r)
        if dq is not None:
            dt = dq[picked, classes].to(zeta.dtype) * targets.probability_factor(classes, zeta.dtype)
            assert shifted is not None  # dq has probabilities beside it
            cost = found.log_partition.to(zeta.dtype)[:, None] - shifted
            surprise = surprise + torch.where(dt == 0, 0.0, dt * cost).sum(1).to(found.m.dtype)
            mass = mass + dt.sum(1).to(found.m.dtype)
        if plan.resident:
            kept.append(pushed)
    entropy = None if found.e is None else found.e / (1 + found.r) * p_zeta - p_zeta_z
    log_prob = centred if problem.requested.log_prob else None
    own_classes = None if targets.index is None else centred
    out = RowTangent(slope + surprise, p_zeta, mass, entropy, None, log_prob, own_classes)
    if problem.requested.log_rest:
        out = out._replace(log_rest=-torch.expm1(found.log_rest) * of_rest - own_zeta, of_rest=of_rest)
    return out._replace(apart=apart, left=left, at_sure=at_sure, sure=sure), kept


class _Part(NamedTuple):
    """The parts of a row's sums that a tile adds beside the target's class, each (R,)."""

    rest: Tensor  # ⟨p̂, ζ⟩, p̂ without the class that is sure
    left: Tensor  # Σ p̂
    of_sure: Tensor  # p of the class with more than half of a row's probability, 0 where it is not here
    at_sure: Tensor  # ζ there
    sure: Tensor  # int64 this class, −1 where it is not here


def _part_of_tile(problem: Problem, pushed: _Pushed, found: Statistics) -> tuple[_Pushed, _Part]:
    """Return the tile, as it was, and its part."""
    ops, tile, zeta = problem.ops, pushed.tile, pushed.zeta
    own, dtype, whole = tile.own, found.m.dtype, _partition(found, tile)
    of_own = None if own is None else own.take(tile.z, 0.0)
    e = tile.z if own is None else own.put(ops, tile.z, 0.0)
    most, top = e.max(1, keepdim=True)
    is_sure = most > 0.5 * whole[:, None]
    e = ops.scatter(e, top, torch.where(is_sure, 0.0, most))
    rest, left = (e * zeta).sum(1).to(dtype) / whole, e.sum(1).to(dtype) / whole
    e = ops.scatter(e, top, most)
    e = e if own is None or of_own is None else own.put(ops, e, of_own)
    of_sure = torch.where(is_sure, most, 0.0)[:, 0].to(dtype) / whole
    at_sure = torch.where(is_sure, zeta.gather(1, top), 0.0)[:, 0].to(dtype)
    sure = torch.where(is_sure, tile.classes.start + top, -1)[:, 0]
    return pushed._replace(tile=tile._replace(z=e)), _Part(rest, left, of_sure, at_sure, sure)


def _partition(found: Statistics, tile: Tile) -> Tensor:
    """Return Σ exp(z − base) over all classes, (R,)."""
    if found.lse_others is None:
        return 1 + found.r
    near = beside_others(found, tile.base) * torch.exp(found.log_rest)  # type: ignore[arg-type]  # there is one
    return 1 / near


def _others(problem: Problem, own: TargetColumns | None, values: Tensor) -> Tensor:
    """Return Σ over the classes of a tile (R, T) that are not the target's own."""
    return (values if own is None else own.put(problem.ops, values, 0.0)).sum(1)


def _push(
    problem: Problem,
    workspace: Workspace,
    chunk: slice,
    picked: Rows,
    loaded: Loaded,
    classes: slice,
    found: Statistics,
    tangents: Tangents,
) -> _Pushed:
    """Return a tile with its tangents."""
    logits, targets, ops = problem.logits, problem.targets, problem.ops
    tile, shifted = revisit(problem, workspace, chunk, loaded, classes, found)
    bend = None
    if tile.slope is not None:
        assert tile.base is not None
        bend = loaded.map.bend(shifted + tile.base.to(shifted.dtype)[:, None], tile.slope, classes)
    wanted = targets.probabilities is not None or problem.requested.entropy
    saved = shifted.clone() if wanted else None
    tile = tile._replace(z=ops.exp(shifted))
    if found.lse_others is not None and tile.own is not None:
        tile = tile._replace(z=tile.own.put(ops, tile.z, 0.0))
    du = zeta = torch.zeros_like(tile.z)
    if any(t is not None for t in tangents):
        du = logits.push(ops, picked, loaded, tangents, classes, workspace.tile(chunk, classes, 1))
        gain = tile.gain
        gain = gain.to(du.dtype)[:, None] if isinstance(gain, Tensor) else gain
        if tile.slope is not None:
            zeta = du * tile.slope * gain
        else:
            zeta = du if isinstance(gain, float) and gain == 1.0 else ops.mul(du, gain)
    return _Pushed(tile, saved, du, zeta, bend)


def _hessian_tile(
    problem: Problem,
    picked: Rows,
    pushed: _Pushed,
    found: Statistics,
    asked: Coefficients,
    part: RowTangent,
    dq: Tensor | None,
) -> Tensor:
    """Return gain·(α·p∘(ζ − ⟨p, ζ⟩) + γ·(p·⟨f, q̇⟩ − f∘q̇)), in the memory of ζ."""
    targets, ops = problem.targets, problem.ops
    dtype = pushed.zeta.dtype
    asked = asked.scaled(pushed.tile.gain)
    if found.lse_others is not None:
        return _hessian_of_others(problem, pushed, found, asked, part)
    gamma, alpha = asked.loss, asked.alpha(found.a)
    r = ops.sub(pushed.zeta, part.logsumexp.to(dtype)[:, None])
    if part.centred is not None and pushed.tile.own is not None:
        r = pushed.tile.own.put(ops, r, part.centred.to(dtype))
    if part.sure is not None:
        sure = TargetColumns.locate(part.sure[:, None], pushed.tile.classes)
        r = sure.put(ops, r, -part.away.to(dtype)[:, None])
    of_entropy = None
    if asked.entropy is not None:
        assert found.e is not None
        assert part.entropy is not None
        assert pushed.shifted is not None
        far = pushed.shifted - (found.e / (1 + found.r)).to(dtype)[:, None]
        far = torch.where(pushed.tile.z == 0, 0.0, far)  # a masked class is infinitely far, and has no share
        of_entropy = r * far + r + part.entropy.to(dtype)[:, None]
        of_entropy = of_entropy * pushed.tile.z * (asked.entropy / (1 + found.r)).to(dtype)[:, None]
    r = ops.mul(ops.mul(r, pushed.tile.z), (alpha / (1 + found.r)).to(dtype)[:, None])
    if of_entropy is not None:
        r = r - of_entropy
    if dq is not None:
        classes = pushed.tile.classes
        dt = dq[picked, classes].to(dtype) * targets.probability_factor(classes, dtype)
        share = (gamma * part.mass / (1 + found.r)).to(dtype)[:, None]
        r = r + pushed.tile.z * share - dt * gamma.to(dtype)[:, None]
    return r


def _hessian_of_others(
    problem: Problem, pushed: _Pushed, found: Statistics, asked: Coefficients, part: RowTangent
) -> Tensor:
    """Return gain times the derivative of ∂L/∂z where log P̄ is an output, in the memory of ζ."""
    ops, tile, dtype = problem.ops, pushed.tile, pushed.zeta.dtype
    assert part.of_rest is not None
    assert part.log_rest is not None
    assert tile.base is not None
    alpha = asked.alpha(found.a)
    alpha = alpha if asked.log_rest is None else alpha - asked.log_rest  # the factor of p
    near = beside_others(found, tile.base)
    spread, moved = share_of_others(found, asked), alpha * torch.exp(found.log_rest) * part.log_rest
    r = ops.mul(ops.sub(pushed.zeta, part.of_rest.to(dtype)[:, None]), (spread * near).to(dtype)[:, None])
    r = ops.mul(ops.add(r, (moved * near).to(dtype)[:, None]), tile.z)
    if tile.own is not None:
        assert tile.own_z is not None
        assert part.centred is not None
        p = torch.exp(found.log_prob(tile.own_z))
        r = tile.own.put(ops, r, (alpha[:, None] * p * part.centred).to(dtype))
    return r


def _plan(problem: Problem, *, resident: bool) -> Plan:
    # kept: probabilities and tangents, and where the transform is curved its slopes, bends and ζ beside u̇
    curved, soft = problem.logits.map.curved, problem.targets.probabilities is not None
    entropy = problem.requested.entropy
    kept = 2 + 2 * curved + (soft or entropy)
    # those of a tile live on while the next tile makes its own
    passing = 1 + 6 * curved + 3 * soft + 4 * entropy
    return problem.plan(resident=resident, buffers=kept, temporaries=passing, least_rows=2)


def _workspace(problem: Problem, plan: Plan) -> Workspace:
    return Workspace(problem, plan, slopes=problem.logits.map.curved, buffers=2, slope_at=2)


def _of_all_classes(part: RowTangent, ranks: ClassGroup) -> RowTangent:
    """Sum a row's tangent over ranks; the index of a sure class comes from the rank that holds it."""
    whole = RowTangent(*ranks.sum_all(part._replace(sure=None)))  # type: ignore[arg-type]  # None where it was
    return whole._replace(sure=part.sure)


def _concatenate(parts: list[RowTangent], found: Statistics, problem: Problem) -> RowTangent:
    requested = problem.requested
    if not parts:
        loss, logsumexp, mass, entropy, rest = (found.a.clone() for _ in range(5))
        log_rest = rest if requested.log_rest else None
        log_prob = found.a.new_empty((0, problem.targets.n_own))
        wanted = entropy if requested.entropy else None, log_prob if requested.log_prob else None
        return RowTangent(loss, logsumexp, mass, wanted[0], log_rest, wanted[1])
    if len(parts) == 1:
        return parts[0]
    columns = (None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))
    return RowTangent(*columns)  # type: ignore[arg-type]  # None where each of them is
