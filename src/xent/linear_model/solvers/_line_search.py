"""The step along a direction: long enough, and where values no longer differ, by slopes alone.

    f(θ + αs) ≤ f(θ) + δα·f'                        (sufficient decrease)
    f(θ + αs) ≤ f(θ) + rounding,  |f'(α)| ≤ (1 − 2δ)·|f'|    (Hager and Zhang's approximate Wolfe condition)

Hager and Zhang, "A new conjugate gradient method with guaranteed descent", 2005. The second is how a gradient
of 1e-10 is reached, where a decrease is 1e-20.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from xent.linear_model.objective import Objective

SHORTER = 20  # times, at most
SUFFICIENT = 1e-4  # of the decrease that the slope promises


def line_search(
    objective: Objective, theta: np.ndarray, step: np.ndarray, value: float, gradient: np.ndarray
) -> tuple[np.ndarray, float] | None:
    """Return θ + α·s and α, 1 or as much smaller as it takes; None where nothing lies lower."""
    slope = float(gradient @ step)
    if not slope < 0:
        return None
    rounding = 8 * np.finfo(objective.dtype).eps * abs(value)
    length = 1.0
    for _ in range(SHORTER):
        there = theta + length * step
        now, ahead = objective(there)
        now_slope = float(ahead @ step)
        lower = now <= value + SUFFICIENT * length * slope
        flat = now <= value + rounding and now_slope <= (1 - 2 * SUFFICIENT) * -slope
        if lower or flat:
            return there, length
        # where the slope, if it is linear in between, vanishes
        bent = slope / (slope - now_slope) if now_slope > slope else 0.5
        length *= min(0.5, max(0.1, bent))
    return None
