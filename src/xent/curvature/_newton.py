"""Newton's step for a linear head by conjugate gradients: the curvature's products alone, no matrix of it.

    (H + I ⊗ diag(ρ)) s = −∇        H = Σ γ·M ⊗ x̃ x̃ᵀ, (P, P)        ρ (D̃,), of l2 and damping

H changes nothing along 1 ⊗ v: one vector added to every class's row. Where ρ is 0 too (biases, weights
without a penalty) the system is singular, and consistent, as the gradient's classes sum to zero; residual and
step are projected off these directions, so that conjugate gradients run on what is left. Preconditioners
(`preconditioners`) are unchanged by any linear map of the inputs, the diagonal apart.

Curvature that is negative along a search direction ends the iterations with what they have found before
(Steihaug 1983), a direction of descent. Whatever ends them, the model at the step lies no higher than at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from xent._arguments.validation import check_tensors, require_tensors
from xent._autograd.transforms import plain
from xent._core.target import Target
from xent._core.tiles import sweep
from xent._core.validators import valid
from xent.curvature import _cg
from xent.curvature._batches import OPTIONS, Batch, check_options
from xent.curvature._cg import Found, Map, Refined
from xent.curvature._heads import HeadGGN, HeadHessian, HeadOperator
from xent.curvature._kronecker import HeadKronecker
from xent.curvature._preconditioners import of_blocks, of_diagonal, of_factors

Preconditioner: TypeAlias = Literal["class-blocks", "kronecker", "diagonal"]


class NewtonStep(NamedTuple):
    """What to add to weight and bias, and how it was found."""

    weight: Tensor  # (C, D)
    bias: Tensor | None  # (C,)
    iterations: int
    residual: float  # ‖(H + ρ) s + ∇‖ / ‖∇‖ of this step
    decrease: float  # of the quadratic model: −⟨∇, s⟩ − ½⟨s, (H + ρ) s⟩, never negative
    converged: bool  # whether this residual is within the tolerance
    negative_curvature: bool  # whether it ended the iterations


def newton_step(
    features: Tensor | Iterable[Batch],
    weight: Tensor,
    target: Target = None,
    *,
    bias: Tensor | None = None,
    l2: float = 0.0,
    damping: float = 0.0,
    curvature: Literal["gauss-newton", "hessian"] = "gauss-newton",
    preconditioner: Preconditioner | None = "kronecker",
    tolerance: float = 1e-6,
    max_iterations: int | None = None,
    **options: Any,
) -> NewtonStep:
    """The step s of Newton's method from (weight, bias) on a linear head's loss + l2/2·‖weight‖².

    Solves (H + l2 + damping) s = −∇ by preconditioned conjugate gradients, a product with H an iteration. The
    bias, where there is one, moves along, and is damped but not penalised. Directions that the loss does not
    see, and that nothing else fixes, are left alone: there the step's classes sum to zero.

    Args:
        features: (N, D) or batches of them, weight (C, D), target, bias (C,), and ``options``: as in
            :class:`HeadHessian`.
        l2: of the penalty; its gradient is part of ∇.
        damping: λ of Levenberg and Marquardt: a shorter step, not another minimum.
        curvature: ``"gauss-newton"`` is never negative where no mass is; ``"hessian"`` differs from it with
            z-loss or softcap alone, and may be indefinite: then the step is where the model ceases to be
            convex.
        preconditioner: ``"kronecker"`` (C² + D² memory), ``"class-blocks"`` (C·D²), ``"diagonal"`` or None.
        tolerance: of the residual, relative to the gradient, in the 2-norm. The residual is that of the step
            returned, by one product more; where it cannot be had, for want of digits or because the loss has
            no curvature along some of the gradient, ``converged`` says so.
        max_iterations: None is twice the number of parameters.

    Raises:
        ValueError: a negative l2 or damping, an unknown preconditioner, shapes that do not fit, features
            or a gradient that are not finite.
        TypeError: half precision, in which conjugate gradients have nothing to converge to.

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
    given: dict[str, Any] = {"bias": bias, "wrt": "weight" if bias is None else ("weight", "bias"), **options}
    of = HeadHessian if curvature == "hessian" else HeadGGN
    operator = of(features, weight, target, **given)
    ridge = weight.new_full((weight.shape[1] + (bias is not None),), l2 + damping)
    if bias is not None:
        ridge[-1] = damping
    system = NewtonSystem(
        operator,
        ridge,
        kronecker=lambda: HeadKronecker(features, weight, target, weighting="curvature", **given),
    )
    with plain(operator.device):
        gradient = loss_gradient(operator)
        gradient[:, : weight.shape[1]] += l2 * weight
        if not bool(gradient.isfinite().all()):
            raise ValueError(
                "the gradient is not finite: weight or bias hold nan or inf, or their logits overflow; "
                "if earlier steps led there, give these damping, or a line search"
            )
        found, residual, decrease = system.refined(-gradient, preconditioner, tolerance, max_iterations)
    d = weight.shape[1]
    return NewtonStep(
        found.solution[:, :d].contiguous(),
        None if bias is None else found.solution[:, d].contiguous(),
        found.iterations,
        residual,
        decrease,
        found.converged,
        found.negative_curvature,
    )


