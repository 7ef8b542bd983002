"""The rows of a divergence of given logits, of torch's own operations, some rows at a time.

    log p = (z − m)/T − log1p(r)        δ = log p − log t        φ(δ) = e^δ − 1 − δ ≥ 0

    KL(t ‖ p) = Σ t·φ(δ)        KL(p ‖ t) = Σ p·φ(−δ)
    JS_β = β·KL(t ‖ M) + (1 − β)·KL(p ‖ M) = β·Σ t·φ(log M/t) + (1 − β)·Σ p·φ(log M/p),  M = (1 − β)·p + β·t
    log M/p = log1p(β·expm1(−δ))        log M/t = log1p((1 − β)·expm1(δ))

No term is negative and none cancels. δ of near logits loses what log p and log t round; it is brought back as
a constant (`_lost`). β says which: 0 is KL(t ‖ p), 1 is KL(p ‖ t).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from xent._autograd import transforms
from xent._core.statistics import statistics_dtype
from xent._core.tiles.divergences import NEAR, log_mixture, phi_terms
from xent._core.tiles.pair import PIECE


class Settings(NamedTuple):
    logits: bool  # whether the target is
    dtype: torch.dtype  # of the computation
    beta: float = 0.0


Temperature: TypeAlias = float | Tensor  # a number, or (..., 1) in the type of the computation


def rows(target: Tensor, z: Tensor, temperature: Temperature, settings: Settings) -> Tensor:
    """Return the divergence of each row, (..., C) and (..., C) -> (...), of torch's own operations."""
    given, z = target.to(settings.dtype), z.to(settings.dtype)
    log_p = _log_softmax(z, temperature)
    p, mass = log_p.exp(), None
    if settings.logits:
        log_t = _log_softmax(given, temperature)
        t = log_t.exp()
        delta = _difference_of_logs(log_p, log_t)
        delta = delta + _lost(delta, z, given, temperature, log_t)
    else:
        t, mass = given, given.sum(-1, keepdim=True, dtype=statistics_dtype(given.device))
        log_t = torch.where(t == 0, 1.0, t).log()
        if settings.beta in (0.0, 1.0):
            log_t = log_t - torch.where(mass == 0, 1.0, mass).log().to(t.dtype)
        delta = _difference_of_logs(log_p, torch.where(t == 0, -math.inf, log_t))
    if 0.0 < settings.beta < 1.0:
        return _jensen_shannon(p, t, delta, settings.beta)
    if settings.beta == 1.0:
        t = t if mass is None else t / torch.where(mass == 0, 1.0, mass).to(t.dtype)
        value = _terms(p, t, -delta)
        return value if mass is None else value - mass.squeeze(-1).log()
    if mass is None:
        return _terms(t, p, delta)
    p = p * mass.to(p.dtype)
    # the slope of t·log t at 0
    slope = torch.special.entr(torch.where((t == 0) & (p > 0), t, 1.0))
    return _terms(t, p, delta, slope) - torch.special.entr(mass.squeeze(-1))


def _difference_of_logs(log_p: Tensor, log_t: Tensor) -> Tensor:
    """Return log p − log t, 0 of a class that is masked in both."""
    both = (log_p == -math.inf) & (log_t == -math.inf)
    return torch.where(both, 0.0, torch.where(both, 0.0, log_p) - torch.where(both, 0.0, log_t))


def _terms(q: Tensor, r: Tensor, delta: Tensor, less: Tensor | None = None) -> Tensor:
    """Return Σ q·φ(δ), δ = log(r/q), which is Σ q·log(q/r) + Σ r − Σ q."""
    terms = phi_terms(q, r, delta)
    terms = terms if less is None else terms - less
    return terms.sum(-1, dtype=statistics_dtype(q.device))


def _jensen_shannon(p: Tensor, t: Tensor, delta: Tensor, beta: float) -> Tensor:
    """Return JS_β of each row; the sums of M, p and t that φ adds cancel for t of any mass."""
    m = (1 - beta) * p + beta * t
    of_p = _terms(p, m, log_mixture(-delta, t == 0, beta))
    of_t = _terms(t, m, log_mixture(delta, p == 0, 1 - beta))
    return (1 - beta) * of_p + beta * of_t


