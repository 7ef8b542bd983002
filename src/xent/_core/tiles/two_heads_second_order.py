"""Second derivatives of a divergence of two heads in closed form, tile by tile; no logits are kept.

Along tangents of both heads' tensors, with ζ those of the logits and G = ∂L/∂u, R the derivative of G
(`divergences`), each head pulls its own back: R W + G Ẇ into features, Rᵀx + Gᵀẋ into the weight, Rᵀ1 into
the bias. Behind a softcap k, with τ = tanh(κu/k) and the gain g, G = g(1 − τ²)·∂L/∂z and

    ζ = g(1 − τ²)·u̇        R = g(1 − τ²)·(∂L/∂z)˙ − (2κ/k)·τ·ζ·∂L/∂z
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from xent._core.logits import Tangents
from xent._core.plan import Plan
from xent._core.tiles.pair import Both, Found, Pair, PairGradients, Tile, Wants, curved, over
from xent._core.tiles.sweep import Workspace
from xent._core.tiles.two_heads import log_probabilities

BUFFERS = 4  # log p, log t and the tangents of both heads' logits

BothTangents: TypeAlias = tuple[Tangents, Tangents]


class _Pushed(NamedTuple):
    classes: slice
    logs: Tile
    zeta: Tile


def tangent(pair: Pair, found: Found, tangents: BothTangents) -> Tensor:
    """Return the derivative of the rows' divergence along tangents, (M,)."""
    plan = pair.plan(resident=False, buffers=BUFFERS)
    workspace = pair.workspace(plan, BUFFERS)
    with pair.products():
        parts = [
            _chunk(pair, plan, workspace, chunk, pair.load(chunk), found.rows(chunk), tangents)[0][0]
            for chunk in plan.row_chunks(pair.selection.count)
        ]
    return torch.cat(parts) if parts else torch.zeros_like(found.student.m)


def product(
    pair: Pair,
    found: Found,
    gamma: Tensor,  # (M,) ∂L/∂D
    tangents: BothTangents,
    wants: tuple[Wants, Wants],
) -> tuple[Tensor, PairGradients]:
    """Return D˙ (M,), and the derivative of ⟨gradient, tangents⟩ in both heads' tensors."""
    plan = pair.plan(resident=True, buffers=BUFFERS, least_rows=2)
    workspace = pair.workspace(plan, BUFFERS)
    accumulators = pair.accumulators(wants)
    parts = []
    with pair.products():
        for chunk in plan.row_chunks(pair.selection.count):
            loaded, rows = pair.load(chunk), found.rows(chunk)
            sums, kept = _chunk(pair, plan, workspace, chunk, loaded, rows, tangents)
            parts.append(sums[0])
            gammas = tuple(gamma[chunk] * gain for gain in pair.gains(chunk))
            columns = (gamma[chunk], *gammas, *pair.curves(chunk, rows), *rows.moments, *sums)
            for number, classes in enumerate(plan.class_tiles(pair.n_classes)):
                if plan.resident:
                    pushed = kept[number]
                else:
                    pushed = _push(pair, workspace, chunk, loaded, classes, rows, tangents)
                _pull_back(pair, accumulators, wants, chunk, loaded, pushed, columns, tangents)
    return torch.cat(parts) if parts else torch.zeros_like(found.student.m), accumulators


def _chunk(
    pair: Pair,
    plan: Plan,
    workspace: Workspace,
    chunk: slice,
    loaded: Both,
    found: Found,
    tangents: BothTangents,
) -> tuple[tuple[Tensor, ...], list[_Pushed]]:
    """Return a chunk's sums over all classes, D˙ first; its tiles, where the plan keeps them."""
    sums: tuple[Tensor, ...] = ()
    kept = []
    for classes in plan.class_tiles(pair.n_classes):
        pushed = _push(pair, workspace, chunk, loaded, classes, found, tangents)
        _, here = over(pair, pair.divergence.along, (*pushed.logs, *pushed.zeta), found.moments, places=0)
        sums = tuple(total + part for total, part in zip(sums, here, strict=True)) if sums else here
        if plan.resident:
            kept.append(pushed)
    return sums, kept


