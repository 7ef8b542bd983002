"""The Hessian of the objective, summed over chunks of rows and over the ranks that hold them.

    H v = Σ_i H_i v      diag H = Σ_i diag H_i      A = Σ_i A_i,  G = Σ_i G_i      i: a chunk of a rank

Products, diagonal, blocks and the sums that Kronecker factors are made of add up over rows. Few rows are
standardised once and are one chunk, whose operator is kept while the point stays; of more an operator is made
for each chunk, each time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from xent._processes.leader import Leader
from xent.curvature._heads import HeadHessian
from xent.curvature._kronecker import HeadKronecker
from xent.data.rows import ArrayRows, BatchRows, RowSource, StandardisedRows
from xent.data.sparse_rows import SparseBatch
from xent.linear_model.labelled_rows import LabelledRows
from xent.linear_model.sparse_hessian import SparseHessian

KEPT = 1 << 27
"""Bytes of standardised features that are kept, at most."""


class HessianSums:
    """Sums over the rows of all ranks, at a point to which ``move`` leads; every rank makes one.

    Args:
        rows: makes the rows as the solver sees them, standardised; called when a Hessian is first needed.
        shape: (K, D + 1) of theta.
        binary: whether theta is one vector, the logits being (0, s).
        fit_intercept: whether the last column of theta counts.
        total: the divisor of the mean over all rows.
    """

    def __init__(
        self,
        rows: Callable[[], LabelledRows],
        shape: tuple[int, int],
        binary: bool,
        fit_intercept: bool,
        total: float,
        leader: Leader,
    ) -> None:
        self._make_rows, self._shape, self._binary, self._total = rows, shape, binary, total
        self._fit_intercept = fit_intercept
        self._rows: LabelledRows | None = None
        self._head: dict[str, Any] = {}
        self._operator: SummedHessian | None = None
        self._moves = 0
        self._kept: list[HeadHessian | SparseHessian] | None = None
        self.move = leader.register(self._move)
        self.product = leader.register(lambda v: self._sum(h @ self.tensor(v) for h in self._each()))
        self.diagonal = leader.register(lambda _: self._sum(h.diagonal() for h in self._each()))
        self.block = leader.register(lambda c: self._sum(h.block(int(c[0])) for h in self._each()))
        self.factors = leader.register(self._factors)

    def forget(self) -> None:
        """Remove the rows as they were standardised, for the scale has changed, and what was made of them."""
        self._rows = self._kept = self._operator = None
        self._moves += 1

    def at(self, theta: np.ndarray) -> SummedHessian:
        """Return the Hessian at theta, in the solver's variables; it answers until the next is asked for."""
        self.move(theta)
        if self._operator is None:
            no_rows = self.tensor(np.empty((0, self._shape[1] - 1)))
            no_target = torch.empty(0, dtype=torch.int64, device=no_rows.device)
            self._operator = SummedHessian(no_rows, target=no_target, **self._head)
        self._moves += 1
        return self._operator.bound(self, self._moves, **self._head)

    def check_here(self, moves: int) -> None:
        """Raise ``RuntimeError`` if this is another point than that of an operator."""
        if moves != self._moves:
            raise RuntimeError("this Hessian is that of an earlier point: ask the objective for another")

    def tensor(self, array: np.ndarray) -> Tensor:
        """Return an array as a tensor in the features' type."""
        return torch.from_numpy(array.astype(self._labelled.source.dtype)).to(self._labelled.device)

    @property
    def _labelled(self) -> LabelledRows:
        if self._rows is None:
            self._rows = self._make_rows()
        return self._rows

    def _move(self, theta: np.ndarray) -> np.ndarray:
        at = self.tensor(theta).reshape(self._shape)
        if self._binary:
            at = torch.cat([torch.zeros_like(at), at])
        self._head = {
            "weight": at[:, :-1].contiguous(),
            "bias": at[:, -1].contiguous() if self._fit_intercept else None,
            "wrt": ("weight", "bias") if self._fit_intercept else ("weight",),
            "denominator": self._total,
        }
        self._kept = list(self._made()) if self._labelled.source.in_memory else None
        return np.empty(0)

    def _each(self) -> Iterable[HeadHessian | SparseHessian]:
        """Return the operator of each chunk."""
        return self._made() if self._kept is None else self._kept

    def _made(self) -> Iterator[HeadHessian | SparseHessian]:
        for x, target, weight in self._labelled.chunks():
            about = {"target": target, "sample_weight": weight, **self._head}
            yield SparseHessian(x, **about) if isinstance(x, SparseBatch) else HeadHessian(x[:], **about)

    def _factors(self, _: np.ndarray) -> np.ndarray:
        """Return Σ γ·tr M·x̃ x̃ᵀ, Σ γ·M and Σ γ, flat."""

        def sums() -> Iterator[tuple[Tensor, ...]]:
            for x, target, weight in self._labelled.chunks():
                about = {"target": target, "sample_weight": weight, **self._head}
                if isinstance(x, SparseBatch):
                    yield SparseHessian(x, **about).factor_sums()
                    continue
                k = HeadKronecker(x[:], weighting="curvature", **about)
                curved = k.G * k.total
                total = torch.tensor(k.total, dtype=torch.float64, device=curved.device)
                yield (k.A * curved.trace()).double(), curved.double(), total

        return self._sum(sums())

    @staticmethod
    def _sum(parts: Iterable[Tensor | tuple[Tensor, ...]]) -> np.ndarray:
        """Return Σ parts, flat; several in float64."""
        total: np.ndarray | None = None
        for part in parts:
            flat = _flat(part).cpu().numpy()
            total = flat if total is None else np.add(total, flat, dtype=np.float64)
        assert total is not None  # there is always a chunk
        return total


