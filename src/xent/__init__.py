"""xent: softmax cross-entropy as one coherent system."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from xent import curvature, metrics, nn, sinkhorn, triplets
from xent.binary import binary_cross_entropy, binary_cross_entropy_with_logits, kl_div
from xent.core.margin import Margin
from xent.divergence import kl_divergence, linear_kl_divergence
from xent.functional import cross_entropy, linear_cross_entropy
from xent.rows import RowStatistics, entropy, linear_row_statistics, linear_top_k, row_statistics, top_k
from xent.subset import sample_classes
from xent.surrogate import surrogate_cross_entropy
from xent.target import TopKTarget
from xent.temperature import fit_temperature

if TYPE_CHECKING:
    from xent.probe import SoftmaxRegression

__version__ = "0.1.0"
__all__ = [
    "Margin",
    "RowStatistics",
    "SoftmaxRegression",
    "TopKTarget",
    "__version__",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "curvature",
    "entropy",
    "fit_temperature",
    "kl_div",
    "kl_divergence",
    "linear_cross_entropy",
    "linear_kl_divergence",
    "linear_row_statistics",
    "linear_top_k",
    "metrics",
    "nn",
    "row_statistics",
    "sample_classes",
    "sinkhorn",
    "surrogate_cross_entropy",
    "top_k",
    "triplets",
]


def __getattr__(name: str) -> object:
    if name == "SoftmaxRegression":  # needs an extra, which importing xent must not
        return _import_module("xent.probe").SoftmaxRegression
    raise AttributeError(f"module 'xent' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
