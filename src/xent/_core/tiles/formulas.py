"""The formulas of one tile of rows × classes: its statistics, and its gradient once the row's are known.

With row coefficients from what came after the row's outputs (γ = ∂L/∂ℓ, η = ∂L/∂H, ω_y = ∂L/∂log p_y):

    ∂L/∂z = p∘(α − η·(z − m − ē)) − γ·t + Σ ω_y·e_y        α = a·γ + ∂L/∂lse − Σ ω
    ∂L/∂q = γ·(∂t/∂q)·(−log p)

with p = exp(z − m) / (1 + r) and ē = e/(1 + r). At an own class y, where α·p, γ·t and ω may cancel, each
upstream gradient has a factor of its own, none of which does (`target_residual`):

    γ·(a·p_y − t_y) + ∂L/∂lse·p_y − ω_y·expm1(log p_y) − p_y·Σ_{j≠y} ω_j − η·p_y·(z_y − m − ē)

Of log P̄, P̄ the sum of p over the classes that are not own, μ = ∂L/∂log P̄ and π = p/P̄ there:

    ∂L/∂z = π·(α·P̄ + μ·(1 − P̄)) of these        − μ·p_y of an own one

Which tiles there are, and whose memory they use, is decided elsewhere: by the sweep, or by the one tile that
holds a small problem whole.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from xent._core.class_indices import NO_CLASS
from xent._core.coefficients import Coefficients
from xent._core.logit_map import TileBuffers
from xent._core.logits import Loaded
from xent._core.ops import TileOps, cut
from xent._core.problem import Problem
from xent._core.statistics import (
    RequestedOutputs,
    Statistics,
    TargetColumns,
    softmax_pays,
    summarise,
    summarise_beside,
    summarise_row,
)
from xent._core.targets import Targets

LOG_HALF = -0.69


class Tile(NamedTuple):
    """A tile of some rows and classes, as its statistics leave it for the gradient."""

    classes: slice
    z: Tensor  # (R, T) exp(z − base)
    slope: Tensor | None  # (R, T)
    gain: float | Tensor  # dz/du ÷ slope, a number or (R,)
    base: Tensor | None  # (R,) what was subtracted before exp; None means lse
    own: TargetColumns | None
    own_z: Tensor | None  # (R, K) logits of the target's classes, where this tile holds them
    memory: Tensor | None = None  # (R, T) for G, where it may not overwrite z


def takes_whole_rows(problem: Problem) -> bool:
    """Return whether a tile of all classes is summarised together with the target's own, in one go."""
    t = problem.targets
    return (
        t.index is not None
        and t.index.shape[1] == 1
        and t.uniform_alone
        and not problem.requested.of_scores
        and (t.held is None or not t.dense)
    )


def row_tile(problem: Problem, chunk: slice, loaded: Loaded, buffers: TileBuffers) -> tuple[Statistics, Tile]:
    """Return the statistics of a chunk of rows from one tile of all classes, and the tile."""
    logits, targets, ops = problem.logits, problem.targets, problem.ops
    classes = slice(0, targets.n_classes)
    z, slope = logits.tile(ops, loaded, classes, buffers, borrow=True)
    own = target_columns(targets, chunk, classes)
    assert own is not None
    mass = None if targets.index_mass is None else cut(targets.index_mass, chunk)
    t = targets.tile(chunk, classes, z.dtype)
    base = None
    if t is None and own.inside is None and targets.held is None and softmax_pays(z):
        out = buffers.z if z is loaded.x else z
        z, own_z, found = summarise_beside(ops, z, own, mass, out)
    else:
        other = targets.other_mass if targets.held is None else None
        rest = None if other is None else cut(other, chunk)
        z, own_z, found = summarise_row(ops, z, own, t, mass, rest, buffers.z, absent_logit(targets, chunk))
        base = found.m
    if problem.requested.mass:
        found = replace(found, mass=found.a)
    return found, Tile(classes, z, slope, loaded.map.gain, base, own, own_z)


def absent_logit(targets: Targets, chunk: slice) -> float | Tensor:
    """Return the logit of an own class that no tile holds: −inf if another process does, or `NO_CLASS`."""
    elsewhere = targets.elsewhere(chunk)
    if targets.n_own > 1:
        assert targets.index is not None
        none = cut(targets.index, chunk) < NO_CLASS // 2  # of a process, counted from its first class
        elsewhere = none if elsewhere is None else elsewhere | none
    if elsewhere is None:
        return torch.nan
    return torch.where(elsewhere, -torch.inf, torch.nan)


def target_columns(targets: Targets, chunk: slice, classes: slice) -> TargetColumns | None:
    """Return the columns of the targets' classes within a tile."""
    if targets.index is None:
        return None
    holds_all = targets.index_checked and classes == slice(0, targets.n_classes)
    return TargetColumns.locate(cut(targets.index, chunk), classes, holds_all=holds_all)


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
    asked = asked.scaled(tile.gain)
    gamma, dtype = asked.loss, tile.z.dtype
    share, of_entropy = row_factors(found, asked, tile.base)
    bent = None if of_entropy is None else torch.special.entr(tile.z)  # −E log E, E = exp(z − base)
    t = targets.tile(chunk, tile.classes, dtype)
    if isinstance(t, float):
        g = ops.affine(tile.z, share.to(dtype)[:, None], (gamma * t).to(dtype)[:, None])
    else:
        g = ops.mul(tile.z, share.to(dtype)[:, None])
        g = g if t is None else ops.subtract_scaled(g, t, gamma.to(dtype)[:, None])
    if bent is not None and of_entropy is not None:
        g = ops.add(g, bent * of_entropy.to(dtype)[:, None])
    if tile.own is not None:
        assert tile.own_z is not None
        g = tile.own.put(ops, g, at_own_classes(targets, chunk, tile.own_z, found, asked).to(dtype))
    return g