def standardised(source: RowSource, mean: np.ndarray, scale: np.ndarray) -> RowSource:
    """Return (x − mean)/scale for the rows of a source: kept where they are few, else a batch at a time."""
    made = StandardisedRows(source, mean, scale)
    if source.shape[0] * source.width * source.dtype.itemsize > KEPT:
        return made
    parts = [batch for _, batch in made.batches()]
    if not parts:
        return ArrayRows(torch.empty((0, source.shape[1]), dtype=getattr(torch, source.dtype.name)))
    return BatchRows(parts[0].joined(parts[1:]), source)


class Factors(NamedTuple):
    """The factors of ``HeadKronecker``, Γ·G ⊗ A, without its rows."""

    A: Tensor  # (D̃, D̃)
    G: Tensor  # (C, C)
    total: float  # Γ


class SummedHessian(HeadHessian):
    """The Hessian over all rows: an operator on no rows of its own, whose answers are sums."""

    _all: HessianSums
    _moves: int
    _at: tuple[Tensor, Tensor | None] | None = None

    def bound(self, sums: HessianSums, moves: int, weight: Tensor, bias: Tensor | None, **_: Any) -> Self:
        """Return the operator at the point to which the sums have been moved."""
        made = copy.copy(self)
        made._all, made._moves, made._at = sums, moves, (weight, bias)
        return made

    @property
    def weight(self) -> Tensor:
        """V at the point, (C, D)."""
        return super().weight if self._at is None else self._at[0]

    @property
    def bias(self) -> Tensor | None:
        """c at the point, (C,), None without an intercept."""
        return super().bias if self._at is None else self._at[1]

    @property
    def _sums(self) -> HessianSums:
        self._all.check_here(self._moves)
        return self._all

    def _products(self, stacks: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found = []
        for side in zip(*stacks, strict=True):
            product = self._sums.product(_flat(side).double().cpu().numpy())
            found.append(self._cut(self._all.tensor(product)))
        return tuple(torch.stack(parts) for parts in zip(*found, strict=True))

    def diagonal(self) -> Any:
        """Return the diagonal, in the parameter's shape (a tuple of them for several)."""
        parts = self._cut(self._all.tensor(self._sums.diagonal(np.empty(0))))
        return parts if len(parts) > 1 else parts[0]

    def trace(self) -> Tensor:
        """Return the sum of the diagonal, a scalar."""
        return self._all.tensor(self._sums.diagonal(np.empty(0))).sum()

    def block(self, index: int) -> Tensor:
        """Return the block of a class, (D̃, D̃), with its bias last."""
        index = self._index(index, self.weight.shape[0])
        found = self._all.tensor(self._sums.block(np.array([index], dtype=np.float64)))
        return found.reshape(self._side, self._side)

    def kronecker(self) -> Factors:
        """Return the Kronecker factors over all rows, these counted by their curvature."""
        sums = self._sums.factors(np.empty(0))
        a, g = self._side, self.weight.shape[0]
        curved, total = sums[a * a : -1].reshape(g, g), float(sums[-1])
        counted = float(np.trace(curved))
        tensor = self._all.tensor
        return Factors(
            tensor(sums[: a * a].reshape(a, a) / (counted or 1.0)), tensor(curved / (total or 1.0)), total
        )

    @property
    def _side(self) -> int:  # D̃
        return self.weight.shape[1] + len(self.wrt) - 1


def _flat(parts: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return tensors, or one, as one flat tensor."""
    return torch.cat([part.reshape(-1) for part in (parts if isinstance(parts, tuple) else (parts,))])
