"""Triplet losses between a row and the class vectors, for training: from logits, or from features.

    triplet        (1/(K+1)) Σ_j max(m_j + margin, 0)
    smooth         (1/(K+1)) Σ_j softplus(m_j + margin)        m_j = z_j − z_y over K negatives

Over all negatives with margin log C they equal the lower bounds `hinge` and `smooth` of `bounds`.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from xent._arguments.call import Call, resolve_logits
from xent._arguments.options import Options
from xent._autograd import transforms
from xent._core.class_indices import holds_integers, widened
from xent._core.logits import DenseLogits, LinearHead
from xent._core.problem import Problem
from xent._core.validators import GeometryName, ReductionName, Whole, valid
from xent.triplets import _tiles
from xent.triplets._arguments import class_indices, no_autocast, resolve_plain_head, scatter_rows
from xent.triplets._forms import Form, in_geometry, softplus

Negatives: TypeAlias = Literal["all"] | int | Tensor


def triplet_loss(
    input: Tensor,
    target: Tensor,
    *,
    margin: float = 1.0,
    negatives: Negatives = "all",
    ignore_index: int | None = -100,
    reduction: ReductionName = "mean",
    sample_weight: Tensor | None = None,
    check_targets: bool | None = None,
) -> Tensor:
    r"""Return the triplet loss of logits over K negatives of each row.

    The loss of a row is ``(1/(K+1)) Σ_j max(m_j + margin, 0)``, with ``m_j = z_j − z_y`` the margin of
    negative j over the target class y. It is differentiable under autograd, ``torch.func`` and forward mode.
    Over all negatives with margin log C it is the field ``hinge`` of :func:`bounds`, a lower bound on
    cross-entropy. Source: Schroff et al., "FaceNet", 2015.

    Args:
        input: logits z, (C,), (N, C) or (N, C, d1, ...).
        target: class indices of any integer type, (), (N,) or (N, d1, ...).
        margin: the distance by which each negative's logit must stay below the target's, in nats.
        negatives: ``"all"`` for the C − 1 other classes; a number k for the k hardest of each row (at most C
            − 1); or sampled negatives, class indices (N, k) or (N, d1, ..., k). A sample that equals the
            row's target is left out, and the row's K is then smaller.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. The mean divides by Σ ``sample_weight`` over the rows
            that are not ignored, and is 0 over no rows.
        ignore_index, sample_weight, check_targets: as in :func:`xent.cross_entropy`.

    Returns:
        A scalar, or for ``"none"`` a tensor of the shape of the target, of the type of ``input`` (float32
        under autocast).

    Raises:
        IndexError: a target or a sampled negative outside 0..C−1; the message names place and value.
        ValueError: shapes or option values that do not fit together.
        TypeError: types that do not fit together; a target that is not one class a row.

    Example:
        >>> import torch, xent
        >>> z, y = torch.tensor([[3.0, 2.5, 1.0]]), torch.tensor([0])
        >>> xent.triplets.triplet_loss(z, y).item()  # (0.5 + 0)/3
        0.1666666716337204
    """
    options = _options(ignore_index, reduction, sample_weight, check_targets)
    return _loss(resolve_logits(options, input, class_indices(target)), _hinge(margin), negatives)


def smooth_triplet_loss(
    input: Tensor,
    target: Tensor,
    *,
    margin: float | None = None,
    negatives: Negatives = "all",
    ignore_index: int | None = -100,
    reduction: ReductionName = "mean",
    sample_weight: Tensor | None = None,
    check_targets: bool | None = None,
) -> Tensor:
    r"""Return the smooth triplet loss of logits over K negatives of each row.

    The loss of a row is ``(1/(K+1)) Σ_j softplus(m_j + margin)``, with ``m_j = z_j − z_y`` and
    ``softplus(u) = log(1 + exp(u))``. It is :func:`triplet_loss` with softplus in place of the hinge. Over
    all negatives it is the field ``smooth`` of :func:`bounds`. Over one negative, with margin 0, it is half
    the logistic loss of the difference of the two logits.

    Args:
        margin: as in :func:`triplet_loss`. None means log(K + 1), with which the loss is a lower bound on the
            cross-entropy over the target class and the K negatives.
        input, target, negatives, ignore_index: as in :func:`triplet_loss`.
        reduction, sample_weight, check_targets: as in :func:`triplet_loss`.

    Returns:
        A scalar or a tensor, as :func:`triplet_loss`.

    Raises:
        IndexError, ValueError, TypeError: as :func:`triplet_loss`.

    Example:
        >>> import torch, xent
        >>> z, y = torch.zeros(1, 10), torch.tensor([3])
        >>> round(xent.triplets.smooth_triplet_loss(z, y).item(), 6)  # of a cross-entropy of 2.302585
        2.158106
    """
    options = _options(ignore_index, reduction, sample_weight, check_targets)
    return _loss(resolve_logits(options, input, class_indices(target)), _smooth(margin), negatives)


def linear_triplet_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    geometry: GeometryName = "inner",
    margin: float = 1.0,
    negatives: Negatives = "all",
    ignore_index: int | None = -100,
    reduction: ReductionName = "mean",
    sample_weight: Tensor | None = None,
    check_targets: bool | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    r"""Return the triplet loss of a linear classifier from its features, without storing the scores.

    The value is :func:`triplet_loss` of the scores that ``geometry`` makes of features and class vectors.
    Each tile of rows × classes is computed again in the backward pass, so that loss and gradients cost four
    matrix products. A second derivative through ``create_graph`` stores every tile, as much memory as the
    logits. So do transforms of ``torch.func``, forward mode and compiled graphs.

    Args:
        input: features x, (..., D).
        linear_weight: W, (C, D), or (C, d1, ..., D): the class vectors w.
        target: class indices of any integer type, (..., d1, ...).
        linear_bias: b, (C,), or (C, d1, ...), added to the scores.
        geometry: the score of a row and a class: ``"inner"`` is ⟨x, w⟩, ``"cosine"`` the cosine of the angle
            between x and w, ``"squared_l2"`` is −‖x − w‖². The last one ranks the classes as ``"inner"`` does
            where all ‖w‖ are equal, or where ``"inner"`` has the bias −‖w‖²/2; its margins are then twice as
            large.
        negatives: as in :func:`triplet_loss`. The class vectors of k hardest or sampled negatives are
            gathered for a block of rows at a time.
        margin, ignore_index, reduction, sample_weight, check_targets: as in :func:`triplet_loss`.
        memory_budget: bytes of working memory, beside inputs, gradients and O(N·D); 64 MiB by default.

    Returns:
        A scalar or a tensor, as :func:`triplet_loss`.

    Raises:
        IndexError, ValueError, TypeError: as :func:`triplet_loss`.

    Example:
        >>> import torch, xent
        >>> x, prototypes = torch.randn(8, 16), torch.randn(1000, 16, requires_grad=True)
        >>> loss = xent.triplets.linear_triplet_loss(
        ...     x, prototypes, torch.randint(1000, (8,)), geometry="cosine", margin=0.2, negatives=10
        ... )
        >>> loss.backward()
    """
    options = _options(ignore_index, reduction, sample_weight, check_targets, memory_budget, geometry)
    call = resolve_plain_head(options, input, linear_weight, linear_bias, target)
    return _loss(call, _hinge(margin), negatives, geometry)


def linear_smooth_triplet_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    geometry: GeometryName = "inner",
    margin: float | None = None,
    negatives: Negatives = "all",
    ignore_index: int | None = -100,
    reduction: ReductionName = "mean",
    sample_weight: Tensor | None = None,
    check_targets: bool | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    r"""Return the smooth triplet loss of a linear classifier from its features, without storing the scores.

    Args:
        input, linear_weight, target, linear_bias: as in :func:`linear_triplet_loss`.
        geometry, negatives, memory_budget: as in :func:`linear_triplet_loss`.
        margin: as in :func:`smooth_triplet_loss`.
        ignore_index, reduction, sample_weight, check_targets: as in :func:`triplet_loss`.

    Returns:
        A scalar or a tensor, as :func:`triplet_loss`.

    Raises:
        IndexError, ValueError, TypeError: as :func:`triplet_loss`.

    Example:
        >>> import torch, xent
        >>> x, w, y = torch.randn(8, 16), torch.randn(1000, 16), torch.randint(1000, (8,))
        >>> loss = xent.triplets.linear_smooth_triplet_loss(x, w, y)
        >>> bool(loss <= xent.linear_cross_entropy(x, w, y))
        True
    """
    options = _options(ignore_index, reduction, sample_weight, check_targets, memory_budget, geometry)
    call = resolve_plain_head(options, input, linear_weight, linear_bias, target)
    return _loss(call, _smooth(margin), negatives, geometry)


def _options(
    ignore_index: int | None,
    reduction: ReductionName,
    sample_weight: Tensor | None,
    check_targets: bool | None,
    memory_budget: int | None = None,
    geometry: GeometryName = "inner",
) -> Options:
    """Validate the options of a triplet loss; the order is that of the public signatures."""
    return Options.of(
        ignore_index=ignore_index,
        reduction=reduction,
        sample_weight=sample_weight,
        check_targets=check_targets,
        memory_budget=memory_budget,
        normalize=valid("geometry", geometry) == "cosine",
    )


def _hinge(margin: float) -> Form:
    return Form(F.relu, valid("margin", margin))


def _smooth(margin: float | None) -> Form:
    return Form(softplus, None if margin is None else valid("margin", margin))


def _loss(call: Call, form: Form, negatives: Negatives, geometry: GeometryName = "inner") -> Tensor:
    parts, reduction = call.problems, call.reduction
    by_part = _negatives_by_part(transforms.thawed(negatives), call)
    with no_autocast(parts[0].logits.device):
        values = [_row_losses(part, form, k, geometry) for part, k in zip(parts, by_part, strict=True)]
        if reduction.kind == "none":
            return call.stack([scatter_rows(part, value) for part, value in zip(parts, values, strict=True)])
        scale = reduction.scale(call.problems)
        return reduction.total(torch.cat(values), scale).to(call.dtype)


def _row_losses(problem: Problem, form: Form, negatives: int | Tensor, geometry: str) -> Tensor:
    """Return the weighted loss of each of the M rows, float64."""
    logits, targets = problem.logits, problem.targets
    assert targets.index is not None
    assert isinstance(logits, DenseLogits | LinearHead)
    if problem.in_graph and problem.selection.mask is not None:
        logits = logits.select(problem.selection.mask)
    if isinstance(negatives, Tensor) and targets.selection.index is not None:
        negatives = negatives[targets.selection.index]
    first, *others = (t if t is None else t.to(logits.dtype) for t in logits.leaves)
    assert first is not None
    first = first if targets.selection.index is None else first[targets.selection.index]
    if isinstance(logits, DenseLogits):
        loss, count = form.sum_over_negatives(first, targets.index, negatives)
    else:
        w, b = others
        assert w is not None
        x, w, b = in_geometry(geometry, first, w, b)
        # torch's transforms do not allow a checkpoint
        if problem.in_graph or problem.selection.mask is not None or transforms.transformed(x, w, b):
            loss, count = form.sum_over_negatives(F.linear(x, w, b), targets.index, negatives)
        else:
            head = LinearHead(x, w, b)
            loss, count = _tiles.sum_over_negatives(head, targets, negatives, form, problem.budget)
    value = problem.selection.masked(loss / (count + 1))
    return value if problem.row_weight is None else value * problem.row_weight


def _negatives_by_part(negatives: Negatives, call: Call) -> list[int | Tensor]:
    """Return for each part the number of hardest negatives, or the sampled ones (N, k)."""
    first, parts, rows_shape = call.problems[0], len(call.problems), tuple(call.rows_shape)
    classes = first.targets.n_classes
    if isinstance(negatives, Tensor) and negatives.dim() > 0:
        if not holds_integers(negatives):
            raise TypeError(f"sampled negatives must be of an integer type, got {negatives.dtype}")
        if tuple(negatives.shape[:-1]) != rows_shape:
            raise ValueError(
                f"sampled negatives must have shape {(*rows_shape, 'k')}, got {tuple(negatives.shape)}"
            )
        k = negatives.shape[-1]
        index = _check_negatives(widened(negatives), classes, first)
        return list(index.reshape(call.rows_shape.numel() // parts, parts, k).unbind(1))
    hardest = count_of_negatives(negatives)
    return [classes if hardest is None else hardest] * parts


def count_of_negatives(negatives: object) -> int | None:
    """Return the number of hardest negatives, None for all; raise a ValueError for anything else."""
    if isinstance(negatives, str) and negatives == "all":
        return None
    try:
        count = Whole("at least 1", 1)("negatives", negatives)
    except TypeError:
        raise ValueError(
            f"negatives must be 'all', how many of the hardest, or class indices; got {negatives!r}"
        ) from None
    assert count is not None
    return count


def _check_negatives(negatives: Tensor, classes: int, problem: Problem) -> Tensor:
    """Return sampled negatives (..., k), int64; raise an IndexError that names the first outside 0..C−1."""
    if problem.in_graph or problem.selection.mask is not None:  # no data to read: torch's gather checks it
        return negatives
    good = (negatives >= 0) & (negatives < classes)
    if problem.check is None and negatives.device.type != "cpu":
        torch._assert_async(
            good.all(), f"a negative is outside 0..{classes - 1}; check_targets=True names it"
        )
    elif problem.check is not False and not good.all():
        at = tuple(good.logical_not().nonzero()[0].tolist())
        raise IndexError(f"negatives{list(at)} is {int(negatives[at])}, outside 0..{classes - 1}")
    return negatives
