"""Why a fit ended before its tolerance, and what helps, in the words of who asked for it."""

from __future__ import annotations

import dataclasses

import numpy as np

from xent.linear_model.descent import Descent


@dataclasses.dataclass(frozen=True)
class Words:
    """The names that a caller has for the ways out."""

    max_iter: str
    tol: str
    newton: str
    penalty: str
    scaling: str | None  # None where the features are standardised already


ESTIMATOR = Words("max_iter", "tol", 'solver="newton-cg"', "a smaller C", "standardised features")


def command_words(class_parallel: bool, standardised: bool) -> Words:
    """Return the words of ``xent fit``, which does not do everything together."""
    newton = "--solver newton-cg" + (" without --class-parallel" if class_parallel else "")
    return Words("--max-iter", "--tol", newton, "a larger --l2", None if standardised else "--standardize")


def advice(descent: Descent, words: Words) -> str:
    """Return "why; what helps" for a descent that has not converged."""
    dtype = descent.objective.dtype
    single = dtype == np.float32
    if not np.isfinite(descent.gradient_norm):
        wider = ", or pass float64 features" if single else ""
        return f"features, masses or weights are too large for {dtype}; scale them down{wider}"
    if not descent.stalled:
        return f"{words.max_iter} is reached; raise {words.max_iter} or {words.tol}"
    newton = None if descent.solver == "newton-cg" else words.newton
    *most, last = filter(None, [newton, words.scaling, words.penalty, f"a larger {words.tol}"])
    precise = ", or pass float64 features" if single else ""
    return f"the arithmetic resolves no further decrease; try {', '.join(most)} or {last}{precise}"
