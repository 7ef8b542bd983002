"""Second derivatives of a linear head's loss as operators: products, diagonals, blocks, never a matrix.

    H_W = Σ_n γ_n·a_n·J_n ⊗ x_n x_nᵀ        H_x = γ·a·Wᵀ J W        H_b = Σ_n γ_n·a_n·J_n

equal, in W, x or b alone, to the Gauss–Newton matrix (z is linear in each) and to the type-2 Fisher
information. Where W and x move together the Hessian has the indefinite cross term of ∂L/∂u beside it. Of
z-loss and softcap Gauss–Newton leaves out what would make it indefinite. Formulas: `core.curvature`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from xent.core.curvature import Curvature, Form
from xent.core.sampling import sample
from xent.core.scores import LinearHead
from xent.core.sweep import Problem
from xent.core.targets import of_one_class
from xent.modes import plain
from xent.options import Call, Options, Target, check_tensors

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

Batch: TypeAlias = tuple[Tensor, Target] | tuple[Tensor, Target, Tensor]
Wrt: TypeAlias = Literal["weight", "bias", "features"]
PLACES = {"features": 0, "weight": 1, "bias": 2}  # among the tensors of a head
LARGEST_DENSE = 1 << 28  # elements
AT_ONCE = 64  # right-hand sides of one sweep, where the caller did not choose


class HeadOperator:
    """What the operators share: the loss's options, right-hand sides of any shape, and what is made of them.

    Not to be made itself: see :class:`HeadHessian`, :class:`HeadGGN`, :class:`HeadFisher`.
    """

    form: Form
    _held: list[Curvature] | None  # of features that are all there; those of batches are made each time

    def __init__(
        self,
        features: Tensor | Iterable[Batch],
        weight: Tensor,
        target: Target = None,
        *,
        bias: Tensor | None = None,
        wrt: Wrt | Sequence[Wrt] = "weight",
        reduction: str = "mean",
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
        check_tensors(weight=weight, bias=bias)
        if weight.dim() != 2:
            raise ValueError(f"weight must be (C, D), got {tuple(weight.shape)}")
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.options = Options(
            weight=class_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            temperature=temperature,
            denominator=denominator,
            memory_budget=memory_budget,
        )
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        self.wrt: tuple[Wrt, ...] = (wrt,) if isinstance(wrt, str) else tuple(wrt)
        self._check_wrt(features)
        if isinstance(features, Tensor):
            if target is None:
                raise ValueError("a target is needed: it says how much each row counts")
            self.batches: Iterable[Batch] = [(features, target)]
            self.options = self.options._replace(sample_weight=sample_weight)
        else:
            if target is not None or sample_weight is not None:
                raise ValueError("batches bring their targets: (features, target[, sample_weight]) each")
            if iter(features) is features:
                raise TypeError(
                    "features must be a tensor, or something that can be gone through again and again (a "
                    "list of batches, a DataLoader); an iterator is empty after one pass"
                )
            self.batches = features
        self.in_memory, self._held = isinstance(features, Tensor), None
        self.rows_shape = features.shape if isinstance(features, Tensor) else None
        with torch.no_grad():
            self.scale = self._total_scale()
            if self.in_memory:
                self._held = list(self._fresh())

    # ── what it is ──

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Of the parameters, in the order of ``wrt``."""
        of = {"weight": self.weight.shape, "bias": None if self.bias is None else self.bias.shape}
        of["features"] = self.rows_shape
        return tuple(shape for shape in (of[name] for name in self.wrt) if shape is not None)

    @property
    def shape(self) -> tuple[int, int]:
        size = sum(shape.numel() for shape in self.shapes)
        return size, size

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def T(self) -> HeadOperator:
        """Itself: it is symmetric."""
        return self

    def __repr__(self) -> str:
        of = ", ".join(f"{name} {tuple(shape)}" for name, shape in zip(self.wrt, self.shapes, strict=True))
        return f"{type(self).__name__}({of}; {self.shape[0]} × {self.shape[1]})"

    # ── products ──

    @torch.no_grad()
    def __matmul__(self, v: Any) -> Any:
        """H v for one v, or many: answers in the shape that it was asked in.

        One: the parameter's shape; flat (P,); for several parameters a tuple of their shapes. Many, in one
        sweep: (K, *shape), or columns (P, K).
        """
        return self._each(v, self._products)

    def _each(self, v: Any, of: Callable[[list[tuple[Tensor, ...]]], list[list[Tensor]]]) -> Any:
        """A linear map of right-hand sides, some at once, answered in the shape that it was asked in."""
        sides, shape = self._sides(v)
        found: list[list[Tensor]] = []
        for start in range(0, len(sides), AT_ONCE):
            found += of(sides[start : start + AT_ONCE])
        return self._answered(found, v, shape)

    def _products(self, sides: list[tuple[Tensor, ...]]) -> list[list[Tensor]]:
        places = [PLACES[name] for name in self.wrt]
        wants = tuple(place in places for place in range(3))
        total: list[list[Tensor]] | None = None
        for curvature in self._curvatures():
            tangents = []
            for side in sides:
                along: list[Tensor | None] = [None, None, None]
                for place, v in zip(places, side, strict=True):
                    along[place] = v.reshape(-1, v.shape[-1]) if place == 0 else v
                tangents.append(tuple(along))
            with plain(self.device):
                products = curvature.products(tangents, wants)
            one = [[_present(product[place]) for place in places] for product in products]
            total = (
                one
                if total is None
                else [[a + b for a, b in zip(*r, strict=True)] for r in zip(total, one, strict=True)]
            )
        if total is None:
            return [[torch.zeros_like(v) for v in side] for side in sides]
        return total

    def _sides(self, v: Any) -> tuple[list[tuple[Tensor, ...]], str]:
        """Right-hand sides as tuples of the parameters' shapes, and how they were given."""
        shapes, size = self.shapes, self.shape[0]
        if isinstance(v, tuple | list):
            if len(v) != len(shapes) or any(a.shape != s for a, s in zip(v, shapes, strict=True)):
                raise ValueError(
                    f"a tuple must hold {', '.join(str(tuple(s)) for s in shapes)}; "
                    f"got {', '.join(str(tuple(a.shape)) for a in v)}"
                )
            sides, given = [tuple(v)], "tuple"
        elif not isinstance(v, Tensor):
            raise TypeError(
                f"the right-hand side must be a tensor, or a tuple of them; got {type(v).__name__}"
            )
        elif len(shapes) == 1 and v.shape == shapes[0]:
            sides, given = [(v,)], "one"
        elif v.shape == (size,):
            sides, given = [self._cut(v)], "flat"
        elif len(shapes) == 1 and v.shape[1:] == shapes[0]:
            sides, given = [(one,) for one in v], "many"
        elif v.dim() == 2 and v.shape[0] == size:
            sides, given = [self._cut(column) for column in v.t()], "columns"
        else:
            each = " or ".join(str(tuple(s)) for s in shapes[:1] * (len(shapes) == 1))
            raise ValueError(
                f"the right-hand side must have shape {each + ', ' if each else ''}({size},) or ({size}, K); "
                f"got {tuple(v.shape)}"
            )
        for side in sides[:1]:
            for one in side:
                if one.dtype != self.dtype:
                    raise TypeError(
                        f"the right-hand side is {one.dtype}, the head {self.dtype}: convert one of them"
                    )
        return sides, given

    def _cut(self, flat: Tensor) -> tuple[Tensor, ...]:
        parts = flat.split([shape.numel() for shape in self.shapes])
        return tuple(part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True))

    def _answered(self, found: list[list[Tensor]], v: Any, given: str) -> Any:
        shaped = [tuple(t.reshape(s) for t, s in zip(one, self.shapes, strict=True)) for one in found]
        if given == "tuple":
            return shaped[0]
        if given == "one":
            return shaped[0][0]
        if given == "many":
            return torch.stack([one for (one,) in shaped]) if shaped else torch.zeros_like(v)
        columns = [torch.cat([t.reshape(-1) for t in one]) for one in shaped]
        if given == "flat":
            return columns[0]
        return torch.stack(columns, dim=1) if columns else torch.zeros_like(v)

    # ── what is read off it ──

    @torch.no_grad()
    def diagonal(self) -> Any:
        """The exact diagonal, in the parameter's shape (a tuple of them for several)."""
        wants = tuple(name in self.wrt for name in PLACES)
        total: list[Tensor] | None = None
        for curvature in self._curvatures():
            with plain(self.device):
                found = curvature.diagonal(wants)
            one = [_present(found[PLACES[name]]).to(self.dtype) for name in self.wrt]
            total = one if total is None else [a + b for a, b in zip(total, one, strict=True)]
        shaped = tuple(
            torch.zeros(s, dtype=self.dtype, device=self.device) if total is None else total[i].reshape(s)
            for i, s in enumerate(self.shapes)
        )
        return shaped if len(shaped) > 1 else shaped[0]

    @torch.no_grad()
    def trace(self) -> Tensor:
        """The sum of the diagonal, a scalar; of weight and bias from one matrix product."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for curvature in self._curvatures():
            with plain(self.device):
                if "features" in self.wrt:
                    (dx, _, _) = curvature.diagonal((True, False, False))
                    total = total + _present(dx).to(total.dtype).sum()
                if set(self.wrt) - {"features"}:
                    each = curvature.logit_traces().to(total.dtype)
                    if "weight" in self.wrt:
                        total = total + (each * self._norms(curvature)).sum()
                    if "bias" in self.wrt:
                        total = total + each.sum()
        return total.to(self.dtype)

    @torch.no_grad()
    def block(self, index: int) -> Tensor:
        """A block of the diagonal: of class ``index`` (D, D), with its bias last where that is among ``wrt``
        (D + 1, D + 1); with respect to features alone, of row ``index`` (D, D)."""
        count = self.weight.shape[0]
        if self.wrt == ("features",):
            assert self.rows_shape is not None
            count = self.rows_shape[:-1].numel()
        if not 0 <= index < count:
            raise IndexError(f"block {index} is outside 0..{count - 1}")
        if self.wrt == ("features",):
            return self._feature_block(index)
        if "features" in self.wrt:
            raise ValueError("blocks are those of classes, or of rows with respect to features alone")
        total: Tensor | None = None
        for curvature in self._curvatures():
            with plain(self.device):
                h = curvature.class_diagonal(index)
            x = self._inputs(curvature)
            part = (x * h[:, None]).t() @ x
            total = part if total is None else total + part
        size = ("weight" in self.wrt) * self.weight.shape[1] + ("bias" in self.wrt)
        zero = torch.zeros(size, size, dtype=self.dtype, device=self.device)
        return zero if total is None else total.to(self.dtype)

    def _feature_block(self, row: int) -> Tensor:
        d = self.weight.shape[1]
        total = torch.zeros(d, d, dtype=self.dtype, device=self.device)
        for curvature in self._curvatures():
            rows = curvature.problem.targets.rows
            at = row if rows is None else int(torch.searchsorted(rows, row))
            if rows is None or (at < len(rows) and int(rows[at]) == row):
                with plain(self.device):
                    total = total + curvature.feature_block(at).to(self.dtype)
        return total

    def to_dense(self) -> Tensor:
        """(P, P), for small heads."""
        size = self.shape[0]
        if size**2 > LARGEST_DENSE:
            raise ValueError(f"{size} × {size} is too large for a dense matrix: use products, or to_scipy()")
        eye = torch.eye(size, dtype=self.dtype, device=self.device)
        columns = [self @ part for part in eye.split(AT_ONCE, dim=1)]
        return torch.cat(columns, dim=1) if columns else eye

    def to_scipy(self) -> LinearOperator:
        """A :class:`scipy.sparse.linalg.LinearOperator`, for ``eigsh``, ``cg`` and the like."""
        from scipy.sparse.linalg import LinearOperator

        def product(v: Any) -> Any:
            flat = torch.as_tensor(v, dtype=self.dtype, device=self.device)
            return (self @ flat).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(
            self.shape,
            matvec=lambda v: product(v.reshape(-1)),
            rmatvec=lambda v: product(v.reshape(-1)),
            matmat=product,
            rmatmat=product,
            dtype=dtype,
        )

    # ── where it comes from ──

    def _check_wrt(self, features: object) -> None:
        if (
            not self.wrt
            or len(set(self.wrt)) != len(self.wrt)
            or any(name not in PLACES for name in self.wrt)
        ):
            raise ValueError(f"wrt must name different ones of 'weight', 'bias', 'features'; got {self.wrt}")
        if "bias" in self.wrt and self.bias is None:
            raise ValueError("wrt names the bias, and there is none: pass bias")
        if "features" in self.wrt and not isinstance(features, Tensor):
            raise ValueError("with respect to features these must be one tensor, not batches")

    def _calls(self) -> Iterator[Call]:
        for batch in self.batches:
            x, target, *s = batch
            options = self.options._replace(sample_weight=s[0]) if s else self.options
            check_tensors(features=x)
            yield options.of_head(x.detach(), self.weight, self.bias, target)

    def _total_scale(self) -> float:
        """One over the divisor of all batches together."""
        if self.options.reduction == "sum" or self.options.denominator is not None:
            (scale, *_) = [float(call.reduction.scale(())) for call in self._calls()] or [1.0]
            return scale
        divisor = 0.0
        for call in self._calls():
            (part,) = call.parts
            scale = float(call.reduction.scale([(part.problem.targets, part.row_weight)]))
            empty = part.problem.targets.count == 0
            divisor += 0.0 if scale == 0.0 or empty else 1.0 / scale
        return 0.0 if divisor == 0.0 else 1.0 / divisor

    def _curvatures(self) -> Iterable[Curvature]:
        return self._fresh() if self._held is None else self._held

    def _fresh(self) -> Iterator[Curvature]:
        for number, call in enumerate(self._calls()):
            (part,) = call.parts
            problem = part.problem
            self._check_finite(problem, number)
            with plain(self.device):
                found = Curvature.of(problem, self.form, self.scale, part.row_weight, self.options.z_loss)
            yield from self._of(found)

    def _of(self, curvature: Curvature) -> Iterator[Curvature]:
        """What a batch of rows adds: one curvature, or several."""
        yield curvature

    def _check_finite(self, problem: Problem, batch: int) -> None:
        x, rows = problem.scores.tensors[0], problem.targets.rows
        assert x is not None
        good = (x if rows is None else x[rows]).isfinite().all(1)
        if not good.all():
            at = int(good.logical_not().nonzero()[0])
            row = at if rows is None else int(rows[at])
            where = (
                f"row {row}" if self._held is not None or self.in_memory else f"row {row} of batch {batch}"
            )
            raise ValueError(f"the features of {where} are not finite; leave it out with ignore_index")

    def _inputs(self, curvature: Curvature) -> Tensor:
        """Rows' inputs to the parameters, (M, D), (M, D + 1) or (M, 1)."""
        scores = curvature.problem.scores
        assert isinstance(scores, LinearHead)
        x = scores.load(curvature.problem.targets.pick(slice(0, curvature.problem.targets.count)))
        one = torch.ones_like(x[:, :1])
        return torch.cat([t for t, name in ((x, "weight"), (one, "bias")) if name in self.wrt], dim=1)

    def _norms(self, curvature: Curvature) -> Tensor:
        """‖x‖², (M,)."""
        scores = curvature.problem.scores
        assert isinstance(scores, LinearHead)
        norms = torch.linalg.vecdot(scores.x, scores.x)
        rows = curvature.problem.targets.rows
        return (norms if rows is None else norms[rows]).to(torch.float64)


