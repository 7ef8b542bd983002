"""Curvature of softmax cross-entropy in closed form, as linear operators."""

from xent.curvature.heads import HeadFisher, HeadGGN, HeadHessian
from xent.curvature.kronecker import HeadKronecker, KroneckerEigen
from xent.curvature.newton import NewtonStep, newton_step

__all__ = [
    "HeadFisher",
    "HeadGGN",
    "HeadHessian",
    "HeadKronecker",
    "KroneckerEigen",
    "NewtonStep",
    "newton_step",
]