class ByChunks(torch.autograd.Function):
    """`rows` of many rows, some at a time and once more for their gradient: what it makes stays small."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, temperature: Temperature, target: Tensor, z: Tensor) -> Tensor:
        ctx.settings = settings
        ctx.temperature = None if isinstance(temperature, Tensor) else temperature
        ctx.save_for_backward(target, z, temperature if isinstance(temperature, Tensor) else None)
        chunks = _chunks(target, z, temperature)
        return torch.cat([rows(t, some, each, settings) for t, some, each in chunks])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        target, logits, each = ctx.saved_tensors
        given, temperature = (target, logits), ctx.temperature if each is None else each
        wants = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or transforms.batched(upstream) or transforms.transformed(upstream):

            def again(target: Tensor, z: Tensor) -> Tensor:
                return rows(target, z, temperature, ctx.settings)

            return None, None, *transforms.gradients_of(again, given, wants, upstream)
        answers = [torch.empty_like(t) if want else None for t, want in zip(given, wants, strict=True)]
        start = 0
        for *chunk, of_chunk in _chunks(target, logits, temperature):
            here = slice(start, start + len(chunk[0]))
            start = here.stop
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_(want) for t, want in zip(chunk, wants, strict=True)]
                kl = rows(leaves[0], leaves[1], of_chunk, ctx.settings)
            kl.backward(upstream[here])
            for answer, leaf in zip(answers, leaves, strict=True):
                if answer is not None and leaf.grad is not None:
                    answer[here] = leaf.grad
        return None, None, *answers


def _chunks(
    target: Tensor, z: Tensor, temperature: Temperature
) -> Iterator[tuple[Tensor, Tensor, Temperature]]:
    """Split tensors (N, C), and the temperatures (N, 1) where each row has one, into some rows at a time."""
    n, classes = z.shape
    size = max(1, at_a_time(z) // classes)
    for start in range(0, max(n, 1), size):
        here = slice(start, start + size)
        yield target[here], z[here], temperature[here] if isinstance(temperature, Tensor) else temperature


def at_a_time(z: Tensor) -> int:
    """Return how many elements are worth a step: what a cache holds, or what keeps a device busy."""
    return PIECE if z.device.type == "cpu" else 256 * PIECE


def _log_softmax(z: Tensor, temperature: Temperature) -> Tensor:
    """Return (z − m)/T − log1p(r), (..., C); r leaves the maximum's own term out, for confident rows."""
    m, top = z.max(-1, keepdim=True)
    shifted = (z - m) / temperature
    r = shifted.exp().scatter(-1, top, 0.0).sum(-1, keepdim=True, dtype=statistics_dtype(z.device))
    return shifted - torch.log1p(r).to(z.dtype)


def _lost(direct: Tensor, z: Tensor, teacher: Tensor, temperature: Temperature, log_t: Tensor) -> Tensor:
    """Return what rounding took from δ = log p − log t: a constant, 0 where nothing better is known.

    With k the teacher's first class and w = (z_c − z_k) − (y_c − y_k), y the teacher's logits, which loses
    nothing: δ = w − log1p(Σ t·expm1(w)). Near logits lose log t's own rounding otherwise.
    """
    with torch.no_grad():
        direct, z, teacher, log_t = (v.detach() for v in (direct, z, teacher, log_t))
        k = teacher.argmax(-1, keepdim=True)
        first, first_error = _difference(z, z.gather(-1, k))
        second, second_error = _difference(teacher, teacher.gather(-1, k))
        w = ((first - second) + (first_error - second_error)) / temperature
        t = log_t.exp()
        far = torch.exp(first / temperature + log_t.gather(-1, k)) - t  # the same, and finite where w is not
        moved = torch.where(w.abs() < 1, t * torch.expm1(w), far)
        change = moved.sum(-1, keepdim=True, dtype=statistics_dtype(z.device))
        exact = w - torch.log1p(change).to(w.dtype)
        better = (change.abs() < NEAR) & exact.isfinite() & direct.isfinite()
        return torch.where(better, exact - direct, 0.0)


def _difference(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return a − b and its rounding error, exactly (Knuth)."""
    d = a - b
    other = a - d
    return d, (a - (d + other)) + (other - b)


def reduced(value: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Return weighted rows, their sum, or their mean, which is 0 over nothing."""
    weight = None if weight is None else weight.to(value.dtype)
    value = value if weight is None else value * weight
    if reduction != "mean":
        return value if reduction == "none" else value.sum()
    if weight is None:
        return value.sum() / max(1, value.numel())
    divisor = weight.sum()
    return (value.sum() / divisor.masked_fill(divisor == 0, 1.0)).masked_fill(divisor == 0, 0.0)


def check_probabilities(t: Tensor) -> None:
    """Name negative, infinite and nan ones where asking costs nothing and is possible."""
    if t.device.type != "cpu" or not t.numel() or transforms.is_opaque(t) or transforms.batched(t):
        return
    low, high = t.detach().aminmax()
    if low >= 0 and high < math.inf:  # nan is neither
        return
    bad = ~((t >= 0) & (t < math.inf))
    at = tuple(bad.nonzero()[0].tolist())
    raise ValueError(
        f"target holds probabilities, which must be finite and not negative; got {t[at].item()} at {at} "
        "(for logits pass target_is_logits=True)"
    )
