"""Second derivatives of softmax cross-entropy in closed form, as operators that are never written out.

    ∂²ℓ/∂z² = a·J        J = diag(p) − p pᵀ        p = softmax(z)

Read in this order: `rowwise` (a C × C matrix for every row, known by what it does to a vector), `jacobian`
(J, its root and its inverses), `secular` (its largest eigenvalue).
"""

from xent.curvature.jacobian import SoftmaxJacobian
from xent.curvature.secular import Eigenpair

__all__ = ["Eigenpair", "SoftmaxJacobian"]
