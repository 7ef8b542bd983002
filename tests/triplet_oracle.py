"""The chain of bounds of a row in exact arithmetic, and what rounding one margin a rival may cost."""

from __future__ import annotations

import math

import mpmath
from mpmath import mpf


def bounds(z: list[float], y: int) -> dict[str, tuple[mpf, mpf]]:
    """Field -> its value, and Σ_j |∂/∂m_j|·(|m_j| + log C), by which one unit of rounding may move it."""
    with mpmath.workdps(80):
        C = len(z)
        m = [mpf(v) - mpf(z[y]) for j, v in enumerate(z) if j != y and v > -math.inf]
        rivals = C - 1
        log_C, log_rivals = mpmath.log(C), mpmath.log(max(rivals, 1))
        found = {
            "hinge": _mean([_hinge(v + log_C) for v in m], m, C, C),
            "smooth": _mean([_softplus(v + log_C) for v in m], m, C, C),
            "tight": _mean([_softplus(v + log_rivals) for v in m], m, C, max(rivals, 1)),
            "union": _mean([_softplus(v) for v in m], m, C, 1),
        }
        total = mpmath.fsum(mpmath.exp(v) for v in m)
        found["loss"] = (
            mpmath.log1p(total),
            mpmath.fsum(mpmath.exp(v) / (1 + total) * (abs(v) + log_C) for v in m),
        )
        for name, shift in (("hardest_low", 0), ("hardest_high", log_rivals)):
            found[name] = _mean([_softplus(max(m) + shift)], [max(m)], C, 1) if m else (mpf(0), mpf(0))
        return found


def shares(z: list[float], y: int) -> list[mpf]:
    """π of every class, 0 for the own one."""
    with mpmath.workdps(80):
        weights = [mpf(0) if j == y else mpmath.exp(mpf(v)) for j, v in enumerate(z)]
        total = mpmath.fsum(weights) or mpf(1)  # all of them masked: no shares
        return [w / total for w in weights]


def _hinge(v: mpf) -> tuple[mpf, mpf]:
    return (v, mpf(1)) if v > 0 else (mpf(0), mpf(0))


def _softplus(v: mpf) -> tuple[mpf, mpf]:
    return mpmath.log1p(mpmath.exp(v)), 1 / (1 + mpmath.exp(-v))


def _mean(terms: list[tuple[mpf, mpf]], m: list[mpf], classes: int, by: int) -> tuple[mpf, mpf]:
    value = mpmath.fsum(term for term, _ in terms)
    moved = mpmath.fsum(
        slope * (abs(v) + mpmath.log(classes)) for (_, slope), v in zip(terms, m, strict=True)
    )
    return value / by, moved / by
