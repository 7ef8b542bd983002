"""The formulas of a divergence D(t, p) of a teacher and a student, in a tile of log p and log t.

A divergence is made of moments, sums over a row's classes, from which its value and slopes come. With
δ = log p − log t and φ(δ) = e^δ − 1 − δ ≥ 0:

    KL(t ‖ p) = Σ t·φ(δ)        ∂/∂z_S = p − t = t∘expm1(δ)        ∂/∂z_T = t∘(−δ − KL)

    JS_β = (1 − β)·A + β·B,  A = KL(p ‖ M) = Σ p·φ(−a),  B = KL(t ‖ M) = Σ t·φ(−b),  M = (1 − β)·p + β·t
    a = log p/M = −log1p(β·expm1(−δ))        b = log t/M = −log1p((1 − β)·expm1(δ))
    ∂/∂z_S = (1 − β)·p∘(a − A)               ∂/∂z_T = β·t∘(b − B)

The sums of φ cancel nowhere: equal heads are at 0 exactly, near ones keep their digits, and nothing is ever
negative. Far from δ = 0 a term q·φ is written r − q − q·log(r/q), which is r where q = 0.

Second derivatives along tangents ζ of the logits, c_S = ζ_S − ⟨p, ζ_S⟩ and c_T = ζ_T − ⟨t, ζ_T⟩:

    KL:  R_S = p∘c_S − t∘c_T        R_T = t∘(c_T∘(1 − δ − KL) − c_S − KL˙)
    JS:  R_S = (1 − β)·p∘(c_S∘(a − A) + c_S − μ − Ȧ)        Ȧ = Σ p∘(c_S∘a − μ)
         R_T = β·t∘(c_T∘(b − B) + c_T − μ − Ḃ)              Ḃ = Σ t∘(c_T∘b − μ)
         μ = Ṁ/M = w∘c_S + (1 − w)∘c_T,  w = (1 − β)·p/M

since ṗ = p∘c_S, ṫ = t∘c_T, δ˙ = c_S − c_T and ȧ = c_S − μ.
"""

from __future__ import annotations

import math
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from xent._core.record import record

NEAR = 0.5  # |δ| below which e^δ − 1 and δ cancel

MOST = {torch.float32: 80.0, torch.float64: 700.0}
"""|δ| beyond which e^δ is no number, and the smaller of p and t beside the other nothing."""

Terms: TypeAlias = tuple[Tensor, ...]  # (R, T), of which rows are summed


class Divergence(Protocol):
    """The formulas of a divergence; log p, log t and ζ are (R, T), sums over the classes (R, 1)."""

    @property
    def beta(self) -> float: ...

    @property
    def n_moments(self) -> int: ...

    @property
    def alone(self) -> bool:
        """True where the student's slope needs no moment, so that it may be formed before they are known."""
        ...

    def value(self, moments: Terms) -> Tensor: ...

    def moments(self, log_p: Tensor, log_t: Tensor) -> Terms: ...

    def slopes(self, log_p: Tensor, log_t: Tensor, *moments: Tensor) -> tuple[Tensor, Tensor]:
        """Return ∂D/∂z of the student and of the teacher."""
        ...

    def slope(self, log_p: Tensor, log_t: Tensor, *moments: Tensor, student: bool) -> Tensor:
        """Return one of the slopes, of the student or of the teacher."""
        ...

    def apart(self, log_p: Tensor, log_t: Tensor, *, student: bool) -> Terms:
        """Return f and g of one head, whose slope is f − μ·g, and the terms of the moments.

        μ is the first moment for the student and the last for the teacher.
        """
        ...

    def along(self, log_p: Tensor, log_t: Tensor, zeta_s: Tensor, zeta_t: Tensor, *moments: Tensor) -> Terms:
        """Return the terms of D˙, and of what `second` needs beside it."""
        ...

    def second(
        self, zeta_s: Tensor, zeta_t: Tensor, log_p: Tensor, log_t: Tensor, sums: Terms, moments: Terms
    ) -> tuple[Tensor, Tensor]:
        """Return the derivatives of both slopes along ζ; ``sums`` are those of `along`."""
        ...


