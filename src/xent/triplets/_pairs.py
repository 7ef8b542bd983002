"""The loss of a data set by pair of true class and rival class.

    M[y, j] = Σ_n [y_n = y]·π_nj·CE_n        Σ_j M[y, j] + remainder[y] = Σ_n [y_n = y]·CE_n

Matrices of disjoint sets of rows add up: `a + b` is that of both sets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from xent._arguments.call import Call, resolve_logits
from xent._core.statistics import statistics_dtype
from xent._core.validators import valid
from xent._util import html
from xent._util.text import counted
from xent.triplets import _attribution_sweep
from xent.triplets._arguments import class_indices, eager_problem, report_options, resolve_plain_head
from xent.triplets._attribution import weighted_loss

MAX_DENSE_CLASSES = 4096  # a dense matrix of 128 MiB


class Pair(NamedTuple):
    """A true class, a rival class, and the loss of the pair.

    Example:
        >>> import torch, xent
        >>> xent.triplets.pair_matrix(torch.zeros(1, 2), torch.tensor([1])).largest(1)
        [Pair(true=1, rival=0, loss=0.6931471805599453, share=1.0)]
    """

    true: int  # the true class
    rival: int  # the rival class
    loss: float  # Σ π·ℓ over the rows of the pair, nats
    share: float  # the loss as a share of the loss of all pairs, 0..1


@dataclass(frozen=True, eq=False)
class PairMatrix:
    """The loss of each pair of true class and rival class; ``a + b`` joins disjoint sets of rows.

    Example:
        >>> import torch, xent
        >>> z = torch.tensor([[0.0, 2.0, 1.0], [0.0, 1.0, 0.0]])
        >>> pairs = xent.triplets.pair_matrix(z, torch.tensor([0, 1]))
        >>> pairs.matrix.shape, pairs.count.tolist()
        (torch.Size([3, 3]), [1, 1, 0])
    """

    matrix: Tensor  # (C, C) float64, [true, rival], nats summed over rows; dense, or coalesced sparse COO
    remainder: Tensor  # (C,) float64, nats, the loss of the rivals that a sparse matrix leaves out; else 0
    count: Tensor  # (C,) int64, the number of rows of each class

    @property
    def loss(self) -> Tensor:
        """The loss of each class summed over its rows, (C,) float64."""
        rows = self.matrix.sum(1)
        return (rows.to_dense() if rows.is_sparse else rows) + self.remainder

    def largest(self, k: int = 10) -> list[Pair]:
        """Return the k pairs with the largest loss, largest first; pairs without loss are left out.

        Args:
            k: the largest number of pairs.

        Returns:
            A list of :class:`Pair`.

        Example:
            >>> import torch, xent
            >>> z = torch.tensor([[0.0, 2.0, 1.0], [0.0, 1.0, 0.0]])
            >>> pair = xent.triplets.pair_matrix(z, torch.tensor([0, 1])).largest(1)[0]
            >>> pair.true, pair.rival, round(pair.share, 2)
            (0, 1, 0.59)
        """
        k = valid("k", k)
        if self.matrix.is_sparse:
            values, indices = self.matrix.values(), self.matrix.indices().T
        else:
            values = self.matrix.flatten()
            at = torch.arange(len(values), device=values.device)
            indices = torch.stack([at // len(self.count), at % len(self.count)], dim=1)
        all_loss = self.loss.sum()
        loss, order = values.topk(min(k, len(values)))
        shares = (loss / all_loss).tolist()
        return [
            Pair(y, j, nats, share)
            for (y, j), nats, share in zip(indices[order].tolist(), loss.tolist(), shares, strict=True)
            if nats > 0
        ]

    def _repr_html_(self) -> str:
        """Return the pairs with the largest loss as a table for a notebook.

        >>> import xent
        >>> found = xent.triplets.pair_matrix(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([0]))
        >>> "<tr><td>0</td><td>1</td><td>1.76</td><td>73.11 %</td></tr>" in found._repr_html_()
        True
        """
        return html.shown(self, (self.matrix, self.remainder, self.count), self._table)

    def _table(self) -> str:
        pairs = self.largest(html.MOST)
        values = self.matrix.values() if self.matrix.is_sparse else self.matrix
        nats, rows = self.loss.detach().sum().item(), int(self.count.sum())
        note = html.how_many(len(pairs), int((values > 0).sum()), "pair", "largest")
        return html.table(
            "Loss by pair of true class and rival class, in nats summed over rows",
            ("true class", "rival class", "loss", "share"),
            [(pair.true, pair.rival, pair.loss, f"{100 * pair.share:.4g} %") for pair in pairs],
            f"{note} All loss: {html.cell(nats)} nats in {counted(rows, 'row')}.",
        )

    def __add__(self, other: PairMatrix) -> PairMatrix:
        if not isinstance(other, PairMatrix):
            return NotImplemented
        kinds = [
            f"{'sparse' if m.is_sparse else 'dense'} {tuple(m.shape)}" for m in (self.matrix, other.matrix)
        ]
        if kinds[0] != kinds[1]:
            raise ValueError(
                "pair matrices add up over the same classes, both dense or both of top_k; "
                f"got {' and '.join(kinds)}"
            )
        matrix = self.matrix + other.matrix
        return PairMatrix(
            matrix.coalesce() if matrix.is_sparse else matrix,  # on CUDA the sum is not coalesced
            self.remainder + other.remainder,
            self.count + other.count,
        )


def pair_matrix(
    input: Tensor,
    target: Tensor,
    *,
    top_k: int | None = None,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    check_targets: bool | None = None,
) -> PairMatrix:
    r"""Return the loss of each pair of true class and rival class, summed over rows.

    The entry is ``M[y, j] = Σ_n [y_n = y]·π_nj·ℓ_n``, with π_nj the share of rival j in the loss ℓ_n of row n
    (:func:`attribution`). For a data set in batches, add the matrices of the batches.
    :doc:`/explanation/triplets` has the derivation.

    Args:
        input: logits, (C,), (N, C) or (N, C, d1, ...).
        target: class indices of any integer type, (), (N,) or (N, d1, ...).
        top_k: None for a dense matrix of all pairs. A number k for a sparse matrix of the k rivals with the
            largest shares of each row.
        ignore_index, softcap, temperature, check_targets: as in :func:`xent.cross_entropy`.

    Returns:
        A :class:`PairMatrix`, float64, without gradient.

    Raises:
        IndexError: a target outside 0..C−1; the message names row and value.
        ValueError: a dense matrix of more than 4,096 classes; else as :func:`xent.cross_entropy`.
        TypeError: a target that is not one class a row; else as :func:`xent.cross_entropy`.
        NotImplementedError: a call under transforms of ``torch.func``, in forward mode or in a compiled
            graph.

    Example:
        >>> import torch, xent
        >>> z, y = torch.randn(100, 10), torch.randint(10, (100,))
        >>> whole = xent.triplets.pair_matrix(z, y)
        >>> halves = xent.triplets.pair_matrix(z[:50], y[:50]) + xent.triplets.pair_matrix(z[50:], y[50:])
        >>> torch.allclose(halves.matrix, whole.matrix), int(whole.count.sum())
        (True, 100)
    """
    options = report_options(ignore_index, softcap, temperature, check_targets)
    return _pair_matrix(resolve_logits(options, input, class_indices(target)), top_k)


def linear_pair_matrix(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    top_k: int | None = None,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    check_targets: bool | None = None,
    product_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> PairMatrix:
    r"""Return the pair matrix of a linear classifier from its features, without storing the logits.

    Args:
        input, linear_weight, linear_bias: as in :func:`xent.linear_cross_entropy`.
        logit_scale, product_dtype: as in :func:`xent.linear_cross_entropy`.
        memory_budget: as in :func:`xent.linear_cross_entropy`; the matrix itself comes on top.
        target, top_k, ignore_index, softcap, temperature, check_targets: as in :func:`pair_matrix`.

    Returns:
        A :class:`PairMatrix`, as :func:`pair_matrix`.

    Raises:
        IndexError, ValueError, TypeError, NotImplementedError: as :func:`pair_matrix`.

    Example:
        >>> import torch, xent
        >>> x, w, y = torch.randn(64, 16), torch.randn(20_000, 16), torch.randint(20_000, (64,))
        >>> pairs = xent.triplets.linear_pair_matrix(x, w, y, top_k=5)
        >>> pairs.matrix.is_sparse, len(pairs.largest(3))
        (True, 3)
    """
    options = report_options(
        ignore_index, softcap, temperature, check_targets, product_dtype, memory_budget, logit_scale
    )
    return _pair_matrix(resolve_plain_head(options, input, linear_weight, linear_bias, target), top_k)


def _pair_matrix(call: Call, top_k: int | None) -> PairMatrix:
    classes = call.problems[0].targets.n_classes
    if top_k is None and classes > MAX_DENSE_CLASSES:
        raise ValueError(
            f"a dense matrix of {classes} classes takes {8 * classes**2 / 2**30:.1f} GiB; "
            f"with top_k each row's largest shares are kept, in a sparse one"
        )
    top_k = None if top_k is None else valid("top_k", top_k)
    result: PairMatrix | None = None
    for part in call.problems:
        problem = eager_problem(part)
        if problem.selection.mask is not None:
            raise NotImplementedError("under vmap rows cannot be gathered by class: call this outside of it")
        with torch.no_grad():
            if top_k is None:
                matrix, count = _attribution_sweep.pair_losses(problem)
                pairs = PairMatrix(matrix, torch.zeros_like(matrix[0]), count)
            else:
                pairs = _sparse(
                    _attribution_sweep.attribution(problem, min(top_k, classes - 1)),
                    problem.targets.index,
                    classes,
                )
        result = pairs if result is None else result + pairs
    assert result is not None
    return result


def _sparse(rows: _attribution_sweep.PartialSums, own: Tensor | None, classes: int) -> PairMatrix:
    assert own is not None
    unmasked = rows.classes >= 0
    indices = torch.stack([own.expand_as(rows.classes)[unmasked], rows.classes[unmasked]])
    losses = weighted_loss(rows.shares, rows.loss[:, None])[unmasked]
    matrix = torch.sparse_coo_tensor(
        indices, losses, (classes, classes), device=losses.device, check_invariants=True
    )
    y = own[:, 0]
    remainder = torch.zeros(classes, dtype=statistics_dtype(own.device), device=own.device)
    remainder.index_add_(0, y, weighted_loss(rows.remainder, rows.loss))
    return PairMatrix(matrix.coalesce(), remainder, torch.bincount(y, minlength=classes))
