"""Losses with torch's names, defaults and shapes.

Options become objects at the door (`options`), the sweep gives each row's ℓ and lse (`autograd`, or `opaque`
in a graph), and what is done to them here is ordinary operations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xent._arguments import class_parallel
from xent._arguments.call import Call, Options, Part
from xent._autograd import chain, custom_ops, small, transforms
from xent._core.margin import Margin
from xent._core.reduction import Reduction
from xent._core.target import TopKTarget
from xent._core.targets import Targets

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def cross_entropy(
    input: Tensor,
    target: Tensor | TopKTarget,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    denominator: float | Tensor | None = None,
    check_targets: bool | None = None,
    margin: Margin | float | None = None,
    log_q: Tensor | None = None,
    group: ProcessGroup | DeviceMesh | None = None,
    data_group: ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    r"""Softmax cross-entropy of logits, ``a·lse(z) − ⟨t, z⟩`` a row, in nats.

    A drop-in for :func:`torch.nn.functional.cross_entropy`, computed relative to each row's maximum, so that
    large logits, confident rows and masked (−inf) classes keep their digits.

    Args:
        input: logits, (C,), (N, C) or (N, C, d1, ...).
        target: class indices of any integer type, (), (N,) or (N, d1, ...); or probabilities, the shape of
            ``input``, of any sign and mass, which may require gradient; or a :class:`TopKTarget`.
        weight: (C,), a factor for each class. No gradient.
        ignore_index: rows with this target are left out. None means −100.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. The mean divides by Σ s·w[target] over rows not
            ignored (indices) or by Σ s (probabilities), and is 0 over no rows.
        label_smoothing: ε in [0, 1]; the target becomes (1 − ε)·t + ε/C.
        sample_weight: s, the shape of the unreduced loss. A row of weight 0 is left out.
        z_loss: λ; adds λ·s·lse² to each row that is not ignored.
        softcap: k; logits pass through k·tanh(z/k) first.
        temperature: logits are divided by it, after the softcap. No gradient.
        denominator: replaces the divisor of ``"mean"`` (gradient accumulation).
        check_targets: None checks targets on a CPU and asserts asynchronously elsewhere; True always
            checks and names the row; False does not check, and a target outside the classes costs nan.
        margin: holds the target's own score back, after the softcap and before the temperature: a number,
            which is subtracted, or a :class:`Margin`. Class indices only.
        log_q: (C,), where the columns are a sample of the classes: the logarithm of each one's chance to be
            there, subtracted from every logit but the target's own, last of all. The sum over all classes is
            then estimated without bias; its logarithm, the loss, is not. Class indices only. No gradient.
        group: processes that share the classes (docs/scaling.md). Every rank passes all rows, and of
            ``input``, of a probability target and of ``weight`` the columns of its own classes, a contiguous
            slice in the order of ranks, of any size; class indices are those of the whole. Every rank gets
            the same loss. A DTensor placed ``Shard(1)`` says its group.
        data_group: processes that share the rows. ``"mean"`` then divides by the average over ranks of what
            each one's rows weigh, so that the average of their losses, and of their gradients as DDP and FSDP
            take it, is the mean over all rows.

    Returns:
        A scalar, or the shape of an index target for ``"none"``, of the type of ``input`` (float32 under
        autocast).

    Raises:
        IndexError: a target outside 0..C−1, naming row and value.
        ValueError: shapes or option values that do not fit together.
        TypeError: types that do not.

    Example:
        >>> import torch, xent
        >>> round(xent.cross_entropy(torch.tensor([0.1, 0.12, 0.78]).log(), torch.tensor(2)).item(), 7)
        0.2484614
    """
    options = Options(
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        sample_weight=sample_weight,
        z_loss=z_loss,
        softcap=softcap,
        temperature=temperature,
        denominator=denominator,
        check_targets=check_targets,
        margin=margin,
        log_q=log_q,
        group=group,
        data_group=data_group,
    )
    if options.plain:
        value = small.loss(input, None, None, target, ignore_index, reduction, _by_the_sweep)
        if value is not None:
            return value
    return class_parallel.agreed(
        lambda: _loss(options.checked().of_spread_logits(input, target)), (group, data_group), input
    )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | TopKTarget,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    denominator: float | Tensor | None = None,
    check_targets: bool | None = None,
    product_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    margin: Margin | float | None = None,
    classes: Tensor | None = None,
    log_q: Tensor | None = None,
    sparse_grad: bool = False,
    normalize: bool = False,
    group: ProcessGroup | DeviceMesh | None = None,
    data_group: ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    r"""Softmax cross-entropy of a linear head, straight from features: the logits never exist.

    ``cross_entropy(input @ linear_weight.T + linear_bias, target)``, visited in tiles of rows × classes. For
    ``"mean"`` and ``"sum"`` the gradient is formed in the forward sweep (three matrix products in all where
    the budget holds 128 rows of logits, else four); ignored rows are left out before the products; a frozen
    input or weight costs nothing.

    Args:
        input: features, (..., D): any number of leading batch dimensions.
        linear_weight: (C, D); or (C, d1, ..., D), one classifier for each position d.
        target: class indices of any integer type, (..., d1, ...); or probabilities (..., C, d1, ...); or a
            :class:`TopKTarget`.
        linear_bias: (C,), or (C, d1, ...).
        product_dtype: the type to which the matrix products round their factors. None means float32 for half
            types on a CPU, whose half products round their results too (a loss then errs by 1e-2 where it
            erred by 1e-6), and the type of ``input`` elsewhere. ``torch.bfloat16`` asks for speed on
            processors that have such products; everything but the factors stays float32.
        memory_budget: bytes of working memory beside inputs, gradients and O(N); 64 MiB by default,
            whatever N and C. For half types the float32 accumulator of a gradient comes beside it.
        weight, ignore_index, reduction, label_smoothing, sample_weight, z_loss, softcap, temperature,
            denominator, check_targets, margin, log_q, data_group: as in :func:`cross_entropy`; ``log_q`` (S,)
            with ``classes``.
        group: processes that share the classes (docs/scaling.md). Every rank passes all rows, and of
            ``linear_weight``, ``linear_bias``, a probability target and ``weight`` its own classes, a
            contiguous slice in the order of ranks, of any size; class indices are those of the whole. Every
            rank gets the same loss, the gradient of ``input`` over all classes, and that of its own
            classifiers. A ``linear_weight`` that is a DTensor placed ``Shard(0)`` says its group.
        classes: (S,) different class indices: the softmax, and label smoothing, over these alone. Targets and
            ``weight`` stay global; every target must be among them (:func:`sample_classes` sees to it).
        sparse_grad: with ``classes``, the gradients of weight and bias as sparse tensors of S rows; else they
            are dense, with zeros in the others.
        normalize: scale each row of ``input`` and of ``linear_weight`` to length 1 first, in float32 or
            float64, so that their products are cosines (of which 1/``temperature`` is the scale). Rows may be
            of any finite length; a row of zeros has cosines of 0 and no gradient.

    Returns:
        A scalar, or the shape of an index target for ``"none"``, of the type of ``input`` (float32 under
        autocast, whose half type the products' factors then take).

    Raises:
        IndexError, ValueError, TypeError: as :func:`cross_entropy`.

    Example:
        >>> import torch, xent
        >>> features, classifier = torch.eye(3), torch.tensor([0.1, 0.12, 0.78]).log()[:, None].expand(3, 3)
        >>> round(xent.linear_cross_entropy(features, classifier, torch.tensor([2, 2, 2])).item(), 7)
        0.2484614
    """
    options = Options(
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        sample_weight=sample_weight,
        z_loss=z_loss,
        softcap=softcap,
        temperature=temperature,
        denominator=denominator,
        check_targets=check_targets,
        product_dtype=product_dtype,
        memory_budget=memory_budget,
        margin=margin,
        classes=classes,
        log_q=log_q,
        sparse_grad=sparse_grad,
        normalize=normalize,
        group=group,
        data_group=data_group,
    )
    if options.plain and linear_weight is not None:
        value = small.loss(input, linear_weight, linear_bias, target, ignore_index, reduction, _by_the_sweep)
        if value is not None:
            return value
    return class_parallel.agreed(
        lambda: _loss(options.checked().of_spread_head(input, linear_weight, linear_bias, target)),
        (group, data_group),
        linear_weight,
    )


def _by_the_sweep(reduction: str, x: Tensor, w: Tensor | None, b: Tensor | None, y: Tensor) -> Tensor:
    """Return a plain loss where `small` cannot: a second backward, or one to be differentiated."""
    options = Options(reduction=reduction, check_targets=False)
    return _loss(options.of_logits(x, y) if w is None else options.of_head(x, w, b, y))


def _loss(call: Call) -> Tensor:
    """One loss from parts that share its divisor."""
    parts, reduction = call.with_target().parts, call.reduction
    if reduction.kind == "none":
        return call.stack([_unreduced(part, reduction) for part in parts])
    # one part only: the gradients of several, kept until backward, would be several times the memory
    if len(parts) == 1 and _forms_early(parts[0]):
        (part,) = parts
        scale = reduction.scale([(part.problem.targets, part.row_weight)])
        return chain.reduced(part.asking(), reduction, part.row_weight, scale, part.move).to(call.dtype)
    rows = [_values(part, reduction) for part in parts]
    scale = reduction.scale(
        [(targets, part.row_weight) for (_, targets), part in zip(rows, parts, strict=True)]
    )
    first, *others = (reduction.total(values, scale) for values, _ in rows)
    return sum(others, start=first).to(call.dtype)


def _forms_early(part: Part) -> bool:
    """Return whether to form the gradient in the forward sweep: only where that is right and pays."""
    problem, s = part.problem, part.row_weight
    q = problem.targets.probabilities
    if (
        part.opaque
        or not problem.logits.gradient_in_forward
        or any(t is not None and t.requires_grad for t in (s, q))
    ):
        return False
    if problem.ranks is not None:  # whose statistics come when the last tile has been seen
        return False
    return chain.needs_gradient(problem) and not transforms.transformed(*problem.logits.tensors, q, s)


def _values(part: Part, reduction: Reduction) -> tuple[Tensor, Targets]:
    """Return what each of the M rows adds to the loss, before the divisor; and the targets that give it."""
    problem = part.asking()
    targets = problem.targets
    found = custom_ops.rows(problem, part.kept, part.check) if part.opaque else chain.rows(problem)
    nll, logsumexp, log_prob = found.loss, found.logsumexp, found.log_prob
    # select before weighing: 0·nan is not 0
    nll, logsumexp = part.selection.masked(nll), part.selection.masked(logsumexp)
    log_prob = None if log_prob is None else part.selection.masked(log_prob)
    move = part.move
    if found.mass is not None:  # of all processes' classes
        targets = targets.weighed(found.mass) if part.weighs else targets
        if move is not None and found.of_target is not None:
            rest = found.of_target - found.mass if targets.dense else None
            move = move._replace(mass=found.mass, rest=rest)
    return reduction.values(nll, logsumexp, log_prob, part.row_weight, move), targets


def _unreduced(part: Part, reduction: Reduction) -> Tensor:
    """Return the losses of all N rows of a part, zero where a row is left out."""
    values, _ = _values(part, reduction)
    return part.selection.scatter(values)