@record
class KL:
    """KL(t ‖ p)."""

    beta = 0.0
    n_moments = 1
    alone = True

    def value(self, moments: Terms) -> Tensor:
        return moments[0]

    def moments(self, log_p: Tensor, log_t: Tensor) -> Terms:
        return terms(log_p, log_t)[:1]

    def slopes(self, log_p: Tensor, log_t: Tensor, *moments: Tensor) -> tuple[Tensor, Tensor]:
        of_student = self.slope(log_p, log_t, *moments, student=True)
        return of_student, self.slope(log_p, log_t, *moments, student=False)

    def slope(self, log_p: Tensor, log_t: Tensor, *moments: Tensor, student: bool) -> Tensor:
        if student:
            return terms(log_p, log_t)[1]
        (kl,) = moments
        t = log_t.exp()
        return torch.where(t == 0, 0.0, t * (log_t - log_p - kl))

    def apart(self, log_p: Tensor, log_t: Tensor, *, student: bool) -> Terms:
        assert not student, "the student's slope needs no moment"
        t = log_t.exp()
        return torch.where(t == 0, 0.0, t * (log_t - log_p)), t, terms(log_p, log_t)[0]

    def along(self, log_p: Tensor, log_t: Tensor, zeta_s: Tensor, zeta_t: Tensor, *moments: Tensor) -> Terms:
        of_student, of_teacher = self.slopes(log_p, log_t, *moments)
        return of_student * zeta_s + of_teacher * zeta_t, log_p.exp() * zeta_s, log_t.exp() * zeta_t

    def second(
        self, zeta_s: Tensor, zeta_t: Tensor, log_p: Tensor, log_t: Tensor, sums: Terms, moments: Terms
    ) -> tuple[Tensor, Tensor]:
        (kl,), (kl_dot, mean_s, mean_t) = moments, sums
        t, centred_s, centred_t = log_t.exp(), zeta_s - mean_s, zeta_t - mean_t
        moved = torch.where(t == 0, 0.0, t * (1 - (log_p - log_t) - kl)) * centred_t
        return log_p.exp() * centred_s - t * centred_t, moved - t * (centred_s + kl_dot)