def _push(
    pair: Pair,
    workspace: Workspace,
    chunk: slice,
    loaded: Both,
    classes: slice,
    found: Found,
    tangents: BothTangents,
) -> _Pushed:
    """Return log p and log t of a tile, and ζ of both heads."""
    ops, picked = pair.ops, pair.selection.pick(chunk)
    logs = log_probabilities(pair, pair.tile(workspace, chunk, loaded, classes), found)
    zeta = []
    for number, (head, x, along) in enumerate(zip(pair.heads, loaded, tangents, strict=True)):
        buffers = workspace.tile(chunk, classes, 2 + number)
        if any(t is not None for t in along):
            du = head.push(ops, picked, x, along, classes, buffers)
            gain = x.map.gain
            gain = gain.to(du.dtype)[:, None] if isinstance(gain, Tensor) else gain
            du = du if isinstance(gain, float) and gain == 1.0 else ops.mul(du, gain)
            zeta.append(_curved_tile(pair, number, du, logs, pair.curves(chunk, found)))
        else:
            zeta.append(ops.copy(logs[0].new_zeros(()).expand(logs[0].shape), buffers))
    return _Pushed(classes, logs, (zeta[0], zeta[1]))


def _curved_tile(pair: Pair, number: int, du: Tensor, logs: Tile, curves: tuple[Tensor, ...]) -> Tensor:
    """Return du times the slope of one head's softcap, in the memory of du."""
    if not pair.heads[number].map.curved:
        return du

    def bent(du: Tensor, log_p: Tensor, log_t: Tensor, *curves: Tensor) -> tuple[Tensor, ...]:
        return (curved(du, pair.taus((log_p, log_t), curves)[number]),)

    ((zeta,), _) = over(pair, bent, (du, *logs), curves, places=1)
    return zeta


def _pull_back(
    pair: Pair,
    accumulators: PairGradients,
    wants: tuple[Wants, Wants],
    chunk: slice,
    loaded: Both,
    pushed: _Pushed,
    columns: tuple[Tensor, ...],
    tangents: BothTangents,
) -> None:
    known, n_curves = pair.divergence.n_moments, 2 * sum(head.map.curved for head in pair.heads)

    def both(
        zeta_s: Tensor, zeta_t: Tensor, log_p: Tensor, log_t: Tensor, gamma: Tensor, *columns: Tensor
    ) -> tuple[Tensor, ...]:
        """Return R of both heads, then G of both."""
        gammas, curves = columns[:2], columns[2 : 2 + n_curves]
        moments, sums = columns[2 + n_curves : 2 + n_curves + known], columns[2 + n_curves + known :]
        second = pair.divergence.second(zeta_s, zeta_t, log_p, log_t, sums, moments)
        first = pair.divergence.slopes(log_p, log_t, *moments)
        taus = pair.taus((log_p, log_t), curves)
        of_second = [curved(r, tau) * own for r, tau, own in zip(second, taus, gammas, strict=True)]
        of_first = [curved(g, tau) * own for g, tau, own in zip(first, taus, gammas, strict=True)]
        for number, (head, g, tau, zeta) in enumerate(
            zip(pair.heads, first, taus, (zeta_s, zeta_t), strict=True)
        ):
            if tau is not None and head.map.softcap is not None:
                of_second[number] = of_second[number] - (2 * head.map.scale / head.map.softcap) * (
                    tau * zeta * g * gamma
                )
        return *of_second, *of_first

    found, _ = over(pair, both, (*pushed.zeta, *pushed.logs), columns, places=4)
    second_s, second_t, first_s, first_t = found
    picked = pair.selection.pick(chunk)
    every = zip(accumulators, wants, loaded, (second_s, second_t), (first_s, first_t), tangents, strict=True)
    for accumulator, want, x, second, first, along in every:
        if any(want):
            accumulator.add(picked, x, pushed.classes, second)
            if accumulator.crosses(along):
                accumulator.add_tangent(picked, along, pushed.classes, first)
