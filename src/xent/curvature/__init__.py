"""Second derivatives of softmax cross-entropy in closed form, as operators without their matrices.

    ∂²ℓ/∂z² = a·J        J = diag(p) − p pᵀ        p = softmax(z)        H_W = Σ a·J ⊗ x xᵀ

Read in this order: `_row_operator` (a C × C operator for every row), `_jacobian` (J, its root and its
inverses), `_top_eigenpair` (its largest eigenvalue); `_batches` and `_right_hand_sides` (rows and right-hand
sides), `_heads` (the Hessian and the Gauss–Newton matrix of a linear head), `_fisher` (its Fisher
information), `_kronecker` (its approximation by two factors); `_cg` and `_preconditioners` (linear systems),
`_newton` (a step); `_row_gradients` (each row's own gradient); `_model_products` (products through a model
before the head).
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
