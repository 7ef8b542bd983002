"""xent: softmax cross-entropy as one coherent system."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from xent import curvature, metrics, nn, sinkhorn, triplets
from xent._arguments.class_subset import sample_classes
from xent._calibration import fit_temperature
from xent._core.backend import Backend
from xent._core.backends import backends, register_backend, unregister_backend
from xent._core.low_rank import LowRank
from xent._core.margin import Margin
from xent._core.target import TopKTarget
from xent._log_prob import LogProb, linear_log_prob, log_prob
from xent._row_statistics import (
    RowStatistics,
    entropy,
    linear_row_statistics,
    linear_top_k,
    row_statistics,
    top_k,
)
from xent.losses._binary import binary_cross_entropy, binary_cross_entropy_with_logits, kl_div
from xent.losses._cross_entropy import cross_entropy, linear_cross_entropy
from xent.losses._focal import focal_loss, linear_focal_loss
from xent.losses._kl_divergence import js_divergence, kl_divergence
from xent.losses._linear_divergence import linear_js_divergence, linear_kl_divergence
from xent.losses._poly import linear_poly_loss, poly_loss
from xent.losses._surrogate import surrogate_cross_entropy

if TYPE_CHECKING:
    from xent.auditing import Audit, AuditResult, audit
    from xent.linear_model import SoftmaxRegression, SoftmaxRegressionCV, load_model

__version__ = "0.1.0"
__all__ = [
    "Audit",
    "AuditResult",
    "Backend",
    "LogProb",
    "LowRank",
    "Margin",
    "RowStatistics",
    "SoftmaxRegression",
    "SoftmaxRegressionCV",
    "TopKTarget",
    "__version__",
    "audit",
    "backends",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "curvature",
    "entropy",
    "fit_temperature",
    "focal_loss",
    "js_divergence",
    "kl_div",
    "kl_divergence",
    "linear_cross_entropy",
    "linear_focal_loss",
    "linear_js_divergence",
    "linear_kl_divergence",
    "linear_log_prob",
    "linear_poly_loss",
    "linear_row_statistics",
    "linear_top_k",
    "load_model",
    "log_prob",
    "metrics",
    "nn",
    "poly_loss",
    "register_backend",
    "row_statistics",
    "sample_classes",
    "sinkhorn",
    "surrogate_cross_entropy",
    "top_k",
    "triplets",
    "unregister_backend",
]


def __getattr__(name: str) -> object:
    if name in ("Audit", "AuditResult", "audit"):  # what few need at once
        return getattr(_import_module("xent.auditing"), name)
    if name in (
        "SoftmaxRegression",
        "SoftmaxRegressionCV",
        "load_model",
    ):  # need an extra, which importing xent must not
        return getattr(_import_module("xent.linear_model"), name)
    if name == "integrations":  # a module that few need
        return _import_module("xent.integrations")
    raise AttributeError(f"module 'xent' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
