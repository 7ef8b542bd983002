"""The curvature of a linear head as one Kronecker product of a class factor and an input factor.

    Σ_n γ_n·M_n ⊗ x̃_n x̃_nᵀ  ≈  Γ·G ⊗ A        A = Σ γ x̃ x̃ᵀ/Γ   (D̃, D̃)        G = Σ γ·M/Γ   (C, C)

M = a·J for a loss without z-loss and softcap, x̃ = x, or (x, 1) where the bias is a parameter too, Γ = Σ γ.
So A is the mean of x̃ x̃ᵀ and G the mean of a·J, weighted by the row weights, exact and not estimated from
drawn labels (Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature",
2015); the reduction enters in Γ alone. Or A = Σ γ·tr M·x̃ x̃ᵀ / Σ γ·tr M, in which the inputs of rows without
curvature do not count. Exact for one row, for rows with equal inputs, and for rows with equal predictions.
With G = U diag(g) Uᵀ and A = V diag(a) Vᵀ everything is elementwise on the (C, D̃) matrix UᵀXV:

    Λ = Γ·g aᵀ        (Γ·G⊗A + δ)⁻¹ X = U [UᵀXV / (Λ + δ)] Vᵀ        log det = Σ log(Λ + δ)

Corrected (George et al., "Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis",
2018), Λ_ij = Σ_n γ_n·(u_iᵀ M_n u_i)·(x̃_nᵀ v_j)²: of all matrices diagonal in the basis u_i ⊗ v_j the nearest
to the curvature in the Frobenius norm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from xent._autograd.transforms import plain
from xent._core.logits import compute_dtype
from xent._core.target import Target
from xent._core.validators import FINITE, WeightingName, valid
from xent.curvature._batches import Batch
from xent.curvature._eigen import eigen
from xent.curvature._heads import HeadOperator, without_autograd
from xent.curvature._kronecker_sums import input_sum, logit_sum, second_moments
from xent.curvature._right_hand_sides import Stacks
from xent.curvature._tiles import Curvature, Form


class KroneckerEigen(NamedTuple):
    """The eigenvalues of a ``HeadKronecker``, and its eigenvectors as two factors.

    The eigenvector of ``values[i, j]`` is ``of_classes[:, i] ⊗ of_inputs[:, j]``.

    Example:
        >>> import torch, xent
        >>> x, w, y = torch.randn(64, 4), torch.randn(3, 4), torch.randint(3, (64,))
        >>> eigen = xent.curvature.HeadKronecker(x, w, y).eigh()
        >>> eigen.values.shape, eigen.of_classes.shape, eigen.of_inputs.shape
        (torch.Size([3, 4]), torch.Size([3, 3]), torch.Size([4, 4]))
    """

    values: Tensor  # (C, D̃) the eigenvalues μ; D̃ is D, or D + 1 with the bias
    of_classes: Tensor  # (C, C) eigenvectors of G, orthonormal columns
    of_inputs: Tensor  # (D̃, D̃) eigenvectors of A, orthonormal columns


class HeadKronecker(HeadOperator):
    """The curvature of a linear head as one Kronecker product ``Γ·G ⊗ A``, in O(C² + D²) memory.

    G is the mean of the rows' curvature in the logits, ``a·J``, A the mean of ``x̃ x̃ᵀ``, and Γ the sum of
    the row weights over the divisor of the loss; x̃ is x, or (x, 1) where the bias is a parameter too, with
    D̃ entries. The product approximates :class:`HeadGGN` in weight, bias or both. One sweep over the rows
    computes the factors. After O(C³ + D³) for the eigenvectors, each product, solution, determinant or sample
    costs O(C²D + CD²) and reads no row, where :class:`HeadHessian` sweeps over the rows for every product.
    The sweep takes chunks of rows within ``memory_budget`` and makes no tensor of shape (N, C). Sources:
    Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", 2015; for
    :meth:`corrected`, George et al., "Fast approximate natural gradient descent in a Kronecker-factored
    eigenbasis", 2018.

    The methods of :class:`HeadHessian` (``@``, ``diagonal``, ``trace``, ``block``, ``to_dense``,
    ``to_scipy``) are exact for the approximation. The matrix is semidefinite unless masses or weights are
    negative. Without z-loss and softcap it is singular along vectors that are equal in all classes
    (``G @ ones`` is 0).

    Args:
        features, weight, target: as in :class:`HeadHessian`.
        wrt: ``"weight"``, ``"bias"``, or both, in the order of their parameters in vectors.
        weighting: the weights of the rows in A. ``"rows"`` takes their weights in the loss. ``"curvature"``
            takes these times the trace of the row's curvature: the trace of the approximation is then exact,
            and the approximation is closer for a fitted head, most of whose rows have no curvature. It costs
            one more sweep.
        corrected: whether the eigenvalues are corrected as in :meth:`corrected`.
        options: the other arguments of :class:`HeadHessian`, such as ``bias`` and ``reduction``.

    Attributes:
        A: (D̃, D̃), with the bias as the last row and column.
        G: (C, C).
        total: Γ, a number.

    Raises:
        ValueError: shapes that do not fit; features that are not finite. In methods that invert the matrix,
            ``damping`` that leaves it singular or indefinite.
        TypeError: types that do not fit; an iterator in place of batches.

    Example:
        >>> import torch, xent
        >>> x, w, y = torch.randn(64, 4), torch.randn(3, 4), torch.randint(3, (64,))
        >>> K = xent.curvature.HeadKronecker(x, w, y)
        >>> step = K.solve(torch.ones(3, 4), damping=0.1)
        >>> torch.allclose(K @ step + 0.1 * step, torch.ones(3, 4), atol=1e-4)
        True
        >>> K.sample(damping=0.1, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([3, 4])
    """

    form = Form.GAUSS_NEWTON

    def __init__(
        self,
        features: Tensor | Iterable[Batch],
        weight: Tensor,
        target: Target = None,
        *,
        wrt: Literal["weight", "bias"] | Sequence[Literal["weight", "bias"]] = "weight",
        weighting: WeightingName = "rows",
        corrected: bool = False,
        **options: Any,
    ) -> None:
        weighting, corrected = valid("weighting", weighting), valid("corrected", corrected)
        super().__init__(features, weight, target, wrt=wrt, **options)
        self.weighting = weighting
        self._eigen: KroneckerEigen | None = None
        self._factors: tuple[Tensor, Tensor] | None = None  # eigenvalues of total·G and of A
        self.is_corrected = False
        with plain(self.device):
            self._make_factors()
            if corrected:
                self._correct()

    def _check_wrt(self, features: object, bias: Tensor | None) -> None:
        if "features" in self.wrt:
            raise ValueError(
                "wrt must be 'weight', 'bias' or both: each row has features of its own, and their curvature "
                "is HeadHessian(..., wrt='features').block(row)"
            )
        super()._check_wrt(features, bias)

    # ── the factors ──

    def _make_factors(self) -> None:
        dtype, c = compute_dtype(self.dtype), self.weight.shape[0]
        d = ("weight" in self.wrt) * self.weight.shape[1] + ("bias" in self.wrt)
        a = torch.zeros(d, d, dtype=dtype, device=self.device)
        g = torch.zeros(c, c, dtype=dtype, device=self.device)
        self.total, sum_of_weights, self._semidefinite = 0.0, 0.0, True
        for curvature in self._curvatures():
            g += logit_sum(curvature)
            row_weights = curvature.weight if self.weighting == "rows" else curvature.logit_traces()
            a += input_sum(curvature, row_weights, **self._input_parts)
            sum_of_weights += float(row_weights.sum())
            self.total += float(curvature.weight.sum())
            self._semidefinite &= _is_semidefinite(curvature)
        self.A = a / sum_of_weights if sum_of_weights else torch.zeros_like(a)
        self.G = g / self.total if self.total else torch.zeros_like(g)

    @property
    def _input_parts(self) -> dict[Literal["features", "one"], bool]:
        return {"features": "weight" in self.wrt, "one": "bias" in self.wrt}

    @without_autograd
    def eigh(self) -> KroneckerEigen:
        """Return the eigenvalues and the eigenvectors, the latter as two factors; they are computed once.

        Eigenvalues of the factors at the level of rounding are set to 0; small ones that come from features
        with a small unit are not. After the correction the values are not sorted, and the vectors are still
        those of G and A.

        Returns:
            A :class:`KroneckerEigen`.
        """
        if self._eigen is None:
            g, u = eigen(self.G * self.total, semidefinite=self._semidefinite)
            a, v = eigen(self.A, semidefinite=self._semidefinite)
            self._factors = g, a
            self._eigen = KroneckerEigen(torch.outer(g, a), u, v)
        return self._eigen

    @without_autograd
    def corrected(self) -> HeadKronecker:
        """Return a copy whose eigenvalues are the exact second moments of the curvature in the eigenbasis.

        Of all matrices that are diagonal in this basis, the copy is the nearest to the curvature in the
        Frobenius norm, and its trace is exact. It costs one more sweep over the rows, O(N·C² + N·D²).

        Returns:
            The copy.
        """
        self.eigh()  # computed once for both
        corrected = copy.copy(self)
        corrected._correct()
        return corrected

    def _correct(self) -> None:
        self.is_corrected = True
        values, u, v = self.eigh()
        moments = torch.zeros_like(values)
        for curvature in self._curvatures():
            moments += second_moments(curvature, u, v, **self._input_parts)
        if self._semidefinite and self._factors is not None:
            # a sum of non-negative terms is 0 only where every term is
            g, a = self._factors
            moments[g == 0] = 0.0
            moments[:, a == 0] = 0.0
        self._eigen = KroneckerEigen(moments, u, v)

    # ── products, diagonals and blocks ──

    def _products(self, stacks: Stacks) -> Stacks:
        if self.is_corrected:
            return self._in_eigenbasis(stacks, lambda t: t * self.eigh().values)
        return self._map_joined(stacks, lambda x: (self.G @ x @ self.A) * self.total)

    def _in_eigenbasis(self, stacks: Stacks, scale: Callable[[Tensor], Tensor]) -> Stacks:
        _, u, v = self.eigh()
        return self._map_joined(stacks, lambda x: u @ scale(u.t() @ x @ v) @ v.t())

    def _map_joined(self, stacks: Stacks, f: Callable[[Tensor], Tensor]) -> Stacks:
        """Apply f to right-hand sides joined to (K, C, D̃)."""
        columns = [
            stacks[self.wrt.index(name)].to(self.A.dtype) for name in ("weight", "bias") if name in self.wrt
        ]
        joined = torch.cat([t if t.dim() == 3 else t[..., None] for t in columns], dim=2)
        return self._split(f(joined))

    def _split(self, joined: Tensor) -> Stacks:
        """Split (..., C, D̃) into tensors of the parameters' shapes, in the order of wrt."""
        joined, d = joined.to(self.dtype), self.weight.shape[1]
        return tuple(
            (joined[..., :d] if name == "weight" else joined[..., -1]).contiguous() for name in self.wrt
        )

    def _in_parameter_shape(self, joined: Tensor) -> Any:
        parts = self._split(joined)
        return parts if len(parts) > 1 else parts[0]

    @without_autograd
    def diagonal(self) -> Any:
        """Return the exact diagonal of the approximation.

        Returns:
            A tensor of the parameter's shape, or a tuple of such for several parameters.
        """
        if self.is_corrected:
            values, u, v = self.eigh()
            return self._in_parameter_shape(u.square() @ values @ v.square().t())
        return self._in_parameter_shape(torch.outer(self.G.diagonal() * self.total, self.A.diagonal()))

    @without_autograd
    def trace(self) -> Tensor:
        """Return the exact trace of the approximation.

        Returns:
            A scalar.
        """
        trace = (
            self.eigh().values.sum() if self.is_corrected else self.G.trace() * self.total * self.A.trace()
        )
        return trace.to(self.dtype)

    @without_autograd
    def block(self, index: int) -> Tensor:
        """Return the approximation's diagonal block of one class.

        Args:
            index: the class.

        Returns:
            (D̃, D̃).
        """
        index = self._index(index, len(self.G))
        if self.is_corrected:
            values, u, v = self.eigh()
            return ((v * (u[index].square() @ values)) @ v.t()).to(self.dtype)
        return (self.A * (self.G[index, index] * self.total)).to(self.dtype)

    # ── inverses, determinants and samples ──

    def solve(self, v: Any, damping: float = 0.0, *, factored: bool = False) -> Any:
        """Return ``(K + δI)⁻¹ v`` with K the approximation, exactly, for one right-hand side or several.

        Args:
            v: right-hand sides, in any shape that ``@`` takes.
            damping: δ, above 0 where K is singular.
            factored: whether to damp the factors instead, as implementations without eigenvectors do: (Γ·G +
                √δ/π) ⊗ (A + π√δ), with π² the mean eigenvalue of A over that of Γ·G (Martens and Grosse,
                §6.3).

        Returns:
            The solutions, in the shape of ``v``.

        Raises:
            ValueError: damping that leaves the matrix singular or indefinite.
        """
        values = self._damped(damping, factored)
        return self._apply_symmetric(v, lambda stacks: self._in_eigenbasis(stacks, lambda t: t / values))

    @without_autograd
    def logdet(self, damping: float = 0.0, *, factored: bool = False) -> Tensor:
        """Return ``log det(K + δI)`` with K the approximation.

        Args:
            damping, factored: as in :meth:`solve`.

        Returns:
            A scalar.

        Raises:
            ValueError: damping that leaves the matrix singular or indefinite.
        """
        return self._damped(damping, factored).log().sum().to(self.dtype)

    @without_autograd
    def sample(
        self,
        generator: torch.Generator | None = None,
        damping: float = 0.0,
        *,
        count: int | None = None,
        factored: bool = False,
    ) -> Any:
        """Draw from the normal distribution ``N(0, (K + δI)⁻¹)`` with K the approximation.

        Args:
            generator: the generator of the noise, on this device; None is torch's default one.
            damping, factored: as in :meth:`solve`.
            count: the number of draws, along a new first dimension; None for one draw without it.

        Returns:
            A tensor of the parameter's shape, or a tuple of such for several parameters.

        Raises:
            ValueError: damping that leaves the matrix singular or indefinite.
        """
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator or None, got {type(generator).__name__}: "
                f"damping={generator!r}?"
            )
        _, u, v = self.eigh()
        scale = self._damped(damping, factored).rsqrt()
        noise = torch.randn(
            1 if count is None else count,
            *scale.shape,
            dtype=scale.dtype,
            device=scale.device,
            generator=generator,
        )
        drawn = u @ (noise * scale) @ v.t()
        return self._in_parameter_shape(drawn[0] if count is None else drawn)

    @without_autograd
    def _damped(self, damping: float, factored: bool) -> Tensor:
        """Return the eigenvalues of the damped matrix, (C, D̃); raise a ValueError unless all are above 0."""
        FINITE("damping", damping)
        factored = valid("factored", factored)
        values = self.eigh().values
        assert self._factors is not None
        if factored and self.is_corrected:
            raise ValueError(
                "corrected eigenvalues are no product of factors that could be damped: factored=False"
            )
        if factored and damping > 0:
            g, a = self._factors
            root = damping**0.5
            # where a factor is 0, both are damped equally
            ratio = float(a.mean() / g.mean()) if g.mean() > 0 and a.mean() > 0 else 1.0
            values = torch.outer(g + root / ratio**0.5, a + root * ratio**0.5)
        else:
            values = values + damping
        lowest = float(values.min()) if values.numel() else 1.0
        if not lowest > 0:
            why = "is singular" if lowest == damping else f"has the eigenvalue {lowest - damping:.3g}"
            raise ValueError(
                f"the matrix {why}: damping must be above {max(0.0, damping - lowest):.3g}, got {damping}"
            )
        return values


def _is_semidefinite(curvature: Curvature) -> bool:
    rows = curvature.rows(slice(0, curvature.problem.targets.count))
    return not bool((rows.alpha < 0).any() or (rows.beta < 0).any())
