"""Second derivatives of a linear head's loss as operators: products, diagonals and blocks.

    H_W = Σ_n γ_n·a_n·J_n ⊗ x_n x_nᵀ        H_x = γ·a·Wᵀ J W        H_b = Σ_n γ_n·a_n·J_n

equal, in W, x or b alone, to the Gauss–Newton matrix (z is linear in each) and to the type-2 Fisher
information. In W and x together the Hessian also has the indefinite cross term of ∂L/∂u. Gauss–Newton drops
the terms of z-loss and softcap that would make it indefinite. The formulas are in `_tiles`, the rows in
`_batches`, the shapes of right-hand sides in `_right_hand_sides`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeAlias, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from xent._arguments.options import Options
from xent._arguments.validation import check_tensors
from xent._autograd.transforms import plain
from xent._core.logits import LinearHead, Tangents, compute_dtype
from xent._core.statistics import statistics_dtype
from xent._core.target import Target
from xent._core.validators import OneOf, TotalName
from xent.curvature._batches import Batch, Source
from xent.curvature._kronecker_sums import input_sum
from xent.curvature._right_hand_sides import MAX_AT_ONCE, RightHandSides, Stacks
from xent.curvature._tiles import Curvature, Form

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

Wrt: TypeAlias = Literal["weight", "bias", "features"]
PLACES = {"features": 0, "weight": 1, "bias": 2}  # positions among the tensors of a head
LARGEST_DENSE = 1 << 28  # elements

P = ParamSpec("P")
Result = TypeVar("Result")
Self = TypeVar("Self", bound="HeadOperator")


def without_autograd(
    method: Callable[Concatenate[Self, P], Result],
) -> Callable[Concatenate[Self, P], Result]:
    """Run a method without autocast and without recording a graph."""

    @wraps(method)
    def inner(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        with plain(self.device):
            return method(self, *args, **kwargs)

    return inner


class HeadOperator:
    """Base of the operators of a head: options of the loss, right-hand sides of any shape, diagonals, blocks.

    Use :class:`HeadHessian`, :class:`HeadGGN` or :class:`HeadFisher`.
    """

    form: Form
    _cached: list[Curvature] | None = None  # None for batches, whose curvatures are computed in every pass

    def __init__(
        self,
        features: Tensor | Iterable[Batch],
        weight: Tensor,
        target: Target = None,
        *,
        bias: Tensor | None = None,
        wrt: Wrt | Sequence[Wrt] = "weight",
        reduction: TotalName = "mean",
        class_weight: Tensor | None = None,
        ignore_index: int | None = -100,
        label_smoothing: float = 0.0,
        sample_weight: Tensor | None = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        denominator: float | None = None,
        memory_budget: int | None = None,
    ) -> None:
        OneOf(get_args(TotalName))("reduction", reduction)
        check_tensors(class_weight=class_weight)  # the loss calls it weight
        self.options = Options.of(
            weight=class_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            sample_weight=sample_weight,
            z_loss=z_loss,
            softcap=softcap,
            temperature=temperature,
            denominator=denominator,
            memory_budget=memory_budget,
        )
        if not isinstance(wrt, str | tuple | list):
            raise TypeError(f"wrt must be a name or several, got {type(wrt).__name__}")
        self.wrt: tuple[Wrt, ...] = (wrt,) if isinstance(wrt, str) else tuple(wrt)
        self._check_wrt(features, bias)
        given: object = weight
        with plain(given.device if isinstance(given, Tensor) else torch.device("cpu")):
            self.source = Source(features, weight, bias, target, self.options)
            if self.source.in_memory:
                self._cached = list(self._make_curvatures())

    # ── properties ──

    @property
    def weight(self) -> Tensor:
        """The weight W of the head, (C, D)."""
        return self.source.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias b of the head, (C,), or None."""
        return self.source.bias

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """The shapes of the parameters, in the order of ``wrt``."""
        shapes = {"weight": self.weight.shape, "bias": None if self.bias is None else self.bias.shape}
        shapes["features"] = self.source.rows_shape
        return tuple(shape for shape in (shapes[name] for name in self.wrt) if shape is not None)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix, (P, P), with P the number of parameters."""
        size = sum(shape.numel() for shape in self.shapes)
        return size, size

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weight and of every result."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weight and of every result."""
        return self.weight.device

    @property
    def T(self) -> HeadOperator:
        """The operator itself, which is symmetric."""
        return self

    def __repr__(self) -> str:
        shapes = [f"{name} {tuple(shape)}" for name, shape in zip(self.wrt, self.shapes, strict=True)]
        return f"{type(self).__name__}({', '.join(shapes)}; {self.shape[0]} × {self.shape[1]})"

    # ── products ──

    def __matmul__(self, v: Any) -> Any:
        """Return the product H v for one right-hand side v, or for several in one sweep; differentiable in v.

        Args:
            v: one right-hand side, in the parameter's shape, flat (P,), or for several parameters a tuple of
                their shapes; or several, as columns (P, K), as a matrix of P rows is always read, or as a
                stack (K, *shape) of three dimensions or more.

        Returns:
            The product, in the shape of ``v``.
        """
        return self._apply_symmetric(v, self._products)

    def _apply_symmetric(self, v: Any, f: Callable[[Stacks], Stacks]) -> Any:
        """Apply a symmetric linear map to right-hand sides of any accepted shape."""

        def apply(stacks: Stacks) -> Stacks:
            with plain(self.device):
                return f(stacks)

        return RightHandSides(self.shapes, self.dtype).apply(v, apply)

    def _cut(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Split (P,) into tensors of the parameters' shapes."""
        return tuple(stack[0] for stack in RightHandSides(self.shapes, self.dtype).split(flat[None]))

    def _products(self, stacks: Stacks) -> Stacks:
        places = [PLACES[name] for name in self.wrt]
        wants = tuple(place in places for place in range(3))
        totals: list[Tensor] | None = None
        for curvature in self._curvatures():
            tangents: list[Tangents] = []
            for side in zip(*stacks, strict=True):
                tangent: list[Tensor | None] = [None, None, None]
                for place, v in zip(places, side, strict=True):
                    tangent[place] = v.reshape(v.shape[:-1].numel(), v.shape[-1]) if place == 0 else v
                tangents.append(tuple(tangent))
            products = curvature.products(tangents, wants)
            parts = [_stack([_require(product[place]) for product in products]) for place in places]
            totals = parts if totals is None else [a.add_(b) for a, b in zip(totals, parts, strict=True)]
        if totals is None:
            return tuple(torch.zeros_like(stack) for stack in stacks)
        return tuple(t.to(self.dtype).reshape(s.shape) for t, s in zip(totals, stacks, strict=True))

    # ── diagonals, blocks and dense forms ──

    @without_autograd
    def diagonal(self) -> Any:
        """Return the exact diagonal.

        Returns:
            A tensor of the parameter's shape, or a tuple of such for several parameters.
        """
        wants = tuple(name in self.wrt for name in PLACES)
        total: list[Tensor] | None = None
        for curvature in self._curvatures():
            diagonals = curvature.diagonal(wants)
            one = [_require(diagonals[PLACES[name]]) for name in self.wrt]
            total = one if total is None else [a + b for a, b in zip(total, one, strict=True)]
        shaped = tuple(
            torch.zeros(s, dtype=self.dtype, device=self.device)
            if total is None
            else total[i].to(self.dtype).reshape(s)
            for i, s in enumerate(self.shapes)
        )
        return shaped if len(shaped) > 1 else shaped[0]

    @without_autograd
    def trace(self) -> Tensor:
        """Return the trace. For weight and bias it costs one matrix product.

        Returns:
            A scalar.
        """
        total = torch.zeros((), dtype=statistics_dtype(self.device), device=self.device)
        for curvature in self._curvatures():
            if "features" in self.wrt:
                (dx, _, _) = curvature.diagonal((True, False, False))
                total = total + _require(dx).to(total.dtype).sum()
            if set(self.wrt) - {"features"}:
                each = curvature.logit_traces().to(total.dtype)
                if "weight" in self.wrt:
                    total = total + (each * _squared_norms(curvature)).sum()
                if "bias" in self.wrt:
                    total = total + each.sum()
        return total.to(self.dtype)

    @without_autograd
    def block(self, index: int) -> Tensor:
        """Return the diagonal block of one class, or, with respect to features alone, of one row.

        Args:
            index: the position of the class or row.

        Returns:
            (D, D); (D + 1, D + 1), with the bias last, for a class whose bias is in ``wrt`` too.

        Raises:
            IndexError: a position that does not exist.
            ValueError: features are in ``wrt`` beside other parameters.
        """
        if self.wrt == ("features",):
            assert self.source.rows_shape is not None
            return self._feature_block(self._index(index, self.source.rows_shape[:-1].numel()))
        index = self._index(index, self.weight.shape[0])
        if "features" in self.wrt:
            raise ValueError("blocks are those of classes, or of rows with respect to features alone")
        features, one = "weight" in self.wrt, "bias" in self.wrt
        size = features * self.weight.shape[1] + one
        total = torch.zeros(size, size, dtype=compute_dtype(self.dtype), device=self.device)
        for curvature in self._curvatures():
            total += input_sum(curvature, curvature.class_diagonal(index), features=features, one=one)
        return total.to(self.dtype)

    @staticmethod
    def _index(index: Any, count: int) -> int:
        if isinstance(index, bool) or not hasattr(index, "__index__"):
            raise TypeError(f"index, the number of a block, must be a whole number; got {index!r}")
        at = operator.index(index)
        if not 0 <= at < count:
            raise IndexError(f"index: block {at} is outside 0..{count - 1}")
        return at

    def _feature_block(self, row: int) -> Tensor:
        d = self.weight.shape[1]
        total = torch.zeros(d, d, dtype=self.dtype, device=self.device)
        for curvature in self._curvatures():
            rows = curvature.problem.selection.index
            at = row if rows is None else int(torch.searchsorted(rows, row))
            if rows is None or (at < len(rows) and int(rows[at]) == row):
                total = total + curvature.feature_block(at).to(self.dtype)
        return total

    def to_dense(self) -> Tensor:
        """Return the matrix, for small heads.

        Returns:
            (P, P), with P the number of parameters.

        Raises:
            ValueError: a matrix of more than 2²⁸ elements.
        """
        size = self.shape[0]
        if size**2 > LARGEST_DENSE:
            raise ValueError(f"{size} × {size} is too large for a dense matrix: use products, or to_scipy()")
        eye = torch.eye(size, dtype=self.dtype, device=self.device)
        columns = [self @ part for part in eye.split(MAX_AT_ONCE, dim=1)]
        return torch.cat(columns, dim=1) if columns else eye

    def to_scipy(self) -> LinearOperator:
        """Return the operator in SciPy's form, for ``eigsh``, ``cg`` and the like.

        Returns:
            A :class:`scipy.sparse.linalg.LinearOperator`. Half types give float32, as NumPy has no bfloat16.
        """
        from scipy.sparse.linalg import LinearOperator

        result_dtype = compute_dtype(self.dtype)

        def product(v: Any) -> Any:
            if np.iscomplexobj(v):
                return product(v.real) + 1j * product(v.imag)
            # a copy, since SciPy's arrays may be read-only
            right = torch.from_numpy(np.array(v)).to(self.device, self.dtype)
            return (self @ right).to(result_dtype).cpu().numpy()

        return LinearOperator(
            self.shape,
            matvec=lambda v: product(v.reshape(-1)),
            rmatvec=lambda v: product(v.reshape(-1)),
            matmat=product,
            rmatmat=product,
            dtype=torch.empty(0, dtype=result_dtype, device="cpu").numpy().dtype,
        )

    # ── the rows ──

    def _check_wrt(self, features: object, bias: Tensor | None) -> None:
        if (
            not self.wrt
            or len(set(self.wrt)) != len(self.wrt)
            or any(name not in PLACES for name in self.wrt)
        ):
            raise ValueError(f"wrt must name different ones of 'weight', 'bias', 'features'; got {self.wrt}")
        if "bias" in self.wrt and bias is None:
            raise ValueError("wrt names the bias, and there is none: pass bias")
        if "features" in self.wrt and not isinstance(features, Tensor):
            raise ValueError("with respect to features these must be one tensor, not batches")

    def _curvatures(self) -> Iterable[Curvature]:
        self.source.check_unchanged()
        return self._make_curvatures() if self._cached is None else self._cached

    def _make_curvatures(self) -> Iterator[Curvature]:
        for problem, row_weight in self.source.problems():
            yield from self._contributions(
                Curvature.of(problem, self.form, self.source.scale, row_weight, self.options.reduction.z_loss)
            )

    def _contributions(self, curvature: Curvature) -> Iterator[Curvature]:
        """Yield the curvatures whose sum is a batch's contribution."""
        yield curvature


def _stack(tensors: list[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def _squared_norms(curvature: Curvature) -> Tensor:
    """Return ‖x‖² of the M rows, (M,)."""
    logits, rows = curvature.problem.logits, curvature.problem.selection.index
    assert isinstance(logits, LinearHead)
    norms = torch.linalg.vector_norm(logits.x, dim=1, dtype=statistics_dtype(logits.device))
    return (norms if rows is None else norms[rows]).square()


def _require(t: Tensor | None) -> Tensor:
    assert t is not None
    return t


class HeadHessian(HeadOperator):
    """The Hessian of a linear head's loss, as an operator.

    With z = W x + b, the row weights γ (sample weights over the divisor of the loss) and J the softmax
    Jacobian, the Hessian in W is ``H = Σ_n γ_n·a_n·J_n ⊗ x_n x_nᵀ``, in one row's x it is ``γ·a·Wᵀ J W``, and
    in b it is ``Σ_n γ_n·a_n·J_n``. With respect to weight (or bias) and features together it also has a cross
    term and is indefinite.

    ``H @ v`` costs three matrix products where ``memory_budget`` holds the probabilities and tangents of a
    chunk of rows, else five. Each further right-hand side costs two. No tensor of shape (N, C) is made.

    Args:
        features: x, (N, D) or (..., D). Or batches ``(features, target[, sample_weight])`` of any number, in
            a container that can be iterated over again and again; each product reads them once.
        weight: W, (C, D). All tensors are held constant, and must not be changed in place.
        target: as in :func:`xent.linear_cross_entropy`.
        bias: b, (C,).
        wrt: the parameters: ``"weight"``, ``"bias"``, ``"features"``, or several of them, in the order of
            their parameters in vectors.
        reduction: ``"mean"`` or ``"sum"``, as in :func:`xent.cross_entropy`.
        class_weight: w, (C,), the argument ``weight`` of :func:`xent.cross_entropy`.
        ignore_index, label_smoothing, sample_weight, z_loss: as in :func:`xent.cross_entropy`.
        softcap, temperature, denominator: as in :func:`xent.cross_entropy`.
        memory_budget: as in :func:`xent.linear_cross_entropy`.

    Raises:
        ValueError: shapes that do not fit; features that are not finite, with their row.
        TypeError: types that do not fit; an iterator in place of batches.
        IndexError: a target outside 0..C−1.
        RuntimeError: a tensor that was changed in place since the construction.
        NotImplementedError: differentiation of ``torch.func`` in a tensor, or a map over it. (``H @ v`` has
            derivatives in v.)

    Example:
        >>> import torch, xent
        >>> x, w, y = torch.randn(32, 4), torch.randn(3, 4), torch.randint(3, (32,))
        >>> H = xent.curvature.HeadHessian(x, w, y)
        >>> (H @ torch.ones(3, 4)).abs().max().item() < 1e-6  # one vector added to every row changes nothing
        True
        >>> H.diagonal().shape, H.block(1).shape, H.shape
        (torch.Size([3, 4]), torch.Size([4, 4]), (12, 12))
    """

    form = Form.HESSIAN


class HeadGGN(HeadOperator):
    """The generalised Gauss–Newton matrix of a linear head's loss, as an operator.

    The matrix is ``Σ_n Jacᵀ (γ·a·J + 2λγ·p pᵀ) Jac``, with Jac the derivative of a row's logits in the
    parameters, γ the row's weight and λ the z-loss weight. It is positive semidefinite where no mass is
    negative. With respect to weight, bias or features alone it equals :class:`HeadHessian`, but for two
    terms: of a z-loss it keeps 2λ·p pᵀ only, and it drops the second derivative of a softcap. With respect to
    several parameters it has no cross term. The methods are those of :class:`HeadHessian`. Source:
    Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", 2002.

    Args:
        features, weight, target, bias, wrt, reduction: as in :class:`HeadHessian`.
        class_weight, ignore_index, label_smoothing, sample_weight: as in :class:`HeadHessian`.
        z_loss, softcap, temperature, denominator, memory_budget: as in :class:`HeadHessian`.

    Raises:
        ValueError, TypeError, IndexError, RuntimeError, NotImplementedError: as :class:`HeadHessian`.

    Example:
        >>> import torch, xent
        >>> x, w, y = torch.randn(32, 4), torch.randn(3, 4), torch.randint(3, (32,))
        >>> G = xent.curvature.HeadGGN(x, w, y, wrt=("weight", "features"))
        >>> bool(torch.linalg.eigvalsh(G.to_dense()).min() > -1e-6)
        True
    """

    form = Form.GAUSS_NEWTON
