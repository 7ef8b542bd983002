"""Second derivatives of KL(t ‖ p) of two heads in closed form, tile by tile; no logits are kept.

Along tangents of both heads' tensors, ζ_S and ζ_T those of the logits, c_S = ζ_S − ⟨p, ζ_S⟩ and
c_T = ζ_T − ⟨t, ζ_T⟩:

    KL˙ = ⟨p − t, ζ_S⟩ + ⟨t∘(−δ − KL), ζ_T⟩
    (∂KL/∂z_S)˙ = p∘c_S − t∘c_T        (∂KL/∂z_T)˙ = t∘(c_T∘(1 − δ − KL) − c_S − KL˙)

since ṗ = p∘c_S, ṫ = t∘c_T and δ˙ = c_S − c_T. Each head then pulls its own back: R W + G Ẇ into features,
Rᵀx + Gᵀẋ into the weight, Rᵀ1 into the bias, with G = ∂L/∂u and R its derivative.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from xent._core.logits import Tangents
from xent._core.plan import Plan
from xent._core.tiles.sweep import Workspace
from xent._core.tiles.two_heads import (
    Both,
    Found,
    Pair,
    PairGradients,
    Tile,
    Wants,
    log_probabilities,
    over,
    slopes,
)

BUFFERS = 4  # log p, log t and the tangents of both heads' logits

BothTangents: TypeAlias = tuple[Tangents, Tangents]


class _Means(NamedTuple):
    """The means over all classes that a row's second derivatives need, (R,) each."""

    student: Tensor  # ⟨p, ζ_S⟩
    teacher: Tensor  # ⟨t, ζ_T⟩
    kl: Tensor  # KL˙


class _Pushed(NamedTuple):
    classes: slice
    logs: Tile
    zeta: Tile


def tangent(pair: Pair, found: Found, tangents: BothTangents) -> Tensor:
    """Return the derivative of the rows' KL along tangents, (M,)."""
    plan = pair.plan(resident=False, buffers=BUFFERS)
    workspace = pair.workspace(plan, BUFFERS)
    with pair.products():
        parts = [
            _chunk(pair, plan, workspace, chunk, pair.load(chunk), found.rows(chunk), tangents)[0].kl
            for chunk in plan.row_chunks(pair.selection.count)
        ]
    return torch.cat(parts) if parts else torch.zeros_like(found.kl)


def product(
    pair: Pair,
    found: Found,
    gamma: Tensor,  # (M,) ∂L/∂KL
    tangents: BothTangents,
    wants: tuple[Wants, Wants],
) -> tuple[Tensor, PairGradients]:
    """Return KL˙ (M,), and the derivative of ⟨gradient, tangents⟩ in both heads' tensors."""
    plan = pair.plan(resident=True, buffers=BUFFERS, least_rows=2)
    workspace = pair.workspace(plan, BUFFERS)
    accumulators = pair.accumulators(wants)
    parts = []
    with pair.products():
        for chunk in plan.row_chunks(pair.selection.count):
            loaded, rows = pair.load(chunk), found.rows(chunk)
            means, kept = _chunk(pair, plan, workspace, chunk, loaded, rows, tangents)
            parts.append(means.kl)
            columns = (*means, rows.kl, gamma[chunk] * pair.gain(chunk))
            for number, classes in enumerate(plan.class_tiles(pair.n_classes)):
                if plan.resident:
                    pushed = kept[number]
                else:
                    pushed = _push(pair, workspace, chunk, loaded, classes, rows, tangents)
                _pull_back(pair, accumulators, wants, chunk, loaded, pushed, columns, tangents)
    return torch.cat(parts) if parts else torch.zeros_like(found.kl), accumulators


def _chunk(
    pair: Pair,
    plan: Plan,
    workspace: Workspace,
    chunk: slice,
    loaded: Both,
    found: Found,
    tangents: BothTangents,
) -> tuple[_Means, list[_Pushed]]:
    """Return a chunk's row means over all classes; its tiles, where the plan keeps them."""
    student = teacher = kl = torch.zeros_like(found.kl)
    kept = []
    for classes in plan.class_tiles(pair.n_classes):
        pushed = _push(pair, workspace, chunk, loaded, classes, found, tangents)
        _, here = over(pair, _moments, (*pushed.logs, *pushed.zeta), (found.kl,), places=0)
        student, teacher, kl = student + here[0], teacher + here[1], kl + here[2]
        if plan.resident:
            kept.append(pushed)
    return _Means(student, teacher, kl), kept


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
            zeta.append(du if isinstance(gain, float) and gain == 1.0 else ops.mul(du, gain))
        else:
            zeta.append(ops.copy(logs[0].new_zeros(()).expand(logs[0].shape), buffers))
    return _Pushed(classes, logs, (zeta[0], zeta[1]))


def _moments(
    log_p: Tensor, log_t: Tensor, zeta_s: Tensor, zeta_t: Tensor, kl: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the terms of ⟨p, ζ_S⟩, ⟨t, ζ_T⟩ and KL˙ in a tile."""
    of_student, of_teacher = slopes(log_p, log_t, kl)
    return log_p.exp() * zeta_s, log_t.exp() * zeta_t, of_student * zeta_s + of_teacher * zeta_t


def _second(
    zeta_s: Tensor,
    zeta_t: Tensor,
    log_p: Tensor,
    log_t: Tensor,
    mean_s: Tensor,
    mean_t: Tensor,
    kl_dot: Tensor,
    kl: Tensor,
    gamma: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return R of both heads, then G of both."""
    t, centred_s, centred_t = log_t.exp(), zeta_s - mean_s, zeta_t - mean_t
    moved = torch.where(t == 0, 0.0, t * (1 - (log_p - log_t) - kl)) * centred_t
    of_student = (log_p.exp() * centred_s - t * centred_t) * gamma
    of_teacher = (moved - t * (centred_s + kl_dot)) * gamma
    first_s, first_t = slopes(log_p, log_t, kl)
    return of_student, of_teacher, first_s * gamma, first_t * gamma


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
    found, _ = over(pair, _second, (*pushed.zeta, *pushed.logs), columns, places=4)
    second_s, second_t, first_s, first_t = found
    picked = pair.selection.pick(chunk)
    every = zip(accumulators, wants, loaded, (second_s, second_t), (first_s, first_t), tangents, strict=True)
    for accumulator, want, x, second, first, along in every:
        if any(want):
            accumulator.add(picked, x, pushed.classes, second)
            if accumulator.crosses(along):
                accumulator.add_tangent(picked, along, pushed.classes, first)