class HeadHessian(HeadOperator):
    """The Hessian of a linear head's loss, as an operator.

    ``H @ v`` costs three matrix products where the budget holds the probabilities and tangents of a chunk of
    rows (five where not), each further right-hand side two; no (N, C) tensor is made.

    Args:
        features: (N, D) or (..., D), or batches ``(features, target[, sample_weight])`` of any number, in
            something that can be gone through again and again; these are read in every product.
        weight, bias: the head, (C, D) and (C,).
        target: as in :func:`xent.linear_cross_entropy`.
        wrt: ``"weight"``, ``"bias"``, ``"features"``, or several, whose parameters then lie in that order.
            With weight (or bias) and features together H is indefinite.
        reduction: ``"mean"`` or ``"sum"``. ``denominator`` replaces the mean's divisor.
        class_weight: (C,), ``weight`` of :func:`xent.linear_cross_entropy`.
        ignore_index, label_smoothing, sample_weight, z_loss, softcap, temperature, memory_budget: as there.

    Raises:
        ValueError: shapes that do not fit; features that are not finite, naming the row.
        TypeError: types that do not fit; an iterator in place of batches.
        IndexError: a target, or a block, that is none.

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
    """The generalised Gauss–Newton matrix of a linear head's loss: Σ Jacᵀ (γ·a·J + 2λγ·p pᵀ) Jac.

    Positive semidefinite where no mass is negative. Equal to :class:`HeadHessian` in weight, bias or features
    alone, but for z-loss (of which it keeps 2λ·p pᵀ) and softcap (whose second derivative it drops), and but
    for the cross term where they move together. Arguments and methods: as there.

    Example:
        >>> import torch, xent
        >>> x, w, y = torch.randn(32, 4), torch.randn(3, 4), torch.randint(3, (32,))
        >>> G = xent.curvature.HeadGGN(x, w, y, wrt=("weight", "features"))
        >>> bool(torch.linalg.eigvalsh(G.to_dense()).min() > -1e-6)
        True
    """

    form = Form.GAUSS_NEWTON


class HeadFisher(HeadOperator):
    """Fisher information of a linear head, in one of three senses that are not the same matrix.

    Args:
        kind: ``"type-2"``: the expectation over labels drawn from the model,
            γ·a·E_{y∼p}[(p − e_y)(p − e_y)ᵀ] ⊗ x xᵀ in closed form: the Gauss–Newton matrix.
            ``"monte-carlo"``: the same, estimated from ``samples`` labels drawn for each row.
            ``"empirical"``: outer products of the gradients at the targets given,
            γ·(a·p − t)(a·p − t)ᵀ ⊗ x xᵀ: a different matrix, which vanishes where the model is right.
        samples, generator: of ``"monte-carlo"``. Labels are drawn once, when the operator is made (for
            batches, in each pass, from the same seed).
        features, weight, target, ...: as in :class:`HeadHessian`; without ``z_loss``, which is no
            likelihood.

    Example:
        >>> import torch, xent
        >>> x, w, y = torch.randn(32, 4), torch.randn(3, 4), torch.randint(3, (32,))
        >>> xent.curvature.HeadFisher(x, w, y, kind="empirical").trace().item() > 0
        True
    """

    def __init__(
        self,
        features: Tensor | Iterable[Batch],
        weight: Tensor,
        target: Target = None,
        *,
        kind: Literal["type-2", "monte-carlo", "empirical"] = "type-2",
        samples: int = 1,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        if kind not in ("type-2", "monte-carlo", "empirical"):
            raise ValueError(f"kind must be 'type-2', 'monte-carlo' or 'empirical', got {kind!r}")
        if options.get("z_loss"):
            raise ValueError("the Fisher information is that of a likelihood: z_loss must be 0")
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        self.kind, self.samples = kind, samples
        self.form = Form.GAUSS_NEWTON if kind == "type-2" else Form.OUTER
        self._seed = int(torch.randint(1 << 62, (), generator=generator, device="cpu"))
        self._generator: torch.Generator | None = None
        super().__init__(features, weight, target, **options)

    def _fresh(self) -> Iterator[Curvature]:
        self._generator = torch.Generator(self.device).manual_seed(self._seed)
        yield from super()._fresh()

    def _of(self, curvature: Curvature) -> Iterator[Curvature]:
        if self.kind != "monte-carlo":
            yield curvature
            return
        problem, found = curvature.problem, curvature.found
        assert self._generator is not None
        with plain(self.device):
            drawn = sample(problem, found, self.samples, self._generator)
        weight = curvature.weight * found.a / self.samples
        for labels in drawn.unbind(1):
            targets = of_one_class(problem.targets, labels)
            yield Curvature(
                problem._replace(targets=targets),
                replace(found, a=torch.ones_like(found.a)),
                self.form,
                weight,
            )


def _present(t: Tensor | None) -> Tensor:
    assert t is not None
    return t
