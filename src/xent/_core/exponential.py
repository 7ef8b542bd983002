"""Exponentials of which many are too small for a normal number.

    e^x = e^max(x, −L) · e^min(max(x + L, −L), 0)        L = 87 in float32, 708 in float64

Above −L the second factor is 1, so that the result is that of one exponential. Below, both factors are normal
numbers and the product rounds to a subnormal one or to 0; x + L is exact there. On processors by Intel the
vector library that torch calls takes a hundred times as long for a subnormal result or a 0 as for others, as
logits have that lie 87 nats apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = {torch.float32: -87.0, torch.float64: -708.0}
"""−L, by type: above the logarithm of the smallest normal number."""

FEW = 1 << 14
"""Numbers that are looked at, all of them; of more a sample is."""

LEAST, PARTS = 256, 32
"""Numbers of a part at least, and parts at most, one after the other: a part needs as much memory again."""

STEP = 61
"""One number of so many is sampled: a prime, so that all columns are met."""

SHARE = 1 / 64
"""Share of small results from which two exponentials are faster than one."""


def exp_(x: Tensor) -> Tensor:
    """Return e^x (...), in place.

    >>> exp_(torch.tensor([0.0, -100.0, -torch.inf])).tolist()
    [1.0, 3.783505853677006e-44, 0.0]
    """
    low = SMALLEST.get(x.dtype)
    if low is None or x.device.type != "cpu" or x.numel() == 0:
        return x.exp_()
    if not (_any_below(x, low) if x.numel() <= FEW else _many_below(x, low)):
        return x.exp_()
    most = max(LEAST, x.numel() // PARTS)
    for part in x.view(-1).split(most) if x.is_contiguous() else x.split(max(1, most * len(x) // x.numel())):
        if _any_below(part, low):
            rest = torch.sub(part, low).clamp_(low, 0.0).exp_()
            part.clamp_(min=low).exp_().mul_(rest)
        else:
            part.exp_()
    return x


def _any_below(x: Tensor, low: float) -> bool:
    """Return whether a number is below a bound, or is none."""
    return not x.amin().item() >= low


def _many_below(x: Tensor, low: float) -> bool:
    """Return whether many of a sample are below a bound; of −inf the exponential is fast."""
    if x.is_contiguous():
        sample = x.view(-1)[::STEP]
    else:
        sample = x[..., ::STEP] if x.shape[-1] >= 8 * STEP else x[::STEP]
    below = ((sample < low) & (sample > -torch.inf)).sum().item()
    return below > SHARE * sample.numel()
