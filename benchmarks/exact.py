"""The loss of a row and its gradient in exact arithmetic (mpmath), and the bounds that xent claims for them.

float64 and float32:

    |ℓ − exact| ≤ 4 ulp(exact) + eps·Σ_c |∂ℓ/∂z_c|·|z_c − max z|        ‖g − exact‖ ≤ 4 eps·(|a|‖p‖ + ‖t‖)

The second term of the first bound is what rounding one subtraction a class costs. Half types: those of
float32, and one rounding on top, ½ ulp of the loss and of every entry of the gradient.

`tests/core/test_accuracy.py` holds xent to these bounds; `benchmarks/accuracy.py` prints them as a table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import mpmath
import torch

HALF = (torch.float16, torch.bfloat16)


class Exact(NamedTuple):
    """One row: numbers of as many digits as it takes."""

    loss: mpmath.mpf
    gradient: list[mpmath.mpf]  # (C,) a·p − t
    p: list[mpmath.mpf]  # (C,)
    distance: list[mpmath.mpf]  # (C,) max z − z
    t: list[mpmath.mpf]  # (C,)


def exact(z: torch.Tensor, t: Sequence[mpmath.mpf | float]) -> Exact:
    """ℓ = a·lse(z) − ⟨t, z⟩ of one row z (C,), t (C,), to 40 digits beyond its smallest probability."""
    values = z.double().tolist()
    finite = [v for v in values if math.isfinite(v)]
    with mpmath.workdps(40 + int((max(finite) - min(finite)) / math.log(10))):
        top = mpmath.mpf(max(finite))
        t = [mpmath.mpf(c) for c in t]
        distance = [top - v for v in values]
        weights = [mpmath.exp(-d) for d in distance]
        total = mpmath.fsum(weights)
        lse, a = mpmath.log(total), mpmath.fsum(t)
        p = [w / total for w in weights]
        loss = mpmath.fsum(c * (lse + d) for c, d in zip(t, distance, strict=True) if c != 0)
        return Exact(loss, [a * q - c for q, c in zip(p, t, strict=True)], p, distance, t)


def ulp(value: mpmath.mpf | float, dtype: torch.dtype) -> float:
    """The distance from |value| to the next larger number of a type."""
    v = torch.tensor(abs(float(value)), dtype=dtype)
    return float(torch.nextafter(v, torch.tensor(math.inf, dtype=dtype)).double() - v.double())


def norm(values: Sequence[mpmath.mpf]) -> mpmath.mpf:
    return mpmath.sqrt(mpmath.fsum(values, squared=True))


def loss_bound(row: Exact, dtype: torch.dtype) -> mpmath.mpf:
    if dtype in HALF:
        return ulp(row.loss, dtype) / 2 + loss_bound(row, torch.float32)
    slopes = zip(row.gradient, row.distance, strict=True)
    subtractions = mpmath.fsum(abs(g) * d for g, d in slopes if d != mpmath.inf)
    return 4 * ulp(row.loss, dtype) + torch.finfo(dtype).eps * subtractions


def gradient_scale(row: Exact) -> mpmath.mpf:
    return abs(mpmath.fsum(row.t)) * norm(row.p) + norm(row.t)


def gradient_bound(row: Exact, dtype: torch.dtype) -> mpmath.mpf:
    """Bound the Euclidean norm of the gradient's error."""
    if dtype in HALF:
        info = torch.finfo(dtype)
        rounding = norm([max(abs(g), info.smallest_normal) for g in row.gradient]) * info.eps / 2
        return rounding + gradient_bound(row, torch.float32)
    return 4 * torch.finfo(dtype).eps * gradient_scale(row)
