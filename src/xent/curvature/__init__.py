"""Curvature of softmax cross-entropy in closed form, as linear operators."""

from xent.curvature.extractors import (
    ggn_vector_product,
    hessian_vector_product,
    row_gradient_norms,
    row_gradients,
)
from xent.curvature.heads import HeadFisher, HeadGGN, HeadHessian

__all__ = [
    "HeadFisher",
    "HeadGGN",
    "HeadHessian",
    "ggn_vector_product",
    "hessian_vector_product",
    "row_gradient_norms",
    "row_gradients",
]
