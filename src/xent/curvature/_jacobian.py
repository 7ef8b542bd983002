"""The Jacobian of softmax as an operator, with its root and its inverses; nothing of size C² is made.

    J = diag(p) − p pᵀ        J v = p∘(u − ⟨p, u⟩)        u = v − v_k        k = argmax p
    J = S Sᵀ                  S = diag(√p) − p √pᵀ
    J⁺ = Π diag(1/p) Π        Π = I − 11ᵀ/n on the n classes of the support
    (J + λI)⁻¹ v = (v + κp)/(p + λ)        κ = ⟨g, v⟩/(λ Σ g)        g = p/(p + λ)
    log det(J + λI) = Σ log(p + λ) + log(λ Σ g)

J takes no notice of a constant (J·1 = 0), so v is measured from its value at the most probable class: a row
that is sure then loses none of the digits of 1 − p_k, which is Σ_{j≠k} p_j here and no difference. λ Σ g
stands for the 1 − Σ p²/(p + λ) of Sherman and Morrison.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from xent._core.logits import compute_dtype
from xent._core.validators import as_number
from xent.curvature._row_operator import Rowwise, check_floating
from xent.curvature._top_eigenpair import Eigenpair, top_eigenpair


@dataclass(frozen=True)
class Softmax:
    """p of a batch of rows, and what is lost where only p is kept; all in the type of the computation."""

    first: Tensor  # (..., 1) int64, k: the lowest class of the largest logit
    distance: Tensor  # (..., C) z − z_k; nan where there is no softmax
    total: Tensor  # (..., 1) 1 + r = Σ exp(z − z_k)
    p: Tensor  # (..., C)
    q: Tensor  # (..., C) 1 − p

    @classmethod
    def of(cls, z: Tensor) -> Softmax:
        first = z.argmax(-1, keepdim=True)
        m = z.gather(-1, first)  # and not amax, whose derivative is shared out among equal logits
        distance = z - m.masked_fill(m.isinf(), math.nan)
        e = distance.exp()
        r = e.scatter(-1, first, 0.0).sum(-1, keepdim=True)
        total = 1 + r
        p = e / total
        return cls(first, distance, total, p, (1 - p).scatter(-1, first, r / total))

    @property
    def root(self) -> Tensor:
        """√p, (..., C); not by a root of p, which has no derivative at 0."""
        return (self.distance / 2).exp() / self.total.sqrt()

    def at_first(self, v: Tensor) -> Tensor:
        """v at class k, (..., C, K) -> (..., 1, K)."""
        return v.gather(-2, self.first[..., None].expand(*v.shape[:-2], 1, v.shape[-1]))

    def centred(self, v: Tensor) -> Tensor:
        """v − ⟨p, v⟩, (..., C, K) -> (..., C, K)."""
        u = v - self.at_first(v)
        return u - (self.p[..., None] * u).sum(-2, keepdim=True)


def seen(v: Tensor, weight: Tensor) -> Tensor:
    """v (..., C, K) with zeros where the weight (..., C) is zero: inf or nan there takes no part."""
    return v.masked_fill((weight == 0)[..., None], 0.0)


class SoftmaxJacobian(Rowwise):
    r"""J = diag(p) − p pᵀ of each row of a batch of logits: the Hessian of its cross-entropy, at mass 1.

    Every method costs O(C) a row in time and memory (``to_dense`` C²), is made of torch's operations, and is
    differentiable in the logits and in its arguments. Half types are computed in float32; every answer has
    the type of the logits, rounded once. Rows are independent: a row that is wholly masked, or holds +inf or
    nan, has no softmax and answers nan. Formulas: mathematics page, §§4, 5.

    ``J @ v`` takes one vector for each row, of the shape of the logits, or a matrix for each, with one more
    dimension at the end; the number of dimensions says which, and nothing is broadcast. ``J.T`` is J.

    Args:
        logits: (..., C), of any floating type. A class at −inf is masked: p = 0, its row and column of J are
            zero, and whatever a vector holds there is not looked at.

    Raises:
        TypeError: logits, or a vector, that are no floating tensor.
        ValueError: logits without a class dimension; a vector of another shape; damping that is not positive.

    Example:
        >>> import torch, xent
        >>> J = xent.curvature.SoftmaxJacobian(torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log())
        >>> [round(x, 12) for x in (J @ torch.tensor([1.0, 0.0, 0.0])).tolist()]
        [0.21, -0.14, -0.07]
        >>> round(J.trace().item(), 12), round(J.top_eigenpair().value.item(), 9)
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
        """J itself."""
        return self

    def _times(self, v: Tensor) -> Tensor:
        p = self._softmax.p
        return p[..., None] * self._softmax.centred(seen(v, p))

    def diagonal(self) -> Tensor:
        """p(1 − p), (..., C), with the digits of 1 − p.

        Example:
            >>> import torch, xent
            >>> sure = torch.tensor([0.0, -40.0], dtype=torch.float64)
            >>> [f"{x:.12g}" for x in xent.curvature.SoftmaxJacobian(sure).diagonal().tolist()]
            ['4.24835425529e-18', '4.24835425529e-18']
        """
        return self._round(self._softmax.p * self._softmax.q)

    def trace(self) -> Tensor:
        """Σ p(1 − p) = 1 − Σ p², (...,): the chance that two draws from p differ."""
        return self._round((self._softmax.p * self._softmax.q).sum(-1))

    def to_dense(self) -> Tensor:
        """diag(p) − p pᵀ, (..., C, C)."""
        p, q = self._softmax.p, self._softmax.q
        eye = torch.eye(p.shape[-1], dtype=torch.bool, device=p.device)
        return self._round(torch.where(eye, (p * q)[..., None], 0.0 - p[..., None] * p[..., None, :]))

    def eigenvalue_bounds(self) -> tuple[Tensor, Tensor]:
        """(low, high) around the largest eigenvalue, each (...,), without a search.

        The eigenvalues lie between neighbours of the sorted p (Cauchy's interlacing): p₁ ≥ λ₁ ≥ p₂ ≥ λ₂ ≥
        ... ≥ 0, and the last is 0. λ₁ is at most 2p₁(1 − p₁) too, the largest absolute row sum (Gershgorin),
        and at least what e₁ − e₂ and what e₁ − 1/n make of J. Both bounds meet at two classes and at n equal
        ones.
        """
        p, q, first = self._softmax.p, self._softmax.q, self._softmax.first
        p1, q1 = p.gather(-1, first)[..., 0], q.gather(-1, first)[..., 0]
        others = p.scatter(-1, first, 0.0)
        p2 = others.amax(-1)
        n = (p > 0).sum(-1, dtype=p.dtype)
        pair = (p1 * q1 + p2 * (1 - p2)) / 2 + p1 * p2  # p₁ + p₂ − (p₁ − p₂)², halved
        low = torch.maximum(pair, p1 * q1 * (n / (n - 1).clamp(min=1)))
        high = p1 * torch.minimum(2 * q1, torch.ones_like(q1))
        # where they meet, rounding may leave either above
        return self._round(torch.minimum(low, high)), self._round(high)

    def top_eigenpair(self) -> Eigenpair:
        """The largest eigenvalue (...,) and its unit eigenvector (..., C), by the secular equation.

        The vector sums to zero, and its entry at the most probable class is positive. Of equal largest
        probabilities the first two make the vector: (1, −1)/√2 on them. Where one class alone is left J is
        0, and the vector is that class's. Six of Newton's steps.

        Example:
            >>> import torch, xent
            >>> value, vector = xent.curvature.SoftmaxJacobian(torch.tensor([0.0, 0.0, -3.0])).top_eigenpair()
            >>> round(value.item(), 6), [round(x, 6) for x in vector.tolist()]
            (0.487856, [0.707107, -0.707107, 0.0])
        """
        softmax = self._softmax
        theta, vector = top_eigenpair(softmax.distance, softmax.first)
        return Eigenpair(self._round((theta / softmax.total)[..., 0]), self._round(vector))

    def sqrt(self) -> SquareRoot:
        """S with J = S Sᵀ, with ``@``, ``.T`` and ``to_dense``. The covariance of S ε, ε ~ N(0, I), is J."""
        return SquareRoot(self)

    def pseudo_inverse(self) -> PseudoInverse:
        """J⁺: an operator with ``@``, ``.T`` and ``to_dense``."""
        return PseudoInverse(self)

    def solve(self, v: Tensor, damping: float) -> Tensor:
        """(J + λI)⁻¹ v by the formula of Sherman and Morrison, with all digits for a λ as small as eps·p.

        Below that nothing breaks, but an answer to a v that sums to zero hangs on Σ v, which is known to eps²
        of its terms, over λ.

        Args:
            v: (..., C) or (..., C, K), as for ``@``.
            damping: λ > 0; J is singular along the ones vector.

        Returns:
            The shape of ``v``, the type of the logits. A masked class has v/λ.

        Raises:
            ValueError: damping that is not a positive number of the type of the computation.

        Example:
            >>> import torch, xent
            >>> J = xent.curvature.SoftmaxJacobian(torch.randn(8, 1000))
            >>> x = J.solve(torch.ones(8, 1000), damping=1e-8)  # J·1 = 0, so that 1/λ is left
            >>> bool(((x * 1e-8 - 1).abs() < 1e-6).all())
            True
        """
        p = self._softmax.p[..., None]
        self._check(damping)
        near = p > damping  # there ⟨g, v⟩ = Σ v − ⟨1 − g, v⟩: where Σ v cancels, 1 − g is what counts
        g = p / (p + damping)
        kept = torch.where(near, -damping / (p + damping), g)
        scale = damping * g.sum(-2, keepdim=True)

        def solved(v: Tensor) -> Tensor:
            u = seen(v, self._softmax.p)
            total, error = compensated_sum(torch.where(near, u, 0.0))
            kappa = (total + ((kept * u).sum(-2, keepdim=True) + error)) / scale
            return torch.where(p == 0, v / damping, (u + kappa * p) / (p + damping))

        return self._answer(solved, v, "v")

    def logdet(self, damping: float) -> Tensor:
        """log det(J + λI), (...,), by the matrix determinant lemma: Σ log(p + λ) + log(λ Σ p/(p + λ)).

        Args:
            damping: λ > 0, as for :meth:`solve`. A masked class adds log λ.

        Raises:
            ValueError: as :meth:`solve`.
        """
        self._check(damping)
        p = self._softmax.p
        return self._round((p + damping).log().sum(-1) + (damping * (p / (p + damping)).sum(-1)).log())

    def _check(self, damping: float) -> None:
        if isinstance(damping, Tensor):
            raise TypeError("damping must be a number: pass damping.item()")
        as_number("damping", damping)
        dtype = self._softmax.p.dtype
        if not torch.finfo(dtype).tiny <= damping < math.inf:
            raise ValueError(
                f"damping must be positive, finite and no less than {dtype} holds, got {damping}: J is "
                "singular along the ones vector, which pseudo_inverse() leaves out"
            )


