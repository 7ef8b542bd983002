"""Rows for tests of triplets, and their exact values.

Beside each bound stands what rounding one margin a rival may cost.
"""

from __future__ import annotations

import math

import mpmath
import torch
from hypothesis import strategies as st
from mpmath import mpf

INF = math.inf

EXTREME = [
    ([0.0, -40.0], 0),
    ([0.0, 200.0], 0),
    ([0.0, -40.0, -40.0, -40.0, -40.0], 0),
    ([0.0, 700.0, -700.0, 700.0], 2),
    ([0.0, 1e8, -1e8, 1e8], 0),
    ([1e8, 1e8], 1),
    ([1e8, 1e8 + 24, 1e8 - 24], 0),
    ([-1e8, -1e8, -1e8, -INF], 1),
    ([-INF, 1.0, 2.0], 1),
    ([-INF, 5.0, -INF], 1),
    ([79.0, 0.0, 81.0, 80.0], 1),
    ([0.0] * 10, 3),
    ([1e-4, 0.0, -1e-4, 0.0], 3),
    ([0.0, 0.0, -3.0], 0),
    ([3e37, 0.0, -3e37, 1.0], 2),
    ([7.0], 0),
]
ROW = st.integers(1, 9).flatmap(
    lambda c: st.tuples(
        st.lists(
            st.one_of(
                st.floats(-3, 3, width=32),
                st.floats(-120, 120, width=32),
                st.floats(-1e8, 1e8, width=32),
                st.just(-INF),
            ),
            min_size=c,
            max_size=c,
        ),
        st.integers(0, c - 1),
    )
)


def row(z, y, dtype):
    """A row whose own class is there."""
    z = torch.tensor([z], dtype=dtype)
    z[0, y] = z[0, y].clamp_min(-1e8)
    return z, torch.tensor([y])


def head(dtype=torch.float64, n=11, d=5, c=13):
    x, w, b = (torch.randn(*shape, dtype=dtype) for shape in ((n, d), (c, d), (c,)))
    y = torch.randint(c, (n,))
    y[n // 2] = -100
    return x, w, b, y


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
