"""The Jacobian of softmax as an operator, with its root and its inverses, in O(C) memory a row.

    J = diag(p) − p pᵀ        J v = p∘(u − ⟨p, u⟩)        u = v − v_k        k = argmax p
    J = S Sᵀ                  S = diag(√p) − p √pᵀ
    J⁺ = Π diag(1/p) Π        Π = I − 11ᵀ/n on the n classes of the support
    (J + δI)⁻¹ v = (v + κp)/(p + δ)        κ = ⟨g, v⟩/(δ Σ g)        g = p/(p + δ)
    log det(J + δI) = Σ log(p + δ) + log(δ Σ g)

J·1 = 0, so a constant may be subtracted from v: here its value at the most probable class k. Then 1 − p_k is
computed as Σ_{j≠k} p_j, without cancellation on a row with p_k near 1. δ Σ g equals the 1 − Σ p²/(p + δ) of
Sherman and Morrison's formula, without its cancellation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from xent._core.logits import compute_dtype
from xent._core.validators import as_number
from xent.curvature._row_operator import RowOperator, check_floating
from xent.curvature._top_eigenpair import Eigenpair, top_eigenpair


@dataclass(frozen=True)
class Softmax:
    """The softmax p of a batch of rows, and quantities that p alone does not give to full accuracy."""

    first: Tensor  # (..., 1) int64, k: the lowest class of the largest logit
    distance: Tensor  # (..., C) z − z_k; nan for a row without a softmax
    normaliser: Tensor  # (..., 1) 1 + r = Σ exp(z − z_k)
    p: Tensor  # (..., C)
    q: Tensor  # (..., C) 1 − p

    @classmethod
    def of(cls, z: Tensor) -> Softmax:
        first = z.argmax(-1, keepdim=True)
        m = z.gather(-1, first)  # not amax, which splits its derivative among equal logits
        distance = z - m.masked_fill(m.isinf(), math.nan)
        e = distance.exp()
        r = e.scatter(-1, first, 0.0).sum(-1, keepdim=True)
        normaliser = 1 + r
        p = e / normaliser
        return cls(first, distance, normaliser, p, (1 - p).scatter(-1, first, r / normaliser))

    @property
    def root(self) -> Tensor:
        """√p, (..., C), from the logits: the square root of p has no derivative at 0."""
        return (self.distance / 2).exp() / self.normaliser.sqrt()

    def at_first(self, v: Tensor) -> Tensor:
        """Return v at class k, (..., C, K) -> (..., 1, K)."""
        return v.gather(-2, self.first[..., None].expand(*v.shape[:-2], 1, v.shape[-1]))

    def centred(self, v: Tensor) -> Tensor:
        """Return v − ⟨p, v⟩, (..., C, K) -> (..., C, K)."""
        u = v - self.at_first(v)
        return u - (self.p[..., None] * u).sum(-2, keepdim=True)


def zero_where_masked(v: Tensor, weight: Tensor) -> Tensor:
    """Return v (..., C, K) with zeros where the weight (..., C) is 0, in place of inf and nan too."""
    return v.masked_fill((weight == 0)[..., None], 0.0)


class SoftmaxJacobian(RowOperator):
    r"""The Jacobian of softmax, ``J = diag(p) − p pᵀ``, of each row of logits, as an operator.

    J is the Hessian of the cross-entropy of a target of mass 1 in the logits z, with ``p = softmax(z)``. Each
    method takes O(C) time and memory a row (``to_dense`` O(C²)) and is differentiable in the logits and in
    its arguments. Half types are computed in float32; results are rounded once, to the type of the logits. A
    row that is masked altogether, or holds +inf or nan, has no softmax: its results are nan, those of other
    rows are not. The formulas are in :doc:`/explanation/curvature`.

    ``J @ v`` multiplies one vector a row, v of the shape of the logits, or one matrix a row, v with one
    dimension more at the end. Nothing is broadcast. ``J.T`` is J.

    Args:
        logits: z, (..., C), of any floating type. A class at −inf is masked: p = 0, its row and column of J
            are zero, and the entries of vectors there are ignored.

    Raises:
        TypeError: logits, or a vector, that are not a floating tensor.
        ValueError: logits without a class dimension; a vector of another shape; damping that is not positive.

    Example:
        >>> import torch, xent
        >>> J = xent.curvature.SoftmaxJacobian(torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log())
        >>> J @ torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
        tensor([ 0.2100, -0.1400, -0.0700], dtype=torch.float64)
        >>> round(J.trace().item(), 9), round(J.top_eigenpair().value.item(), 9)
        (0.46, 0.334403065)
    """

    def __init__(self, logits: Tensor) -> None:
        check_floating("logits", logits)
        if logits.ndim == 0 or logits.shape[-1] == 0:
            raise ValueError(f"logits must have shape (..., C) with C ≥ 1, got {tuple(logits.shape)}")
        super().__init__(logits.shape, logits.dtype, logits.device)
        self._softmax = Softmax.of(logits.to(compute_dtype(logits.dtype)))

    @property
    def T(self) -> SoftmaxJacobian:
        """J itself, which is symmetric."""
        return self

    def _matmul(self, v: Tensor) -> Tensor:
        p = self._softmax.p
        return p[..., None] * self._softmax.centred(zero_where_masked(v, p))

    def diagonal(self) -> Tensor:
        """Return the diagonal ``p(1 − p)``, accurate also where p is near 1.

        Returns:
            (..., C), of the type of the logits.

        Example:
            >>> import torch, xent
            >>> sure = torch.tensor([0.0, -40.0], dtype=torch.float64)
            >>> [f"{x:.12g}" for x in xent.curvature.SoftmaxJacobian(sure).diagonal().tolist()]
            ['4.24835425529e-18', '4.24835425529e-18']
        """
        return self._round(self._softmax.p * self._softmax.q)

    def trace(self) -> Tensor:
        """Return the trace ``Σ p(1 − p) = 1 − Σ p²``: the probability that two draws from p differ.

        Returns:
            (...,), of the type of the logits.
        """
        return self._round((self._softmax.p * self._softmax.q).sum(-1))

    def to_dense(self) -> Tensor:
        """Return the matrices ``diag(p) − p pᵀ``.

        Returns:
            (..., C, C), of the type of the logits.
        """
        p, q = self._softmax.p, self._softmax.q
        eye = torch.eye(p.shape[-1], dtype=torch.bool, device=p.device)
        return self._round(torch.where(eye, (p * q)[..., None], 0.0 - p[..., None] * p[..., None, :]))

    def eigenvalue_bounds(self) -> tuple[Tensor, Tensor]:
        """Return bounds on the largest eigenvalue, without iterating.

        The eigenvalues μ lie between neighbours of the sorted p (Cauchy's interlacing):
        ``p₁ ≥ μ₁ ≥ p₂ ≥ μ₂ ≥ ... ≥ 0``, and the last one is 0. μ₁ is also at most ``2p₁(1 − p₁)``, the
        largest absolute row sum (Gershgorin), and at least the Rayleigh quotients of e₁ − e₂ and of e₁ − 1/n,
        with n the number of unmasked classes. Both bounds are equal for two classes and for n equal ones.

        Returns:
            A pair ``(low, high)``, each (...,).
        """
        p, q, first = self._softmax.p, self._softmax.q, self._softmax.first
        p1, q1 = p.gather(-1, first)[..., 0], q.gather(-1, first)[..., 0]
        others = p.scatter(-1, first, 0.0)
        p2 = others.amax(-1)
        n = (p > 0).sum(-1, dtype=p.dtype)
        pair = (p1 * q1 + p2 * (1 - p2)) / 2 + p1 * p2  # p₁ + p₂ − (p₁ − p₂)², halved
        low = torch.maximum(pair, p1 * q1 * (n / (n - 1).clamp(min=1)))
        high = p1 * torch.minimum(2 * q1, torch.ones_like(q1))
        # where they are equal, rounding may put low above high
        return self._round(torch.minimum(low, high)), self._round(high)

    def top_eigenpair(self) -> Eigenpair:
        """Return the largest eigenvalue and its unit eigenvector.

        Six Newton steps solve the secular equation. The vector sums to zero, and its entry at the most
        probable class is positive. Where several probabilities are largest, it is (1, −1)/√2 on the first
        two. Where only one class is unmasked, J is 0 and the vector is the unit vector of that class.

        Returns:
            An :class:`Eigenpair`: the eigenvalue (...,) and the vector (..., C).

        Example:
            >>> import torch, xent
            >>> value, vector = xent.curvature.SoftmaxJacobian(torch.tensor([0.0, 0.0, -3.0])).top_eigenpair()
            >>> round(value.item(), 6), [round(x, 6) for x in vector.tolist()]
            (0.487856, [0.707107, -0.707107, 0.0])
        """
        softmax = self._softmax
        theta, vector = top_eigenpair(softmax.distance, softmax.first)
        return Eigenpair(self._round((theta / softmax.normaliser)[..., 0]), self._round(vector))

    def sqrt(self) -> SquareRoot:
        """Return a root S of J, ``J = S Sᵀ``, as an operator; S ε with ε ~ N(0, I) has the covariance J.

        Returns:
            An operator with ``@``, ``.T`` and ``to_dense``.
        """
        return SquareRoot(self)

    def pseudo_inverse(self) -> PseudoInverse:
        """Return the pseudo-inverse J⁺ as an operator.

        Returns:
            An operator with ``@``, ``.T`` and ``to_dense``.
        """
        return PseudoInverse(self)

    def solve(self, v: Tensor, damping: float) -> Tensor:
        """Return ``(J + δI)⁻¹ v`` by the formula of Sherman and Morrison, accurate for δ down to eps·p.

        For a smaller δ and a v that sums to zero, the result depends on Σ v/δ, and Σ v is accurate only to
        eps² of its terms.

        Args:
            v: (..., C) or (..., C, K), as for ``@``.
            damping: δ > 0. J itself is singular along the vector of ones.

        Returns:
            A tensor of the shape of ``v`` and the type of the logits; v/δ at a masked class.

        Raises:
            ValueError: damping that is not a positive number of the type of the computation.

        Example:
            >>> import torch, xent
            >>> J = xent.curvature.SoftmaxJacobian(torch.randn(8, 1000))
            >>> x = J.solve(torch.ones(8, 1000), damping=1e-8)  # J·1 = 0, so x = 1/δ
            >>> bool(((x * 1e-8 - 1).abs() < 1e-6).all())
            True
        """
        p = self._softmax.p[..., None]
        self._check_damping(damping)
        near = p > damping  # there ⟨g, v⟩ = Σ v − ⟨1 − g, v⟩, accurate also where Σ v cancels
        g = p / (p + damping)
        correction_weight = torch.where(near, -damping / (p + damping), g)
        scale = damping * g.sum(-2, keepdim=True)

        def solved(v: Tensor) -> Tensor:
            u = zero_where_masked(v, self._softmax.p)
            total, error = compensated_sum(torch.where(near, u, 0.0))
            kappa = (total + ((correction_weight * u).sum(-2, keepdim=True) + error)) / scale
            return torch.where(p == 0, v / damping, (u + kappa * p) / (p + damping))

        return self._apply(solved, v, "v")

    def logdet(self, damping: float) -> Tensor:
        """Return ``log det(J + δI) = Σ log(p + δ) + log(δ Σ p/(p + δ))``.

        Args:
            damping: δ > 0, as for :meth:`solve`. A masked class adds log δ.

        Returns:
            (...,), of the type of the logits.

        Raises:
            ValueError: as :meth:`solve`.
        """
        self._check_damping(damping)
        p = self._softmax.p
        return self._round((p + damping).log().sum(-1) + (damping * (p / (p + damping)).sum(-1)).log())

    def _check_damping(self, damping: object) -> None:
        if isinstance(damping, Tensor):
            raise TypeError("damping must be a number: pass damping.item()")
        value = as_number("damping", damping)
        dtype = self._softmax.p.dtype
        if not torch.finfo(dtype).tiny <= value < math.inf:
            raise ValueError(
                f"damping must be positive, finite and no less than {dtype} holds, got {damping}: J is "
                "singular along the ones vector, which pseudo_inverse() leaves out"
            )


class SquareRoot(RowOperator):
    """The root S = diag(√p) − p √pᵀ = diag(√p)(I − √p √pᵀ) with J = S Sᵀ, or its transpose."""

    def __init__(self, jacobian: SoftmaxJacobian, transposed: bool = False) -> None:
        super().__init__(jacobian._rows, jacobian.dtype, jacobian.device)
        self._jacobian = jacobian
        self._transposed = transposed

    @property
    def T(self) -> SquareRoot:
        return SquareRoot(self._jacobian, not self._transposed)

    def _matmul(self, v: Tensor) -> Tensor:
        softmax = self._jacobian._softmax
        s, v = softmax.root[..., None], zero_where_masked(v, softmax.root)
        if self._transposed:
            return s * softmax.centred(v)
        at_first = softmax.at_first(v)
        index = softmax.first[..., None].expand_as(at_first)
        s1, q1 = (t.gather(-1, softmax.first)[..., None] for t in (softmax.root, softmax.q))
        others = (s * v).scatter(-2, index, 0.0).sum(-2, keepdim=True)
        # v − √p⟨√p, v⟩; at k with the factor 1 − p_k, so that nothing cancels
        return s * (v - s * (s1 * at_first + others)).scatter(-2, index, q1 * at_first - s1 * others)


class PseudoInverse(RowOperator):
    """The pseudo-inverse J⁺ = Π diag(1/p) Π on the classes whose p is a normal number; zero on all others."""

    def __init__(self, jacobian: SoftmaxJacobian) -> None:
        super().__init__(jacobian._rows, jacobian.dtype, jacobian.device)
        self._jacobian = jacobian

    @property
    def T(self) -> PseudoInverse:
        """J⁺ itself, which is symmetric."""
        return self

    def _matmul(self, v: Tensor) -> Tensor:
        p = self._jacobian._softmax.p[..., None]
        outside = p < torch.finfo(p.dtype).tiny  # nan compares as False, and stays
        n = (~outside).sum(-2, keepdim=True, dtype=p.dtype)

        def projected(v: Tensor) -> Tensor:
            v = v.masked_fill(outside, 0.0)
            return (v - v.sum(-2, keepdim=True) / n).masked_fill(outside, 0.0)

        return projected(projected(v) / p.masked_fill(outside, 1.0))


def compensated_sum(v: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ v over the last dimension but one and its rounding error, (..., C, K) -> (..., 1, K) each.

    Sums in pairs and accumulates the error of each addition (Knuth), so that cancelling entries leave no
    rounding error, which division by a small δ would magnify.
    """
    error = torch.zeros_like(v[..., :1, :])
    while (n := v.shape[-2]) > 1:
        a, b, odd = v.split([n // 2, n // 2, n % 2], dim=-2)
        total = a + b
        part = total - a
        error = error + ((a - (total - part)) + (b - part)).sum(-2, keepdim=True)
        v = torch.cat([total, odd], dim=-2)
    return v, error
