"""Second derivatives of softmax cross-entropy in closed form, as operators that are never written out.

    ∂²ℓ/∂z² = a·J        J = diag(p) − p pᵀ        p = softmax(z)        H_W = Σ a·J ⊗ x xᵀ

Read in this order: `rowwise` (a C × C matrix for every row, known by what it does to a vector), `jacobian`
(J, its root and its inverses), `secular` (its largest eigenvalue); `source` and `sides` (rows and right-hand
sides), `heads` (what a linear head makes of J), `fisher` (its three senses), `kronecker` (that by two
factors); `conjugate` and `preconditioners` (a system with it), `newton` (a step); `rows` (each row's own
gradient); `extractors` (what lies before the head).
"""

from xent.curvature._fisher import HeadFisher
from xent.curvature._heads import HeadGGN, HeadHessian
from xent.curvature._jacobian import SoftmaxJacobian
from xent.curvature._kronecker import HeadKronecker, KroneckerEigen
from xent.curvature._model_products import ggn_vector_product, hessian_vector_product
from xent.curvature._newton import NewtonStep, newton_step
from xent.curvature._row_gradients import row_gradient_norms, row_gradients
from xent.curvature._top_eigenpair import Eigenpair

__all__ = [
    "Eigenpair",
    "HeadFisher",
    "HeadGGN",
    "HeadHessian",
    "HeadKronecker",
    "KroneckerEigen",
    "NewtonStep",
    "SoftmaxJacobian",
    "ggn_vector_product",
    "hessian_vector_product",
    "newton_step",
    "row_gradient_norms",
    "row_gradients",
]
