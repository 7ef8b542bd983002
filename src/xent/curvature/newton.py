"""Newton's step for a linear head by conjugate gradients: the curvature's products alone, no matrix of it.

    (H + I ⊗ diag(ρ)) s = −∇        H = Σ γ·M ⊗ x̃ x̃ᵀ, (P, P)        ρ (D̃,), of l2 and damping

H changes nothing along 1 ⊗ v: one vector added to every class's row. Where ρ is 0 too (biases, weights
without a penalty) the system is singular, and consistent, as the gradient's classes sum to zero; residual and
step are projected off these directions, so that conjugate gradients run on what is left. Preconditioners,
all unchanged by any linear map of the inputs but the last:

    class blocks    Σ γ·M_cc x̃ x̃ᵀ + diag(ρ), a Cholesky factor a class      O(C·D̃²) memory, O(N·C·D̃²) once
    Kronecker       Γ·G ⊗ A + I ⊗ diag(ρ), exactly, by an E that makes      O(C² + D̃²), O(N·(C² + D̃²)) once
                    Eᵀ A E and Eᵀ diag(ρ) E diagonal
    diagonal        of H + I ⊗ diag(ρ)                                      O(C·D̃)

Curvature that is negative along a search direction ends the iterations with what they have found before
(Steihaug 1983), a direction of descent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from xent.core import sweep
from xent.curvature.heads import Batch, HeadGGN, HeadHessian, HeadOperator
from xent.curvature.kronecker import HeadKronecker
from xent.modes import plain
from xent.options import Target, check_tensors

Preconditioner: TypeAlias = Literal["class-blocks", "kronecker", "diagonal"]
Map: TypeAlias = Callable[[Tensor], Tensor]


class NewtonStep(NamedTuple):
    """What to add to weight and bias, and how it was found."""

    weight: Tensor  # (C, D)
    bias: Tensor | None  # (C,)
    iterations: int
    residual: float  # ‖(H + ρ) s + ∇‖ / ‖∇‖
    decrease: float  # of the quadratic model: −⟨∇, s⟩ − ½⟨s, (H + ρ) s⟩
    converged: bool  # whether the residual came within the tolerance
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
        tolerance: of the residual, relative to the gradient, in the 2-norm.
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
    check_tensors(weight=weight, bias=bias)
    for name, value in (("l2", l2), ("damping", damping)):
        if not 0 <= value < torch.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    if weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"newton_step needs float32 or float64, got {weight.dtype}: convert features and head"
        )
    if curvature not in ("gauss-newton", "hessian"):
        raise ValueError(f"curvature must be 'gauss-newton' or 'hessian', got {curvature!r}")
    check_preconditioner(preconditioner)
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
    with torch.no_grad():
        gradient = loss_gradient(operator)
        gradient[:, : weight.shape[1]] += l2 * weight
        if not bool(gradient.isfinite().all()):
            raise ValueError(
                "the gradient is not finite: weight or bias hold nan or inf, or their logits overflow; "
                "if earlier steps led there, give these damping, or a line search"
            )
        found = system.solve(-gradient, preconditioner, tolerance, max_iterations)
        bent, size = system(found.solution), float(gradient.norm())
        residual = float((bent + system.project(gradient)).norm()) / size if size else 0.0
        decrease = -float((gradient * found.solution).sum() + 0.5 * (found.solution * bent).sum())
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


def check_preconditioner(name: object) -> None:
    if name not in ("class-blocks", "kronecker", "diagonal", None):
        raise ValueError(
            f"preconditioner must be 'class-blocks', 'kronecker', 'diagonal' or None; got {name!r}"
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


class Found(NamedTuple):
    solution: Tensor
    iterations: int
    converged: bool
    negative_curvature: bool


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
        """A solution whose residual is within tolerance·‖right‖, none of it along what nothing fixes."""
        right = self.project(right)
        most = 2 * right.numel() if max_iterations is None else max_iterations
        inverse = self.inverse(preconditioner) if most and bool(right.any()) else _same
        return conjugate_gradients(self, right, lambda r: self.project(inverse(r)), tolerance, most)

    def inverse(self, preconditioner: Preconditioner | None) -> Map:
        if preconditioner == "class-blocks":
            return self._of_blocks()
        if preconditioner == "kronecker":
            return self._of_factors()
        if preconditioner == "diagonal":
            diagonal = self.operator.diagonal()
            joined = _joined(list(diagonal) if isinstance(diagonal, tuple) else [diagonal])[self.first :]
            return lambda r: r / _positive(joined + self.ridge)
        return _same

    def _of_blocks(self) -> Map:
        ridge = self.ridge.diag()
        blocks = [self.operator.block(c) + ridge for c in range(self.first, self.operator.weight.shape[0])]
        lower, scale = _cholesky(torch.stack(blocks))
        return lambda r: torch.cholesky_solve((r / scale)[..., None], lower)[..., 0] / scale

    def _of_factors(self) -> Map:
        factors = self.kronecker()
        g, u = torch.linalg.eigh((factors.G * factors.total)[self.first :, self.first :])
        g = g.clamp(min=0.0)
        # as large beside A as the ridge is beside the curvature of an average direction
        share = 1.0 / float(g.mean()) if float(g.mean()) > 0 else 1.0
        lower, scale = _cholesky(factors.A + share * self.ridge.diag())
        half = torch.linalg.solve_triangular(lower, torch.diag_embed(1 / scale), upper=False)
        a, q = torch.linalg.eigh(half @ factors.A @ half.t())
        a = a.clamp(0.0, 1.0)
        basis = half.t() @ q  # Eᵀ A E = diag(a), Eᵀ diag(ρ) E = diag(1 − a)/share
        values = _positive(torch.outer(g, a) + (1 - a) / share)
        return lambda r: u @ ((u.t() @ r @ basis) / values) @ basis.t()


def conjugate_gradients(apply: Map, right: Tensor, inverse: Map, tolerance: float, most: int) -> Found:
    """apply(x) = right for a symmetric semidefinite map, from 0; `inverse` preconditions."""
    x, r = torch.zeros_like(right), right.clone()
    within = tolerance * float(right.norm())
    p, before = torch.zeros_like(right), 1.0
    for iteration in range(most + 1):
        if float(r.norm()) <= within:
            return Found(x, iteration, True, False)
        if iteration == most:
            break
        z = inverse(r)
        now = float((r * z).sum())
        p = z + p * (now / before)
        bent = apply(p)
        curvature = float((p * bent).sum())
        if not curvature > 0:
            # before the first step: downhill all the same
            return Found(x if iteration else p, iteration, False, True)
        x = x + p * (now / curvature)
        r = r - bent * (now / curvature)
        before = now
    return Found(x, most, False, False)


def _same(v: Tensor) -> Tensor:
    return v


def _joined(parts: list[Tensor]) -> Tensor:
    """(C, D) and (C,) -> (C, D̃)."""
    return torch.cat([t if t.dim() == 2 else t[:, None] for t in parts], dim=1)


def _positive(values: Tensor) -> Tensor:
    """What is divided by: at least what rounding leaves of the largest."""
    least = values.numel() * torch.finfo(values.dtype).eps * values.max() if values.numel() else 0.0
    values = values.clamp(min=float(least))
    return torch.where(values > 0, values, 1.0)


def _cholesky(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factors of semidefinite (..., D̃, D̃) of which the diagonal was made 1, and the scale (..., D̃).

    What is singular becomes definite by as little as it takes.
    """
    diagonal = blocks.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, 1.0).sqrt()
    unit = blocks / (scale[..., None] * scale[..., None, :])
    unit.diagonal(dim1=-2, dim2=-1).copy_(torch.ones_like(scale))
    eye, size = torch.eye(unit.shape[-1], dtype=unit.dtype, device=unit.device), unit.shape[-1]
    more = size * torch.finfo(unit.dtype).eps
    while more < 10 * size:
        lower, failed = torch.linalg.cholesky_ex(unit + more * eye)
        if not bool(failed.any()):
            return lower, scale
        more *= 10
    return eye.expand_as(unit), scale  # indefinite beyond its diagonal: that alone
