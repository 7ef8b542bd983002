"""Identities of the triplets inside cross-entropy: bounds, decomposition by rival, gradients in margins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

import xent
from xent.verify.data import Batch
from xent.verify.registry import Deviation, Setting, identity

ROUNDED = "a margin is rounded once for each rival, beside log C, and a sum once more"


def _softplus(v: Tensor) -> Tensor:
    return torch.logaddexp(v, torch.zeros_like(v))


def _margins(batch: Batch) -> Tensor:
    """Return the margins of the rounded logits, (N, C − 1) float64."""
    z, y = batch.exact.z, batch.y.cpu()[:, None]
    is_target = torch.zeros_like(z, dtype=torch.bool).scatter(1, y, value=True)
    return (z - z.gather(1, y))[~is_target].reshape(len(z), -1)


def _size(m: Tensor, slope: Tensor) -> Tensor:
    """Return the effect of rounding the margins by one unit: Σ_j |∂/∂m_j|·(|m_j| + log C), (N,)."""
    m = m.masked_fill(m == -math.inf, 0.0)  # a masked rival, whose slope is 0
    return (slope * (m.abs() + math.log(m.shape[1] + 1))).sum(1)


@identity("the loss in margins", "ℓ = log(1 + Σ_j exp(m_j))", section=6, allowed=8, because=ROUNDED)
def in_margins(s: Setting) -> Iterator[Deviation]:
    """Check the loss in margins, and its bounds by the hardest triplet."""
    for batch in s.batches:
        m, top = _margins(batch), _margins(batch).amax(1)
        computed = xent.cross_entropy(batch.z, batch.y, reduction="none")
        others = torch.where(top == -math.inf, -math.inf, m.logsumexp(1))
        scale = batch.exact.loss_scale(batch.one_hot)
        yield s.compare(computed, _softplus(others), scale, batch.name)
        hardest = xent.triplets.bounds(batch.z, batch.y)
        for name, value, size in (
            ("hardest_low", top, 0.0),
            ("hardest_high", top + math.log(m.shape[1]), math.log(m.shape[1])),
        ):
            scale = _softplus(value) + torch.sigmoid(value) * (top.nan_to_num(neginf=0.0).abs() + size)
            yield s.compare(getattr(hardest, name), _softplus(value), scale, f"{batch.name}, {name}")


@identity(
    "a chain of triplet bounds", "hinge ≤ smooth ≤ tight ≤ ℓ ≤ union", section=6, allowed=8, because=ROUNDED
)
def bounds(s: Setting) -> Iterator[Deviation]:
    for batch in s.batches:
        computed, m = xent.triplets.bounds(batch.z, batch.y), _margins(batch)
        rivals = m.shape[1]
        sum_of_exp = m.exp().sum(1, keepdim=True)
        probabilities = torch.where(sum_of_exp.isinf(), m.softmax(1), m.exp() / (1 + sum_of_exp))
        exact = {  # value, and its slope in each margin
            "hinge": _mean(m, rivals + 1, torch.relu, lambda v: (v > 0).double()),
            "smooth": _mean(m, rivals + 1, _softplus, torch.sigmoid),
            "tight": _mean(m, rivals, _softplus, torch.sigmoid),
            "loss": (batch.exact.loss(batch.one_hot), probabilities),
            "union": (_softplus(m).sum(1), torch.sigmoid(m)),
        }
        scales = {}
        for name, (value, slope) in exact.items():
            scales[name] = value + _size(m, slope)
            yield s.compare(getattr(computed, name), value, scales[name], f"{batch.name}, {name}")
        pairs = [*pairwise(exact), ("hardest_low", "loss"), ("loss", "hardest_high")]
        for low, high in pairs:
            above = (getattr(computed, low) - getattr(computed, high)).clamp_min(0)
            yield s.compare(above, 0.0, scales.get(low, scales["loss"]), f"{batch.name}, {low} ≤ {high}")
        gap = computed.smooth - computed.hinge
        most = rivals / (rivals + 1) * math.log(2)
        outside = (gap - gap.clamp(0, most)).abs()
        yield s.compare(outside, 0.0, scales["smooth"], f"{batch.name}, 0 ≤ smooth − hinge ≤ (C−1)/C·log 2")
    for name, row, at, worked in (
        ("ten equal logits", [0.0] * 10, "smooth", 2.158105745518533),
        ("m = (20, −5 × 8)", [0.0, 20.0, *[-5.0] * 8], "tight", 2.5186906734429215),
    ):
        computed = xent.triplets.bounds(s.tensor([row]), torch.tensor([0], device=s.device))
        yield s.compare(getattr(computed, at), worked, 1 + max(row), name)


def _mean(
    m: Tensor, by: int, phi: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return (1/by) Σ φ(m + log by) of each row, and its slope in each margin."""
    v = m + math.log(by)
    return phi(v).sum(1) / by, slope(v) / by


