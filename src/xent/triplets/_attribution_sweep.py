"""The exact decomposition of cross-entropy by rival class, streaming over class tiles.

    CE = softplus(lse_{j≠y}(z) − z_y) = Σ_{j≠y} π_j·softplus(m_j − log π_j)        m_j = z_j − z_y

with π the softmax over the rivals alone. m_j − log π_j = lse_{j≠y}(z) − z_y is the same for every j, so each
term is π_j·CE, and π_j is the share of rival j in the row's loss. (p_j/(1 − p_y) is the same number, but 0/0
on a row whose p_y rounds to 1.)
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from xent._core.logit_map import TileBuffers
from xent._core.ops import cut
from xent._core.problem import Problem
from xent._core.statistics import (
    NEG_INF,
    PairwiseMerge,
    Statistics,
    TargetColumns,
    finite_base,
    statistics_dtype,
    summarise,
)
from xent._core.tiles.sweep import Workspace
from xent._core.tiles.top_k import Largest
from xent.triplets._sweep import own_logits, softplus


class PartialSums(NamedTuple):
    """The attribution of M rows; every number is float64."""

    classes: Tensor  # (M, k) int64, largest share first; −1 where a rival is masked
    shares: Tensor  # (M, k) π of these classes
    remainder: Tensor  # (M,) Σ π of the other rivals
    loss: Tensor  # (M,)


def attribution(problem: Problem, k: int) -> PartialSums:
    """Return the k < C rivals of each row with the largest shares; one target class a row, no weights."""
    logits, targets, ops = problem.logits, problem.targets, problem.ops
    assert targets.index is not None
    plan = problem.plan(resident=False, temporaries=1)
    workspace = Workspace(problem, plan, slopes=False)
    dtype = statistics_dtype(logits.device)
    own_z = own_logits(problem)
    parts = []
    with problem.products():
        for chunk in plan.row_chunks(targets.count):
            loaded = logits.load(targets.pick(chunk))
            union: PairwiseMerge[Statistics] = PairwiseMerge()
            largest = Largest(k)
            for classes in plan.class_tiles(targets.n_classes):
                z, _ = logits.tile(ops, loaded, classes, workspace.buffers(chunk, classes))
                own = TargetColumns.locate(cut(targets.index, chunk), classes)
                z = own.put(ops, z, NEG_INF)
                largest.add(z, classes.start)
                union.add(summarise(ops, z, None, own)[1])
            rivals, z_y = union.whole(), cut(own_z, chunk)[:, 0].to(dtype)
            assert largest.values is not None
            assert largest.classes is not None
            masked = largest.values == NEG_INF
            shares = torch.exp(rivals.log_prob(largest.values.to(dtype))).masked_fill(masked, 0.0)
            parts.append(
                PartialSums(
                    classes=largest.classes.masked_fill(masked, -1),
                    shares=shares,
                    remainder=_remainder(shares, targets.n_classes),
                    loss=rivals_loss(rivals, z_y),
                )
            )
    if not parts:
        empty = torch.empty(0, k, dtype=dtype, device=logits.device)
        return PartialSums(empty.to(torch.int64), empty, empty.sum(1), empty.sum(1))
    return PartialSums(*map(torch.cat, zip(*parts, strict=True)))


def rivals_loss(rivals: Statistics, own_z: Tensor) -> Tensor:
    """Return the cross-entropy of rows, (R,), from their rivals' statistics and their targets' logits."""
    # subtract the maximum first: a common offset must cancel
    loss = softplus(finite_base(rivals.m) - finite_base(own_z), 1 + rivals.r)
    lost = torch.where(rivals.m == NEG_INF, math.nan, math.inf)
    return torch.where(own_z == NEG_INF, lost, loss)


def _remainder(shares: Tensor, classes: int) -> Tensor:
    """Return 1 − Σ π of the largest rivals; 0 where there are no others."""
    if shares.shape[1] >= classes - 1:
        return torch.zeros_like(shares[:, 0]) if shares.shape[1] else shares.sum(1)
    return (1 - shares.sum(1)).clamp_min(0)


def pair_losses(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return Σ_n π_nj·CE_n over the rows of each target y, and the number of these rows.

    (C, C) float64, indexed [y, j], and (C,) int64.
    """
    logits, targets, ops = problem.logits, problem.targets, problem.ops
    assert targets.index is not None
    classes, dtype = targets.n_classes, statistics_dtype(logits.device)
    y = targets.index[:, 0]
    total = torch.zeros(classes, classes, dtype=dtype, device=logits.device)
    own_z = own_logits(problem)
    a_row = classes * (2 * logits.dtype.itemsize + 3 * dtype.itemsize + logits.bytes_per_logit)
    rows = max(1, problem.budget // (a_row + logits.bytes_per_row(targets.selection.index is not None)))
    with problem.products():
        for start in range(0, targets.count, rows):
            chunk = slice(start, min(start + rows, targets.count))
            buffer = torch.empty(chunk.stop - start, classes, dtype=logits.dtype, device=logits.device)
            buffers = TileBuffers(buffer, None, wants_slope=False)
            z, _ = logits.tile(ops, logits.load(targets.pick(chunk)), slice(0, classes), buffers)
            own = TargetColumns.locate(cut(targets.index, chunk), slice(0, classes))
            e, rivals = summarise(ops, own.put(ops, z, NEG_INF), None, own)
            e = e.to(dtype)
            whole = e.sum(1)  # summed in the type of the matrix, so that a row's shares add up to 1
            loss = rivals_loss(replace(rivals, r=whole - 1), cut(own_z, chunk)[:, 0].to(dtype))
            # a rival with share 0 has loss 0 even if the row's loss is infinite; nan stays nan
            per_share = (loss / whole)[:, None]
            carried = torch.where((e == 0) & ~loss.isnan()[:, None], 0.0, e * per_share)
            total.index_add_(0, y[chunk], carried)
    return total, torch.bincount(y, minlength=classes)
