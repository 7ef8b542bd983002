"""Newton's step for a linear head by conjugate gradients, from products with the curvature alone.

    (H + I ⊗ diag(ρ)) s = −∇        H = Σ γ·M ⊗ x̃ x̃ᵀ, (P, P)        ρ (D̃,), of l2 and damping

H is 0 along 1 ⊗ v, one vector added to every class's row. Where ρ is 0 too (biases, weights without a
penalty) the system is singular, but consistent, since the gradient's classes sum to zero. Residual and step
are projected onto the complement of these directions. The preconditioners (`_preconditioners`), apart from
the diagonal, are invariant under linear maps of the inputs.

Negative curvature along a search direction ends the iterations with the step so far (Steihaug 1983), which is
a direction of descent. However the iterations end, the quadratic model at the step is no higher than at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xent._arguments.validation import check_tensors, require_tensors
from xent._autograd.transforms import plain
from xent._core.target import Target
from xent._core.tiles import sweep
from xent._core.validators import CurvatureName, PreconditionerName, valid
from xent.curvature import _cg
from xent.curvature._batches import OPTIONS, Batch, check_options
from xent.curvature._cg import Map
from xent.curvature._heads import HeadGGN, HeadHessian, HeadOperator
from xent.curvature._kronecker import HeadKronecker
from xent.curvature._preconditioners import from_blocks, from_diagonal, from_factors


class NewtonStep(NamedTuple):
    """A step to add to weight and bias, and how the iterations ended.

    Example:
        >>> import torch, xent
        >>> x, y = torch.randn(100, 4), torch.randint(3, (100,))
        >>> step = xent.curvature.newton_step(x, torch.zeros(3, 4), y, l2=0.01)
        >>> step.weight.shape, step.bias is None, step.converged
        (torch.Size([3, 4]), True, True)
    """

    weight: Tensor  # (C, D) the step of the weight
    bias: Tensor | None  # (C,) the step of the bias; None without one
    iterations: int  # the number of iterations of conjugate gradients
    residual: float  # ‖(H + l2 + δ) s + ∇‖ / ‖∇‖ of this step s
    decrease: float  # of the quadratic model: −⟨∇, s⟩ − ½⟨s, (H + l2 + δ) s⟩, nats, never negative
    converged: bool  # whether the residual is within the tolerance
    negative_curvature: bool  # whether negative curvature ended the iterations


def newton_step(
    features: Tensor | Iterable[Batch],
    weight: Tensor,
    target: Target = None,
    *,
    bias: Tensor | None = None,
    l2: float = 0.0,
    damping: float = 0.0,
    curvature: CurvatureName = "gauss-newton",
    preconditioner: PreconditionerName | None = "kronecker",
    tolerance: float = 1e-6,
    max_iterations: int | None = None,
    **options: Any,
) -> NewtonStep:
    """Return the step of Newton's method for the weight (and bias) of a linear head.

    The objective is the head's loss plus ``l2/2·‖W‖²``. The step s solves ``(H + l2 + δ) s = −∇``, with H the
    curvature and ∇ the gradient of the objective, by preconditioned conjugate gradients: one product with H
    an iteration. A bias is a parameter too; it is damped but not penalised. Along directions on which neither
    the loss nor l2 nor damping depends, the step is 0: there its sum over the classes is zero. Source:
    Steihaug, "The conjugate gradient method and trust regions in large scale optimization", 1983, for the end
    at negative curvature.

    Args:
        features, weight, target, bias: as in :class:`HeadHessian`, float32 or float64.
        l2: the factor of the penalty, whose gradient is part of ∇.
        damping: δ of Levenberg and Marquardt. It shortens the step and does not move the minimum.
        curvature: ``"gauss-newton"`` or ``"hessian"``. The first is semidefinite where no mass is negative.
            The second differs from it with z-loss or softcap only. It may be indefinite; the iterations then
            end at negative curvature, with a direction of descent.
        preconditioner: the approximate inverse of the system: ``"kronecker"`` (C² + D² memory),
            ``"class-blocks"`` (C·D²), ``"diagonal"`` or None.
        tolerance: the residual relative to the gradient, in the 2-norm, at which the iterations end. For the
            returned step the residual is computed anew, with one more product. Where rounding, or a part of
            the gradient along which the loss has no curvature, keeps it above the tolerance, ``converged`` is
            False.
        max_iterations: the largest number of iterations; None is twice the number of parameters.
        options: the other arguments of :class:`HeadHessian`, without ``wrt``.

    Returns:
        A :class:`NewtonStep`.

    Raises:
        ValueError: a negative ``l2`` or ``damping``, an unknown preconditioner, shapes that do not fit,
            features or a gradient that are not finite.
        TypeError: half types, in which conjugate gradients do not converge; an option that does not exist.

    Example:
        >>> import torch, xent
        >>> x, y = torch.randn(100, 4, dtype=torch.float64), torch.randint(3, (100,))
        >>> w = torch.zeros(3, 4, dtype=torch.float64)
        >>> for _ in range(6):
        ...     w = w + xent.curvature.newton_step(x, w, y, l2=0.01).weight
        >>> xent.curvature.newton_step(x, w, y, l2=0.01).decrease < 1e-20
        True
    """
    require_tensors(weight=weight)
    check_tensors(bias=bias)
    l2, damping, tolerance = valid("l2", l2), valid("damping", damping), valid("tolerance", tolerance)
    max_iterations = valid("max_iterations", max_iterations)
    if weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"newton_step needs float32 or float64, got {weight.dtype}: convert features and head"
        )
    curvature, preconditioner = valid("curvature", curvature), valid("preconditioner", preconditioner)
    check_options("newton_step", options, OPTIONS)
    wrt = "weight" if bias is None else ("weight", "bias")
    head_options: dict[str, Any] = {"bias": bias, "wrt": wrt, **options}
    operator_type = HeadHessian if curvature == "hessian" else HeadGGN
    operator = operator_type(features, weight, target, **head_options)
    ridge = weight.new_full((weight.shape[1] + (bias is not None),), l2 + damping)
    if bias is not None:
        ridge[-1] = damping
    system = NewtonSystem(
        operator,
        ridge,
        kronecker=lambda: HeadKronecker(features, weight, target, weighting="curvature", **head_options),
    )
    with plain(operator.device):
        gradient = loss_gradient(operator)
        gradient[:, : weight.shape[1]] += l2 * weight
        if not bool(gradient.isfinite().all()):
            raise ValueError(
                "the gradient is not finite: weight or bias hold nan or inf, or their logits overflow; "
                "if earlier steps led there, give these damping, or a line search"
            )
        arguments = system.for_cg(-gradient, preconditioner, tolerance, max_iterations)
        result, residual, decrease = _cg.solve_refined(*arguments)
    d = weight.shape[1]
    return NewtonStep(
        result.solution[:, :d].contiguous(),
        None if bias is None else result.solution[:, d].contiguous(),
        result.iterations,
        residual,
        decrease,
        result.converged,
        result.negative_curvature,
    )


def loss_gradient(operator: HeadOperator) -> Tensor:
    """Return the gradient of the operator's loss, (C, D̃): weight, then bias."""
    wants = (False, False, "weight" in operator.wrt, "bias" in operator.wrt)  # of targets, of features
    total: Tensor | None = None
    for curvature in operator._curvatures():
        problem = curvature.problem
        asked = curvature.rows(slice(0, problem.targets.count)).asked
        with plain(operator.device):
            _, _, dw, db = sweep.gradient(problem, curvature.found, asked, wants).finish(None)
        part = _join([t for t in (dw, db) if t is not None])
        total = part if total is None else total + part
    if total is None:
        return _join([torch.zeros(s, dtype=operator.dtype, device=operator.device) for s in operator.shapes])
    return total


