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

PART = 1 << 16
"""Numbers that are looked at together; fewer are not sampled."""

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
    if x.numel() <= PART:
        return _part(x, low)
    if not _many_below(x, low):
        return x.exp_()
    if x.is_contiguous():
        for part in x.view(-1).split(PART):
            _part(part, low)
    else:
        for part in x.split(max(1, PART // (x.numel() // len(x)))):
            _part(part, low)
    return x


def _part(x: Tensor, low: float) -> Tensor:
    if x.amin().item() >= low:
        return x.exp_()
    rest = torch.sub(x, low).clamp_(low, 0.0).exp_()
    return x.clamp_(min=low).exp_().mul_(rest)


def _many_below(x: Tensor, low: float) -> bool:
    """Return whether many of a sample are below a bound; of −inf the exponential is fast."""
    if x.is_contiguous():
        sample = x.view(-1)[::STEP]
    else:
        sample = x[..., ::STEP] if x.shape[-1] >= 8 * STEP else x[::STEP]
    below = ((sample < low) & (sample > -torch.inf)).sum().item()
    return below > SHARE * sample.numel()
