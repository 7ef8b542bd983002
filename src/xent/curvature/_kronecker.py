"""The curvature of a linear head as one Kronecker product: a factor of the classes, a factor of the features.

    Σ_n γ_n·M_n ⊗ x̃_n x̃_nᵀ  ≈  Γ·G ⊗ A        A = Σ γ x̃ x̃ᵀ/Γ   (D̃, D̃)        G = Σ γ·M/Γ   (C, C)

M = a·J for the plain loss, x̃ = x, or (x, 1) where the bias moves too, Γ = Σ γ. So A is the mean of x̃ x̃ᵀ and
G the mean of a·J, exact and not drawn from labels (Martens and Grosse, "Optimizing Neural Networks with
Kronecker-factored Approximate Curvature", 2015), rows counted by their weights; the reduction is in Γ alone.
Or A = Σ γ·tr M·x̃ x̃ᵀ / Σ γ·tr M: rows that are sure have no curvature, and their inputs should not count.
Exact for one row, for rows of one input, and for rows of one prediction. With G = U diag(g) Uᵀ and
A = V diag(a) Vᵀ everything is elementwise on the (C, D̃) matrix UᵀXV:

    Λ = Γ·g aᵀ        (Γ·G⊗A + λ)⁻¹ X = U [UᵀXV / (Λ + λ)] Vᵀ        log det = Σ log(Λ + λ)

Corrected (George et al., "Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis",
2018), Λ_ij = Σ_n γ_n·(u_iᵀ M_n u_i)·(x̃_nᵀ v_j)²: of all matrices diagonal in the basis u_i ⊗ v_j the nearest
to the curvature, entry for entry.
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
from xent._core.validators import FINITE, valid
from xent.curvature._batches import Batch
from xent.curvature._eigen import eigen
from xent.curvature._heads import HeadOperator, closed
from xent.curvature._kronecker_sums import input_sum, logit_sum, second_moments
from xent.curvature._right_hand_sides import Stacks
from xent.curvature._tiles import Curvature, Form


class KroneckerEigen(NamedTuple):
    """Eigenvalue ``values[i, j]`` belongs to ``of_classes[:, i]`` ⊗ ``of_inputs[:, j]``."""

    values: Tensor  # (C, D̃)
    of_classes: Tensor  # (C, C), orthonormal columns
    of_inputs: Tensor  # (D̃, D̃)


class HeadKronecker(HeadOperator):
    """The curvature of a linear head as Γ·G ⊗ A, in O(C² + D²) memory whatever the number of rows.

    It approximates :class:`HeadGGN` (the Hessian, but for z-loss and softcap), in weight, bias or both. Where
    :class:`HeadHessian` needs a sweep over the rows for every product, here one sweep makes the factors, and
    products, solutions, determinants and draws cost O(C²D + CD²) each, after O(C³ + D³) for the eigenvectors.
    The sweep holds no (N, C) tensor: chunks of rows within the budget.

    Args:
        features, weight, target, bias, reduction, ...: as in :class:`HeadHessian`.
        wrt: ``"weight"``, ``"bias"``, or both, whose parameters then lie in that order.
        weighting: by what rows count in A: ``"rows"``, their weights in the loss; ``"curvature"``, these
            times tr M, what is seen of the row at all. Then the trace is the curvature's own, and of a fitted
            head, most rows of which are sure and have none, the approximation is nearer. One sweep more.
        corrected: see :meth:`corrected`.

    Attributes:
        A: (D̃, D̃), the (weighted) mean of x̃ x̃ᵀ; D̃ is D, or D + 1 where the bias moves too, whose row and
            column are the last.
        G: (C, C), the mean of a·J (of each row's curvature in the logits).
        total: what multiplies G ⊗ A: the rows' weights over the divisor, summed.

    Methods beside those of :class:`HeadHessian` (``@``, ``diagonal``, ``trace``, ``block``, ``to_dense``,
    ``to_scipy``, which are exact *of the approximation*): :meth:`eigh`, :meth:`solve`, :meth:`logdet`,
    :meth:`sample`, :meth:`corrected`. With masses or weights below 0 it may be indefinite; otherwise it is
    semidefinite, and singular along the vectors that are equal in all classes (``G @ ones`` is 0) unless
    z-loss or softcap see them.

    Raises:
        ValueError: shapes that do not fit; features that are not finite; ``damping`` that leaves the matrix
            singular or indefinite, in methods that invert it.
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
        weighting: Literal["rows", "curvature"] = "rows",
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
        self.total, counted, self._semidefinite = 0.0, 0.0, True
        for curvature in self._curvatures():
            g += logit_sum(curvature)
            counts = curvature.weight if self.weighting == "rows" else curvature.logit_traces()
            a += input_sum(curvature, counts, **self._given)
            counted += float(counts.sum())
            self.total += float(curvature.weight.sum())
            self._semidefinite &= _nowhere_negative(curvature)
        self.A = a / counted if counted else torch.zeros_like(a)
        self.G = g / self.total if self.total else torch.zeros_like(g)

    @property
    def _given(self) -> dict[Literal["features", "one"], bool]:
        return {"features": "weight" in self.wrt, "one": "bias" in self.wrt}

    @closed
    def eigh(self) -> KroneckerEigen:
        """Eigenvalues (C, D̃) and eigenvectors, these as two factors; computed once.

        Eigenvalues of the factors that rounding alone keeps from 0 are 0; small ones of features of a small
        unit are not. Corrected, the values are not in order, and the vectors those of G and A.
        """
        if self._eigen is None:
            g, u = eigen(self.G * self.total, semidefinite=self._semidefinite)
            a, v = eigen(self.A, semidefinite=self._semidefinite)
            self._factors = g, a
            self._eigen = KroneckerEigen(torch.outer(g, a), u, v)
        return self._eigen

    @closed
    def corrected(self) -> HeadKronecker:
        """The same with the exact second moments of the curvature in the eigenvectors' basis as eigenvalues.

        One more sweep over the rows, O(N·C² + N·D²). Its trace is the curvature's own.
        """
        self.eigh()  # kept for both
        made = copy.copy(self)
        made._correct()
        return made

    def _correct(self) -> None:
        self.is_corrected = True
        values, u, v = self.eigh()
        moments = torch.zeros_like(values)
        for curvature in self._curvatures():
            moments += second_moments(curvature, u, v, **self._given)
        if self._semidefinite and self._factors is not None:
            # a sum of terms that are not negative is 0 only where each of them is
            g, a = self._factors
            moments[g == 0] = 0.0
            moments[:, a == 0] = 0.0
        self._eigen = KroneckerEigen(moments, u, v)

    # ── products, and what is read off it ──

    def _products(self, stacks: Stacks) -> Stacks:
        if self.is_corrected:
            return self._in_the_basis(stacks, lambda t: t * self.eigh().values)
        return self._mapped(stacks, lambda x: (self.G @ x @ self.A) * self.total)

    def _in_the_basis(self, stacks: Stacks, change: Callable[[Tensor], Tensor]) -> Stacks:
        _, u, v = self.eigh()
        return self._mapped(stacks, lambda x: u @ change(u.t() @ x @ v) @ v.t())

    def _mapped(self, stacks: Stacks, f: Callable[[Tensor], Tensor]) -> Stacks:
        """f of right-hand sides as (K, C, D̃)."""
        columns = [
            stacks[self.wrt.index(name)].to(self.A.dtype) for name in ("weight", "bias") if name in self.wrt
        ]
        joined = torch.cat([t if t.dim() == 3 else t[..., None] for t in columns], dim=2)
        return self._parted(f(joined))

    def _parted(self, joined: Tensor) -> Stacks:
        """(..., C, D̃) -> tensors of the parameters' shapes, in the order of wrt."""
        joined, d = joined.to(self.dtype), self.weight.shape[1]
        return tuple(
            (joined[..., :d] if name == "weight" else joined[..., -1]).contiguous() for name in self.wrt
        )

    def _shaped(self, joined: Tensor) -> Any:
        parts = self._parted(joined)
        return parts if len(parts) > 1 else parts[0]

    @closed
    def diagonal(self) -> Any:
        """The exact diagonal of the approximation, in the parameter's shape (a tuple of them for several)."""
        if self.is_corrected:
            values, u, v = self.eigh()
            return self._shaped(u.square() @ values @ v.square().t())
        return self._shaped(torch.outer(self.G.diagonal() * self.total, self.A.diagonal()))

    @closed
    def trace(self) -> Tensor:
        """The exact trace of the approximation, a scalar."""
        found = (
            self.eigh().values.sum() if self.is_corrected else self.G.trace() * self.total * self.A.trace()
        )
        return found.to(self.dtype)

    @closed
    def block(self, index: int) -> Tensor:
        """The approximation's block of class ``index``, (D̃, D̃)."""
        index = self._index(index, len(self.G))
        if self.is_corrected:
            values, u, v = self.eigh()
            return ((v * (u[index].square() @ values)) @ v.t()).to(self.dtype)
        return (self.A * (self.G[index, index] * self.total)).to(self.dtype)

    # ── what products alone do not give ──

    def solve(self, v: Any, damping: float = 0.0, *, factored: bool = False) -> Any:
        """(K + damping·I)⁻¹ v, exactly, for one v or many: shapes as in ``@``.

        Args:
            v: right-hand sides.
            damping: λ, above 0 wherever K is singular.
            factored: damp the factors instead, (Γ·G + √λ/π) ⊗ (A + π√λ) with π² = mean eigenvalue of A over
                that of Γ·G (Martens and Grosse, §6.3): what implementations do that hold no eigenvectors.
        """
        values = self._damped(damping, factored)
        return self._each(v, lambda stacks: self._in_the_basis(stacks, lambda t: t / values))

    @closed
    def logdet(self, damping: float = 0.0, *, factored: bool = False) -> Tensor:
        """log det(K + damping·I), a scalar; arguments as in :meth:`solve`."""
        return self._damped(damping, factored).log().sum().to(self.dtype)

    @closed
    def sample(
        self,
        generator: torch.Generator | None = None,
        damping: float = 0.0,
        *,
        count: int | None = None,
        factored: bool = False,
    ) -> Any:
        """A draw from N(0, (K + damping·I)⁻¹), in the parameter's shape (a tuple of them for several).

        Args:
            generator: of the noise, on this device; None is torch's own.
            damping, factored: as in :meth:`solve`.
            count: how many; they then lie along a new first dimension.
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
        return self._shaped(drawn[0] if count is None else drawn)

    @closed
    def _damped(self, damping: float, factored: bool) -> Tensor:
        """Eigenvalues of what is inverted, (C, D̃), all above 0."""
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
            # of factors that are 0 both are damped alike
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


def _nowhere_negative(curvature: Curvature) -> bool:
    rows = curvature.rows(slice(0, curvature.problem.targets.count))
    return not bool((rows.alpha < 0).any() or (rows.beta < 0).any())
