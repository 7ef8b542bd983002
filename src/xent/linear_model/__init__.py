"""Linear classifiers: ``SoftmaxRegression``, its choice of C, and the solvers that it may use.

Importing this package imports none of its dependencies. ``SoftmaxRegression`` does, and says which extra is
missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xent.errors import BadInput, MissingExtra, needs
from xent.linear_model.solvers import Solver, register_solver

if TYPE_CHECKING:
    from xent.linear_model.loaded_model import load_model
    from xent.linear_model.softmax_regression import SoftmaxRegression
    from xent.linear_model.softmax_regression_cv import SoftmaxRegressionCV

__all__ = [
    "BadInput",
    "MissingExtra",
    "SoftmaxRegression",
    "SoftmaxRegressionCV",
    "Solver",
    "load_model",
    "register_solver",
]


def __getattr__(name: str) -> object:
    if name == "SoftmaxRegression":
        with needs("probe"):
            from xent.linear_model.softmax_regression import SoftmaxRegression
        return SoftmaxRegression
    if name == "SoftmaxRegressionCV":
        with needs("probe"):
            from xent.linear_model.softmax_regression_cv import SoftmaxRegressionCV
        return SoftmaxRegressionCV
    if name == "load_model":
        with needs("probe"):
            from xent.linear_model.loaded_model import load_model
        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
