"""Curvature of softmax cross-entropy in closed form, as linear operators."""

from xent.curvature.heads import HeadFisher, HeadGGN, HeadHessian

__all__ = ["HeadFisher", "HeadGGN", "HeadHessian"]
