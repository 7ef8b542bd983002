"""Entropic optimal transport: a plan between rows and columns, differentiable in the scores."""

from xent.sinkhorn._assign import Assignment, assign

__all__ = ["Assignment", "assign"]