def at_own_classes(
    targets: Targets, chunk: slice, own_z: Tensor, found: Statistics, asked: Coefficients
) -> Tensor:
    """Return ∂L/∂z at the own classes, (R, K) float64, from their logits and scaled coefficients."""
    log_p = found.log_prob(own_z)
    at_own = target_residual(targets, chunk, found.a, log_p, asked.loss)
    if asked.logsumexp is not None:
        at_own = at_own + asked.logsumexp[:, None] * torch.exp(log_p)
    if asked.log_rest is not None:
        at_own = at_own - asked.log_rest[:, None] * torch.exp(log_p)
    if asked.log_prob is not None:
        at_own = at_own - asked.log_prob * torch.expm1(log_p)
        if asked.log_prob.shape[1] > 1:
            at_own = at_own - sum_of_others(asked.log_prob) * torch.exp(log_p)
    if asked.entropy is not None:
        distance = mean_shift(found)[:, None] - (own_z - found.m[:, None])
        of_entropy = asked.entropy[:, None] * torch.exp(log_p) * distance
        at_own = at_own + torch.where(own_z == -torch.inf, 0.0, of_entropy)
    return at_own


def row_factors(found: Statistics, asked: Coefficients, base: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the factors of E = exp(z − base) and of −E log E of a tile, (R,), of scaled coefficients."""
    if found.lse_others is not None:
        assert asked.entropy is None  # which nothing has asked for beside log P̄
        assert base is not None
        return share_of_others(found, asked) * beside_others(found, base), None
    alpha, eta = asked.alpha(found.a), asked.entropy
    if base is None:  # E is p
        return alpha, None
    # what lies between the row's maximum and the one that was subtracted from this tile
    behind = None
    if base is not found.m:
        behind = torch.where(base == found.m, 0.0, base - found.m)
    if eta is not None:
        mean = mean_shift(found)
        alpha = alpha + eta * (mean if behind is None else mean - behind)
    share = alpha / (1 + found.r)
    if behind is not None:
        near = torch.exp(behind)
        share = share * near
        if eta is not None:
            share, eta = torch.where(behind == -torch.inf, 0.0, share), eta * near
    return share, None if eta is None else eta / (1 + found.r)


def share_of_others(found: Statistics, asked: Coefficients) -> Tensor:
    """Return α·P̄ + μ·(1 − P̄), (R,), the factor of π."""
    share = asked.alpha(found.a) * torch.exp(found.log_rest)
    return share if asked.log_rest is None else share - asked.log_rest * torch.expm1(found.log_rest)


def beside_others(found: Statistics, base: Tensor) -> Tensor:
    """Return exp(base − lse_others), (R,); 0 where there is nothing to add to the others."""
    assert found.lse_others is not None
    nothing = (base == -torch.inf) | (found.lse_others == -torch.inf)
    return torch.where(nothing, 0.0, torch.exp(torch.where(nothing, 0.0, base - found.lse_others)))


def sum_of_others(v: Tensor) -> Tensor:
    """Return Σ_{i≠j} v_i of each entry j, (R, K) -> (R, K), which leaves v_j out and does not subtract it."""
    zero = torch.zeros_like(v[:, :1])
    before = torch.cat([zero, v[:, :-1].cumsum(1)], dim=1)
    after = torch.cat([v[:, 1:].flip(1).cumsum(1).flip(1), zero], dim=1)
    return before + after


def target_residual(
    targets: Targets, chunk: slice, a: Tensor, log_p: Tensor, gamma: Tensor | None = None
) -> Tensor:
    """Return γ·(a·p_y − t_y) at the own classes of a chunk, (R, K), from a (R,) and log p_y (R, K).

    γ is (R,); None means 1.
    Where p_y is near 1 the difference is a·expm1(log p_y) + (a − t_y), elsewhere what it says.
    """
    of_all = (a if gamma is None else a * gamma)[:, None]
    near = of_all * torch.expm1(log_p)
    if targets.other_mass is None:  # t_y = a
        return near
    mass = torch.ones_like(log_p) if targets.index_mass is None else cut(targets.index_mass, chunk)
    other = cut(targets.other_mass, chunk)
    if gamma is not None:
        mass, other = mass * gamma[:, None], other * gamma[:, None]
    return torch.where(log_p < LOG_HALF, of_all * torch.exp(log_p) - mass, near + other)


def mean_shift(found: Statistics) -> Tensor:
    """Return ē = ⟨p, z − m⟩, (R,)."""
    assert found.e is not None
    return found.e / (1 + found.r)


def target_statistics(
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