@identity(
    "rivals that carry the loss", "ℓ = Σ π_j·softplus(m_j − log π_j)", section=6, allowed=8, because=ROUNDED
)
def decomposition(s: Setting) -> Iterator[Deviation]:
    for batch in s.batches:
        loss, scale = batch.exact.loss(batch.one_hot), batch.exact.loss_scale(batch.one_hot)
        m = _margins(batch)
        top = m.amax(1, keepdim=True)
        log_share = torch.where(top == -math.inf, -math.inf, (m - top).log_softmax(1))
        terms = torch.where(log_share == -math.inf, 0.0, log_share.exp() * _softplus(m - log_share))
        yield s.compare(terms.sum(1), loss, scale, f"{batch.name}, the terms", torch.float64)
        for k in (1, m.shape[1]):
            computed = xent.triplets.attribution(batch.z, batch.y, k)
            added_up = computed.losses.sum(1) + computed.remainder
            yield s.compare(added_up, loss, scale, f"{batch.name}, {k} rivals and the others")
            largest = terms.sort(1, descending=True).values[:, :k]
            yield s.compare(computed.losses, largest, scale[:, None], f"{batch.name}, {k} terms")
            from_shares = computed.shares.cpu().double() * loss[:, None]
            where = f"{batch.name}, {k} terms as shares"
            yield s.compare(computed.losses, from_shares, scale[:, None], where)


@identity("the gradient in a margin", "∂ℓ/∂m_j = p_j", section=6, allowed=4, because="p is rounded once")
def gradient_in_a_margin(s: Setting) -> Iterator[Deviation]:
    for batch in s.batches:
        m = xent.triplets.margins(batch.z, batch.y).requires_grad_()
        rows = torch.cat([torch.zeros_like(m[:, :1]), m], dim=1)
        loss = xent.cross_entropy(rows, torch.zeros_like(batch.y), reduction="none")
        (computed,) = torch.autograd.grad(loss, m, torch.ones_like(loss))
        others = batch.one_hot == 0
        p = batch.exact.p[others].reshape(computed.shape)
        yield s.compare(computed, p, batch.exact.gradient_scale(batch.one_hot), batch.name)


@identity(
    "squared distances as scores",
    "2⟨x, w⟩ − ‖w‖² = ‖x‖² − ‖x − w‖²",
    section=6,
    allowed=8,
    because="a product of D terms is rounded D times, in any order",
)
def squared_distances(s: Setting) -> Iterator[Deviation]:
    for batch, head in s.heads:
        x, w, y = head.x, head.w, batch.y
        bias = -w.square().sum(1) / 2
        computed = 2 * xent.triplets.linear_margins(x, w, y, linear_bias=bias)
        x64, w64, is_target = x.cpu().double(), w.cpu().double(), batch.one_hot.bool()
        logits = -(x64[:, None] - w64).square().sum(2)
        size = x64.square().sum(1, keepdim=True) + 2 * x64.abs() @ w64.abs().T + w64.square().sum(1)
        expected = (logits - logits[is_target][:, None])[~is_target]
        scale = (size + size[is_target][:, None])[~is_target]
        yield s.compare(computed, expected.view_as(computed), scale.view_as(computed), batch.name, s.dtype)
