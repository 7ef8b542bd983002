"""Conjugate gradients for a symmetric system that may be singular, nearly so, or bent the wrong way.

    minimise ½⟨x, H x⟩ − ⟨b, x⟩        r = b − H x        z = M⁻¹ r        p ← z + β p        x ← x + α p

A step goes to the minimum along p, α = ⟨r, z⟩/⟨p, H p⟩, so that the model only falls, as long as ⟨p, H p⟩
is a number and not the rounding of one: beside ⟨p, M p⟩, which comes along as ⟨r, z⟩ + β²⟨p, M p⟩, it must
not be as small as that. Where it is, H sees no more of p, and what r still holds is no part of the system.

The recursion's r drifts from b − H x. `run` trusts it; `refined` asks H again, and goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Map: TypeAlias = Callable[[Tensor], Tensor]
ROUNDING = 4  # units of rounding below which, beside the largest seen, a curvature is none


class Found(NamedTuple):
    solution: Tensor
    iterations: int
    converged: bool
    negative_curvature: bool  # ended it


class Refined(NamedTuple):
    found: Found
    residual: float  # ‖b − H x‖ / ‖b‖, of the solution returned
    decrease: float  # ⟨b, x⟩ − ½⟨x, H x⟩, never negative


def run(apply: Map, right: Tensor, inverse: Map, tolerance: float, most: int) -> Found:
    """apply(x) = right, from 0, until the recursion's residual is within tolerance·‖right‖.

    Where there is no curvature at all, or it is negative, from the first, x is downhill all the same.
    """
    x, size = torch.zeros_like(right), _size(right)
    r = right / size  # squares of what is large or small leave the range of the type
    within = tolerance * float(r.norm())
    p, before, length, largest = torch.zeros_like(right), torch.inf, 0.0, 0.0
    for iteration in range(most + 1):
        if float(r.norm()) <= within:
            return Found(x * size, iteration, True, False)
        if iteration == most:
            break
        z = inverse(r)
        now = float((r * z).sum())
        beta = now / before
        p, length = z + p * beta, now + beta * beta * length
        bent = apply(p)
        curvature = float((p * bent).sum())
        if not 0 < now < torch.inf or not abs(curvature) < torch.inf:
            return Found(x * size, iteration, False, False)
        largest = max(largest, curvature / length)
        rounding = ROUNDING * torch.finfo(r.dtype).eps * largest * length
        if not curvature > rounding:
            return Found((x if iteration else p) * size, iteration, False, curvature < -rounding)
        x = x + p * (now / curvature)
        r = r - bent * (now / curvature)
        before = now
    return Found(x * size, most, False, False)


def refined(apply: Map, right: Tensor, inverse: Map, tolerance: float, most: int) -> Refined:
    """The same, by runs each from where the last one ended, until the residual itself is within.

    It ends too when a run no longer halves the residual, and takes back one that raises the model.
    """
    size = _size(right)
    b = right / size
    x, r, iterations, model, bent = torch.zeros_like(b), b, 0, 0.0, False
    norm = whole = float(b.norm())
    while norm > tolerance * whole and iterations < most:
        found = run(apply, r, inverse, tolerance * whole / norm, most - iterations)
        iterations, bent = iterations + found.iterations, found.negative_curvature
        if bent and iterations > found.iterations == 0:
            break
        there = x + found.solution
        left = b - apply(there)
        lower = 0.5 * float((there * (b + left)).sum())
        before, after = norm, float(left.norm())
        if not max(model, 0.0) <= lower * (1 + 1e-6) < torch.inf or not after < torch.inf:
            break
        if not bool((there * size).isfinite().all()) or not lower * size * size < torch.inf:
            break  # where next to nothing fixes a class, the solution leaves the range of the type
        x, r, model, norm = there, left, lower, after
        if not norm < before / 2:
            break
    relative = norm / whole if whole else 0.0
    converged = norm <= tolerance * whole
    return Refined(Found(x * size, iterations, converged, bent), relative, model * size * size)


def _size(right: Tensor) -> float:
    size = float(right.abs().max()) if right.numel() else 0.0
    return size if 0 < size < torch.inf else 1.0
