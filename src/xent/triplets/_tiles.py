"""A triplet loss of a linear head without its logits, by tiles that the backward pass computes again.

    Σ_j φ(m_j + margin) = Σ_tiles Σ_{j in tile} φ(⟨x, w_j⟩ + b_j − z_y + margin)

Each tile is made of torch's operations inside a checkpoint, so torch differentiates it any number of times.
Rows and classes are taken by `split`: its backward is one concatenation, while that of a slice would fill a
gradient of the full size with zeros for every tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from xent._core.logit_map import IDENTITY
from xent._core.logits import LinearHead, Loaded
from xent._core.plan import Footprint, Plan
from xent._core.problem import Problem
from xent._core.selection import Selection
from xent._core.statistics import NEG_INF
from xent._core.targets import Targets
from xent.triplets import _attribution_sweep
from xent.triplets._forms import Form

TENSORS_ALIVE = 6  # of a tile's size, in the backward of a tile


def sum_over_negatives(
    head: LinearHead,
    targets: Targets,  # of M rows, which are all that the head has
    negatives: int | Tensor,  # the number of hardest negatives, or class indices (M, k)
    form: Form,
    budget: int,
) -> tuple[Tensor, int | Tensor]:
    """Return Σ φ over the negatives of each row, (M,), and the number of negatives."""
    classes, y = targets.n_classes, targets.index
    assert y is not None
    inside = (y >= 0) & (y < classes)
    z_y = torch.where(inside, head.entries(Loaded(head.x, head.map), torch.where(inside, y, 0)), torch.nan)
    count: int | Tensor
    if isinstance(negatives, Tensor):
        used = negatives != y
        count = used.sum(1)
    elif negatives < classes - 1:
        with torch.no_grad():
            every_row = replace(targets, selection=Selection(targets.count))
            b = None if head.b is None else head.b.detach()
            detached = LinearHead(head.x.detach(), head.w.detach(), b)
            hardest = _attribution_sweep.attribution(Problem(detached, every_row, budget), negatives).classes
        used, count = hardest >= 0, negatives
        negatives = torch.where(used, hardest, 0)
    else:
        return _sum_over_all(head, z_y, y, form, form.shift(classes - 1), budget), classes - 1
    return _sum_over_chosen(head, z_y, negatives, used, form, form.shift(count), budget), count


def _sum_over_all(
    head: LinearHead, z_y: Tensor, y: Tensor, form: Form, shift: float | Tensor, budget: int
) -> Tensor:
    def tile(x: Tensor, w: Tensor, b: Tensor | None, z_y: Tensor, own: Tensor) -> Tensor:
        m = F.linear(x, w, b) - z_y
        columns = torch.arange(m.shape[1], device=m.device)
        return form.sum(torch.where(columns == own, NEG_INF, m), shift)

    plan = _plan(head, *head.shape, budget)
    weights = head.w.split(plan.class_tile)
    biases = (None,) * len(weights) if head.b is None else head.b.split(plan.class_tile)
    sums = []
    for x, z_own, own in zip(*(t.split(plan.row_chunk) for t in (head.x, z_y, y)), strict=True):
        parts = [
            _recompute(tile, x, w, b, z_own, own - number * plan.class_tile)
            for number, (w, b) in enumerate(zip(weights, biases, strict=True))
        ]
        sums.append(torch.stack(parts).sum(0))
    return torch.cat(sums)


def _sum_over_chosen(
    head: LinearHead,
    z_y: Tensor,  # (M, 1)
    classes: Tensor,  # (M, k)
    used: Tensor,  # (M, k) bool
    form: Form,
    shift: float | Tensor,
    budget: int,
) -> Tensor:
    rows, k = classes.shape
    shifts = torch.as_tensor(shift, dtype=z_y.dtype, device=z_y.device).expand(rows)

    def block(
        x: Tensor, w: Tensor, b: Tensor | None, z_y: Tensor, classes: Tensor, used: Tensor, shift: Tensor
    ) -> Tensor:
        m = LinearHead(x, w, b).entries(Loaded(x, IDENTITY), classes) - z_y
        return form.sum(torch.where(used, m, NEG_INF), shift)

    # room for the gathered class vectors
    size = max(1, budget // (3 * head.dtype.itemsize * max(1, k * head.depth)))
    pieces = zip(*(t.split(size) for t in (head.x, z_y, classes, used, shifts)), strict=True)
    return torch.cat([_recompute(block, x, head.w, head.b, *rest) for x, *rest in pieces])


def _plan(head: LinearHead, rows: int, classes: int, budget: int) -> Plan:
    size = head.dtype.itemsize
    footprint = Footprint(kept=TENSORS_ALIVE * size, scratch=0, per_row=0, per_class=0, resident_rows=1)
    return Plan.within(budget, rows, classes, footprint, resident=False)


def _recompute(f: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """Return f(*tensors); the backward pass computes its intermediate results again."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return checkpoint(f, *tensors, use_reentrant=False, preserve_rng_state=False)
    return f(*tensors)
