"""Identities of the value: the formula and its options, likelihood, entropy, divergence, row statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import xent
from xent._core.logits import DenseLogits
from xent._core.problem import Problem
from xent._core.statistics import Statistics
from xent._core.targets import probability_targets
from xent._core.tiles import sweep
from xent.verify.data import Batch, Exact, Head
from xent.verify.registry import Deviation, Setting, identity

ROUNDED = "a loss is rounded once, and z − max z once for each class"
TWICE = "as for a loss, on both sides of the equation"
PRODUCTS = "as for a loss; and a product of D terms is rounded D times, in any order"

# §1 The formula, and what its target holds


@identity("cross-entropy", "ℓ = a·lse(z) − ⟨t, z⟩", section=1, allowed=4, because=ROUNDED)
def formula(s: Setting) -> Iterator[Deviation]:
    for where, batch, target, t in s.targets:
        computed = xent.cross_entropy(batch.z, target, reduction="none")
        yield s.compare(computed, batch.exact.loss(t), batch.exact.loss_scale(t), where)


@identity(
    "a common offset", "ℓ(z + c·1) = ℓ(z)", section=1, allowed=0, because="z + c is exact in these rows"
)
def offset(s: Setting) -> Iterator[Deviation]:
    for where, batch, target, _ in s.targets:
        z = torch.where(batch.z.isfinite(), batch.z.clamp(-8, 8).mul(2).round() / 2, batch.z)
        computed, moved = (xent.cross_entropy(u, target, reduction="none") for u in (z, z + 32))
        yield s.compare(moved, computed, 1.0, where)


@identity("label smoothing", "t = (1 − ε)·e_y + ε/C", section=1, allowed=4, because=ROUNDED)
def smoothing(s: Setting) -> Iterator[Deviation]:
    for batch in s.batches:
        for epsilon in (0.1, 1.0):
            t = (1 - epsilon) * batch.one_hot + epsilon / batch.z.shape[1]
            computed = xent.cross_entropy(batch.z, batch.y, label_smoothing=epsilon, reduction="none")
            expected, scale = batch.exact.loss(t), batch.exact.loss_scale(t)
            yield s.compare(computed, expected, scale, f"{batch.name}, ε = {epsilon}")


@identity(
    "smoothing as a prior", "ℓ_ε = (1 − ε)·ℓ + ε·(KL(u‖p) + log C)", section=1, allowed=8, because=TWICE
)
def prior(s: Setting) -> Iterator[Deviation]:
    epsilon = 0.1
    for batch in s.batches:
        classes = batch.z.shape[1]
        uniform = torch.full(batch.z.shape, 1 / classes, dtype=torch.float64)
        divergence = xent.kl_div(batch.z.cpu().double().log_softmax(1), uniform, reduction="none").sum(1)
        hard = xent.cross_entropy(batch.z, batch.y, reduction="none").cpu().double()
        computed = xent.cross_entropy(batch.z, batch.y, label_smoothing=epsilon, reduction="none")
        expected = (1 - epsilon) * hard + epsilon * (divergence + math.log(classes))
        t = (1 - epsilon) * batch.one_hot + epsilon / classes
        yield s.compare(computed, expected, batch.exact.loss_scale(t) + math.log(classes), batch.name)


@identity("the best under smoothing", "p_y = 1 − ε + ε/C, ℓ_ε = H(t)", section=1, allowed=4, because=ROUNDED)
def best_under_smoothing(s: Setting) -> Iterator[Deviation]:
    """Check that the loss has its minimum at the logits log t: slope 0, and larger on both sides."""
    for classes, epsilon in ((2, 0.5), (10, 0.1)):
        t = [1 - epsilon + epsilon / classes, *[epsilon / classes] * (classes - 1)]
        entropy = -sum(v * math.log(v) for v in t)
        z, y = s.tensor([t]).log().requires_grad_(), torch.tensor([0], device=s.device)
        loss = xent.cross_entropy(z, y, label_smoothing=epsilon)
        (slope,) = torch.autograd.grad(loss, z)
        size = 1 - math.log(min(t))  # log t is rounded on the way in
        yield s.compare(loss, entropy, size, f"{classes} classes, the loss")
        yield s.compare(slope, 0.0, size, f"{classes} classes, the slope")
        yield s.compare(z.softmax(1)[0, 0], t[0], size, f"{classes} classes, p_y")
        for step in (-0.25, 0.25):
            moved = z.detach() + step * s.tensor([[1.0, *[0.0] * (classes - 1)]])
            worse = float(xent.cross_entropy(moved, y, label_smoothing=epsilon)) > entropy
            yield Deviation(0.0 if worse else math.inf, f"{classes} classes, a step of {step} is no better")


@identity("class weights", "t = w∘((1 − ε)·e_y + ε/C)", section=1, allowed=4, because=ROUNDED)
def class_weights(s: Setting) -> Iterator[Deviation]:
    for batch in s.batches:
        classes = batch.z.shape[1]
        w = s.tensor([0.25 * (c + 1) for c in range(classes)])  # of few bits, so that w·t is exact
        for epsilon in (0.0, 0.25):
            t = w.cpu().double() * ((1 - epsilon) * batch.one_hot + epsilon / classes)
            computed = xent.cross_entropy(batch.z, batch.y, w, label_smoothing=epsilon, reduction="none")
            expected, scale = batch.exact.loss(t), batch.exact.loss_scale(t)
            yield s.compare(computed, expected, scale, f"{batch.name}, ε = {epsilon}")


@identity("the mean", "Σ s ℓ / Σ s·w[y], of no rows 0", section=1, allowed=4, because=ROUNDED)
def mean(s: Setting) -> Iterator[Deviation]:
    for batch in s.batches:
        if not batch.exact.z.abs().lt(1e4).all():  # whose sum would leave float16
            continue
        rows, classes = batch.z.shape
        w = s.tensor([0.25 * (c + 1) for c in range(classes)])
        weight = s.tensor([float(n % 3) for n in range(rows)])
        s64, w64 = weight.cpu().double(), w.cpu().double()
        for kind, target, t in batch.targets:
            row_mass = s64 * w64[batch.y.cpu()] if kind == "class" else s64
            exact = s64 * batch.exact.loss(w64 * t)
            computed = xent.cross_entropy(batch.z, target, w, sample_weight=weight)
            scale = (s64 * batch.exact.loss_scale(w64 * t)).sum() / row_mass.sum()
            yield s.compare(computed, exact.sum() / row_mass.sum(), scale, f"{batch.name}, {kind} targets")
            nothing = xent.cross_entropy(batch.z, target, sample_weight=weight * 0)
            yield s.compare(nothing, 0.0, 1.0, f"{batch.name}, {kind} targets, no row")


@identity("rows that are ignored", "nan in such a row changes nothing", section=1, allowed=4, because=ROUNDED)
def ignored(s: Setting) -> Iterator[Deviation]:
    for batch in s.batches:
        out = torch.arange(len(batch.y), device=s.device) % 3 == 1
        z = batch.z.masked_fill(out[:, None], math.nan).requires_grad_()
        computed = xent.cross_entropy(z, batch.y.masked_fill(out, -100), reduction="none")
        (gradient,) = torch.autograd.grad(computed.sum(), z)
        counted, exact = (~out).cpu(), batch.exact
        t = batch.one_hot * counted[:, None]
        scale = exact.loss_scale(batch.one_hot)
        yield s.compare(computed, torch.where(counted, exact.loss(t), 0.0), scale, batch.name)
        expected = torch.where(counted[:, None], exact.gradient(t), 0.0)
        scale = exact.gradient_scale(batch.one_hot)
        yield s.compare(gradient, expected, scale, f"{batch.name}, the gradient")


@identity("two classes", "softmax of (0, s) = binary, of s", section=1, allowed=8, because=TWICE)
def two_classes(s: Setting) -> Iterator[Deviation]:
    logits = [0.0, 1e-3, -0.5, 3.0, -7.0, 20.125, 40.0, -40.0, 89.0, 1000.0, -1000.0]
    score = s.tensor([v for v in logits for _ in range(3)])
    y = s.tensor([0.0, 0.25, 1.0] * len(logits))
    z = torch.stack([torch.zeros_like(score), score], dim=1)
    for weight in (None, 3.0):
        binary = xent.binary_cross_entropy_with_logits(
            score, y, reduction="none", pos_weight=None if weight is None else s.tensor(weight)
        )
        t = torch.stack([1 - y, y * (weight or 1.0)], dim=1)
        softmax = xent.cross_entropy(z, t, reduction="none")
        exact, t64 = Exact(z.cpu().double()), t.cpu().double()
        yield s.compare(softmax, binary.cpu().double(), exact.loss_scale(t64), f"pos_weight = {weight}")


# §2 Row statistics


@identity("log 0 is never met", "no nan, no 0, no inf in its place", section=2, allowed=4, because=ROUNDED)
def log_zero(s: Setting) -> Iterator[Deviation]:
    gone, half = -math.inf, s.dtype in (torch.float16, torch.bfloat16)
    far = min(1e8, 2.0 ** int(math.log2(torch.finfo(s.dtype).max / 8)))
    rows: list[tuple[str, list[float], int, float, float]] = [  # name, z, y, loss, max z − z
        ("(0, −40)", [0.0, -40.0], 0, 4.248354255291589e-18, 40.0),
        ("(0, 200)", [0.0, 200.0], 0, 200.0, 200.0),
        ("two equal large logits", [far, far], 0, math.log(2), 0.0),
        ("two equal large logits below 0", [-far, -far], 1, math.log(2), 0.0),
        ("a masked class", [gone, 1.0, 2.0], 1, 1.3132616875182228, 1.0),
        ("all masked but the target", [gone, 3.0, gone], 1, 0.0, 0.0),
        ("a masked target", [gone, 1.0, 2.0], 0, math.inf, 0.0),
    ]
    for name, z, y, loss, distance in rows:
        scale = loss * (1 + distance) if math.isfinite(loss) else 1.0
        one_hot = torch.nn.functional.one_hot(torch.tensor([y]), len(z)).to(s.device, s.dtype)
        for kind, target in (("class", torch.tensor([y], device=s.device)), ("probability", one_hot)):
            computed = xent.cross_entropy(s.tensor([z]), target, reduction="none")
            yield s.compare(computed, loss, scale, f"{name}, {kind}")
    if not half:  # where 1e8 + 24 is another number than 1e8
        computed = xent.cross_entropy(s.tensor([[1e8, 1e8 + 24]]), s.tensor([[0.3, 0.7]]), reduction="none")
        yield s.compare(computed, 7.2 + math.log1p(math.exp(-24)), 7.2, "(1e8, 1e8 + 24)")
    computed = xent.surrogate_cross_entropy(s.tensor([[0.0, 200.0]]), torch.tensor([0], device=s.device))
    yield s.compare(computed, 200.0, 200.0, "the surrogate of (0, 200)")


def _statistics(z: Tensor, q: Tensor) -> Statistics:
    return sweep.statistics(Problem(DenseLogits(z), probability_targets(q)))


@identity("merging statistics", "(A ∪ B) ∪ C = A ∪ (B ∪ C) = whole", section=2, allowed=8, because=TWICE)
def merging(s: Setting) -> Iterator[Deviation]:
    for batch in s.batches:
        t = batch.q.cpu().double()
        expected, scale = batch.exact.loss(t), batch.exact.loss_scale(t)
        classes = batch.z.shape[1]
        for i, j in ((1, classes - 1), (classes // 2, classes // 2 + 1)):
            a, b, c = (
                _statistics(batch.z[:, k], batch.q[:, k]) for k in (slice(i), slice(i, j), slice(j, None))
            )
            m = torch.stack([a.m, b.m, c.m]).amax(0)
            sets = {
                "at once": (a.shares(m) + b.shares(m) + c.shares(m)).at(m, None),  # as processes do it
                "(A ∪ B) ∪ C": a.merge(b).merge(c),
                "A ∪ (B ∪ C)": a.merge(b.merge(c)),
                "(C ∪ A) ∪ B": c.merge(a).merge(b),
                "with nothing": a.merge(b).merge(c).merge(Statistics.identity(len(t), s.device)),
            }
            dtype = torch.float32 if s.dtype in (torch.float16, torch.bfloat16) else s.dtype
            for name, union in sets.items():
                yield s.compare(union.loss, expected, scale, f"{batch.name}, {name}", dtype)


def _head_losses(batch: Batch, head: Head, **options: Any) -> Tensor:
    return xent.linear_cross_entropy(head.x, head.w, batch.y, linear_bias=head.b, reduction="none", **options)


@identity("tiles", "small tiles = one tile", section=2, allowed=8, because=PRODUCTS)
def tiles(s: Setting) -> Iterator[Deviation]:
    for batch, head in s.heads:
        whole, scale = _head_losses(batch, head).cpu().double(), head.loss_scale(batch.one_hot)
        for budget in (4_000, 40_000):
            computed = _head_losses(batch, head, memory_budget=budget)
            yield s.compare(computed, whole, scale, f"{batch.name}, {budget} bytes")


@identity("a linear head", "ℓ(x, W, b) = ℓ(W x + b)", section=2, allowed=8, because=PRODUCTS)
def linear_head(s: Setting) -> Iterator[Deviation]:
    for batch, head in s.heads:
        expected, scale = head.exact.loss(batch.one_hot), head.loss_scale(batch.one_hot)
        yield s.compare(_head_losses(batch, head), expected, scale, batch.name)


@identity("gauge freedom", "W + 1vᵀ: the same loss", section=5, allowed=8, because=PRODUCTS)
def gauge(s: Setting) -> Iterator[Deviation]:
    for batch, head in s.heads:
        moved = replace(head, w=head.w + 1)
        expected, scale = head.exact.loss(batch.one_hot), moved.loss_scale(batch.one_hot)
        yield s.compare(_head_losses(batch, moved), expected, scale, batch.name)


# §3 Likelihood, entropy, divergence


@identity("maximum likelihood", "6 of 10 white: p = 0.6, 0.673012", section=3, allowed=8, because=ROUNDED)
def likelihood(s: Setting) -> Iterator[Deviation]:
    """Check that −log(p⁶(1 − p)⁴)/10 has its minimum where p is the share of white balls."""
    balls = s.tensor([1.0] * 6 + [0.0] * 4)
    best = 0.6730116670092565
    p = s.tensor([0.6] * 10).requires_grad_()
    loss = xent.binary_cross_entropy(p, balls)
    yield s.compare(loss, best, 1.0, "from p")
    (slope,) = torch.autograd.grad(loss, p)
    yield s.compare(slope.sum(), 0.0, slope.abs().sum(), "the slope at p = 0.6")
    z = s.tensor([[0.0, math.log(1.5)]]).requires_grad_()
    q = s.tensor([[0.4, 0.6]])
    loss = xent.cross_entropy(z, q)
    yield s.compare(loss, best, 1.0, "from logits")
    (slope,) = torch.autograd.grad(loss, z)
    yield s.compare(slope, 0.0, 1.0, "the slope at log 1.5")
    for log_odds in (0.3, 0.5):
        worse = xent.cross_entropy(s.tensor([[0.0, log_odds]]), q)
        yield Deviation(0.0 if worse > best else math.inf, f"log odds {log_odds} are no better")


@identity("cross-entropy is entropy + KL", "CE(q, p) = H(q) + KL(q‖p)", section=3, allowed=8, because=TWICE)
def entropy_and_divergence(s: Setting) -> Iterator[Deviation]:
    for batch in s.batches:
        t, exact = batch.q.cpu().double(), batch.exact
        divergence = xent.kl_divergence(target=batch.q, input=batch.z)
        entropy = torch.special.entr(t)
        computed = xent.cross_entropy(batch.z, batch.q, reduction="none")
        scale = exact.loss_scale(t) + entropy.abs().sum(1)
        yield s.compare(computed, entropy.sum(1) + divergence.cpu().double(), scale, batch.name)
        equal = xent.kl_divergence(target=batch.z, input=batch.z, target_is_logits=True)
        yield s.compare(equal, 0.0, 1.0, f"{batch.name}, KL(p‖p) = 0")
        apart = xent.kl_divergence(target=batch.z.flip(0), input=batch.z, target_is_logits=True)
        yield s.compare(apart.clamp_max(0.0), 0.0, 1.0, f"{batch.name}, KL ≥ 0")
    half = s.tensor([0.5, 0.5]).log()
    for name, computed in (
        ("of logits", xent.kl_divergence(target=s.tensor([0.6, 0.4]), input=half)),
        ("of log p", xent.kl_div(half, s.tensor([0.6, 0.4]), reduction="sum")),
    ):
        yield s.compare(computed, 0.020135513550688863, 1.0, f"KL((.6, .4)‖(.5, .5)) {name}")


@identity("cross-entropy with oneself", "CE(p, p) = H(p)", section=3, allowed=8, because=TWICE)
def with_oneself(s: Setting) -> Iterator[Deviation]:
    for batch in s.batches:
        exact = batch.exact
        computed = xent.entropy(batch.z)
        yield s.compare(computed, exact.entropy(), exact.entropy_scale(), f"{batch.name}, entropy")
        p = exact.p.to(s.device, s.dtype)
        t = p.cpu().double()
        computed = xent.cross_entropy(batch.z, p, reduction="none")
        # what p rounds to where the type has few digits left, or none
        lost = torch.finfo(s.dtype).smallest_normal * (exact.cost * (exact.p > 0)).nan_to_num().sum(1)
        scale = exact.entropy_scale() + exact.loss_scale(t) + lost
        yield s.compare(computed, exact.entropy(), scale, f"{batch.name}, against p")


@identity("worked tables", "customers, animals, spam: row by row", section=3, allowed=4, because=ROUNDED)
def worked(s: Setting) -> Iterator[Deviation]:
    p, y = s.tensor([0.7, 0.2]), s.tensor([1.0, 0.0])
    terms = [0.35667494393873245, 0.2231435513142097]  # scale: p is rounded too
    yield s.compare(xent.binary_cross_entropy(p, y, reduction="none"), s64(terms), 1.0, "two customers")
    yield s.compare(xent.binary_cross_entropy(p, y), 0.2899092476264711, 1.0, "two customers, the mean")
    logits = p.cpu().double().logit().to(s.device, s.dtype)
    computed = xent.binary_cross_entropy_with_logits(logits, y, reduction="none")
    yield s.compare(computed, s64(terms), 1.0, "two customers, from logits")
    for name, row, label, loss in (
        ("cat, dog, horse", [0.4, 0.4, 0.2], 1, 0.916290731874155),
        ("three classes", [0.1, 0.12, 0.78], 2, 0.2484613592984996),
        ("confident", [0.7, 0.2, 0.1], 0, 0.35667494393873245),
    ):
        z, target = s.tensor(row).log(), torch.tensor(label, device=s.device)
        scale = 1 + abs(math.log(min(row)))
        yield s.compare(xent.cross_entropy(z, target), loss, scale, f"{name}, from log p")
        yield s.compare(xent.nn.CrossEntropyLoss()(z, target), loss, scale, f"{name}, as a module")
    spam = ["spam", "ham", "ham", "spam"]
    rows = [[0.1, 0.9], [0.9, 0.1], [0.8, 0.2], [0.35, 0.65]]
    computed = torch.tensor(xent.metrics.log_loss(spam, rows), dtype=torch.float64)
    yield s.compare(computed, 0.21616187468057912, 1.0, "spam and ham", torch.float64)


def s64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
