"""A linear probe: ``SoftmaxRegression`` on arrays, and the fit and predict jobs of the command line on files.

Importing this package imports none of its dependencies; the names below do, and say which extra is missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xent.errors import BadInput, MissingExtra, needs

if TYPE_CHECKING:
    from xent.linear_model.softmax_regression import SoftmaxRegression

__all__ = ["BadInput", "MissingExtra", "SoftmaxRegression"]


def __getattr__(name: str) -> object:
    if name == "SoftmaxRegression":
        with needs("probe"):
            from xent.linear_model.softmax_regression import SoftmaxRegression
        return SoftmaxRegression
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
