"""Identities of the derivatives: gradients, also through a head, curvature, and the log-free surrogate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import xent
from xent.verify.data import Batch, Exact
from xent.verify.registry import Deviation, Setting, identity

GRADIENT = "p and t are rounded once each, relative to |a|·‖p‖ + ‖t‖"
PRODUCTS = "as for a gradient; and a product of D terms is rounded D times, in any order"


def first(loss: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Return ∂ℓ_n/∂z_n, (N, C), of a loss whose rows are independent."""
    z = z.detach().requires_grad_()
    losses = loss(z)
    (gradient,) = torch.autograd.grad(losses, z, torch.ones_like(losses))
    return gradient


def second(loss: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Return ∂²ℓ_n/∂z_n², (N, C, C), by one backward pass through the gradient for each class."""
    z = z.detach().requires_grad_()
    losses = loss(z)
    (gradient,) = torch.autograd.grad(losses, z, torch.ones_like(losses), create_graph=True)
    rows = [torch.autograd.grad(g, z, retain_graph=True)[0] for g in gradient.sum(0)]
    return torch.stack(rows, dim=1)


def rows_of(target: Tensor, **options: Any) -> Callable[[Tensor], Tensor]:
    return lambda z: xent.cross_entropy(z, target, reduction="none", **options)


def divergence_of(q: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda z: xent.kl_divergence(target=q, input=z)


def surrogate_of(target: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda z: xent.surrogate_cross_entropy(z, target, reduction="none")


# §4 First derivatives


@identity("the gradient", "∂ℓ/∂z = a·p − t", section=4, allowed=4, because=GRADIENT)
def gradient(s: Setting) -> Iterator[Deviation]:
    yield from compare_gradients(s, rows_of)


def compare_gradients(
    s: Setting, loss_of: Callable[[Tensor], Callable[[Tensor], Tensor]]
) -> Iterator[Deviation]:
    """Compare the gradient of a loss with a·p − t, for every kind of target."""
    for where, batch, target, t in s.targets:
        computed = first(loss_of(target), batch.z)
        yield s.compare(computed, batch.exact.gradient(t), batch.exact.gradient_scale(t), where)


@identity(
    "the divergence's gradient", "∂KL(q‖p)/∂z = ∂CE/∂z, q fixed", section=3, allowed=8, because=GRADIENT
)
def divergence_gradient(s: Setting) -> Iterator[Deviation]:
    for batch in s.batches:
        computed = first(divergence_of(batch.q), batch.z)
        t = batch.q.cpu().double()
        yield s.compare(computed, batch.exact.gradient(t), batch.exact.gradient_scale(t), batch.name)


@identity("z-loss", "∂(λ·lse²)/∂z = 2λ·lse·p", section=1, allowed=4, because=GRADIENT)
def z_loss(s: Setting) -> Iterator[Deviation]:
    for batch in s.batches:
        exact, t = batch.exact, batch.one_hot
        tame = (exact.lse.abs() < 100)[:, None]  # whose square is a number in float16
        computed = first(rows_of(batch.y, z_loss=0.5), batch.z)
        expected = exact.gradient(t) + exact.lse[:, None] * exact.p
        scale = exact.gradient_scale(t) + exact.lse.abs()[:, None]
        computed = computed.masked_fill(~tame.to(s.device), 0.0)
        yield s.compare(computed, torch.where(tame, expected, 0.0), scale, batch.name)


@identity("another temperature", "T·∂ℓ(z/T)/∂z = softmax(z/T) − t", section=7, allowed=4, because=GRADIENT)
def temperature(s: Setting) -> Iterator[Deviation]:
    for batch in s.batches:
        for at in (0.5, 4.0):  # powers of two: z/T is exact
            if not torch.isfinite(batch.z / at).eq(batch.z.isfinite()).all():
                continue
            computed = at * first(rows_of(batch.y, temperature=at), batch.z)
            exact, t = Exact(batch.exact.z / at), batch.one_hot
            yield s.compare(computed, exact.gradient(t), exact.gradient_scale(t), f"{batch.name}, T = {at}")


@identity(
    "the slope in β = 1/T",
    "∂ℓ(βz)/∂β = ⟨a·p − t, z⟩, a·Var_p(z)",
    section=7,
    allowed=8,
    because="as for a gradient, in the direction z",
)
def inverse_temperature(s: Setting) -> Iterator[Deviation]:
    for batch in s.batches:
        # whose products with z are numbers in float16, and where 0·∞ is not met
        tame = batch.z.isfinite().all(1) & (batch.z.abs().amax(1) < 100)
        z, exact = batch.z[tame], Exact(batch.z[tame].cpu().double())
        z64, p, size = exact.z, exact.p, exact.z.abs().sum(1)
        for kind, target, t in batch.targets:
            t = t[tame.cpu()]
            beta = torch.ones_like(z[:, :1]).requires_grad_()
            losses = xent.cross_entropy(beta * z, target[tame], reduction="none")
            (slope,) = torch.autograd.grad(losses, beta, torch.ones_like(losses), create_graph=True)
            (curvature,) = torch.autograd.grad(slope, beta, torch.ones_like(slope))
            a, name = t.sum(1), f"{batch.name}, {kind} targets"
            expected = (exact.gradient(t) * z64).sum(1)
            yield s.compare(slope[:, 0], expected, exact.gradient_scale(t)[:, 0] * size, f"{name}, ∂ℓ/∂β")
            centred = z64 - (p * z64).sum(1, keepdim=True)
            expected = a * (p * centred.square()).sum(1)
            yield s.compare(curvature[:, 0], expected, a * p.norm(dim=1) * size.square(), f"{name}, ∂²ℓ/∂β²")


@identity(
    "gradients through the head", "Wᵀ(a p − t), (a p − t)xᵀ, a p − t", section=4, allowed=8, because=PRODUCTS
)
def head_gradients(s: Setting) -> Iterator[Deviation]:
    for batch, head in s.heads:
        x, w, b = (part.detach().requires_grad_() for part in (head.x, head.w, head.b))
        for kind, target, t in batch.targets:
            loss = xent.linear_cross_entropy(x, w, target, linear_bias=b, reduction="sum")
            computed = torch.autograd.grad(loss, (x, w, b))
            g, scale = head.exact.gradient(t), head.gradient_scale(t)
            x64, w64 = x.detach().cpu().double(), w.detach().cpu().double()
            for name, value, expected, size in (
                ("x", computed[0], g @ w64, scale @ w64.abs()),
                ("W", computed[1], g.T @ x64, scale.T @ x64.abs()),
                ("b", computed[2], g.sum(0), scale.sum(0)),
            ):
                yield s.compare(value, expected, size, f"{batch.name}, {kind} targets, {name}")


@identity(
    "through a feature extractor", "∂ℓ/∂θ = (∂x/∂θ)ᵀ Wᵀ(a p − t)", section=4, allowed=8, because=PRODUCTS
)
def feature_extractor(s: Setting) -> Iterator[Deviation]:
    """Check ∂ℓ/∂θ = Σ_n u∘Wᵀ(a p − t) for x = θ∘u, a scale for each feature."""
    for batch, head in s.heads:
        t = batch.q.cpu().double()
        theta = torch.ones_like(head.x[0]).requires_grad_()
        x = head.x * theta
        loss = xent.linear_cross_entropy(x, head.w, batch.q, linear_bias=head.b, reduction="none")
        (computed,) = torch.autograd.grad(loss, theta, torch.ones_like(loss))
        x, w, g = head.x.cpu().double(), head.w.cpu().double(), head.exact.gradient(t)
        size = (x.abs() * (head.gradient_scale(t) @ w.abs())).sum(0)
        yield s.compare(computed, (x * (g @ w)).sum(0), size, batch.name)


# §5 Curvature


@identity("the second derivative", "∂²ℓ/∂z² = a·(diag(p) − p pᵀ)", section=5, allowed=4, because=GRADIENT)
def second_derivative(s: Setting) -> Iterator[Deviation]:
    for where, batch, target, t in s.targets:
        yield compare_curvature(s, second(rows_of(target), batch.z), batch, t, where)


def compare_curvature(s: Setting, computed: Tensor, batch: Batch, t: Tensor, where: str) -> Deviation:
    """Compare second derivatives of the rows of a batch, (N, C, C), with a·(diag(p) − p pᵀ)."""
    a = t.sum(1)[:, None, None]
    scale = a * batch.exact.p.norm(dim=1)[:, None, None]
    return s.compare(computed, a * batch.exact.jacobian, scale, where)


def jacobian(batch: Batch) -> Tensor:
    """Return J of every row as the second derivative of its loss, (N, C, C), in the batch's type."""
    return second(rows_of(batch.y), batch.z)


@identity(
    "the softmax Jacobian", "J = Jᵀ, J·1 = 0, 0 ⪯ J ⪯ ½(I − 11ᵀ/C)", section=4, allowed=4, because=GRADIENT
)
def softmax_jacobian(s: Setting) -> Iterator[Deviation]:
    for batch in s.batches:
        computed = jacobian(batch)
        J = computed.cpu().double()
        classes = J.shape[1]
        bound = (torch.eye(classes, dtype=torch.float64) - 1 / classes) / 2
        for name, violation in (
            ("symmetric", J - J.mT),
            ("J·1", J.sum(2)),
            ("0 ⪯ J", torch.linalg.eigvalsh((J + J.mT) / 2).clamp_max(0.0)),
            ("J ⪯ ½(I − 11ᵀ/C)", torch.linalg.eigvalsh(bound - (J + J.mT) / 2).clamp_max(0.0)),
        ):
            yield s.compare(violation, 0.0, 1.0, f"{batch.name}, {name}", computed.dtype)


@identity("the chain through log p", "J·(−t/p) = a·p − t", section=4, allowed=8, because=GRADIENT)
def chain(s: Setting) -> Iterator[Deviation]:
    for batch in s.batches:
        # at a temperature at which every p is far from what the type calls 0
        logit_range = batch.exact.distance.amax(1).to(s.device)
        z = batch.z[logit_range < 1e3] * 0.1
        q, J = batch.q[logit_range < 1e3].cpu().double(), second(rows_of(batch.y[logit_range < 1e3]), z)
        exact = Exact(z.cpu().double())
        positive = (exact.p > 1e-4).all(1)
        ratio = (q / exact.p)[positive]
        computed = torch.einsum("nij,nj->ni", J.cpu().double()[positive], -ratio)
        scale = torch.einsum("nij,nj->ni", exact.jacobian.abs()[positive], ratio)
        expected, scale = exact.gradient(q)[positive], scale + exact.gradient_scale(q)[positive]
        if positive.any():
            yield s.compare(computed, expected, scale, batch.name, J.dtype)


@identity(
    "a worked row", "p = (.7, .2, .1): 0.374166, 0.46, 0.334403", section=5, allowed=4, because=GRADIENT
)
def worked_row(s: Setting) -> Iterator[Deviation]:
    z, y = s.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([0], device=s.device)
    g, computed = first(rows_of(y), z), second(rows_of(y), z)
    J = computed.cpu().double()[0]
    scale = 1 + math.log(10)  # log p is rounded on the way in
    yield s.compare(g.cpu().double().norm(), 0.3741657386773941, scale, "‖p − y‖", g.dtype)
    yield s.compare(J.trace(), 0.46, scale, "trace J", computed.dtype)
    top = torch.linalg.eigvalsh((J + J.T) / 2)[-1]
    yield s.compare(top, 0.33440306508910547, scale, "the largest eigenvalue of J", computed.dtype)


# §7 The log-free surrogate


@identity("the surrogate", "⟨a·p − t, z⟩ = ℓ − a·H(p)", section=7, allowed=8, because="as for a loss, twice")
def surrogate(s: Setting) -> Iterator[Deviation]:
    for where, batch, target, t in s.targets:
        computed = xent.surrogate_cross_entropy(batch.z, target, reduction="none")
        a, exact = t.sum(1), batch.exact
        expected = exact.loss(t) - a * exact.entropy()
        yield s.compare(computed, expected, exact.loss_scale(t) + a * exact.entropy_scale(), where)


@identity(
    "the surrogate's own slope", "∂(ℓ − a·H)/∂z = a·p − t + a·J·z", section=7, allowed=8, because=GRADIENT
)
def surrogate_own_gradient(s: Setting) -> Iterator[Deviation]:
    """Check the gradient of the surrogate's value, which is not what its `backward` returns."""
    for batch in s.batches:
        t, exact = batch.q.cpu().double(), batch.exact
        a = t.sum(1, keepdim=True)
        slope_of_value = first(rows_of(batch.q), batch.z).cpu().double()
        slope_of_value = slope_of_value - a * first(xent.entropy, batch.z).cpu().double()
        H = exact.entropy()[:, None]
        Jz = torch.where(exact.p == 0, 0.0, exact.p * (H - exact.cost))  # z = −cost, up to a constant
        slope = torch.where(exact.p == 0, 0.0, exact.p * (H + exact.cost))
        # of H − cost both are rounded, and z − max z in each
        scale = exact.gradient_scale(t) + a * (slope + exact.p * exact.entropy_scale()[:, None])
        scale = scale + a * (exact.jacobian.abs() @ exact.distance[:, :, None])[:, :, 0]
        yield s.compare(slope_of_value, exact.gradient(t) + a * Jz, scale, batch.name, batch.z.dtype)


@identity("the surrogate's gradient", "a·p − t, which is supplied", section=7, allowed=4, because=GRADIENT)
def surrogate_gradient(s: Setting) -> Iterator[Deviation]:
    yield from compare_gradients(s, surrogate_of)


@identity(
    "the surrogate's curvature", "a·(diag(p) − p pᵀ), supplied too", section=7, allowed=4, because=GRADIENT
)
def surrogate_curvature(s: Setting) -> Iterator[Deviation]:
    for batch in s.batches:
        computed = second(surrogate_of(batch.q), batch.z)
        yield compare_curvature(s, computed, batch, batch.q.cpu().double(), batch.name)
