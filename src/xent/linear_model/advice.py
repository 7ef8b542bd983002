"""Advice for a fit that ended before its tolerance: the reason, and what helps."""

from __future__ import annotations

import dataclasses

import numpy as np

from xent.linear_model.descent import Descent
from xent.linear_model.solvers import all_solvers


@dataclasses.dataclass(frozen=True)
class Words:
    """The names by which a caller knows what to change."""

    max_iter: str
    tol: str
    solvers: tuple[str, ...]  # that go on where others stall
    penalty: str
    scaling: str | None  # None where the features are standardised already


def estimator_words() -> Words:
    """Return the words of ``SoftmaxRegression``."""
    solvers = tuple(f'solver="{solver.name}"' for solver in all_solvers() if solver.precise)
    return Words("max_iter", "tol", solvers, "a smaller C", "standardised features")


def command_words(class_parallel: bool, standardised: bool) -> Words:
    """Return the words of ``xent fit``, where some solvers do not go with ``--class-parallel``."""
    solvers = tuple(
        f"--solver {solver.name}"
        + (" without --class-parallel" if class_parallel and not solver.class_parallel else "")
        for solver in all_solvers()
        if solver.precise
    )
    return Words("--max-iter", "--tol", solvers, "a larger --l2", None if standardised else "--standardize")


def advice(descent: Descent, words: Words) -> str:
    """Return "the reason; what helps" for a descent that has not converged."""
    dtype = descent.objective.dtype
    single = dtype == np.float32
    if not np.isfinite(descent.gradient_norm):
        wider = ", or pass float64 features" if single else ""
        return f"features, masses or weights are too large for {dtype}; scale them down{wider}"
    if not descent.stalled:
        return f"{words.max_iter} is reached; raise {words.max_iter} or {words.tol}"
    solvers = () if descent.solver.precise else words.solvers
    *most, last = filter(None, [*solvers, words.scaling, words.penalty, f"a larger {words.tol}"])
    precise = ", or pass float64 features" if single else ""
    return f"the arithmetic resolves no further decrease; try {', '.join(most)} or {last}{precise}"
