"""The slow, obvious float64 version: an introduction for readers and the oracle of the tests.

    −log p_c = softplus(lse_{j≠c}(z_j − z_c))            ℓ = Σ_c t_c·(−log p_c)

Each −log p_c is computed from differences of logits alone, all C² of them, so nothing large is ever
subtracted from anything large. Autograd differentiates it as often as one likes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xent._core.margin import Margin


def target_rows(
    target: Tensor,  # (N,) indices or (N, C) probabilities
    classes: int,
    *,
    weight: Tensor | None = None,  # (C,)
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return t, (N, C) float64: smoothing, then class weights, then ignored rows become zero."""
    if target.is_floating_point():
        t = target.double()
        kept = torch.ones(t.shape[0], dtype=torch.bool)
    else:
        kept = target != ignore_index
        t = torch.zeros(target.shape[0], classes, dtype=torch.float64)
        for row in range(target.shape[0]):
            if kept[row]:
                t[row, int(target[row])] = 1.0
    t = (1 - label_smoothing) * t + label_smoothing / classes
    if weight is not None:
        t = t * weight.double()
    return torch.where(kept[:, None], t, 0.0)


def transform(z: Tensor, *, softcap: float | None = None, temperature: float = 1.0) -> Tensor:
    """Return the logits that enter the softmax, from inner logits."""
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def held_back(c: Tensor, margin: Margin) -> Tensor:
    """Return a target's score with a margin: cos(θ + angle) − cosine, and past π a falling line."""
    turned = c
    if margin.angle:
        theta = torch.arccos(c)
        past = c - margin.angle * math.sin(margin.angle)
        turned = torch.where(theta + margin.angle <= math.pi, torch.cos(theta + margin.angle), past)
    return turned - margin.cosine


def surprise(z: Tensor) -> Tensor:
    """Return −log p (N, C) float64 of logits (N, C), from their differences: +inf of a masked class."""
    z = z.double()
    masked = z == -math.inf
    nothing = masked.all(1)
    columns = []
    for c in range(z.shape[1]):
        own = torch.where(masked[:, c : c + 1], 0.0, z[:, c : c + 1])
        others = torch.cat([z[:, :c], z[:, c + 1 :]], dim=1) - own
        if others.shape[1] == 0:
            cost = torch.zeros_like(z[:, 0]) * z[:, 0]
        else:
            farthest = others.logsumexp(1)
            cost = torch.logaddexp(torch.zeros_like(farthest), farthest)
        cost = torch.where(masked[:, c], math.inf, cost)
        columns.append(torch.where(nothing, math.nan, cost))
    return torch.stack(columns, dim=1)


def row_losses(z: Tensor, t: Tensor) -> Tensor:
    """Return Σ_c t_c·(−log p_c), (N,) float64; a class without target mass costs nothing."""
    cost = surprise(z)
    return torch.where(t == 0, 0.0, t * torch.where(t == 0, 1.0, cost)).sum(1)


def cross_entropy(
    z: Tensor,  # (N, C)
    target: Tensor,  # (N,) or (N, C)
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    denominator: float | None = None,
    margin: Margin | None = None,
    log_q: Tensor | None = None,  # (C,)
) -> Tensor:
    """Return `xent.cross_entropy` over (N, C), written to be read."""
    z = transform(z.double(), softcap=softcap)
    target = target if target.is_floating_point() else target.to(torch.int64)
    y = None if target.is_floating_point() else target.clamp(0, z.shape[1] - 1)[:, None]
    if margin is not None and y is not None:
        z = z.scatter(1, y, held_back(z.gather(1, y), margin))
    z = transform(z, temperature=temperature)
    if log_q is not None and y is not None:
        z = (z - log_q.double()).scatter(1, y, z.gather(1, y))
    t = target_rows(
        target, z.shape[1], weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    s = torch.ones(z.shape[0], dtype=torch.float64) if sample_weight is None else sample_weight.double()
    kept = torch.ones_like(s, dtype=torch.bool) if target.is_floating_point() else target != ignore_index
    rows = row_losses(z, t)
    if z_loss != 0.0:
        rows = rows + z_loss * z.logsumexp(1) ** 2
    rows = torch.where(kept, s * rows, 0.0)
    if reduction == "none":
        return rows
    total = rows.sum()
    if reduction == "sum":
        return total
    if denominator is None:
        share = (
            s if weight is None or target.is_floating_point() else s * weight.double()[target.clamp(min=0)]
        )
        divisor = torch.where(kept, share, 0.0).sum()
    else:
        divisor = torch.tensor(float(denominator), dtype=torch.float64)
    return total / divisor if divisor != 0 else total * 0.0
