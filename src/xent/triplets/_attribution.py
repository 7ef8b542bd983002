"""The exact decomposition of a row's cross-entropy by rival class.

    CE = Σ_{j≠y} π_j·softplus(m_j − log π_j)        π = softmax over the rivals alone

Each term is π_j·CE, so π_j is the share of rival j in the row's loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xent._arguments.call import Call, resolve_logits
from xent._core.logits import compute_dtype
from xent._core.validators import valid
from xent._util import html
from xent.triplets import _attribution_sweep
from xent.triplets._arguments import (
    class_indices,
    join_parts,
    report_options,
    report_rows,
    resolve_plain_head,
)


class Attribution(NamedTuple):
    """The decomposition of each row's cross-entropy by rival class: ``losses.sum(-1) + remainder == loss``.

    Example:
        >>> import torch, xent
        >>> found = xent.triplets.attribution(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([0]), 1)
        >>> found.classes.item(), round(found.shares.item(), 6)
        (1, 0.731059)
    """

    classes: Tensor  # (..., k) int64, the rivals with the largest shares, largest first; −1 if masked
    shares: Tensor  # (..., k) π_j, in 0..1
    losses: Tensor  # (..., k) π_j·ℓ, nats
    remainder: Tensor  # (...) the loss of all other rivals, nats
    loss: Tensor  # (...) ℓ, the cross-entropy, nats

    def _repr_html_(self) -> str:
        """Return the rivals of the first rows as a table for a notebook.

        >>> import xent
        >>> found = xent.triplets.attribution(torch.tensor([[0.0, 2.0, 1.0, -3.0]]), torch.tensor([0]), 2)
        >>> "<td>1: 1.755 (73 %)</td>" in found._repr_html_()
        True
        """
        return html.shown(self, self, self._table)

    def _table(self) -> str:
        classes, shares, losses = (html.first_rows(each) for each in (self.classes, self.shares, self.losses))
        columns: dict[str, list[object]] = {"loss": html.first(self.loss)}
        names = ("first", "second", "third", "fourth", "fifth")[: classes.shape[1]]
        for k, name in enumerate(names):
            columns[f"{name} rival"] = [
                None if rival < 0 else f"{rival}: {html.cell(nats)} ({100 * share:.0f} %)"
                for rival, share, nats in zip(
                    classes[:, k].tolist(), shares[:, k].tolist(), losses[:, k].tolist(), strict=True
                )
            ]
        remainder = self.remainder.detach().reshape(-1)[: html.MOST]
        columns["other rivals"] = html.first(remainder + losses[:, len(names) :].sum(1))
        caption = "What rival classes carry of each row's cross-entropy: class, nats, percent of the row"
        return html.table_by_row(caption, self.loss.shape, columns)


def attribution(
    input: Tensor,
    target: Tensor,
    top_k: int = 5,
    *,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    check_targets: bool | None = None,
) -> Attribution:
    r"""Return the k rivals with the largest shares of each row's cross-entropy, and the loss of the others.

    A rival is any class other than the target class. The cross-entropy ℓ of a row is the sum of ``π_j·ℓ``
    over its rivals j, with π the softmax over the rivals alone; :doc:`/explanation/triplets` has the
    derivation.

    Args:
        input: logits, (C,), (N, C) or (N, C, d1, ...).
        target: class indices of any integer type, (), (N,) or (N, d1, ...).
        top_k: k, the number of rivals to return; at most C − 1 are returned.
        ignore_index, softcap, temperature, check_targets: as in :func:`xent.cross_entropy`.

    Returns:
        An :class:`Attribution`, without gradient, float32 or float64. Ignored rows, and rivals masked by
        −inf, have shares and losses of 0 and the class −1.

    Raises:
        IndexError: a target outside 0..C−1; the message names row and value.
        ValueError, TypeError: as :func:`xent.cross_entropy`; also a target that is not one class a row.
        NotImplementedError: a call under ``torch.func.grad``, in forward mode or in a compiled graph.

    Example:
        >>> import torch, xent
        >>> z, y = torch.tensor([[0.0, 2.0, 1.0, -3.0]]), torch.tensor([0])
        >>> found = xent.triplets.attribution(z, y, 2)
        >>> found.classes, found.shares
        (tensor([[1, 2]]), tensor([[0.7275, 0.2676]]))
        >>> bool(torch.isclose(found.losses.sum() + found.remainder, xent.cross_entropy(z, y)))
        True
    """
    options = report_options(ignore_index, softcap, temperature, check_targets)
    return _attribution(resolve_logits(options, input, class_indices(target)), top_k)


def linear_attribution(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    top_k: int = 5,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    check_targets: bool | None = None,
    product_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> Attribution:
    r"""Return the attribution of a linear classifier's cross-entropy from its features, without storing the
    logits.

    Args:
        input, linear_weight, linear_bias: as in :func:`xent.linear_cross_entropy`.
        logit_scale, product_dtype, memory_budget: as in :func:`xent.linear_cross_entropy`.
        target, top_k, ignore_index, softcap, temperature, check_targets: as in :func:`attribution`.

    Returns:
        An :class:`Attribution`, as :func:`attribution`.

    Raises:
        IndexError, ValueError, TypeError, NotImplementedError: as :func:`attribution`.

    Example:
        >>> import torch, xent
        >>> x, w, y = torch.randn(8, 16), torch.randn(1000, 16), torch.randint(1000, (8,))
        >>> found = xent.triplets.linear_attribution(x, w, y, 3)
        >>> found.classes.shape, found.loss.shape
        (torch.Size([8, 3]), torch.Size([8]))
    """
    options = report_options(
        ignore_index, softcap, temperature, check_targets, product_dtype, memory_budget, logit_scale
    )
    return _attribution(resolve_plain_head(options, input, linear_weight, linear_bias, target), top_k)


def _attribution(call: Call, top_k: int) -> Attribution:
    top_k = valid("top_k", top_k)
    dtype = compute_dtype(call.dtype)
    k = min(top_k, call.problems[0].targets.n_classes - 1)
    parts = report_rows(call, lambda problem: _attribution_sweep.attribution(problem, k))
    classes, shares, remainder, loss = (join_parts(call, columns) for columns in zip(*parts, strict=True))
    return Attribution(
        classes=classes,
        shares=shares.to(dtype),
        losses=weighted_loss(shares, loss[..., None]).to(dtype),
        remainder=weighted_loss(remainder, loss).to(dtype),
        loss=loss.to(dtype),
    )


def weighted_loss(share: Tensor, loss: Tensor) -> Tensor:
    """Return π·CE: 0 where π = 0 even if the loss is infinite, nan where the loss is nan."""
    return torch.where((share == 0) & ~loss.isnan(), 0.0, share * loss)