class NewtonSystem:
    """The linear system of H + I ⊗ diag(ρ) on matrices (K, D̃): a row for each free class, weight, then bias.

    Args:
        operator: with respect to ``("weight",)`` or ``("weight", "bias")``.
        ridge: ρ, (D̃,), nowhere negative.
        kronecker: makes the Kronecker factors when they are needed.
        pinned: whether the first class is fixed, as in a head of two classes with logits (0, s).
    """

    def __init__(
        self,
        operator: HeadOperator,
        ridge: Tensor,
        *,
        kronecker: Callable[[], HeadKronecker],
        pinned: bool = False,
    ) -> None:
        self.operator, self.ridge, self.kronecker, self.first = operator, ridge, kronecker, int(pinned)
        options = operator.options
        shifts = not pinned and options.reduction.z_loss == 0.0 and options.logits.softcap is None
        self.free = (ridge == 0) & shifts  # columns whose sum over the classes is not determined

    def __call__(self, v: Tensor) -> Tensor:
        d = self.operator.weight.shape[1]
        all_classes = torch.cat([v.new_zeros(self.first, v.shape[1]), v])
        parts = [all_classes[:, :d].contiguous(), *all_classes[:, d:].t()]
        product = _join(list(self.operator @ tuple(parts)))[self.first :]
        return self.project(product) + v * self.ridge

    def project(self, v: Tensor) -> Tensor:
        """Subtract the mean over the classes from the columns where it is not determined."""
        return v - v.mean(0) * self.free

    def for_cg(
        self,
        right: Tensor,  # (K, D̃)
        preconditioner: PreconditionerName | None,
        tolerance: float,
        max_iterations: int | None = None,
    ) -> tuple[Map, Tensor, Map, float, int]:
        """Return the arguments of `_cg.solve` and `_cg.solve_refined`, without undetermined components."""
        right = self.project(right)
        limit = 2 * right.numel() if max_iterations is None else max_iterations
        inverse = self.inverse(preconditioner) if limit and bool(right.any()) else _identity
        return self, right, lambda r: self.project(inverse(r)), tolerance, limit

    def inverse(self, preconditioner: PreconditionerName | None) -> Map:
        if preconditioner == "class-blocks":
            classes = range(self.first, self.operator.weight.shape[0])
            return from_blocks(torch.stack([self.operator.block(c) for c in classes]) + self.ridge.diag())
        if preconditioner == "kronecker":
            factors = self.kronecker()
            g = (factors.G * factors.total)[self.first :, self.first :]
            return from_factors(g, factors.A, self.ridge)
        if preconditioner == "diagonal":
            diagonal = self.operator.diagonal()
            joined = _join(list(diagonal) if isinstance(diagonal, tuple) else [diagonal])[self.first :]
            return from_diagonal(joined + self.ridge)
        return _identity


def _identity(v: Tensor) -> Tensor:
    return v


def _join(parts: list[Tensor]) -> Tensor:
    """Join (C, D) and (C,) to (C, D̃)."""
    return torch.cat([t if t.dim() == 2 else t[:, None] for t in parts], dim=1)
