"""Conjugate gradients for a symmetric system that may be singular, nearly singular or indefinite.

    minimise ½⟨x, H x⟩ − ⟨b, x⟩        r = b − H x        z = M⁻¹ r        p ← z + β p        x ← x + α p

A step goes to the minimum along p, α = ⟨r, z⟩/⟨p, H p⟩, so the quadratic model falls as long as ⟨p, H p⟩ is
above its rounding error. The error is measured relative to ⟨p, M p⟩, which is updated as ⟨r, z⟩ + β²⟨p, M p⟩.
Where ⟨p, H p⟩ is below it, p lies in the null space of H to rounding, the rest of r cannot be solved for, and
the iteration ends.

The recursion's r drifts from b − H x. `solve` relies on it; `solve_refined` recomputes b − H x and restarts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Map: TypeAlias = Callable[[Tensor], Tensor]
ROUNDING = 4  # a curvature of fewer units of rounding of the largest one counts as 0


class CGResult(NamedTuple):
    """The result of conjugate gradients."""

    solution: Tensor
    iterations: int
    converged: bool
    negative_curvature: bool  # whether it ended the iterations


class RefinedResult(NamedTuple):
    """The result of conjugate gradients with the residual recomputed."""

    result: CGResult
    residual: float  # ‖b − H x‖ / ‖b‖, of the solution returned
    decrease: float  # ⟨b, x⟩ − ½⟨x, H x⟩, never negative


def solve(apply: Map, right: Tensor, inverse: Map, tolerance: float, max_iterations: int) -> CGResult:
    """Solve apply(x) = right from 0 until the recursion's residual is within tolerance·‖right‖.

    Where the first direction already has zero or negative curvature, x is that direction, which is downhill.
    """
    x, size = torch.zeros_like(right), _largest_entry(right)
    r = right / size  # squares of large or small entries would leave the type's range
    threshold = tolerance * float(r.norm())
    p, before, length, largest_curvature = torch.zeros_like(right), torch.inf, 0.0, 0.0
    for iteration in range(max_iterations + 1):
        if float(r.norm()) <= threshold:
            return CGResult(x * size, iteration, True, False)
        if iteration == max_iterations:
            break
        z = inverse(r)
        rz = float((r * z).sum())
        beta = rz / before
        p, length = z + p * beta, rz + beta * beta * length
        Hp = apply(p)
        curvature = float((p * Hp).sum())
        if not 0 < rz < torch.inf or not abs(curvature) < torch.inf:
            return CGResult(x * size, iteration, False, False)
        largest_curvature = max(largest_curvature, curvature / length)
        rounding = ROUNDING * torch.finfo(r.dtype).eps * largest_curvature * length
        if not curvature > rounding:
            return CGResult((x if iteration else p) * size, iteration, False, curvature < -rounding)
        x = x + p * (rz / curvature)
        r = r - Hp * (rz / curvature)
        before = rz
    return CGResult(x * size, max_iterations, False, False)


def solve_refined(
    apply: Map, right: Tensor, inverse: Map, tolerance: float, max_iterations: int
) -> RefinedResult:
    """Solve apply(x) = right by restarts until the recomputed residual is within tolerance·‖right‖.

    It also ends when a restart does not halve the residual, and discards one that raises the model.
    """
    size = _largest_entry(right)
    b = right / size
    x, r, iterations, model, negative = torch.zeros_like(b), b, 0, 0.0, False
    norm = initial_norm = float(b.norm())
    while norm > tolerance * initial_norm and iterations < max_iterations:
        result = solve(apply, r, inverse, tolerance * initial_norm / norm, max_iterations - iterations)
        iterations, negative = iterations + result.iterations, result.negative_curvature
        if negative and iterations > result.iterations == 0:
            break
        trial = x + result.solution
        residual_at_trial = b - apply(trial)
        decrease = 0.5 * float((trial * (b + residual_at_trial)).sum())
        before, after = norm, float(residual_at_trial.norm())
        if not max(model, 0.0) <= decrease * (1 + 1e-6) < torch.inf or not after < torch.inf:
            break
        if not bool((trial * size).isfinite().all()) or not decrease * size * size < torch.inf:
            break  # a nearly singular system can overflow the solution
        x, r, model, norm = trial, residual_at_trial, decrease, after
        if not norm < before / 2:
            break
    relative = norm / initial_norm if initial_norm else 0.0
    converged = norm <= tolerance * initial_norm
    return RefinedResult(CGResult(x * size, iterations, converged, negative), relative, model * size * size)


def _largest_entry(right: Tensor) -> float:
    size = float(right.abs().max()) if right.numel() else 0.0
    return size if 0 < size < torch.inf else 1.0