@record
class JS:
    """The generalised Jensen–Shannon divergence, 0 < β < 1."""

    beta: float

    n_moments = 2
    alone = False

    def value(self, moments: Terms) -> Tensor:
        return (1 - self.beta) * moments[0] + self.beta * moments[1]

    def moments(self, log_p: Tensor, log_t: Tensor) -> Terms:
        return self.apart(log_p, log_t, student=True)[2:]

    def apart(self, log_p: Tensor, log_t: Tensor, *, student: bool) -> Terms:
        p, t = log_p.exp(), log_t.exp()
        a, b = self._logs(log_p, log_t)
        other = t - p  # M − p = β·(t − p), M − t = −(1 − β)·(t − p)
        of_p, of_t = p * a, t * b
        terms = (
            torch.where(a.abs() < NEAR, p * phi(-a.clamp(-NEAR, NEAR)), self.beta * other + of_p),
            torch.where(b.abs() < NEAR, t * phi(-b.clamp(-NEAR, NEAR)), of_t - (1 - self.beta) * other),
        )
        if student:
            return (1 - self.beta) * of_p, (1 - self.beta) * p, *terms
        return self.beta * of_t, self.beta * t, *terms

    def slopes(self, log_p: Tensor, log_t: Tensor, *moments: Tensor) -> tuple[Tensor, Tensor]:
        of_student = self.slope(log_p, log_t, *moments, student=True)
        return of_student, self.slope(log_p, log_t, *moments, student=False)

    def slope(self, log_p: Tensor, log_t: Tensor, *moments: Tensor, student: bool) -> Tensor:
        of_p, of_t = moments
        delta = self._delta(log_p, log_t)
        if student:
            return (1 - self.beta) * log_p.exp() * (self._of_student(delta) - of_p)
        return self.beta * log_t.exp() * (self._of_teacher(delta) - of_t)

    def along(self, log_p: Tensor, log_t: Tensor, zeta_s: Tensor, zeta_t: Tensor, *moments: Tensor) -> Terms:
        p, t = log_p.exp(), log_t.exp()
        a, b = self._logs(log_p, log_t)
        of_student, of_teacher = self.slopes(log_p, log_t, *moments)
        w = self._share(p, t)
        mixed = w * zeta_s + (1 - w) * zeta_t
        return (
            of_student * zeta_s + of_teacher * zeta_t,
            *(p * zeta_s, t * zeta_t),
            *(p * a * zeta_s, t * b * zeta_t),
            *(p * mixed, t * mixed),
            *(p * w, t * w),
        )

    def second(
        self, zeta_s: Tensor, zeta_t: Tensor, log_p: Tensor, log_t: Tensor, sums: Terms, moments: Terms
    ) -> tuple[Tensor, Tensor]:
        (of_p, of_t), (_, mean_s, mean_t, p_a, t_b, p_mixed, t_mixed, p_w, t_w) = moments, sums
        p, t = log_p.exp(), log_t.exp()
        a, b = self._logs(log_p, log_t)
        w = self._share(p, t)
        centred_s, centred_t = zeta_s - mean_s, zeta_t - mean_t
        mixed = w * centred_s + (1 - w) * centred_t
        of_p_dot = (p_a - of_p * mean_s) - (p_mixed - mean_s * p_w - mean_t * (1 - p_w))
        of_t_dot = (t_b - of_t * mean_t) - (t_mixed - mean_s * t_w - mean_t * (1 - t_w))
        student = p * (centred_s * (a - of_p) + centred_s - mixed - of_p_dot)
        teacher = t * (centred_t * (b - of_t) + centred_t - mixed - of_t_dot)
        return (1 - self.beta) * student, self.beta * teacher

    def _logs(self, log_p: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
        """Return a = log p/M and b = log t/M, bounded where p or t is nothing beside the other."""
        delta = self._delta(log_p, log_t)
        return self._of_student(delta), self._of_teacher(delta)

    def _delta(self, log_p: Tensor, log_t: Tensor) -> Tensor:
        most = MOST[log_p.dtype]
        return (log_p - log_t).nan_to_num(0.0, most, -most).clamp(-most, most)  # nan where both are masked

    def _of_student(self, delta: Tensor) -> Tensor:
        """Return log p/M."""
        return -torch.log1p(self.beta * torch.expm1(-delta))

    def _of_teacher(self, delta: Tensor) -> Tensor:
        """Return log t/M."""
        return -torch.log1p((1 - self.beta) * torch.expm1(delta))

    def _share(self, p: Tensor, t: Tensor) -> Tensor:
        """Return w = (1 − β)·p/M; ½ where both are 0 and it counts nothing."""
        own, other = (1 - self.beta) * p, self.beta * t
        m = own + other
        return torch.where(m == 0, 0.5, own / m)


def divergence(beta: float) -> Divergence:
    """Return the divergence of a β below 1."""
    return KL() if beta == 0.0 else JS(beta)


def phi(delta: Tensor) -> Tensor:
    """Return φ(δ) = δ²·(1/2! + δ/3! + δ²/4! + …) for |δ| ≤ NEAR, to a few units in the last place."""
    terms = 14 if delta.dtype == torch.float64 else 8
    total = delta / math.factorial(terms + 1) + 1 / math.factorial(terms)
    for k in reversed(range(2, terms)):
        total = total * delta + 1 / math.factorial(k)
    return delta * delta * total


def phi_terms(q: Tensor, r: Tensor, delta: Tensor) -> Tensor:
    """Return q·φ(δ), δ = log(r/q), whose sum is Σ q·log(q/r) + Σ r − Σ q: r where q is 0."""
    absent = q == 0
    delta = torch.where(absent, 0.0, delta)
    near = (delta.abs() < NEAR) & ~absent
    return torch.where(near, q * phi(delta.clamp(-NEAR, NEAR)), r - q - q * delta)


def log_mixture(delta: Tensor, absent: Tensor, share: float) -> Tensor:
    """Return log((1 − share) + share·e^δ); ``absent`` is where e^δ is 0."""
    near = delta.abs() < 1
    small = torch.log1p(share * torch.expm1(delta.clamp(-1.0, 1.0)))
    rest = torch.full_like(delta, math.log1p(-share))
    far = torch.logaddexp(rest, torch.where(near | absent, 0.0, delta) + math.log(share))
    return torch.where(absent, rest, torch.where(near, small, far))


def terms(log_p: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    """Return t·φ(δ) and ∂KL/∂z_S = p − t; near δ = 0 from δ, whose digits t and p have lost."""
    t, delta = log_t.exp(), log_p - log_t
    x, change = delta.clamp(-NEAR, NEAR), log_p.exp() - t
    near, excess = delta.abs() < NEAR, phi(x)
    # t·δ is nan where t = 0 lies infinitely far, or both are masked; a row without sense is nan in p or t too
    far = change - (t * delta).nan_to_num(0.0, math.inf, -math.inf)
    return torch.where(near, t * excess, far), torch.where(near, t * (excess + x), change)
