"""Which rivals carry a row's loss: an exact decomposition, not a bound.

    CE = Σ_{j≠y} π_j·softplus(m_j − log π_j)        π = softmax over the rivals alone

Each term is π_j·CE, so the share of rival j in the row's loss is π_j.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xent._arguments.call import Call, Options
from xent._core.logits import compute_dtype
from xent._core.validators import valid
from xent.triplets import _attribution_sweep
from xent.triplets._arguments import described, one_class


class Attribution(NamedTuple):
    """Each row's loss, taken apart: ``losses.sum(-1) + remainder`` is ``loss``."""

    classes: Tensor  # (..., k) int64, the rivals with the largest shares, largest first; −1 for none
    shares: Tensor  # (..., k) π_j, in 0..1
    losses: Tensor  # (..., k) π_j·CE, nats
    remainder: Tensor  # (...) what the other rivals carry, nats
    loss: Tensor  # (...) cross-entropy, nats


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
    r"""The k rivals that carry most of each row's cross-entropy, their shares, and what is left.

    Formula: mathematics page, §6.

    Args:
        input: logits, (C,), (N, C) or (N, C, d1, ...).
        target: class indices of any integer type, (), (N,) or (N, d1, ...).
        top_k: how many rivals; where there are fewer than that, k = C − 1.
        ignore_index, softcap, temperature, check_targets: as in :func:`xent.cross_entropy`.

    Returns:
        :class:`Attribution`, without gradient: float32 or float64, zeros and classes −1 in rows that are
        ignored and for rivals that are masked by −inf.

    Raises:
        IndexError: a target outside 0..C−1, naming row and value.
        ValueError, TypeError: as :func:`xent.cross_entropy`; a target that is not one class a row.
        NotImplementedError: under ``torch.func.grad``, in forward mode, in a graph.

    Example:
        >>> import torch, xent
        >>> z, y = torch.tensor([[0.0, 2.0, 1.0, -3.0]]), torch.tensor([0])
        >>> found = xent.triplets.attribution(z, y, 2)
        >>> found.classes, found.shares
        (tensor([[1, 2]]), tensor([[0.7275, 0.2676]]))
        >>> bool(torch.isclose(found.losses.sum() + found.remainder, xent.cross_entropy(z, y)))
        True
    """
    one_class(target)
    options = Options.of(
        ignore_index=ignore_index,
        reduction="none",
        softcap=softcap,
        temperature=temperature,
        check_targets=check_targets,
    )
    return _attribution(options.of_logits(input, target), top_k)


def linear_attribution(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    top_k: int = 5,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    check_targets: bool | None = None,
    product_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> Attribution:
    r"""The attribution of a linear head, straight from features, streaming over the classes.

    Args:
        input, linear_weight, linear_bias, product_dtype, memory_budget: as in
            :func:`xent.linear_cross_entropy`.
        target, top_k, ignore_index, softcap, temperature, check_targets: as in :func:`attribution`.

    Returns:
        :class:`Attribution`, as :func:`attribution`.

    Raises:
        IndexError, ValueError, TypeError, NotImplementedError: as :func:`attribution`.

    Example:
        >>> import torch, xent
        >>> x, w, y = torch.randn(8, 16), torch.randn(1000, 16), torch.randint(1000, (8,))
        >>> found = xent.triplets.linear_attribution(x, w, y, 3)
        >>> found.classes.shape, found.loss.shape
        (torch.Size([8, 3]), torch.Size([8]))
    """
    one_class(target)
    options = Options.of(
        ignore_index=ignore_index,
        reduction="none",
        softcap=softcap,
        temperature=temperature,
        check_targets=check_targets,
        product_dtype=product_dtype,
        memory_budget=memory_budget,
    )
    return _attribution(options.of_head(input, linear_weight, linear_bias, target), top_k)


def _attribution(call: Call, top_k: int) -> Attribution:
    top_k = valid("top_k", top_k)
    dtype = compute_dtype(call.dtype)
    k = min(top_k, call.parts[0].problem.targets.classes - 1)
    found = described(call, lambda problem: _attribution_sweep.attribution(problem, k))
    classes, shares, remainder, loss = (
        parts[0] if len(found) == 1 else torch.stack(parts, dim=1)
        for parts in map(list, zip(*found, strict=True))
    )
    wide = (*call.rows_shape, k)
    losses = carried(shares, loss[..., None])
    return Attribution(
        classes=classes.reshape(wide),
        shares=shares.to(dtype).reshape(wide),
        losses=losses.to(dtype).reshape(wide),
        remainder=carried(remainder, loss).to(dtype).reshape(call.rows_shape),
        loss=loss.to(dtype).reshape(call.rows_shape),
    )


def carried(share: Tensor, loss: Tensor) -> Tensor:
    """π·CE. Select: a rival without a share carries nothing, be the loss infinite; nan is no 0."""
    return torch.where((share == 0) & ~loss.isnan(), 0.0, share * loss)