class SquareRoot(Rowwise):
    """S = diag(√p) − p √pᵀ = diag(√p)(I − √p √pᵀ), or its transpose: J = S Sᵀ."""

    def __init__(self, jacobian: SoftmaxJacobian, transposed: bool = False) -> None:
        super().__init__(jacobian._rows, jacobian.dtype, jacobian.device)
        self._jacobian = jacobian
        self._transposed = transposed

    @property
    def T(self) -> SquareRoot:
        return SquareRoot(self._jacobian, not self._transposed)

    def _times(self, v: Tensor) -> Tensor:
        softmax = self._jacobian._softmax
        s, v = softmax.root[..., None], seen(v, softmax.root)
        if self._transposed:
            return s * softmax.centred(v)
        at_first = softmax.at_first(v)
        index = softmax.first[..., None].expand_as(at_first)
        s1, q1 = (t.gather(-1, softmax.first)[..., None] for t in (softmax.root, softmax.q))
        others = (s * v).scatter(-2, index, 0.0).sum(-2, keepdim=True)
        # v − √p⟨√p, v⟩; at k, 1 − p_k is multiplied instead of subtracted
        return s * (v - s * (s1 * at_first + others)).scatter(-2, index, q1 * at_first - s1 * others)


class PseudoInverse(Rowwise):
    """J⁺ = Π diag(1/p) Π on the support: the classes whose p is a normal number; zero on all others."""

    def __init__(self, jacobian: SoftmaxJacobian) -> None:
        super().__init__(jacobian._rows, jacobian.dtype, jacobian.device)
        self._jacobian = jacobian

    @property
    def T(self) -> PseudoInverse:
        """J⁺ itself."""
        return self

    def _times(self, v: Tensor) -> Tensor:
        p = self._jacobian._softmax.p[..., None]
        outside = p < torch.finfo(p.dtype).tiny  # nan is not, and stays
        n = (~outside).sum(-2, keepdim=True, dtype=p.dtype)

        def projected(v: Tensor) -> Tensor:
            v = v.masked_fill(outside, 0.0)
            return (v - v.sum(-2, keepdim=True) / n).masked_fill(outside, 0.0)

        return projected(projected(v) / p.masked_fill(outside, 1.0))


def compensated_sum(v: Tensor) -> tuple[Tensor, Tensor]:
    """Σ v over the last but one dimension and its rounding error, (..., C, K) -> (..., 1, K) each.

    In pairs, with the error of each addition kept (Knuth): entries that cancel leave what they leave, and
    not the rounding of their sizes, which a small λ would blow up.
    """
    error = torch.zeros_like(v[..., :1, :])
    while (n := v.shape[-2]) > 1:
        a, b, odd = v.split([n // 2, n // 2, n % 2], dim=-2)
        total = a + b
        part = total - a
        error = error + ((a - (total - part)) + (b - part)).sum(-2, keepdim=True)
        v = torch.cat([total, odd], dim=-2)
    return v, error
