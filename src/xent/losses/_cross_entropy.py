"""Cross-entropy with torch's names, defaults and shapes, of logits and straight from features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xent._arguments.options import (
    Execution,
    LogitOptions,
    Options,
    ReductionOptions,
    TargetOptions,
)
from xent._core.low_rank import LowRank
from xent._core.margin import Margin
from xent._core.target import TopKTarget
from xent.losses._loss import loss_of_head, loss_of_logits

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
    temperature: float | Tensor = 1.0,
    denominator: float | Tensor | None = None,
    check_targets: bool | None = None,
    margin: Margin | float | None = None,
    log_q: Tensor | None = None,
    group: ProcessGroup | DeviceMesh | None = None,
    data_group: ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    r"""Return the softmax cross-entropy of logits, ``a·lse(z) − ⟨t, z⟩`` a row, in nats.

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
        temperature: logits are divided by it, after the softcap: a number, or one for each row, a tensor of
            the shape of the unreduced loss. No gradient.
        denominator: replaces the divisor of ``"mean"`` (gradient accumulation).
        check_targets: None checks targets on a CPU and asserts asynchronously elsewhere; True always
            checks and names the row; False does not check, and a target outside the classes costs nan.
        margin: holds the target's own score back, after the softcap and before the temperature: a number,
            which is subtracted, or a :class:`Margin`. Class indices only.
        log_q: (C,), where the columns are a sample of the classes: the logarithm of each one's chance to be
            there, subtracted from every logit but the target's own, last of all. The sum over all classes is
            then estimated without bias; its logarithm, the loss, is not. Class indices only. No gradient.
        group: processes that share the classes (:doc:`/explanation/scaling`). Every rank passes all rows,
        and of
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
        TargetOptions(weight, ignore_index, label_smoothing, sample_weight, bucket=True),
        LogitOptions(softcap, temperature, margin, log_q),
        ReductionOptions(reduction, denominator, z_loss, data_group),
        Execution(check_targets=check_targets, group=group),
    )
    return loss_of_logits(options, input, target)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor | LowRank,
    target: Tensor | TopKTarget,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
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
    r"""Return the softmax cross-entropy of a linear head, straight from features: the logits never exist.

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
        logit_scale: logits are multiplied by it before the softcap, as some language models do.
        product_dtype: the type to which the matrix products round their factors. None means float32 for half
            types on a CPU, whose half products round their results too (a loss then errs by 1e-2 where it
            erred by 1e-6), and the type of ``input`` elsewhere. ``torch.bfloat16`` asks for speed on
            processors that have such products; everything but the factors stays float32.
        memory_budget: bytes of working memory beside inputs, gradients and O(N); by default 64 MiB on a CPU,
            whatever N and C, and on a CUDA device what :func:`xent.backends` says. For half types the float32
            accumulator of a gradient comes beside it.
        weight, ignore_index, reduction, label_smoothing, sample_weight, z_loss, softcap, temperature,
            denominator, check_targets, margin, log_q, data_group: as in :func:`cross_entropy`; ``log_q`` (S,)
            with
            ``classes``.
        group: processes that share the classes (:doc:`/explanation/scaling`). Every rank passes all rows,
            and of ``linear_weight``, ``linear_bias``, a probability target and ``weight`` its own classes, a
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
        TargetOptions(weight, ignore_index, label_smoothing, sample_weight, bucket=True),
        LogitOptions(softcap, temperature, margin, log_q, classes, sparse_grad, normalize, logit_scale),
        ReductionOptions(reduction, denominator, z_loss, data_group),
        Execution(product_dtype, memory_budget, check_targets, group),
    )
    return loss_of_head(options, input, linear_weight, linear_bias, target)
