"""A divergence of two linear heads over the same classes, tile by tile; neither's logits are kept.

    statistics of both heads → moments, sums over the classes → value, and slopes of each head's logits

Row statistics of both heads are one product each a tile; moments and slopes come from log p and log t
(`divergences`), kept where the budget holds all classes of a chunk of rows for both heads, computed again
where it does not. The student's slope of KL needs no moment, so that a frozen teacher costs two products less
where tiles are not kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from xent._core.plan import Plan
from xent._core.statistics import PairwiseMerge, Statistics, finite_base, statistics_dtype, summarise
from xent._core.tiles.divergences import terms
from xent._core.tiles.pair import (
    Both,
    Found,
    Pair,
    PairGradients,
    Tile,
    Wants,
    curved,
    over,
)
from xent._core.tiles.sweep import Workspace


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