def loss_gradient(operator: HeadOperator) -> Tensor:
    """The gradient of the loss whose curvature the operator is, (C, D̃): weight, then bias."""
    wants = (False, "weight" in operator.wrt, "bias" in operator.wrt)
    total: Tensor | None = None
    for curvature in operator._curvatures():
        problem = curvature.problem
        asked = curvature.rows(slice(0, problem.targets.count)).asked
        with plain(operator.device):
            _, dw, db = sweep.gradient(problem, curvature.found, asked, wants)[0].finish(None)
        part = _joined([t for t in (dw, db) if t is not None])
        total = part if total is None else total + part
    if total is None:
        return _joined(
            [torch.zeros(s, dtype=operator.dtype, device=operator.device) for s in operator.shapes]
        )
    return total


class NewtonSystem:
    """H + I ⊗ diag(ρ) on matrices (K, D̃): a row for each class that moves, its weight and then its bias.

    Args:
        operator: with respect to ``("weight",)`` or ``("weight", "bias")``.
        ridge: ρ, (D̃,), nowhere negative.
        kronecker: makes the factors, if they are asked for.
        pinned: whether the first class stays where it is, as in a head of two classes with logits (0, s).
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
        shifts = not pinned and options.z_loss == 0.0 and options.softcap is None
        self.free = (ridge == 0) & shifts  # columns of which nothing fixes the sum over the classes

    def __call__(self, v: Tensor) -> Tensor:
        d = self.operator.weight.shape[1]
        whole = torch.cat([v.new_zeros(self.first, v.shape[1]), v])
        parts = [whole[:, :d].contiguous(), *whole[:, d:].t()]
        product = _joined(list(self.operator @ tuple(parts)))[self.first :]
        return self.project(product) + v * self.ridge

    def project(self, v: Tensor) -> Tensor:
        """Off what nothing fixes."""
        return v - v.mean(0) * self.free

    def solve(
        self,
        right: Tensor,  # (K, D̃)
        preconditioner: Preconditioner | None,
        tolerance: float,
        max_iterations: int | None = None,
    ) -> Found:
        """A solution none of which lies along what nothing fixes, its residual by the recursion."""
        return _cg.run(self, *self._asked(right, preconditioner, max_iterations, tolerance))

    def refined(
        self,
        right: Tensor,  # (K, D̃)
        preconditioner: Preconditioner | None,
        tolerance: float,
        max_iterations: int | None = None,
    ) -> Refined:
        """The same, and its residual as the products with H have it."""
        return _cg.refined(self, *self._asked(right, preconditioner, max_iterations, tolerance))

    def _asked(
        self, right: Tensor, preconditioner: Preconditioner | None, most: int | None, tolerance: float
    ) -> tuple[Tensor, Map, float, int]:
        right = self.project(right)
        most = 2 * right.numel() if most is None else most
        inverse = self.inverse(preconditioner) if most and bool(right.any()) else _same
        return right, lambda r: self.project(inverse(r)), tolerance, most

    def inverse(self, preconditioner: Preconditioner | None) -> Map:
        if preconditioner == "class-blocks":
            classes = range(self.first, self.operator.weight.shape[0])
            return of_blocks(torch.stack([self.operator.block(c) for c in classes]) + self.ridge.diag())
        if preconditioner == "kronecker":
            factors = self.kronecker()
            g = (factors.G * factors.total)[self.first :, self.first :]
            return of_factors(g, factors.A, self.ridge)
        if preconditioner == "diagonal":
            diagonal = self.operator.diagonal()
            joined = _joined(list(diagonal) if isinstance(diagonal, tuple) else [diagonal])[self.first :]
            return of_diagonal(joined + self.ridge)
        return _same


def _same(v: Tensor) -> Tensor:
    return v


def _joined(parts: list[Tensor]) -> Tensor:
    """(C, D) and (C,) -> (C, D̃)."""
    return torch.cat([t if t.dim() == 2 else t[:, None] for t in parts], dim=1)
